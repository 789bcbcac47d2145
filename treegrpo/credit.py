"""Credit on the tree of agent steps: which leaves pass through a step, what a step is worth, who it is compared with.

A node is a step of a leaf, named by every token up to the step's end; leaves with the same tokens up to there share it.
Its prefix is looked up in the group's token trie, so this is exact and costs no pass over the tokens. Roots hold what
precedes the first step: one root for each prompt (`root="prompt"`: equal prefixes of several sampled trees are one
node), or one for each sampled tree (`root="tree"`). Example root -> {s1, d}, s1 -> {s2, c}, s2 -> {a, b}, R = a 1, b 0,
c 0, d 1:

    node values V          root    s1     s2       A = V - V(parent)    s1      s2      a     b      c      d
    leaf_mean              .5      .333   .5                           -.167    .167    .5   -.5    -.333   .5
    child_mean             .625    .25    .5                           -.375    .25     .5   -.5    -.25    .375

Equal whole trajectories end at one node: its value is the mean of their rewards. A trajectory that is a prefix of
another ends at an inner node: there it counts as one more child.

E entries (leaf, step) in the order of leaves and steps, F leaves, N nodes, all over every tree of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from treegrpo.tree import RolloutTree

LEAF_BASELINES = ("tree", "prompt", "tree+prompt")
NODE_BASELINES = ("parent", "root", "parent+root", "siblings", "all_ancestors_mean")
BASELINES = LEAF_BASELINES + NODE_BASELINES
VALUES = ("leaf", "leaf_mean", "child_mean", "entropy_softmax")
NORMS = ("none", "std", "std_population", "std_batch", "std_siblings", "rloo", "whiten")
MULTIPLICITIES = ("row", "mean", "sqrt", "once")
ROOTS = ("prompt", "tree")
ANCESTORS = ("mean", "size")


@dataclass(frozen=True, eq=False)
class StepNodes:
    """The step nodes of all trees of a call; nodes 0 .. num_roots - 1 are the roots, a parent precedes its children."""

    entry_leaf: np.ndarray
    """int64 [E]"""
    entry_node: np.ndarray
    """int64 [E]: the node at the end of the step."""
    entry_parent: np.ndarray
    """int64 [E]: the node at its beginning."""
    leaf_root: np.ndarray
    """int64 [F]"""
    leaf_end: np.ndarray
    """int64 [F]: the node of the last step; the root for a leaf without steps."""
    parent: np.ndarray
    """int64 [N], -1 at a root."""
    depth: np.ndarray
    """int64 [N]: steps from the root."""
    num_leaves: np.ndarray
    """int64 [N]: leaves through the node, those that end there included."""
    num_roots: int

    @property
    def num_nodes(self) -> int:
        return self.parent.size


def step_starts(trajectory) -> np.ndarray:
    """Index of the first token of each step, int64 [num_steps]; a leaf without recorded steps is one step."""
    return np.zeros(1, np.int64) if trajectory.steps is None else np.asarray(trajectory.steps, np.int64)


def step_nodes(trees: Sequence[RolloutTree], root: str = "prompt") -> StepNodes:
    """The nodes of `trees`, which need `.trie`, `.group` and `.trajectories` with `.steps` and `.tree`.

    Raises ValueError naming group and leaf where one node has two parents: the same tokens were cut into other steps.
    """
    per_leaf = [step_starts(t) for tree in trees for t in tree.trajectories]
    counts = np.fromiter(map(len, per_leaf), np.int64, len(per_leaf))
    starts = np.concatenate(per_leaf) if per_leaf else np.zeros(0, np.int64)
    num_entries, num_leaves = starts.size, counts.size
    entry_leaf = np.repeat(np.arange(num_leaves), counts)
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(tree.trie.leaf_offsets) for tree in trees)])
    last = np.cumsum(counts)
    is_last = np.zeros(num_entries, np.bool_)
    is_last[last[counts > 0] - 1] = True
    ends = np.where(is_last, lengths[entry_leaf], np.append(starts[1:], 0)[:num_entries])

    tree_leaves = np.array([tree.num_leaves for tree in trees], np.int64)
    tree_of_leaf = np.repeat(np.arange(len(trees)), tree_leaves)
    token = np.empty(num_entries, np.int64)
    num_tokens = leaf0 = entry0 = 0
    for tree in trees:
        leaf1 = leaf0 + tree.num_leaves
        entry1 = int(last[leaf1 - 1])
        begins = tree.trie.leaf_offsets[:-1][entry_leaf[entry0:entry1] - leaf0]
        token[entry0:entry1] = tree.trie.leaf_tokens[begins + ends[entry0:entry1] - 1] + num_tokens
        num_tokens += tree.num_tokens
        leaf0, entry0 = leaf1, entry1

    leaf_root, num_roots = tree_of_leaf, len(trees)
    if root == "tree":
        sampled = np.array([t.tree for tree in trees for t in tree.trajectories], np.int64)
        pairs = np.stack([tree_of_leaf, sampled], 1)
        unique, leaf_root = np.unique(pairs, axis=0, return_inverse=True)
        leaf_root, num_roots = leaf_root.reshape(-1), len(unique)

    # The trie counts tokens in preorder, so sorted keys put a parent before its children.
    unique, inverse = np.unique(leaf_root[entry_leaf] * num_tokens + token, return_inverse=True)
    entry_node = inverse.reshape(-1) + num_roots
    is_first = np.append(True, is_last[:-1])[:num_entries]
    entry_parent = np.where(is_first, leaf_root[entry_leaf], np.append(0, entry_node[:-1])[:num_entries])
    parent = np.full(num_roots + unique.size, -1)
    parent[entry_node] = entry_parent
    torn = np.flatnonzero(parent[entry_node] != entry_parent)
    if torn.size:
        leaf = int(entry_leaf[torn[0]])
        index = int(tree_of_leaf[leaf])
        step = int(torn[0] - (last[leaf] - counts[leaf]))
        raise ValueError(
            f"trees[{index}] (group {trees[index].group!r}), leaf {leaf - int(tree_leaves[:index].sum())}: step {step} "
            "ends where a step of another leaf with the same tokens ends, but began elsewhere: cut equal tokens into "
            "equal steps (Trajectory.steps), or use a baseline over whole leaves"
        )
    depth = np.zeros(parent.size, np.int64)
    depth[entry_node] = np.arange(num_entries) - (last - counts)[entry_leaf] + 1
    leaf_end = leaf_root.copy()
    leaf_end[entry_leaf[is_last]] = entry_node[is_last]
    through = np.bincount(entry_node, minlength=parent.size) + np.bincount(leaf_root, minlength=parent.size)
    return StepNodes(entry_leaf, entry_node, entry_parent, leaf_root, leaf_end, parent, depth, through, num_roots)


def node_values(nodes: StepNodes, leaf_values: np.ndarray, value: str, entropy: np.ndarray | None = None) -> np.ndarray:
    """Values of the nodes, float64 [N], backed up from those of the leaves, float64 [F].

    value: "leaf_mean" the mean over the leaves below (each counts the same); "child_mean" the mean over the children
    (each branch counts the same); "entropy_softmax" the mean over the children weighted by softmax of their `entropy`
    [N], at temperature 1 (AT2PO). A leaf that ends at an inner node is one more child, of the others' mean entropy.
    """
    num = nodes.num_nodes
    if value == "leaf_mean":
        above_roots = np.bincount(nodes.entry_node, leaf_values[nodes.entry_leaf], num)
        return (above_roots + np.bincount(nodes.leaf_root, leaf_values, num)) / nodes.num_leaves
    ends_here = np.bincount(nodes.leaf_end, minlength=num)
    child_weight: np.ndarray = np.ones(num)
    own_weight: np.ndarray = np.ones(num)
    if value == "entropy_softmax":
        assert entropy is not None
        inner = np.arange(nodes.num_roots, num)
        above = nodes.parent[inner]
        children = np.bincount(above, minlength=num)
        highest = np.zeros(num)
        np.maximum.at(highest, above, entropy[inner])
        child_weight[inner] = np.exp(entropy[inner] - highest[above])
        mean = np.bincount(above, entropy[inner], num) / np.maximum(children, 1)
        own_weight = np.where(children > 0, np.exp(mean - highest), 1.0)
    total = own_weight * np.bincount(nodes.leaf_end, leaf_values, num)
    weight = own_weight * ends_here
    by_depth = np.argsort(nodes.depth, kind="stable")
    cuts = np.searchsorted(nodes.depth[by_depth], np.arange(1, nodes.depth.max(initial=0) + 2))
    for begin, end in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
        level = by_depth[begin:end]
        above = nodes.parent[level]
        np.add.at(total, above, child_weight[level] * (total[level] / weight[level]))
        np.add.at(weight, above, child_weight[level])
    return total / weight


def step_entropies(trees: Sequence[RolloutTree], nodes: StepNodes) -> np.ndarray:
    """Mean -logp of the trained tokens of each node's step in nats, float64 [N], as recorded at sampling; 0 at roots
    and for a step without trained tokens. Leaves that recorded the shared step differently count their mean.

    Raises ValueError naming group and leaf where log-probs were not recorded.
    """
    for index, tree in enumerate(trees):
        for leaf, trajectory in enumerate(tree.trajectories):
            if trajectory.logprobs is None:
                raise ValueError(
                    f"logprobs is missing at trees[{index}] (group {tree.group!r}), leaf {leaf}: value "
                    "'entropy_softmax' weighs steps by it; record log-probs when sampling, or use value 'child_mean'"
                )
    nll = _step_sums(trees, lambda t: np.where(t.loss_mask, -t.logprobs.astype(np.float64), 0.0))
    per_entry = nll / np.maximum(trained_tokens(trees), 1)
    entropy = np.bincount(nodes.entry_node, per_entry, nodes.num_nodes)
    return entropy / np.maximum(np.bincount(nodes.entry_node, minlength=nodes.num_nodes), 1)


def trained_tokens(trees: Sequence[RolloutTree]) -> np.ndarray:
    """Trained tokens of every step of every leaf, float64 [E]."""
    return _step_sums(trees, lambda t: t.loss_mask.astype(np.float64))


def _step_sums(trees: Sequence[RolloutTree], per_token) -> np.ndarray:
    """Sums over the steps [E] of per-token values that vanish before the first step of a leaf."""
    sums: list[np.ndarray] = [np.zeros(0)]
    for tree in trees:
        leaves = [t for t in tree.trajectories if step_starts(t).size]
        if leaves:
            lengths = np.array([t.num_tokens for t in leaves])
            begins = np.cumsum(lengths) - lengths
            cuts = np.concatenate([step_starts(t) + begin for t, begin in zip(leaves, begins, strict=True)])
            sums.append(np.add.reduceat(np.concatenate([per_token(t) for t in leaves]), cuts))
    return np.concatenate(sums)


def compare(nodes: StepNodes, leaf_values: np.ndarray, values: np.ndarray, baseline: str) -> np.ndarray:
    """Credits float64 [E]: each node's value minus its baseline.

    "parent" V - V(parent); "root" V - V(root); "parent+root" their sum; "siblings" V minus the mean over the parent's
    children, itself included; any leaf baseline: V itself.
    """
    own = values[nodes.entry_node]
    above = values[nodes.entry_parent]
    root = values[nodes.leaf_root[nodes.entry_leaf]]
    if baseline == "parent":
        return own - above
    if baseline == "root":
        return own - root
    if baseline == "parent+root":
        return (own - above) + (own - root)
    if baseline == "siblings":
        return own - sibling_moments(nodes, leaf_values, values)[0][nodes.entry_parent]
    return own


def sibling_moments(nodes: StepNodes, leaf_values: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population std [N], [N] of the values of each node's children and of the leaves that end there."""
    num, inner = nodes.num_nodes, np.arange(nodes.num_roots, nodes.num_nodes)
    above = nodes.parent[inner]
    count = np.maximum(np.bincount(above, minlength=num) + np.bincount(nodes.leaf_end, minlength=num), 1)
    mean = (np.bincount(above, values[inner], num) + np.bincount(nodes.leaf_end, leaf_values, num)) / count
    squares = np.bincount(above, (values[inner] - mean[above]) ** 2, num)
    squares = squares + np.bincount(nodes.leaf_end, (leaf_values - mean[nodes.leaf_end]) ** 2, num)
    return mean, np.sqrt(squares / count)


