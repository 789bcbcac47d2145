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
        length_before[1:][np.diff(owners) != 0] = 0
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
