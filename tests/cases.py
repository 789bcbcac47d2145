"""Named forests, random forests and the brute-force definitions tests and benches share. Every named forest forks."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np

# token lists of each forest's leaves; leaves of different trees differ in their first token
NAMED: dict[str, list[list[int]]] = {
    "worked_example": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]],
    "fork_at_first_token": [[1, 2, 3], [4, 5, 6], [7]],
    "fork_at_last_token": [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 7]],
    "prefixes_of_one_another": [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 9]],
    "duplicates": [[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 4]],
    "binary_depth_4": [[1, 2 + (i >> 3 & 1), 4 + (i >> 2 & 1), 6 + (i >> 1 & 1), 8 + (i & 1)] for i in range(16)],
    "star_64": [[1, 2, 3, 10 + i, 11 + i] for i in range(64)],
    "comb_depth_50": [[1] * d + [2, 3] for d in range(1, 51)],
    "two_trees": [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8], [6, 7, 9, 10, 11], [6, 12]],
    "ragged_turns": [
        [1] * 13 + [2] * 7 + [3] * 5,
        [1] * 13 + [2] * 7 + [4] * 9,
        [1] * 13 + [5] * 17,
        [1] * 13 + [5] * 3 + [6] * 8,
    ],
}


def trie_subtree_end(leaves: list[list[int]]) -> np.ndarray:
    """subtree_end int32 [T] of the leaves' trie by plain recursion over token lists: the slow, obvious way."""
    end: list[int] = []

    def lay(suffixes: list[list[int]]) -> None:
        heads: dict[int, list[list[int]]] = {}
        for suffix in suffixes:
            if suffix:
                heads.setdefault(suffix[0], []).append(suffix[1:])
        for head in sorted(heads):
            mine = len(end)
            end.append(-1)
            lay(heads[head])
            end[mine] = len(end)

    lay(leaves)
    return np.array(end, dtype=np.int32)


def named_subtree_end(name: str) -> np.ndarray:
    return trie_subtree_end(NAMED[name])


def random_parents(num_tokens: int, seed: int, branch: float = 0.2, root: float = 0.02) -> np.ndarray:
    """Parents in depth-first order: each token continues the last one, or (``branch``) forks from a random
    ancestor-or-self of it, or (``root``) starts a new tree."""
    rng = np.random.default_rng(seed)
    parents = np.full(num_tokens, -1, dtype=np.int64)
    path: list[int] = []
    for t in range(num_tokens):
        draw = rng.random()
        if path and draw < root:
            path = []
        elif path and draw < root + branch:
            path = path[: int(rng.integers(1, len(path) + 1))]
        parents[t] = path[-1] if path else -1
        path.append(t)
    return parents


def subtree_end_of(parents: np.ndarray) -> np.ndarray:
    """subtree_end int32 [T] from a parent array in depth-first order."""
    end = np.arange(1, len(parents) + 1, dtype=np.int32)
    for t in range(len(parents) - 1, -1, -1):
        if parents[t] >= 0:
            end[parents[t]] = max(end[parents[t]], end[t])
    return end


def random_subtree_end(num_tokens: int, seed: int, branch: float = 0.2, root: float = 0.02) -> np.ndarray:
    """A random forest in depth-first order, int32 [T]."""
    return subtree_end_of(random_parents(num_tokens, seed, branch, root))


def residue_subtree_end(residue: int, block: int) -> np.ndarray:
    """A prompt, a first branch, then a second branch that begins at ``residue`` modulo ``block`` and is longer than two
    tiles, so that a whole query tile sees only the keys from that column on."""
    prompt = max(1, block // 2)
    first = (residue - prompt) % block or block
    second = 2 * block + block // 3
    total = prompt + first + second
    end = np.empty(total, dtype=np.int32)
    end[:prompt] = total
    end[prompt : prompt + first] = prompt + first
    end[prompt + first :] = total
    return end


def ancestor_mask(subtree_end: np.ndarray) -> np.ndarray:
    """bool [T, T] by walking each token's path to its root: the meaning of the mask, not its formula."""
    num_tokens = len(subtree_end)
    mask = np.zeros((num_tokens, num_tokens), dtype=bool)
    path: list[int] = []
    for t in range(num_tokens):
        while path and subtree_end[path[-1]] <= t:
            path.pop()
        path.append(t)
        mask[t, path] = True
    return mask


def stretches(subtree_end: np.ndarray, most: int = 4096) -> list[tuple[int, int]]:
    """The row cut between trees into (start, stop) of at most ``most`` tokens each, longer where one tree is."""
    seen = np.maximum.accumulate(subtree_end)
    stops = [*(np.flatnonzero(seen[:-1] <= np.arange(1, len(seen))) + 1).tolist(), len(seen)]
    cuts = [0]
    for last, stop in zip([0, *stops], stops, strict=False):
        if stop - cuts[-1] > most and last > cuts[-1]:
            cuts.append(last)
    return list(itertools.pairwise([*cuts, len(seen)]))


# a node's tokens and its children
Node = tuple[int, list["Node"]]


def nested_subtree_end(*trees: Node) -> np.ndarray:
    """subtree_end int32 [T] of trees in a row, each nested (tokens, children)."""
    runs: list[np.ndarray] = []

    def lay(node: Node, start: int) -> int:
        own, children = node
        place = len(runs)
        runs.append(np.empty(0, dtype=np.int32))
        stop = start + own
        for child in children:
            stop = lay(child, stop)
        runs[place] = np.full(own, stop, dtype=np.int32)
        return stop

    stop = 0
    for tree in trees:
        stop = lay(tree, stop)
    return np.concatenate(runs)


def balanced(prompt: int, branching: int, depth: int, node: int) -> Node:
    """A prompt of ``prompt`` tokens, then ``depth`` levels of ``node``-token nodes, ``branching`` under each."""
    return prompt, [balanced(node, branching, depth - 1, node) for _ in range(branching if depth else 0)]


def balanced_subtree_end(prompt: int, branching: int, depth: int, node: int) -> np.ndarray:
    return nested_subtree_end(balanced(prompt, branching, depth, node))


def comb(depth: int, leaf: int, node: int) -> Node:
    """``depth`` nodes in a chain, each with a leaf of its own beside the next."""
    return node, [(leaf, []), comb(depth - 1, leaf, node)] if depth else []


def searched(turns: list[int], branches: list[int], prompt: int) -> Node:
    """An agent's episode of ``turns`` tokens each after a prompt; for every entry of ``branches`` another end from that
    turn on."""
    node: Node = (0, [])
    for i in range(len(turns) - 1, -1, -1):
        node = turns[i], [*([node] if node[0] else []), *((sum(turns[i + 1 :]), []) for b in branches if b == i + 1)]
    return prompt, [node, *((sum(turns), []) for b in branches if b == 0)]


def residues_subtree_end(block: int) -> np.ndarray:
    """A row of trees as of :func:`residue_subtree_end`, in which a branch starts at every residue modulo ``block``."""
    row, stop = [], 0
    for residue in range(block):
        tree = residue_subtree_end((residue - stop) % block, block)
        row.append(tree + stop)
        stop += len(tree)
    return np.concatenate(row)


def shared_data(name: str) -> Path | None:
    """A file of the public data the tests can use, or None: below ``$TREEGRPO_DATA``, else ``../shared/data``."""
    root = Path(os.environ.get("TREEGRPO_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
    path = root / name
    return path if path.exists() else None