def all_ancestors_mean(
    nodes: StepNodes, leaf_values: np.ndarray, values: np.ndarray, ancestors: str = "mean", raw_single: bool = False
) -> np.ndarray:
    """Per leaf, float64 [F]: the mean of R - V(node) over the nodes of its path that two or more leaves share, and the
    root (TreePO, arXiv 2508.17445). ancestors: "mean" weighs them equally, "size" by their leaves. A root with a single
    leaf gives 0, or its R with `raw_single`."""
    shared = nodes.num_leaves > 1
    shared[: nodes.num_roots] = True
    weight = np.where(shared, nodes.num_leaves if ancestors == "size" else 1, 0).astype(np.float64)
    if raw_single:
        alone = np.flatnonzero(nodes.num_leaves[: nodes.num_roots] == 1)
        values = values.copy()
        values[alone] = 0.0
    num_leaves = leaf_values.size
    of_entry = weight[nodes.entry_node] * (leaf_values[nodes.entry_leaf] - values[nodes.entry_node])
    # not in place: numpy counts nothing, as where no leaf has a step, in integers
    total = np.bincount(nodes.entry_leaf, of_entry, num_leaves)
    total = total + weight[nodes.leaf_root] * (leaf_values - values[nodes.leaf_root])
    return total / (np.bincount(nodes.entry_leaf, weight[nodes.entry_node], num_leaves) + weight[nodes.leaf_root])


