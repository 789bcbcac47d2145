"""Keys and values of the `hf` engine: what a session has computed, each token once, and the batch that is decoded.

Hybrid models keep a state per sequence, of a convolution and perhaps of a recurrence, in layers without keys and values
or beside them. It holds for one length alone, so it is kept at the ends of prefixes, and only there can they be
continued.

Shape legend: L layers with keys and values, M layers with a state, B rows, H key/value heads, C columns (one per cached
token), D head dim; keys and values may differ in D. A prefix is [L, H, n, D] and its state [M, ...], a batch [L, B, H,
C, D] and [M, B, ...].
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Piece = tuple[Tensor, Tensor]
"""Keys and values of consecutive tokens, each [L, H, n, D]."""
State = tuple[Tensor, ...]
"""Of the convolutions [M, ...] and, in models that have them, of the recurrences [M, ...], behind one token."""


class KeptStates:
    """Which nodes of all sessions hold a state: beyond `max_bytes`, those used longest ago lose theirs."""

    def __init__(self, max_bytes: float = math.inf) -> None:
        self.max_bytes = max_bytes
        # used last comes last; what a released session had leaves by itself
        self._nodes: weakref.WeakKeyDictionary[PrefixTree, None] = weakref.WeakKeyDictionary()

    def use(self, node: PrefixTree) -> None:
        """Counts a node with a state as the one used last."""
        self.forget(node)
        self._nodes[node] = None
        assert node.state is not None
        # a model's states are all of one size
        size = sum(x.nbytes for x in node.state)
        while len(self._nodes) * size > self.max_bytes:
            oldest = next(iter(self._nodes))
            oldest.state = None
            self.forget(oldest)

    def forget(self, node: PrefixTree) -> None:
        """Does not count a node that has no state any more."""
        self._nodes.pop(node, None)


# without slots, which are no weak references' before Python 3.11
@dataclass(eq=False)
class PrefixTree:
    """A session's keys and values as a radix tree: a sequence is a path, what sequences share is stored once."""

    tokens: list[int] = field(default_factory=list)
    piece: Piece | None = None
    """Of its tokens; None at the root, which has none."""
    children: dict[int, PrefixTree] = field(default_factory=dict)
    state: State | None = None
    """Behind its last token, where one was kept; never written to."""
    kept: KeptStates = field(default_factory=KeptStates)
    """Of all nodes together."""

    def _walk(self, ids: list[int]) -> Iterator[tuple[PrefixTree, int]]:
        """The nodes on the way of `ids` and how many tokens of each match, at least one."""
        node, at = self, 0
        while at < len(ids) and (child := node.children.get(ids[at])):
            length = _common_length(child.tokens, ids[at : at + len(child.tokens)])
            yield child, length
            if length < len(child.tokens):
                return
            node, at = child, at + length

    def match(self, ids: list[int]) -> tuple[int, list[Piece]]:
        """The longest prefix of `ids` that is stored: its length, and its keys and values in order."""
        total, pieces = 0, []
        for node, length in self._walk(ids):
            pieces.append(node._part(0, length))
            total += length
        return total, pieces

    def resume(self, ids: list[int]) -> tuple[int, list[Piece], State | None]:
        """The longest prefix of `ids` at whose end a state is stored: its length, keys and values in order, state."""
        best: tuple[int, list[Piece], State | None] = (0, [], None)
        total, pieces, found = 0, [], None
        for node, length in self._walk(ids):
            pieces.append(node._part(0, length))
            total += length
            if node.state is not None and length == len(node.tokens):
                best, found = (total, list(pieces), node.state), node
        if found is not None:
            self.kept.use(found)
        return best

    def insert(
        self, ids: list[int], keys: Tensor, values: Tensor, num_known: int = 0, state: State | None = None
    ) -> None:
        """Stores a sequence: `keys` and `values` [L, H, n, D] of the tokens behind the first `num_known`, which are
        stored already, and perhaps the state behind them all. What is new of them is copied."""
        node, at = self, 0
        for child, length in self._walk(ids):
            at += length
            # a state needs a node that ends where it holds
            if length < len(child.tokens) and (at < len(ids) or state is not None):
                child._split(length)
            node = child
        if at < len(ids):
            # a copy in its own memory: a view would keep the whole batch alive
            piece = (keys[:, :, at - num_known :].clone(), values[:, :, at - num_known :].clone())
            child = PrefixTree(list(ids[at:]), piece, kept=self.kept)
            node.children[ids[at]] = node = child
        if state is not None and node.state is None:
            node.state = tuple(x.clone() for x in state)
            self.kept.use(node)

    def _split(self, length: int) -> None:
        rest = PrefixTree(
            self.tokens[length:], self._part(length, len(self.tokens)), self.children, self.state, self.kept
        )
        if rest.state is not None:
            self.kept.forget(self)
            self.kept.use(rest)
        self.children = {rest.tokens[0]: rest}
        # the state behind its first part was not kept
        self.tokens, self.piece, self.state = self.tokens[:length], self._part(0, length), None

    def _part(self, begin: int, end: int) -> Piece:
        assert self.piece is not None
        keys, values = self.piece
        return keys[:, :, begin:end], values[:, :, begin:end]

    @property
    def num_tokens(self) -> int:
        """Tokens stored, each once."""
        return len(self.tokens) + sum(child.num_tokens for child in self.children.values())


