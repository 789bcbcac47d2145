"""What kernels read of a plan beyond its tile lists: ends and window starts of tokens, and the work of dK/dV.

A key tile of a root is seen by all its descendants, within a window by those near it. Where one such tile would take
longer than a multiprocessor's fair share of the whole pass, its query tiles are cut into pieces. Every piece writes a
float32 partial, and the partials of a tile are added in the order of the pieces: same inputs, same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .plan import TreePlan

# query tiles: less than this is not worth a partial
SHORTEST_PIECE = 4


class Tile(Protocol):
    """Query and key rows of a kernel's tile; hashable."""

    @property
    def block_m(self) -> int: ...

    @property
    def block_n(self) -> int: ...


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; on the CPU a few, so that small forests part their long key tiles too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def span(plan: TreePlan, multiple: int) -> Tensor:
    """subtree_end[j] - j, int32, padded with zeros to a multiple: keys past T are visible to nobody."""
    index = torch.arange(plan.num_tokens, dtype=torch.int32, device=plan.device)
    return F.pad(plan.subtree_end - index, (0, -plan.num_tokens % multiple))


def work_items(plan: TreePlan, tile: Tile, num_kv_heads: int, window: int = 0) -> list[Tensor]:
    """[items [I,4], parted [P,3]] int32, both empty where no key tile is long enough to part; made once a plan.

    An item is (key tile, first query tile, query tile past the last, slot of its partial or -1), longest first; a
    parted tile is (key tile, its first slot, how many). Under a window the query tiles are places in kv_indices of
    :func:`query_lists`.

    Example: one chain of 10 query tiles and 10 key tiles on 8 multiprocessors has 55 visible tiles, a share of 6.9: key
    tiles 0 to 3, which are 10 to 7 query tiles long, are parted.
    """
    key = "dkv items", tile, num_kv_heads, window
    return plan.made_once(key, lambda: _make_work_items(plan, tile, num_kv_heads, window))


