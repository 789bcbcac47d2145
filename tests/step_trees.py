"""Small trees of agent steps, their nodes and values by definition; shared by the tests of credit."""

import numpy as np

from treegrpo import Trajectory, build_tree, compute_advantages
from treegrpo.advantages import ESTIMATORS

PROMPT = [1, 2]
BACKUPS = ("leaf_mean", "child_mean", "entropy_softmax")
# Rows of the option grid beside the named estimators, so that every option is met by the property tests.
COMBINATIONS = [
    ("grid", dict(baseline="parent", value="entropy_softmax", norm="std_siblings", root="tree")),
    ("grid", dict(baseline="siblings", value="leaf_mean", norm="rloo", multiplicity="sqrt")),
    ("grid", dict(baseline="parent+root", value="child_mean", norm="std_batch", multiplicity="mean")),
    ("grid", dict(baseline="root", norm="std", root="tree", multiplicity="once")),
    ("grid", dict(baseline="all_ancestors_mean", value="child_mean", ancestors="size")),
    ("grid", dict(baseline="tree+prompt", norm="whiten", multiplicity="mean")),
    ("at2po", dict(baseline="parent+root")),
]
EVERY = [(name, {}) for name in ESTIMATORS] + COMBINATIONS


def leaf(reward, *steps, tree=0, nll=None, group="q"):
    """A trajectory of the prompt and the token lists of its steps; `nll` is -logp of the tokens, one number a step."""
    ids, starts = list(PROMPT), []
    for tokens in steps:
        starts.append(len(ids))
        ids += tokens
    nll = [0.5] * len(steps) if nll is None else nll
    logp = [np.nan] * 2 + [-value for tokens, value in zip(steps, nll, strict=True) for _ in tokens]
    mask = [0, 0] + [1] * (len(ids) - 2)
    return Trajectory(ids, mask, reward=reward, logprobs=logp, tree=tree, steps=starts, group=group)


def example():
    """root -> {s1, d}, s1 -> {s2, c}, s2 -> {a, b}; s1 has two tokens, all others one."""
    return build_tree(
        [
            leaf(1, [10, 11], [20], [30]),
            leaf(0, [10, 11], [20], [31]),
            leaf(0, [10, 11], [32]),
            leaf(1, [33]),
        ]
    )


def credits(tree, estimator, **options):
    (leaves,) = compute_advantages([tree], estimator, **options)
    return leaves


def random_tree(seed, num_trees=3, depth=4, reward=None, unique=False):
    """A group of random step trees: they fork, repeat leaves, and leaves are prefixes of others unless `unique`."""
    rng = np.random.default_rng(seed)
    rows = []
    for tree in range(num_trees):
        for _ in range(rng.integers(1, 6)):
            steps = [[int(rng.integers(3, 5)), 9] for _ in range(rng.integers(1, depth + 1))]
            if unique:
                steps.append([100 + len(rows)])
            nll = [0.25 * (tokens[0] % 4) for tokens in steps]
            rows.append(leaf(rng.normal() if reward is None else reward, *steps, tree=tree, nll=nll))
    return build_tree(rows)


def paths(tree, root="prompt"):
    """Nodes from the root down, for each leaf: (root, tokens up to the end of the step)."""
    found = []
    for t in tree.trajectories:
        top = t.tree if root == "tree" else 0
        ends = [*t.steps.tolist()[1:], t.num_tokens]
        found.append([(top, ())] + [(top, tuple(t.token_ids[:end].tolist())) for end in ends])
    return found


def value_by_definition(tree, node, value, root="prompt"):
    """V of a node, recursively."""
    below = [(path, t) for path, t in zip(paths(tree, root), tree.trajectories, strict=True) if node in path]
    if value == "leaf_mean":
        return np.mean([t.reward for _, t in below])
    ended = [t.reward for path, t in below if path[-1] == node]
    children = sorted({path[path.index(node) + 1] for path, _ in below if path[-1] != node})
    values = [value_by_definition(tree, child, value, root) for child in children]
    if value == "child_mean" or not children:
        return np.mean(values + ended)
    entropies = [0.25 * (child[1][-2] % 4) if child[1][-1] == 9 else 0.25 * (child[1][-1] % 4) for child in children]
    weights = np.exp(entropies + [np.mean(entropies)] * len(ended))
    return np.average(values + ended, weights=weights)