def _common_length(a: list[int], b: list[int]) -> int:
    low, high = 0, min(len(a), len(b))
    # by halves: comparing slices takes a tenth of the time of a loop over tokens
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values are, in every layer that has them, and what states layers have."""

    num_layers: int
    key: tuple[int, int]
    """(H, D)"""
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    layers: tuple[tuple[bool, bool], ...] = ()
    """For each layer of a hybrid model, whether it has keys and values, and whether it has a state."""
    states: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shape and dtype of one layer's states of one sequence."""

    def zeros(self, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
        """Zeros, not empty memory: a masked column has weight 0, and 0 * NaN would be NaN."""
        keys, values = (
            torch.zeros(self.num_layers, num_rows, heads, num_columns, dim, dtype=self.dtype, device=self.device)
            for heads, dim in (self.key, self.value)
        )
        return keys, values

    def zero_states(self, num_rows: int) -> State:
        """What rows without tokens begin with."""
        count = sum(has_state for _, has_state in self.layers)
        return tuple(
            torch.zeros(count, num_rows, *size, dtype=dtype, device=self.device) for size, dtype in self.states
        )


class _BatchLayer(DynamicLayer):
    """One layer of a `KVBatch`: new tokens are written behind the old ones in place, nothing is copied."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers, self._length = (keys, values), length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Piece:
        keys, values = self._buffers
        begin, self._length = self._length, self._length + key_states.shape[2]
        keys[:, :, begin : self._length] = key_states
        values[:, :, begin : self._length] = value_states
        self.keys, self.values = keys[:, :, : self._length], values[:, :, : self._length]
        return self.keys, self.values


@functools.cache
def _hybrid_layers() -> tuple[Any, Any]:
    """Classes of a layer without keys and values, and of one with both them and a state."""
    # not there in older versions, whose hybrid models are refused
    from transformers.cache_utils import LinearAttentionLayer

    class Both(LinearAttentionLayer, _BatchLayer):
        def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
            LinearAttentionLayer.__init__(self)
            _BatchLayer.__init__(self, keys, values, length)

    return LinearAttentionLayer, Both


def _hybrid_layer(attention: tuple[Tensor, Tensor, int] | None, states: Sequence[Tensor]) -> Any:
    """One layer of a hybrid `KVBatch`, with states [B, ...] or none: calls of the model update these tensors."""
    without, both = _hybrid_layers()
    if not states:
        return without() if attention is None else _BatchLayer(*attention)
    layer = without() if attention is None else both(*attention)
    layer.dtype, layer.device = states[0].dtype, states[0].device
    layer.conv_states[0], layer.conv_kernel_size[0] = states[0], states[0].shape[-1]
    # a row without tokens has zeros, which is what a sequence begins with
    layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
    if len(states) > 1:
        layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = states[1], True
    return layer


class KVBatch:
    """Keys and values of rows that end at one column, `length`; row i begins at column `starts[i]`. Of hybrid models
    their states too.

    Live rows are the first ones of the buffer: a row that leaves is overwritten by the last, a row that joins goes
    behind them, so neither moves the others.
    """

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self.length = 0
        self.starts: list[int] = []
        self.keys, self.values = shape.zeros(0, 0)
        self.states = shape.zero_states(0)
        self._cache: DynamicCache | None = None

    def cache(self, num_new: int) -> DynamicCache:
        """The cache to hand to the model, with room for `num_new` tokens a row; the same object while rows stay."""
        if self.length + num_new > self.keys.shape[3]:
            # columns that no row uses any more go where everything is copied anyway
            self._rebuild(-min(self.starts, default=0), num_new)
        if self._cache is None:
            num_rows = len(self.starts)
            self._cache = DynamicCache()
            attention = ((k[:num_rows], v[:num_rows], self.length) for k, v in zip(self.keys, self.values, strict=True))
            states = ([x[:num_rows] for x in layer] for layer in zip(*self.states, strict=True))
            self._cache.layers = [
                _hybrid_layer(next(attention) if has_keys else None, next(states) if has_state else ())
                for has_keys, has_state in self.shape.layers
            ] or [_BatchLayer(*layer) for layer in attention]
        return self._cache

    def row(self, index: int) -> Piece:
        """Views [L, H, n, D] of one row."""
        begin = self.starts[index]
        return self.keys[:, index, :, begin : self.length], self.values[:, index, :, begin : self.length]

    def state(self, index: int) -> State | None:
        """Views [M, ...] of one row; None where the model has no states."""
        return tuple(x[:, index] for x in self.states) or None

    def reserve(self, num_rows: int, num_columns: int, num_new: int = 1) -> None:
        """Makes room for `num_rows` more rows of up to `num_columns` tokens and for `num_new` tokens behind all rows,
        so that each `join` only copies itself."""
        if not self.starts:
            self.length = num_columns
        shift = max(0, num_columns - self.length)
        total = len(self.starts) + num_rows
        if shift or total > self.keys.shape[1] or self.length > self.keys.shape[3]:
            self._rebuild(shift, num_new, total)

    def join(self, pieces: Sequence[Piece], num_copies: int = 1, state: State | None = None) -> None:
        """Adds `num_copies` equal rows, the pieces one behind the other; `state` is that of hybrid models behind them,
        None where there are no pieces."""
        num_tokens = sum(keys.shape[2] for keys, _ in pieces)
        self.reserve(num_copies, num_tokens)
        begin, end = len(self.starts), len(self.starts) + num_copies
        column = self.length - num_tokens
        for keys, values in pieces:
            stop = column + keys.shape[2]
            self.keys[:, begin:end, :, column:stop] = keys[:, None]
            self.values[:, begin:end, :, column:stop] = values[:, None]
            column = stop
        for x, new in zip(self.states, state or self.shape.zero_states(1), strict=True):
            x[:, begin:end] = new[:, None] if state else new
        self.starts += [self.length - num_tokens] * num_copies
        self._cache = None

    def drop(self, indices: Sequence[int]) -> list[int]:
        """Removes rows; returns, for each row that is left, where it was."""
        gone = set(indices)
        num_left = len(self.starts) - len(gone)
        holes = [i for i in indices if i < num_left]
        moved = [i for i in range(num_left, len(self.starts)) if i not in gone]
        order = list(range(num_left))
        for hole, source in zip(sorted(holes), moved, strict=True):
            order[hole] = source
            self.keys[:, hole] = self.keys[:, source]
            self.values[:, hole] = self.values[:, source]
            for x in self.states:
                x[:, hole] = x[:, source]
        self.starts = [self.starts[i] for i in order]
        self._cache = None
        if self.starts and 2 * min(self.starts) > self.length:
            self._rebuild(-min(self.starts), 1)
        return order

    def _rebuild(self, shift: int, num_new: int, num_rows: int = 0) -> None:
        """Moves every column by `shift` into a buffer with room for `num_new` more columns and `num_rows` rows."""
        live, old = len(self.starts), (self.keys, self.values)
        begin = max(0, -shift)
        length = self.length + shift
        # a few stragglers do not grow the room of all that have left
        slots = max(num_rows, live, min(old[0].shape[1], 2 * live))
        # room grows by a share, so that copying costs a constant per token
        self.keys, self.values = self.shape.zeros(slots, length + max(num_new, 64, length // 4))
        if live:
            for new, source in zip((self.keys, self.values), old, strict=True):
                new[:, :live, :, begin + shift : length] = source[:, :live, :, begin : self.length]
        if slots != old[0].shape[1]:
            kept, self.states = self.states, self.shape.zero_states(slots)
            for new, source in zip(self.states, kept, strict=True):
                new[:, :live] = source[:, :live]
        self.length, self.starts, self._cache = length, [start + shift for start in self.starts], None
