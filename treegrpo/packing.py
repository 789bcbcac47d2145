"""Rollout trees -> TreeBatch: one packed row of unique tokens, and a stream of per-leaf values beside it.

T unique tokens in the packed row, L leaf-stream length (sum of leaf lengths), B batches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treegrpo.tree import RolloutTree
from treegrpo.trie import Trie, token_trie
from treegrpo_kernels.plan import TreePlan

# Evening out the batches repeats the packing this often, ...
BALANCE_TRIALS = 8
# ... so more trees than this are packed once: they are small beside the batches anyway.
REFINE_MAX_TREES = 4096
# Even batches may hold this much more in all.
BALANCE_MAX_GROWTH = 1.01


class _Expand(torch.autograd.Function):
    """x [T, ...] -> x[leaf_tokens] [L, ...]; the gradient is `_Collapse`, which sums in a fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, leaf_tokens: Tensor, leaf_order: Tensor, token_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(leaf_tokens, leaf_order, token_offsets)
        return x.index_select(0, leaf_tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Collapse.apply(grad, *ctx.saved_tensors), None, None, None


class _Collapse(torch.autograd.Function):
    """y [L, ...] -> [T, ...], the sum over the leaves of each token in stream order; the gradient is `_Expand`."""

    @staticmethod
    def forward(ctx, y: Tensor, leaf_tokens: Tensor, leaf_order: Tensor, token_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(leaf_tokens, leaf_order, token_offsets)
        # Half precision is summed in float32, and rounded once.
        wide = y.to(torch.promote_types(y.dtype, torch.float32)).index_select(0, leaf_order)
        # One segment per token, reduced in order: no atomics, so the same bits every time on a GPU too.
        return torch.segment_reduce(wide, "sum", offsets=token_offsets, axis=0, unsafe=True).to(y.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Expand.apply(grad, *ctx.saved_tensors), None, None, None


@dataclass(eq=False)
class TreeBatch:
    """Whole rollout trees as one packed row [T], and the leaves' own values as streams [L]. Made by `pack`.

    Leaves stand tree by tree in the order of `trees`, within a tree in the order of its trajectories. What trees (of
    several groups) have in common is in the row once; what belongs to a leaf is in the streams once per leaf.

    >>> from treegrpo.tree import Trajectory, build_tree
    >>> leaves = [([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 5], [0, 0, 1, 1]), ([1, 2, 6], [0, 0, 1])]
    >>> [batch] = pack([build_tree([Trajectory(ids, mask) for ids, mask in leaves])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 3, 2])
    >>> batch.subtree_end.tolist(), batch.prev.tolist()
    ([6, 6, 5, 4, 5, 6], [-1, 0, 1, 2, 2, 1])
    >>> batch.leaf_tokens.tolist(), batch.leaf_offsets.tolist()
    ([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5], [0, 4, 8, 11])
    >>> batch.expand(torch.tensor([10, 20, 30, 40, 50, 60])).tolist()
    [10, 20, 30, 40, 10, 20, 30, 50, 10, 20, 60]
    >>> batch.trained.int().tolist(), batch.multiplicity.int().tolist()
    ([0, 0, 1, 1, 1, 1], [1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1])
    >>> batch.leaf_stream([[np.array([1.0]), np.array([2.0]), np.array([-3.0])]]).tolist()
    [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, -3.0, -3.0, -3.0]
    """

    input_ids: Tensor
    """int64 [T]"""
    position_ids: Tensor
    """int64 [T]: depth in tokens."""
    subtree_end: Tensor
    """int32 [T]: key j is visible to query i iff j <= i < subtree_end[j]."""
    prev: Tensor
    """int32 [T]: packed index of the token before, whose hidden state predicts this one; -1 at a root."""
    trained: Tensor
    """bool [T]: some leaf trains it."""
    leaf_tokens: Tensor
    """int64 [L]: packed index of each token of each leaf."""
    leaf_offsets: Tensor
    """int64 [leaves+1]: leaf i is leaf_offsets[i] .. leaf_offsets[i+1] of every stream."""
    leaf_mask: Tensor
    """bool [L]: this leaf trains this token."""
    leaf_logp: Tensor
    """float32 [L]: log-prob recorded at sampling, NaN where unknown."""
    multiplicity: Tensor
    """float32 [L]: how many leaves of the same tree (group) train this token; 1 where none does. It does not depend on
    what else is in the batch."""
    leaf_order: Tensor
    """int64 [L]: stream positions sorted by packed token, equal ones in stream order."""
    token_offsets: Tensor
    """int64 [T+1]: the leaves' copies of token t are leaf_order[token_offsets[t] : token_offsets[t+1]]."""
    trees: tuple[RolloutTree, ...]
    tree_indices: tuple[int, ...]
    """Index of each tree in the list given to `pack`."""
    num_pairs: int
    """Visible (query, key) pairs of the packed row."""
    num_packed_trees: int
    """Trees in the list given to `pack`, over all batches."""
    _plan: TreePlan | None = field(default=None, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def num_tokens(self) -> int:
        """T, unique tokens."""
        return self.input_ids.numel()

    @property
    def num_leaves(self) -> int:
        return self.leaf_offsets.numel() - 1

    @property
    def num_chain_tokens(self) -> int:
        """L, tokens of the flattened leaves."""
        return self.leaf_tokens.numel()

    @property
    def num_chain_pairs(self) -> int:
        """Causal pairs of the flattened leaves."""
        return sum(tree.num_chain_pairs for tree in self.trees)

    @property
    def token_ratio(self) -> float:
        """Packing ratio: chain tokens for one packed token."""
        return self.num_chain_tokens / self.num_tokens

    @property
    def pair_ratio(self) -> float:
        """Chain pairs for one packed pair."""
        return self.num_chain_pairs / self.num_pairs

    @property
    def plan(self) -> TreePlan:
        """The attention plan on the batch's device, built at first use."""
        if self._plan is None:
            self._plan = TreePlan.build(self.subtree_end, device=self.device)
        return self._plan

    def model_inputs(self) -> dict[str, Any]:
        """Keywords for a transformers model that runs attention "treegrpo"; token tensors are [1, T]."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "attention_mask": None,
            "use_cache": False,
            "tree_plan": self.plan,
        }

    def expand(self, x: Tensor) -> Tensor:
        """Per token [T, ...] -> per leaf [L, ...]. The gradient is the exact adjoint, summed in a fixed order."""
        self._check_rows("x", x, self.num_tokens)
        return _Expand.apply(x, self.leaf_tokens, self.leaf_order, self.token_offsets)

    def collapse(self, y: Tensor) -> Tensor:
        """Per leaf [L, ...] -> per token [T, ...], summed over the leaves: the adjoint of `expand`."""
        self._check_rows("y", y, self.num_chain_tokens)
        if not y.is_floating_point():
            raise ValueError(f"y is {y.dtype}: sums are taken of floating-point values, pass y.float()")
        return _Collapse.apply(y, self.leaf_tokens, self.leaf_order, self.token_offsets)

    def _check_rows(self, name: str, values: Tensor, num_rows: int) -> None:
        if values.dim() == 0 or values.shape[0] != num_rows:
            have = (self.num_tokens, self.num_chain_tokens)
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, but this batch takes {num_rows} rows (T, L = {have}): "
                "pass the values of this batch, without a batch dimension"
            )
        if values.device != self.device:
            raise ValueError(f"{name} is on {values.device}, the batch on {self.device}: move one with .to()")

    def leaf_stream(self, advantages: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """Advantages on tokens, float32 [L]: each token gets that of the agent step it belongs to (a step lasts until
        the next one begins), tokens before the first step get 0.

        `advantages` is what `compute_advantages` returned for the whole list given to `pack`: [tree][leaf] -> float64
        [num_steps of that leaf]. Raises ValueError naming the tree where they do not fit, or are not finite.
        """
        if len(advantages) != self.num_packed_trees:
            raise ValueError(
                f"advantages are for {len(advantages)} trees, but {self.num_packed_trees} were packed: pass those of "
                "the whole list given to pack; the batch picks its own"
            )
        values: list[np.ndarray] = [np.zeros(1)]
        starts: list[np.ndarray] = []
        leaf_starts = iter(self.leaf_offsets[:-1].tolist())
        for tree, index in zip(self.trees, self.tree_indices, strict=True):
            where = f"advantages[{index}] (group {tree.group!r})"
            if len(advantages[index]) != tree.num_leaves:
                raise ValueError(f"{where} are for {len(advantages[index])} leaves, the tree has {tree.num_leaves}")
            for leaf, (trajectory, per_step) in enumerate(zip(tree.trajectories, advantages[index], strict=True)):
                per_step = np.asarray(per_step, np.float64)
                if per_step.shape != (trajectory.num_steps,):
                    raise ValueError(
                        f"{where}, leaf {leaf}: shape {per_step.shape}, but the leaf has {trajectory.num_steps} steps: "
                        "pass one advantage per step"
                    )
                if not np.isfinite(per_step).all():
                    raise ValueError(f"{where}, leaf {leaf}: {per_step} is not finite; check its rewards")
                begin = next(leaf_starts)
                steps = np.zeros(1, np.int64) if trajectory.steps is None else trajectory.steps
                if not steps.size or steps[0] > 0:
                    # What precedes the first step gets 0, as if it were a step of its own.
                    values.append(np.zeros(1))
                    starts.append(np.array([begin]))
                values.append(per_step)
                starts.append(begin + steps)
        marks = np.zeros(self.num_chain_tokens, np.int64)
        marks[np.concatenate(starts)] = 1
        stream = np.concatenate(values)[np.cumsum(marks)].astype(np.float32)
        return torch.from_numpy(stream).to(self.device)

    def to(self, device: torch.device | str) -> TreeBatch:
        """The batch on `device` (itself when it is there already); its plan is built there at first use."""
        moved = self.input_ids.to(device)
        if moved.device == self.device:
            return self
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_plan"}
        values |= {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return TreeBatch(**values)


def pack(
    trees: Sequence[RolloutTree],
    *,
    token_budget: int | None = None,
    share_across_groups: bool = True,
    device: torch.device | str = "cpu",
) -> list[TreeBatch]:
    """Pack whole trees into batches of at most `token_budget` unique tokens each (None: one batch of all).

    Trees of one batch that begin alike share those tokens, unless `share_across_groups` is False: then they stand side
    by side. Batches are few and of similar size, ordered by their first tree; within a batch trees keep their order.
    The same trees always give the same batches.

    Raises ValueError if there is no tree, or naming the tree that alone exceeds the budget.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("no trees to pack: give at least one RolloutTree (build_forest makes them)")
    for index, tree in enumerate(trees):
        if not isinstance(tree, RolloutTree):
            raise ValueError(f"trees[{index}] is a {type(tree).__name__}, not a RolloutTree: use build_forest first")
    if token_budget is None:
        members = [list(range(len(trees)))]
    else:
        if isinstance(token_budget, bool) or not isinstance(token_budget, (int, np.integer)) or token_budget < 1:
            raise ValueError(f"token_budget is {token_budget!r}: give a positive integer, or None for one batch")
        for index, tree in enumerate(trees):
            if tree.num_tokens > token_budget:
                raise ValueError(
                    f"trees[{index}] (group {tree.group!r}) has {tree.num_tokens} unique tokens, over "
                    f"token_budget={token_budget}: raise the budget to at least that, or leave out or shorten some of "
                    f"its {tree.num_leaves} trajectories"
                )
        members = _assign(trees, int(token_budget), share_across_groups)
    return [_build_batch(trees, indices, share_across_groups, device) for indices in members]


def cut_tree(tree: RolloutTree, token_budget: int) -> list[list[int]]:
    """The leaves of a tree in parts of at most `token_budget` unique tokens, which no leaf may exceed.

    Leaves 1 2 3 4, 1 2 5, 1 6 7 and a budget of 5 tokens give [[0, 1], [2]]: what parts share is in each of them.
    """
    if tree.num_tokens <= token_budget:
        return [list(range(tree.num_leaves))]
    offsets = tree.trie.leaf_offsets
    paths = [tree.trie.leaf_tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    parts: list[list[int]] = []
    used = 0
    last: np.ndarray = np.zeros(0, np.int64)
    # in depth-first order a leaf shares most with the one before it
    for leaf in sorted(range(len(paths)), key=lambda i: int(paths[i][-1])):
        path = paths[leaf]
        length = min(path.size, last.size)
        shared = int(np.cumprod(path[:length] == last[:length]).sum())
        if parts and used + path.size - shared <= token_budget:
            parts[-1].append(leaf)
            used += path.size - shared
        else:
            parts.append([leaf])
            used = path.size
        last = path
    return [sorted(part) for part in parts]


def _build_batch(trees: list[RolloutTree], indices: list[int], share: bool, device: torch.device | str) -> TreeBatch:
    chosen = tuple(trees[i] for i in indices)
    leaves = [t for tree in chosen for t in tree.trajectories]
    owners = None if share else np.repeat(np.arange(len(chosen)), [tree.num_leaves for tree in chosen])
    trie = chosen[0].trie if len(chosen) == 1 else token_trie([t.token_ids for t in leaves], owners)
    mask = np.concatenate([t.loss_mask for t in leaves])
    logp = np.concatenate(
        [np.full(t.num_tokens, np.nan, np.float32) if t.logprobs is None else t.logprobs for t in leaves]
    )
    trained = np.zeros(trie.num_tokens, np.bool_)
    trained[trie.leaf_tokens[mask]] = True
    token_offsets = np.zeros(trie.num_tokens + 1, np.int64)
    np.cumsum(np.bincount(trie.leaf_tokens, minlength=trie.num_tokens), out=token_offsets[1:])
    arrays = {
        "input_ids": trie.tokens,
        "position_ids": trie.position.astype(np.int64),
        "subtree_end": trie.subtree_end,
        "prev": trie.prev,
        "trained": trained,
        "leaf_tokens": trie.leaf_tokens,
        "leaf_offsets": trie.leaf_offsets,
        "leaf_mask": mask,
        "leaf_logp": logp,
        "multiplicity": _multiplicity([tree.trie for tree in chosen], mask),
        "leaf_order": np.argsort(trie.leaf_tokens, kind="stable"),
        "token_offsets": token_offsets,
    }
    return TreeBatch(
        **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()},
        trees=chosen,
        tree_indices=tuple(indices),
        num_pairs=trie.num_pairs,
        num_packed_trees=len(trees),
    )


def _multiplicity(tries: list[Trie], mask: np.ndarray) -> np.ndarray:
    """float32 [L]: leaves of the same tree that train the token, at least 1."""
    begins = np.cumsum([0] + [trie.num_tokens for trie in tries])
    own = np.concatenate([trie.leaf_tokens + begin for trie, begin in zip(tries, begins, strict=False)])
    counts = np.bincount(own[mask], minlength=begins[-1])
    return np.maximum(counts, 1)[own].astype(np.float32)


def _assign(trees: list[RolloutTree], budget: int, share: bool) -> list[list[int]]:
    """Tree indices of each batch: best-fit decreasing, then the smallest budget that needs no more batches."""
    sizes = [tree.num_tokens for tree in trees]
    stems = _shared_stems(trees) if share else [[] for _ in trees]
    order = sorted(range(len(trees)), key=lambda tree: -sizes[tree])
    tokens, best = _best_fit(sizes, stems, order, budget, len(trees), 0)
    num_batches = num_early = len(best)
    if num_batches in (1, len(trees)) or len(trees) > REFINE_MAX_TREES:
        return sorted(sorted(batch) for batch in best)
    # Trees that share nothing with what is packed so far may open one of those batches at once: less is packed twice.
    early_tokens, early = _best_fit(sizes, stems, order, budget, num_batches, num_early)
    if early and early_tokens < tokens:
        tokens, best = early_tokens, early
    else:
        num_early = 0
    low, high = max(sizes), budget
    for _ in range(BALANCE_TRIALS):
        middle = (low + high) // 2
        if middle >= high:
            break
        even_tokens, even = _best_fit(sizes, stems, order, middle, num_batches, num_early)
        if even and even_tokens <= BALANCE_MAX_GROWTH * tokens:
            best, high = even, middle
        else:
            low = middle + 1
    return sorted(sorted(batch) for batch in best)


def _best_fit(
    sizes: list[int],
    stems: list[list[tuple[int, int]]],
    order: list[int],
    budget: int,
    max_batches: int,
    num_early: int,
) -> tuple[int, list[list[int]]]:
    """Each tree goes where it adds least, then where most is already: (tokens of all batches, tree indices of each);
    no batches if more than `max_batches` were needed. The first `num_early` batches open for any tree that shares
    nothing with the ones before it, the others only when a tree fits nowhere.

    `stems[i]` are tree i's shared beginnings as (node, tokens down to it), shallow first. What a tree adds to a batch
    is its size less the longest of them already there: never less than the true number of new tokens.
    """
    batches: list[list[int]] = []
    fill = _Fill()
    holders: dict[int, set[int]] = {}
    for tree in order:
        room = budget - sizes[tree]
        batch, added = None, sizes[tree]
        # a batch that holds a deeper beginning and has no room for the rest has none with a shallower one
        for node, depth in reversed(stems[tree]):
            batch = fill.fullest(room + depth, holders.get(node, ()))
            if batch is not None:
                added -= depth
                break
        if batch is None and len(batches) >= num_early:
            batch = fill.fullest(room)
        if batch is None:
            if len(batches) == max_batches:
                return 0, []
            batch = len(batches)
            batches.append([])
        fill.add(batch, added)
        batches[batch].append(tree)
        for node, _ in stems[tree]:
            holders.setdefault(node, set()).add(batch)
    return sum(fill.used), batches


class _Fill:
    """How full batches are, and the fullest that has room without a look at each."""

    def __init__(self) -> None:
        self.used: list[int] = []
        self._order: list[tuple[int, int]] = []
        """(used, -batch), ascending."""

    def add(self, batch: int, tokens: int) -> None:
        """To a batch, or to a new one behind the last."""
        if batch == len(self.used):
            self.used.append(0)
        else:
            del self._order[bisect_left(self._order, (self.used[batch], -batch))]
        self.used[batch] += tokens
        insort(self._order, (self.used[batch], -batch))

    def fullest(self, most: int, among: Collection[int] | None = None) -> int | None:
        """The fullest batch (of `among`) that holds at most `most` tokens, the first of equally full ones."""
        if among is not None and len(among) ** 2 <= len(self._order):
            fits = (batch for batch in among if self.used[batch] <= most)
            return max(fits, key=lambda batch: (self.used[batch], -batch), default=None)
        for at in range(bisect_right(self._order, (most, 0)) - 1, -1, -1):
            batch = -self._order[at][1]
            if among is None or batch in among:
                return batch
        return None


def _shared_stems(trees: list[RolloutTree]) -> list[list[tuple[int, int]]]:
    """Per tree, the beginnings of its stem (its tokens before the first fork) that other stems have too, each as
    (node, number of tokens), shallow first, one per set of trees that share it."""
    stems = []
    for tree in trees:
        trie = tree.trie
        on_stem = (trie.subtree_end == trie.num_tokens) & (trie.position == np.arange(trie.num_tokens))
        # A tree that forks at its very first token still has a first token.
        stems.append(trie.tokens[: max(1, np.count_nonzero(on_stem))])
    trie = token_trie(stems)
    count = np.bincount(trie.leaf_tokens, minlength=trie.num_tokens)[trie.leaf_tokens]
    last = np.ones(count.size, np.bool_)
    last[:-1] = count[1:] != count[:-1]
    last[trie.leaf_offsets[1:] - 1] = True
    ends = np.flatnonzero(last & (count > 1))
    owner = np.searchsorted(trie.leaf_offsets, ends, side="right") - 1
    shared: list[list[tuple[int, int]]] = [[] for _ in trees]
    depths = ends - trie.leaf_offsets[owner] + 1
    for tree, node, depth in zip(owner.tolist(), trie.leaf_tokens[ends].tolist(), depths.tolist(), strict=True):
        shared[tree].append((node, depth))
    return shared
