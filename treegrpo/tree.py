"""Trajectories, and the exact token trie of one prompt's group of them. Numpy only: nothing here needs torch.

    T unique tokens of a trie (or of several side by side), L leaf-stream length (sum of leaf lengths), n sequences.

The packed row is the trie in depth-first pre-order, children in ascending token order. Three values per token say
everything: `subtree_end` (key j is visible to query i iff j <= i < subtree_end[j]), `prev` (the token before it on its
path, -1 at a root) and `position` (depth in tokens).
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled leaf: every token the model saw, which of them the policy produced, and what it earned.

    Checked when made, frozen afterwards (arrays are read-only copies): use `dataclasses.replace` for a changed one.
    Two trajectories are equal when every field is, bit for bit; an unknown log-prob (NaN) equals an unknown one.

    >>> t = Trajectory(token_ids=[7, 8, 9, 5, 6], loss_mask=[0, 0, 1, 0, 1], reward=1.0, group="task-3",
    ...                logprobs=[float("nan"), float("nan"), -0.5, float("nan"), -2.0], steps=[2, 4])
    >>> t.num_tokens, t.num_steps        # prompt 7 8, step one 9 with observation 5, step two 6
    (5, 2)

    Raises ValueError naming the field, the index and the cure.
    """

    token_ids: np.ndarray
    """int64 [n], n >= 1: the sampled ids themselves, never re-tokenised; 0 <= id < 2**31."""
    loss_mask: np.ndarray
    """bool [n]: True (1) where the policy produced the token. Never at index 0, which nothing predicts."""
    reward: float | None = None
    """Finite, or None while it is unknown (an advantage then refuses it)."""
    logprobs: np.ndarray | None = None
    """float32 [n]: log-prob of each token as recorded at sampling; NaN only where loss_mask is 0. None: not recorded.
    A float64 input is rounded once to float32, the precision engines record in."""
    group: str = ""
    """The prompt. Rewards are compared within one group."""
    tree: int = 0
    """Which of the group's M sampled trees it came from."""
    steps: np.ndarray | None = None
    """int64 [num_steps], ascending: index of the first token of each agent step. None: all of it is one step."""
    info: dict[str, Any] | None = None
    """Anything else, carried along untouched; must be plain JSON to be saved."""

    def __post_init__(self) -> None:
        if not isinstance(self.group, str):
            raise ValueError(f"Trajectory.group is {self.group!r}, not a string: pass str(...) of it")
        where = f"Trajectory of group {self.group!r}"
        put = lambda field, value: object.__setattr__(self, field, value)  # noqa: E731
        tokens = _as_array(where, "token_ids", self.token_ids, "iu")
        if not tokens.size:
            raise ValueError(f"{where}: token_ids is empty; a trajectory holds at least one token, leave this one out")
        _refuse(where, "token_ids", tokens, (tokens < 0) | (tokens >= MAX_TOKEN_ID), "give ids from 0 to 2**31 - 2")
        put("token_ids", _frozen(tokens, np.int64))

        mask = _as_array(where, "loss_mask", self.loss_mask, "biu", like=tokens)
        _refuse(where, "loss_mask", mask, (mask != 0) & (mask != 1), "give 1 where the policy produced it, else 0")
        if mask[0]:
            raise ValueError(
                f"{where}: loss_mask[0] is 1, but nothing precedes the first token, so it has no log-prob to train: "
                "set loss_mask[0] to 0, or put the prompt (or a beginning-of-sequence token) before it"
            )
        put("loss_mask", _frozen(mask, np.bool_))

        if self.reward is not None:
            if not isinstance(self.reward, (int, float, np.number)) or not math.isfinite(self.reward):
                raise ValueError(f"{where}: reward is {self.reward!r}; give a finite number, or None when unknown")
            put("reward", float(self.reward))
        if self.logprobs is not None:
            logp = _as_array(where, "logprobs", self.logprobs, "fiu", like=tokens).astype(np.float32)
            _refuse(where, "logprobs", logp, np.isinf(logp), "give a finite log-prob, or NaN where loss_mask is 0")
            unknown = np.isnan(logp)
            cure = "give a number, set its loss_mask to 0, or pass logprobs=None to have them recomputed"
            _refuse(where, "logprobs", logp, unknown & self.loss_mask, cure)
            logp[unknown] = np.nan
            put("logprobs", _frozen(logp, np.float32))
        if self.steps is not None:
            put("steps", _frozen(self._checked_steps(where), np.int64))
        if isinstance(self.tree, bool) or not isinstance(self.tree, (int, np.integer)):
            raise ValueError(f"{where}: tree is {self.tree!r}; give an integer, the number of its tree in the group")
        put("tree", int(self.tree))
        if self.info is not None and not isinstance(self.info, dict):
            raise ValueError(f"{where}: info is a {type(self.info).__name__}; give a dict or None")

    def _checked_steps(self, where: str) -> np.ndarray:
        steps = _as_array(where, "steps", self.steps, "iu")
        _refuse(
            where, "steps", steps, (steps < 0) | (steps >= self.num_tokens), f"give indices below {self.num_tokens}"
        )
        down = np.diff(steps, prepend=-1) <= 0
        _refuse(where, "steps", steps, down, "give the start of each step once, in ascending order")
        first = int(steps[0]) if steps.size else self.num_tokens
        if self.loss_mask[:first].any():
            index = int(self.loss_mask.argmax())
            raise ValueError(
                f"{where}: loss_mask[{index}] is 1, but that token comes before the first step (steps[0]): "
                "start the first step there, or pass steps=None"
            )
        return steps

    @property
    def num_tokens(self) -> int:
        return self.token_ids.size

    @property
    def num_steps(self) -> int:
        """How many advantages it takes: one per step, one in all when steps is None."""
        return 1 if self.steps is None else self.steps.size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    __hash__ = None