def share(nodes: StepNodes, credits: np.ndarray, multiplicity: str) -> np.ndarray:
    """What each of the c leaves through a step carries of it, float64 [E], from the credits x float64 [E].

    "row" x; "mean" the mean of x over the c leaves (hard ARPO); "sqrt" x / sqrt(c) (TreeRL); "once" x / c, so that the
    leaves' shares sum to the mean of x (lambda-GRPO).
    """
    if multiplicity == "row":
        return credits
    count = np.bincount(nodes.entry_node, minlength=nodes.num_nodes)[nodes.entry_node]
    if multiplicity == "mean":
        return np.bincount(nodes.entry_node, credits, nodes.num_nodes)[nodes.entry_node] / count
    return credits / (np.sqrt(count) if multiplicity == "sqrt" else count)


def whiten(credits: np.ndarray, weights: np.ndarray, eps: float, noise: float) -> np.ndarray:
    """(x - mean) / (std + eps) over all entries [E], each counted as often as `weights` [E] says (trained tokens); std
    with n - 1. Zeros where nothing is trained or std <= `noise`."""
    num = weights.sum()
    seen = credits[weights > 0]
    if num < 2 or seen.min() == seen.max():
        return np.zeros_like(credits)
    centred = credits - (weights * credits).sum() / num
    std = float(np.sqrt((weights * centred**2).sum() / (num - 1)))
    return np.zeros_like(credits) if std <= noise else centred / (std + eps)
