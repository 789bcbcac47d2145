"""Honest FLOPs: what training on flattened chains costs, and on the packed tree, from a model's config.

Letters: h hidden size, V vocabulary, Hq query heads, Dk and Dv head dims of keys and values, W window, K taps of a
short convolution; Hv heads of a layer with states, each a state S of Dk x Dv (Mamba-2: state size x head dim). One
definition (DEFINITION below) is printed with every number; matmuls only, as every MFU convention does. The baseline is
the best chain: padding-free, LM head on trained tokens only. So the ratio contains no padding gains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treegrpo.model_shape import ModelShape as ModelShape
from treegrpo.model_shape import model_shape as model_shape

if TYPE_CHECKING:
    from treegrpo.packing import TreeBatch
    from treegrpo.tree import RolloutTree

DEFINITION = """\
forward FLOPs = linear + recurrent + attention + head
training = 3 x forward (model FLOPs: no recompute, no masked tile elements)
  linear     2 x matmul parameters per forwarded token, all layers; no embedding, no norms; MoE: router, active experts;
             the K weights a short convolution has for each channel are parameters too
  recurrent  per forwarded token, however a kernel chunks it: 6 x Dk x Dv x Hv a layer with a delta rule (reading S k,
             adding k v^T, reading S q), 4 x Dk x Dv x Hv one with a Mamba-2 scan (adding B x^T, reading S C); the decay
             of S is no product
  attention  2 x (Dk + Dv) x Hq per visible (query, key) pair and attention layer (latent attention: keys and values as
             expanded), pairs exact: chain sum n(n+1)/2, tree sum of depth+1; in a sliding layer of window W a query
             sees at most W tokens of its path, itself included
  head       2 x h x V per projected row; a row is a trained token (of every leaf: chain, or unique: tree)