def _as_array(where: str, field: str, value: Any, kinds: str, like: np.ndarray | None = None) -> np.ndarray:
    try:
        array = np.array(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {field} is not a flat list of numbers ({error})") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        what = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{where}: {field} is {array.ndim}-dimensional {array.dtype}; give a flat list of {what}")
    if like is not None and array.size != like.size:
        raise ValueError(
            f"{where}: {field} has {array.size} entries for {like.size} token_ids; give one entry per token"
        )
    return array


def _refuse(where: str, field: str, array: np.ndarray, bad: np.ndarray, cure: str) -> None:
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(f"{where}: {field}[{index}] is {array[index]}; {cure}")


def _frozen(array: np.ndarray, dtype: type) -> np.ndarray:
    array = array.astype(dtype, copy=False)
    array.flags.writeable = False
    return array


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) or isinstance(left, float):
        return type(left) is type(right) and np.asarray(left).tobytes() == np.asarray(right).tobytes()
    return type(left) is type(right) and left == right


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """The exact trie of n token sequences as one packed row, and the way back to every sequence.

    [A B C D], [A B C E], [A B F] as 1 2 3 4, 1 2 3 5, 1 2 6:

    >>> trie = token_trie([np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), np.array([1, 2, 6])])
    >>> trie.tokens.tolist(), trie.subtree_end.tolist()
    ([1, 2, 3, 4, 5, 6], [6, 6, 5, 4, 5, 6])
    >>> trie.prev.tolist(), trie.position.tolist()
    ([-1, 0, 1, 2, 2, 1], [0, 1, 2, 3, 3, 2])
    >>> trie.leaf_tokens.tolist(), trie.leaf_offsets.tolist()
    ([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5], [0, 4, 8, 11])
    """

    tokens: np.ndarray
    """int64 [T]"""
    subtree_end: np.ndarray
    """int32 [T]: index just past the last token of the subtree of t's continuations."""
    prev: np.ndarray
    """int32 [T]: packed index of the token before t on its path, -1 at a root."""
    position: np.ndarray
    """int32 [T]: depth in tokens."""
    leaf_tokens: np.ndarray
    """int64 [L]: packed index of every token of every sequence, in the order given."""
    leaf_offsets: np.ndarray
    """int64 [n+1]: sequence i is leaf_tokens[leaf_offsets[i] : leaf_offsets[i+1]]."""

    @property
    def num_tokens(self) -> int:
        return self.tokens.size

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs: each token sees its ancestors and itself."""
        return int(self.position.sum(dtype=np.int64)) + self.num_tokens


def token_trie(sequences: Sequence[np.ndarray], owners: np.ndarray | None = None) -> Trie:
    """The trie of `sequences` (integer [n_i] each, n_i >= 1, 0 <= id < 2**31 - 1; unchecked, as Trajectory checks them).

    Equal prefixes merge, duplicates and prefixes of one another are legal; the packed row does not depend on the order
    of the sequences. With `owners` (int [n], >= 0), only sequences of one owner merge: the result is the tries of the
    owners side by side, in ascending order of owner.

    O(L log n) time and O(L) memory: sort as big-endian bytes, compare neighbours, and copy what is shared by pointer
    doubling; no Python per token.
    """
    num = len(sequences)
    lengths = np.fromiter(map(len, sequences), np.int64, num)
    offsets = np.zeros(num + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.concatenate(sequences) if num else np.zeros(0, np.int64)

    order = _sorted_rows(flat, offsets, owners)
    inverse = np.empty(num, np.int64)
    inverse[order] = np.arange(num)
    # From here on row r is sequence order[r], and rows lie one after another in `row_tokens`.
    row_lengths = lengths[order]
    row_starts = np.cumsum(row_lengths) - row_lengths
    total = int(offsets[-1])
    index = np.arange(total)
    row_of = np.repeat(np.arange(num), row_lengths)
    depth = index - row_starts[row_of]
    row_tokens = flat[index + (offsets[:-1][order] - row_starts)[row_of]]

    # `above` is the same depth in the row before: token f - (length of that row).
    length_before = np.zeros(num, np.int64)
    length_before[1:] = row_lengths[:-1]
    if owners is not None:
        # No row before the first of its owner: nothing merges across owners.
        length_before[1:][np.diff(np.asarray(owners)[order]) != 0] = 0
    length_before = length_before[row_of]
    above = index - length_before
    equal = (depth < length_before) & (row_tokens == row_tokens[above])
    common = np.minimum.reduceat(np.where(equal, total, depth), row_starts) if num else row_lengths
    common = np.minimum(common, row_lengths)

    is_new = depth >= common[row_of]
    packed = np.cumsum(is_new) - 1
    source = np.where(is_new, index, above)
    pending = np.flatnonzero(~is_new[source])
    while pending.size:
        source[pending] = source[source[pending]]
        pending = pending[~is_new[source[pending]]]
    row_leaf = packed[source]

    first = np.flatnonzero(is_new)
    prev = np.where(depth[first] > 0, row_leaf[first - 1], -1)
    # A token is last seen in the row whose successor has parted from it; its subtree ends with that row.
    common_after = np.zeros(num, np.int64)
    common_after[:-1] = common[1:]
    last = np.flatnonzero(depth >= common_after[row_of])
    subtree_end = np.empty(first.size, np.int32)
    subtree_end[row_leaf[last]] = packed[(row_starts + row_lengths - 1)[row_of[last]]] + 1

    back = np.repeat(row_starts[inverse] - offsets[:-1], lengths) + index
    return Trie(
        tokens=row_tokens[first].astype(np.int64),
        subtree_end=subtree_end,
        prev=prev.astype(np.int32),
        position=depth[first].astype(np.int32),
        leaf_tokens=row_leaf[back],
        leaf_offsets=offsets,
    )


def _sorted_rows(flat: np.ndarray, offsets: np.ndarray, owners: np.ndarray | None) -> np.ndarray:
    """Order [n] of the sequences by (owner, tokens), equal ones as given."""
    # Big-endian words compare like numbers, so memcmp of the bytes is the lexicographic order of the tokens.
    words = memoryview(flat.astype(">u4").tobytes())
    cuts = (4 * offsets).tolist()
    keys = [bytes(words[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    if owners is not None:
        heads = memoryview(np.asarray(owners).astype(">u4").tobytes())
        keys = [bytes(heads[4 * i : 4 * i + 4]) + key for i, key in enumerate(keys)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal run of packed tokens in which nothing forks and no trajectory ends before its last token.

    In the example of Trie: [A B] is Segment(start=0, end=2, parent=-1, children=(1, 4), leaves=(), depth=0), [D] is
    Segment(start=3, end=4, parent=1, children=(), leaves=(0,), depth=2).
    """

    start: int
    end: int
    parent: int
    """Index of the segment it continues, -1 at a root."""
    children: tuple[int, ...]
    """Indices of the segments that continue it, ascending."""
    leaves: tuple[int, ...]
    """Indices of the trajectories that end at its last token."""
    depth: int
    """Segments above it: 0 at a root."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutTree:
    """One prompt's whole group of trajectories and their trie. Its M sampled trees are told apart by Trajectory.tree.

    >>> a = Trajectory([1, 2, 3, 4], [0, 0, 1, 1], reward=1.0, group="g")
    >>> b = Trajectory([1, 2, 3, 5], [0, 0, 1, 1], reward=0.0, group="g")
    >>> tree = build_tree([a, b])
    >>> tree.num_tokens, tree.num_chain_tokens, tree.num_pairs, tree.num_chain_pairs
    (5, 8, 14, 20)
    >>> tree.to_trajectories() == [a, b]
    True
    """

    group: str
    trajectories: tuple[Trajectory, ...]
    """The leaves, in the order given."""
    trie: Trie

    @property
    def num_leaves(self) -> int:
        return len(self.trajectories)

    @property
    def num_tokens(self) -> int:
        """Unique tokens."""
        return self.trie.num_tokens

    @property
    def num_chain_tokens(self) -> int:
        """Tokens of the flattened leaves."""
        return self.trie.leaf_tokens.size

    @property
    def num_pairs(self) -> int:
        return self.trie.num_pairs

    @property
    def num_chain_pairs(self) -> int:
        """Causal pairs of the flattened leaves, n (n + 1) / 2 each."""
        lengths = np.diff(self.trie.leaf_offsets)
        return int((lengths * (lengths + 1) // 2).sum())

    def to_trajectories(self) -> list[Trajectory]:
        """Every trajectory, bit for bit and in the order given, its tokens read back from the trie."""
        trie, cuts = self.trie, self.trie.leaf_offsets.tolist()
        rows = (trie.tokens[trie.leaf_tokens[a:b]] for a, b in zip(cuts, cuts[1:], strict=False))
        return [dataclasses.replace(t, token_ids=row) for t, row in zip(self.trajectories, rows, strict=True)]

    def segments(self) -> list[Segment]:
        """The trie's segments in packed order (a parent before its children)."""
        trie, num = self.trie, self.num_tokens
        ends = trie.leaf_tokens[trie.leaf_offsets[1:] - 1]
        closes = np.bincount(trie.prev[trie.prev >= 0], minlength=num) > 1
        closes[ends] = True
        opens = trie.prev != np.arange(num) - 1
        opens[0] = True
        opens[1:] |= closes[:-1]
        starts = np.flatnonzero(opens)
        owner = np.cumsum(opens) - 1
        above = trie.prev[starts]
        parents = np.where(above >= 0, owner[above], -1).tolist()
        children: list[list[int]] = [[] for _ in parents]
        leaves: list[list[int]] = [[] for _ in parents]
        depth: list[int] = []
        for index, parent in enumerate(parents):
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                children[parent].append(index)
        for leaf, index in enumerate(owner[ends].tolist()):
            leaves[index].append(leaf)
        cuts = [*starts.tolist(), num]
        return [
            Segment(cuts[i], cuts[i + 1], parents[i], tuple(children[i]), tuple(leaves[i]), depth[i])
            for i in range(len(parents))
        ]


