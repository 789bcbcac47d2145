"""The work of dK/dV: lists under a window; long key tiles parted, with float32 partials and a sum in fixed order.

A key tile of a root is seen by all its descendants. Where one such tile would take longer than a multiprocessor's fair
share of the whole pass, its range of query tiles is cut into pieces. Every piece writes a float32 partial, and the
partials of a tile are added in the order of the pieces: same inputs, same bits. Names as in common.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, TileConfig, cdiv, multiprocessors, store_rows, strides

if TYPE_CHECKING:
    from ..plan import TreePlan

# query tiles: less than this is not worth a partial
SHORTEST_PIECE = 4
_SUM_ROWS = 16


def work_items(plan: TreePlan, tile: TileConfig, num_kv_heads: int) -> list[Tensor]:
    """[items [I,4], parted [P,3]] int32, both empty where no key tile is long enough to part; made once a plan.

    An item is (key tile, first query tile, query tile past the last, slot of its partial or -1), longest first; a
    parted tile is (key tile, its first slot, how many).

    Example: one chain of 10 query tiles and 10 key tiles on 8 multiprocessors has 55 visible tiles, a share of 6.9: key
    tiles 0 to 3, which are 10 to 7 query tiles long, are parted.
    """
    return _made_once(plan, ("dkv items", tile, num_kv_heads), lambda: _make_work_items(plan, tile, num_kv_heads))


def _made_once(plan: TreePlan, key: tuple, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    made = plan.derived.get(key)
    if made is None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "the work of dK/dV cannot be laid out inside torch.compile, for it depends on the tree: call"
                " tree_attention once with this plan before the compiled function"
            )
        made = plan.derived[key] = make()
    return made


def _make_work_items(plan: TreePlan, tile: TileConfig, num_kv_heads: int) -> list[Tensor]:
    lists = plan.tile_lists(tile.block_m, tile.block_n)
    device, num_kv = plan.device, len(lists.kv_max)
    nothing = [torch.empty((0, n), dtype=torch.int32, device=device) for n in (4, 3)]
    # the entries of the lists are the visible tiles, so that their number is known without asking the device
    share = max(SHORTEST_PIECE, lists.q_indices.shape[0] * num_kv_heads / multiprocessors(device))
    if cdiv(plan.num_tokens, tile.block_m) <= share:
        return nothing
    low = torch.arange(num_kv, device=device) * tile.block_n // tile.block_m
    length = -(-lists.kv_max.long() // tile.block_m) - low
    pieces = torch.where(length > share, -(-length // max(SHORTEST_PIECE, int(share / 2))), 1)
    parted = torch.nonzero(pieces > 1).squeeze(1)
    if parted.numel() == 0:
        return nothing
    kv_tile = torch.repeat_interleave(torch.arange(num_kv, device=device), pieces)
    place = torch.arange(len(kv_tile), device=device) - (pieces.cumsum(0) - pieces)[kv_tile]
    length, low, pieces = length[kv_tile], low[kv_tile], pieces[kv_tile]
    start, stop = low + place * length // pieces, low + (place + 1) * length // pieces
    slot = torch.where(pieces > 1, (pieces > 1).cumsum(0) - 1, -1)
    items = torch.stack([kv_tile, start, stop, slot], 1)
    items = items[torch.argsort(stop - start, descending=True, stable=True)]
    counts = torch.bincount(kv_tile, minlength=num_kv)[parted]
    sums = torch.stack([parted, counts.cumsum(0) - counts, counts], 1)
    return [x.to(torch.int32).contiguous() for x in (items, sums)]


def query_lists(plan: TreePlan, tile: TileConfig, window: int) -> list[Tensor]:
    """[kv_offsets [NK+1], kv_indices [nnz]] int32: the query tiles of each key tile under a window, ascending.

    Empty without a window, where they are a range. Made once a plan.
    """
    if not window:
        return [torch.empty(0, dtype=torch.int32, device=plan.device) for _ in range(2)]
    key = ("dkv query lists", tile.block_m, tile.block_n, window)
    return _made_once(plan, key, lambda: _make_query_lists(plan, tile, window))


def _make_query_lists(plan: TreePlan, tile: TileConfig, window: int) -> list[Tensor]:
    lists = plan.tile_lists(tile.block_m, tile.block_n, window)
    num_q, num_kv = len(lists.q_full), len(lists.kv_max)
    q_tile = torch.repeat_interleave(torch.arange(num_q, device=plan.device), lists.q_offsets.diff())
    kv_tile = lists.q_indices.long()
    offsets = torch.zeros(num_kv + 1, dtype=torch.int64, device=plan.device)
    torch.cumsum(torch.bincount(kv_tile, minlength=num_kv), 0, out=offsets[1:])
    ordered = q_tile[torch.argsort(kv_tile * num_q + q_tile)]
    return [x.to(torch.int32) for x in (offsets, ordered)]


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads"])
def tree_attention_bwd_dkv_sum_kernel(
    partial_dk,
    partial_dv,
    parted,
    dk,
    dv,
    dk_strides,
    dv_strides,
    num_tokens,
    num_kv_heads,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up ROWS rows of one parted key tile and head."""
    PARTS: tl.constexpr = BN // ROWS
    i_program = tl.program_id(0)
    i_part = i_program % PARTS
    i_kv = i_program // PARTS % num_kv_heads
    p_entry = parted + i_program // PARTS // num_kv_heads * 3
    i_n = tl.load(p_entry)
    slot = tl.load(p_entry + 1).to(tl.int64) * num_kv_heads + i_kv
    o_row = tl.arange(0, ROWS)
    p_dk = partial_dk + (slot * BN + i_part * ROWS) * BD + o_row[:, None] * BD + tl.arange(0, BD)[None, :]
    p_dv = partial_dv + (slot * BN + i_part * ROWS) * BDV + o_row[:, None] * BDV + tl.arange(0, BDV)[None, :]
    step = num_kv_heads.to(tl.int64) * BN
    b_dk = tl.zeros((ROWS, BD), tl.float32)
    b_dv = tl.zeros((ROWS, BDV), tl.float32)
    for _ in tl.range(0, tl.load(p_entry + 2)):
        b_dk += tl.load(p_dk)
        b_dv += tl.load(p_dv)
        p_dk += step * BD
        p_dv += step * BDV
    row = i_n.to(tl.int64) * BN + i_part * ROWS
    num_rows = num_tokens - row
    p_out = dk + row * dk_strides[0] + i_kv.to(tl.int64) * dk_strides[1]
    store_rows(p_out, b_dk * scale, o_row, dk_strides[0], num_rows, D, BD)
    p_out = dv + row * dv_strides[0] + i_kv.to(tl.int64) * dv_strides[1]
    store_rows(p_out, b_dv, o_row, dv_strides[0], num_rows, DV, BDV)


def sum_launch(partial_dk: Tensor, partial_dv: Tensor, parted: Tensor, dk: Tensor, dv: Tensor, scale: float) -> Launch:
    """The launch that adds the partials [slots, Hkv, BN, BD] and [slots, Hkv, BN, BDV] into dk and dv."""
    num_kv_heads, block_n, padded_dim = partial_dk.shape[1:]
    args = dict(
        partial_dk=partial_dk,
        partial_dv=partial_dv,
        parted=parted,
        dk=dk,
        dv=dv,
        dk_strides=strides(dk),
        dv_strides=strides(dv),
        num_tokens=dk.shape[0],
        num_kv_heads=num_kv_heads,
        scale=scale,
        D=dk.shape[2],
        DV=dv.shape[2],
        BD=padded_dim,
        BDV=partial_dv.shape[3],
        BN=block_n,
        ROWS=_SUM_ROWS,
    )
    grid = (parted.shape[0] * num_kv_heads * (block_n // _SUM_ROWS),)
    return Launch(tree_attention_bwd_dkv_sum_kernel, grid, args, TileConfig(_SUM_ROWS, block_n, 4, 1))