chain = every leaf on its own, padding-free, head on trained tokens only"""


@dataclass(frozen=True)
class Cost:
    """Forward cost of one way to lay the rollouts out. `pairs` are visible pairs under full attention."""

    tokens: int
    pairs: int
    head_rows: int
    linear: int
    attention: int
    head: int
    recurrent: int = 0

    @property
    def forward(self) -> int:
        return self.linear + self.recurrent + self.attention + self.head

    @property
    def training(self) -> int:
        return 3 * self.forward


@dataclass(frozen=True)
class ChainVsTree:
    """What `report` returns: both costs, their ratios (chain over tree), and the definition they follow."""

    model: str
    num_trees: int
    num_leaves: int
    share_across_groups: bool
    """Whether tokens that several groups begin with were counted once (all groups packed into one batch)."""
    chain: Cost
    tree: Cost
    definition: str = DEFINITION

    @property
    def token_ratio(self) -> float:
        return self.chain.tokens / self.tree.tokens

    @property
    def pair_ratio(self) -> float:
        return self.chain.pairs / self.tree.pairs

    @property
    def flop_ratio(self) -> float:
        return self.chain.forward / self.tree.forward

    def _rows(self) -> list[tuple[str, int, int]]:
        recurrent = ("recurrent",) if self.chain.recurrent else ()
        names = ("tokens", "pairs", "head_rows", "linear", *recurrent, "attention", "head", "forward", "training")
        return [(name, getattr(self.chain, name), getattr(self.tree, name)) for name in names]

    def table(self) -> str:
        """Plain text: one line per part, chain, tree, chain / tree; then the definition."""
        shared = "shared across groups" if self.share_across_groups else "each group on its own"
        lines = [
            f"{self.model}: {self.num_trees} groups, {self.num_leaves} leaves, {shared}",
            f"{'':<18}{'chain':>14}{'tree':>14}{'chain / tree':>14}",
        ]
        for name, chain, tree in self._rows():
            is_flops = name not in ("tokens", "pairs", "head_rows")
            label = f"{name} FLOPs" if is_flops else name.replace("_", " ")
            ratio = f"{chain / tree:.2f}x" if tree else "-"
            lines.append(f"{label:<18}{_number(chain, is_flops):>14}{_number(tree, is_flops):>14}{ratio:>14}")
        return "\n".join([*lines, "", self.definition])

    def to_dict(self) -> dict[str, Any]:
        """Every field, the totals `forward` and `training` of both costs, and the three ratios, as plain values."""

        def cost(side: Cost) -> dict[str, int]:
            return asdict(side) | {"forward": side.forward, "training": side.training}

        ratios = {"token_ratio": self.token_ratio, "pair_ratio": self.pair_ratio, "flop_ratio": self.flop_ratio}
        return asdict(self) | {"chain": cost(self.chain), "tree": cost(self.tree)} | ratios

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _number(value: int, is_flops: bool) -> str:
    if not is_flops:
        return f"{value:,}"
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return str(value)


def _chain_pairs(lengths: np.ndarray, window: int) -> int:
    """Causal pairs of chains: n (n + 1) / 2, or with a window the sum of min(depth + 1, window)."""
    lengths = lengths.astype(np.int64)
    ramp = np.minimum(lengths, window) if window else lengths
    return int((ramp * (ramp + 1) // 2 + (lengths - ramp) * window).sum())


def _tree_pairs(positions: Sequence[np.ndarray], window: int) -> int:
    visible = (position.astype(np.int64) + 1 for position in positions)
    return sum(int((np.minimum(seen, window) if window else seen).sum()) for seen in visible)


def _cost(shape: ModelShape, tokens: int, head_rows: int, pairs_of: dict[int, int]) -> Cost:
    return Cost(
        tokens=tokens,
        pairs=pairs_of[0],
        head_rows=head_rows,
        linear=2 * shape.linear_parameters * tokens,
        attention=sum(
            2 * width * pairs_of[window] for width, window in zip(shape.pair_widths, shape.windows, strict=True)
        ),
        head=2 * shape.head_parameters * head_rows,
        recurrent=2 * shape.state_products * tokens,
    )


def _unique_trained(tree: RolloutTree) -> int:
    trained = np.zeros(tree.num_tokens, bool)
    mask = np.concatenate([trajectory.loss_mask for trajectory in tree.trajectories])
    trained[tree.trie.leaf_tokens[mask.astype(bool)]] = True
    return int(trained.sum())


def report(config: Any, trees: Sequence[RolloutTree], *, share_across_groups: bool = False) -> ChainVsTree:
    """Tokens, pairs and forward FLOPs of `trees`, as flattened chains and as packed trees.

    Args:
        config: any transformers decoder config: the object, a dict, or the path of a config.json.
        trees: RolloutTrees, one per prompt.
        share_across_groups: False counts every group's tree on its own. True counts tokens that several groups begin
            with (a common system prompt) once, by packing all of `trees` into one batch; with a token budget, where
            they are spread over batches, the truth lies between the two.

    Raises:
        ValueError: no trees; a config that cannot be read, or whose family is not known.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("trees is empty: there is nothing to count")
    shape = model_shape(config)
    if share_across_groups:
        from treegrpo.packing import pack

        (batch,) = pack(trees, share_across_groups=True)
        return _compare(shape, trees, [batch.position_ids.numpy()], int(batch.trained.sum()), True)
    return _compare(shape, trees, [tree.trie.position for tree in trees], sum(map(_unique_trained, trees)), False)


def report_batch(config: Any, batch: TreeBatch, lengths: np.ndarray | None = None) -> ChainVsTree:
    """What `report` says of a packed row as it is: what its groups begin with counts once where it stands there once.

    The chains are its leaves, or samples of `lengths` (int [n]) that train each of the leaves' trained tokens once.

    Raises ValueError for a config that cannot be read, or whose family is not known.
    """
    shared = batch.num_tokens < sum(tree.num_tokens for tree in batch.trees)
    positions, tree_rows = batch.position_ids.cpu().numpy(), int(batch.trained.sum())
    return _compare(model_shape(config), batch.trees, [positions], tree_rows, shared, lengths)


def _compare(
    shape: ModelShape,
    trees: Sequence[RolloutTree],
    positions: Sequence[np.ndarray],
    tree_rows: int,
    shared: bool,
    lengths: np.ndarray | None = None,
) -> ChainVsTree:
    windows = {0, *shape.windows}
    if lengths is None:
        lengths = np.array([trajectory.num_tokens for tree in trees for trajectory in tree.trajectories])
    chain_rows = sum(int(np.count_nonzero(t.loss_mask)) for tree in trees for t in tree.trajectories)
    chain_pairs = {window: _chain_pairs(lengths, window) for window in windows}
    tree_pairs = {window: _tree_pairs(positions, window) for window in windows}
    return ChainVsTree(
        model=shape.name,
        num_trees=len(trees),
        num_leaves=len(lengths),
        share_across_groups=shared,
        chain=_cost(shape, int(lengths.sum()), chain_rows, chain_pairs),
        tree=_cost(shape, sum(position.size for position in positions), tree_rows, tree_pairs),
    )