def build_tree(trajectories: Iterable[Trajectory]) -> RolloutTree:
    """The exact token trie of one group. Raises ValueError if there is none, or they are of several groups."""
    forest = build_forest(trajectories)
    if len(forest) > 1:
        names = ", ".join(repr(tree.group) for tree in forest[:3])
        raise ValueError(f"build_tree got trajectories of {len(forest)} groups ({names}, ...): use build_forest")
    return forest[0]


def build_forest(trajectories: Iterable[Trajectory]) -> list[RolloutTree]:
    """One RolloutTree per group, groups in order of first appearance, leaves in the order given.

    >>> rows = [Trajectory([1, 2], [0, 1], group="g"), Trajectory([1, 2], [0, 1], group="h"),
    ...         Trajectory([1, 3], [0, 1], group="g")]
    >>> [(tree.group, tree.num_leaves, tree.num_tokens) for tree in build_forest(rows)]
    [('g', 2, 3), ('h', 1, 2)]
    """
    groups: dict[str, list[Trajectory]] = {}
    for index, trajectory in enumerate(trajectories):
        if not isinstance(trajectory, Trajectory):
            raise ValueError(
                f"trajectories[{index}] is a {type(trajectory).__name__}: give treegrpo.Trajectory objects"
            )
        groups.setdefault(trajectory.group, []).append(trajectory)
    if not groups:
        raise ValueError("no trajectories, so no group to build a tree of: give at least one")
    counts = np.array([len(members) for members in groups.values()])
    rows = [t.token_ids for members in groups.values() for t in members]
    # One pass for all groups, cut apart afterwards: thousands of small groups cost no more than one large one.
    whole = token_trie(rows, np.repeat(np.arange(len(groups)), counts))
    leaf_cuts = [0, *np.cumsum(counts).tolist()]
    row_cuts = whole.leaf_offsets[leaf_cuts]
    token_cuts = [*np.minimum.reduceat(whole.leaf_tokens, row_cuts[:-1]).tolist(), whole.num_tokens]
    forest = []
    for g, (group, members) in enumerate(groups.items()):
        t0, t1, r0, r1 = token_cuts[g], token_cuts[g + 1], int(row_cuts[g]), int(row_cuts[g + 1])
        prev = whole.prev[t0:t1]
        trie = Trie(
            tokens=whole.tokens[t0:t1],
            subtree_end=whole.subtree_end[t0:t1] - np.int32(t0),
            prev=np.where(prev < 0, np.int32(-1), prev - np.int32(t0)),
            position=whole.position[t0:t1],
            leaf_tokens=whole.leaf_tokens[r0:r1] - t0,
            leaf_offsets=whole.leaf_offsets[leaf_cuts[g] : leaf_cuts[g + 1] + 1] - r0,
        )
        forest.append(RolloutTree(group, tuple(members), trie))
    return forest


