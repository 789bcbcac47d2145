"""How the `hf` engine computes the prompts of hybrid models, some of whose layers keep a state.

Padding would move on a convolution and make a state decay, so the rows of a forward have equally many new tokens. And
the last token of a prompt is left to be decoded like one sampled: a state is kept before it, where the same prompt can
be taken up again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from treegrpo.rollout import kv

Forward = Callable[[Tensor, Tensor, Tensor | None, DynamicCache], Tensor]
"""Of ids and positions [B, n], a mask [B, columns] or None, and a cache."""


@dataclass(slots=True)
class Prefix:
    """Tokens to compute, but for the first `num_known`, whose keys and values are given."""

    ids: list[int]
    num_known: int = 0
    known: list[kv.Piece] = field(default_factory=list)
    state: kv.State | None = None
    """Behind the last token that is computed."""
    num_new: int = 0
    """Tokens computed so far, behind those known."""
    new: list[kv.Piece] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        return self.num_known + self.num_new

    @property
    def pieces(self) -> list[kv.Piece]:
        return [*self.known, *self.new]

    def store(self, session: kv.PrefixTree) -> None:
        """Puts what was computed where the known part came from."""
        keys, values = (torch.cat(parts, 2) for parts in zip(*self.new, strict=True))
        session.insert(self.ids, keys, values, self.num_known, self.state)


def complete(prefixes: Sequence[Prefix], shape: kv.KVShape, forward: Forward, max_columns: int) -> None:
    """Computes what is not known of all prefixes; `max_columns` bounds rows times columns of a forward of several."""
    for width, indices in strides([len(prefix.ids) - prefix.num_cached for prefix in prefixes]):
        rows = sorted((prefixes[i] for i in indices), key=lambda prefix: -prefix.num_cached)
        while rows:
            count = max(1, max_columns // (rows[0].num_cached + width))
            _advance(rows[:count], width, shape, forward)
            rows = rows[count:]


def strides(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """`(tokens, rows)` of the forwards that together compute `lengths[i]` tokens for row i, in order: one for each
    length, or for each power of two where that takes fewer."""
    whole = sorted(set(lengths) - {0}, reverse=True)
    used = functools.reduce(operator.or_, lengths, 0)
    powers = [1 << i for i in reversed(range(used.bit_length())) if used >> i & 1]
    if len(powers) < len(whole):
        return [(power, [i for i, length in enumerate(lengths) if length & power]) for power in powers]
    return [(width, [i for i, length in enumerate(lengths) if length == width]) for width in whole]


def _advance(prefixes: list[Prefix], width: int, shape: kv.KVShape, forward: Forward) -> None:
    """One forward over the next `width` tokens of each prefix, of which the first has the most cached."""
    past = prefixes[0].num_cached
    batch = kv.KVBatch(shape)
    batch.reserve(len(prefixes), past, width)
    for prefix in prefixes:
        batch.join(prefix.pieces, 1, prefix.state)
    new_ids = [prefix.ids[prefix.num_cached : prefix.num_cached + width] for prefix in prefixes]
    starts = torch.tensor(batch.starts, device=shape.device)[:, None]
    columns = torch.arange(past + width, device=shape.device)
    # hides what stands before shorter prefixes, from attention alone
    mask = columns >= starts if any(batch.starts) else None
    forward(torch.tensor(new_ids, device=shape.device), columns[past:] - starts, mask, batch.cache(width))
    batch.length += width
    span = slice(past, past + width)
    for i, prefix in enumerate(prefixes):
        prefix.new.append((batch.keys[:, i, :, span], batch.values[:, i, :, span]))
        prefix.num_new += width
        prefix.state = batch.state(i)
