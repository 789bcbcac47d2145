"""The exact trie of token sequences as one packed row. Numpy only.

    T unique tokens of a trie (or of several side by side), L sum of the lengths of the sequences, n sequences.

The packed row is the trie in depth-first pre-order, children in ascending token order. Three values per token say
everything: `subtree_end` (key j is visible to query i iff j <= i < subtree_end[j]), `prev` (the token before it on its
path, -1 at a root) and `position` (depth in tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKEN_ID = 2**31 - 1


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
    """The trie of `sequences`: integer [n_i] each, n_i >= 1, 0 <= id <= MAX_TOKEN_ID (checked by Trajectory, not here).

    Equal prefixes merge, duplicates and prefixes of one another are legal; the packed row does not depend on the order
    of the sequences. With `owners` (int [n], never decreasing), only sequences of one owner merge: the result is the
    tries of the owners side by side, in that order.

    O(L log n) time and O(L) memory: sort as big-endian bytes, compare neighbours, and copy what is shared from the row
    before; no Python per token.
    """
    num = len(sequences)
    lengths = np.fromiter(map(len, sequences), np.int64, num)
    offsets = np.zeros(num + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.concatenate(sequences) if num else np.zeros(0, np.int64)

    order = _sorted_rows(flat, offsets, owners)
    # From here on row r is sequence order[r], which begins at flat[begins[r]].
    begins, lengths = offsets[:-1][order], lengths[order]
    common = _common_prefixes(flat, begins, lengths, owners)
    num_new = lengths - common
    ends = np.cumsum(num_new)
    first = _runs(begins + common, num_new)
    index = np.arange(first.size)
    leaf_tokens = np.empty(flat.size, np.int64)
    leaf_tokens[first] = index
    shared = np.flatnonzero(common)
    spans = (x.tolist() for x in (begins[shared], begins[shared - 1], common[shared]))
    for begin, before, length in zip(*spans, strict=True):
        leaf_tokens[begin : begin + length] = leaf_tokens[before : before + length]

    prev = index - 1
    has_new = num_new > 0
    above = np.where(common > 0, leaf_tokens[begins + common - 1], -1)
    prev[(ends - num_new)[has_new]] = above[has_new]
    # A token is last seen in the row whose successor has parted from it; its subtree ends with that row.
    common_after = np.append(common[1:], 0)[:num]
    num_last = lengths - common_after
    subtree_end = np.empty(first.size, np.int32)
    subtree_end[leaf_tokens[_runs(begins + common_after, num_last)]] = np.repeat(ends, num_last)
    return Trie(
        tokens=flat[first].astype(np.int64),
        subtree_end=subtree_end,
        prev=prev.astype(np.int32),
        position=(first - np.repeat(begins, num_new)).astype(np.int32),
        leaf_tokens=leaf_tokens,
        leaf_offsets=offsets,
    )


def _runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices begins[r] .. begins[r] + lengths[r] of every row, one behind the other."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(begins - (ends - lengths), lengths)


def _common_prefixes(
    flat: np.ndarray, begins: np.ndarray, lengths: np.ndarray, owners: np.ndarray | None
) -> np.ndarray:
    """How many tokens each sorted row begins with as the row before it does; none where that has another owner."""
    is_alike = flat[begins[1:]] == flat[begins[:-1]]
    if owners is not None:
        is_alike &= owners[1:] == owners[:-1]
    overlap = np.zeros_like(lengths)
    overlap[1:] = np.where(is_alike, np.minimum(lengths[1:], lengths[:-1]), 0)
    parted = np.flatnonzero(flat[_runs(begins, overlap)] != flat[_runs(np.roll(begins, 1), overlap)])
    ends = np.cumsum(overlap)
    parted = np.append(parted, overlap.sum())
    return np.minimum(parted[np.searchsorted(parted, ends - overlap)], ends) - (ends - overlap)


def _sorted_rows(flat: np.ndarray, offsets: np.ndarray, owners: np.ndarray | None) -> np.ndarray:
    """Order [n] of the sequences by (owner, tokens), equal ones as given."""
    # Big-endian words compare like numbers, so memcmp of the bytes is the lexicographic order of the tokens.
    words = flat.astype(">u4").tobytes()
    cuts = (4 * offsets).tolist()
    keys = [words[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    blocks = [0, len(keys)]
    if owners is not None:
        blocks = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(keys)]
    order: list[int] = []
    for begin, end in zip(blocks, blocks[1:], strict=False):
        order += sorted(range(begin, end), key=keys.__getitem__)
    return np.array(order, np.int64)