FIELDS = tuple(field.name for field in dataclasses.fields(Trajectory))


def save(path: str | os.PathLike, trajectories: Iterable[Trajectory]) -> None:
    """Write one JSON object per trajectory and line; compressed, with repeatable bytes, when the name ends in `.gz`.

    A whole file or nothing: it is written under a temporary name and renamed. Unknown log-probs (NaN) become null,
    every other number is written so that `load` gives it back bit for bit.
    Raises ValueError naming the trajectory if its `info` is not plain JSON.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            stream = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
            for index, trajectory in enumerate(trajectories):
                stream.write(_to_line(index, trajectory).encode())
            if stream is not raw:
                stream.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> list[Trajectory]:
    """Read what `save` wrote, or any JSON lines with at least token_ids and loss_mask. Names that are no field of
    Trajectory are kept in `info`; blank lines are skipped.

    Raises ValueError naming the file, the line and the cure.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    trajectories = []
    number = 0
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    trajectories.append(_from_line(line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {number}: the compressed file is damaged ({error}): write it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    return trajectories


def _to_line(index: int, trajectory: Trajectory) -> str:
    t = trajectory
    record = {"group": t.group, "tree": t.tree, "reward": t.reward, "token_ids": t.token_ids.tolist()}
    record["loss_mask"] = t.loss_mask.astype(np.int8).tolist()
    if t.logprobs is not None:
        record["logprobs"] = [None if value != value else value for value in t.logprobs.tolist()]
    if t.steps is not None:
        record["steps"] = t.steps.tolist()
    if t.info is not None:
        try:
            survives = json.loads(json.dumps(t.info, allow_nan=False)) == t.info
        except (TypeError, ValueError):
            survives = False
        if not survives:
            raise ValueError(
                f"trajectory {index} (group {t.group!r}): info would not survive JSON; keep to dicts with string keys, "
                "lists, strings, finite numbers, booleans and None"
            )
        record["info"] = t.info
    return json.dumps(record, separators=(",", ":")) + "\n"


def _from_line(line: bytes) -> Trajectory:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}): mend or delete the line, or write the file again") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object: give one object per line")
    for field in ("token_ids", "loss_mask"):
        if field not in record:
            raise ValueError(f"{field} is missing: add it, or convert messages to tokens first")
    extra = {name: record.pop(name) for name in list(record) if name not in FIELDS}
    for name in extra:
        if meant := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85):
            raise ValueError(f"unknown name {name!r}: rename it to {meant[0]!r}, or move it into info")
    if extra:
        record["info"] = extra | (record.get("info") or {})
    if record.get("logprobs") is not None:
        record["logprobs"] = [math.nan if value is None else value for value in record["logprobs"]]
    return Trajectory(**record)