def num_slots(num_tokens: int, block_n: int, items: Tensor, parted: Tensor) -> int:
    """How many partials the items of :func:`work_items` write: every key tile that is not parted is one item."""
    num_parted = parted.shape[0]
    return items.shape[0] - (-(-num_tokens // block_n) - num_parted) if num_parted else 0


def _make_work_items(plan: TreePlan, tile: Tile, num_kv_heads: int, window: int) -> list[Tensor]:
    """Waits for the device once at most: there are few key tiles, and the host is done with them sooner than a dozen
    operations on the device."""
    block_m, block_n = tile.block_m, tile.block_n
    nothing = [torch.empty((0, n), dtype=torch.int32, device=plan.device) for n in (4, 3)]

    def share_of(num_tiles: float) -> float:
        return max(SHORTEST_PIECE, num_tiles * num_kv_heads / multiprocessors(plan.device))

    # the visible tiles hold all visible pairs, so that there are as many at least
    if -(-plan.num_tokens // block_m) <= share_of(plan.count_pairs(window) / (block_m * block_n)):
        return nothing
    if window:
        offsets = query_lists(plan, tile, window)[1][::2].cpu().numpy().astype(np.int64)
        low, length = offsets[:-1], np.diff(offsets)
    else:
        kv_max = plan.key_lists(block_m, block_n).kv_max.cpu().numpy().astype(np.int64)
        low = np.arange(len(kv_max)) * block_n // block_m
        # of the range of query tiles that see a key tile every one does
        length = -(-kv_max // block_m) - low
    share = share_of(int(length.sum()))
    pieces = np.where(length > share, -(-length // max(SHORTEST_PIECE, int(share / 2))), 1)
    parted = np.flatnonzero(pieces > 1)
    if parted.size == 0:
        return nothing
    kv_tile = np.repeat(np.arange(len(length)), pieces)
    place = np.arange(len(kv_tile)) - (pieces.cumsum() - pieces)[kv_tile]
    counts = pieces[parted]
    length, low, pieces = length[kv_tile], low[kv_tile], pieces[kv_tile]
    start, stop = low + place * length // pieces, low + (place + 1) * length // pieces
    slot = np.where(pieces > 1, (pieces > 1).cumsum() - 1, -1)
    items = np.stack([kv_tile, start, stop, slot], 1)[np.argsort(start - stop, kind="stable")]
    sums = np.stack([parted, counts.cumsum() - counts, counts], 1)
    return [torch.from_numpy(x.astype(np.int32)).to(plan.device, non_blocking=True) for x in (items, sums)]


def query_lists(plan: TreePlan, tile: Tile, window: int) -> list[Tensor]:
    """[kv_order [NK], kv_offsets [2 NK + 1], kv_indices [nnz]] int32: the query tiles of each key tile under a window.

    Those of key tile n lie in kv_indices from kv_offsets[2n] on, those that see it in full first, the others from
    kv_offsets[2n + 1] on; each class ascending. A query tile that reaches past T counts with the others. kv_order are
    the key tiles, longest list first. Without a window the query tiles are ranges: kv_order is the plan's and the other
    two are empty. Made once a plan.
    """
    if not window:
        nothing = [torch.empty(0, dtype=torch.int32, device=plan.device) for _ in range(2)]
        return [plan.key_lists(tile.block_m, tile.block_n).kv_order, *nothing]
    key = ("dkv query lists", tile.block_m, tile.block_n, window)
    return plan.made_once(key, lambda: _make_query_lists(plan, tile, window))


def first_visible(plan: TreePlan, window: int, multiple: int) -> Tensor:
    """The oldest token that each query sees under a window, int32, padded with zeros to a multiple; empty without one.

    Along a path indices grow with positions, so that a window is one comparison of indices, and positions are not
    needed. An ancestor at some depth is the last token of that depth before. O(T log T).

    Example: subtree_end = [6 6 5 4 5 6], position = [0 1 2 3 3 2] and a window of 2 give [0 0 1 2 2 1].
    """
    if not window:
        return torch.empty(0, dtype=torch.int32, device=plan.device)
    num_tokens = plan.num_tokens
    index = torch.arange(num_tokens, device=plan.device)
    position = plan.position.long()
    by_depth = torch.sort(position * num_tokens + index).values
    depth = position - (window - 1)
    found = torch.searchsorted(by_depth, depth * num_tokens + index, right=True) - 1
    # who is less deep than the window sees all of a path, the tokens before which are no ancestors anyway
    first = torch.where(depth > 0, by_depth[found.clamp(min=0)] % num_tokens, 0)
    return F.pad(first.to(torch.int32), (0, -num_tokens % multiple))


def _make_query_lists(plan: TreePlan, tile: Tile, window: int) -> list[Tensor]:
    """Does not wait for the device beyond what the tile lists do."""
    lists = plan.tile_lists(tile.block_m, tile.block_n, window)
    device, num_q, num_kv = plan.device, len(lists.q_full), len(lists.kv_max)
    length = len(lists.q_indices)
    index = torch.arange(num_q, device=device)
    q_tile = torch.repeat_interleave(index, lists.q_offsets.diff(), output_size=length)
    # a query tile's list has its full key tiles first
    place = torch.arange(length, device=device) - lists.q_offsets[:-1].long()[q_tile]
    is_whole = (q_tile + 1) * tile.block_m <= plan.num_tokens
    is_partial = (place >= lists.q_full.long()[q_tile]) | ~is_whole
    ordered = torch.sort((2 * lists.q_indices.long() + is_partial) * num_q + q_tile).values
    offsets = torch.searchsorted(ordered, torch.arange(2 * num_kv + 1, device=device) * num_q)
    order = torch.argsort(offsets[::2].diff(), descending=True, stable=True)
    return [x.to(torch.int32) for x in (order, offsets, ordered % num_q)]
