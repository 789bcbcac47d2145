"""Triton dK/dV: one program per (key tile, key/value head) sums over the query heads of its group and all descendants.

The query rows that see a key tile are one contiguous range, so the loops count through it without a list. Shapes, names
and mathematics: common.py and backward.py; scores are held transposed, [BN, BM].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    Launch,
    TileConfig,
    backward_args,
    cap_grad,
    capped,
    cdiv,
    descriptor,
    dot,
    head_of,
    load_tile,
    narrow,
    padded,
    store_rows,
    strides,
    visible,
)


@triton.jit
def dkv_bounds(n0, kv_max, kv_min, num_tokens, BM: tl.constexpr, BN: tl.constexpr):
    """Query tiles that see the key tile at ``n0``: [lo, a) across the diagonal, [a, b) full, [b, hi) across ends.

    A ragged last query tile is left to the last class, so that the full class needs no row masks.
    """
    n1 = tl.minimum(n0 + BN, num_tokens)
    lo = n0 // BM
    hi = (kv_max + BM - 1) // BM
    a = tl.minimum((n1 - 1 + BM - 1) // BM, hi)
    b = tl.maximum(a, tl.minimum(kv_min // BM, hi))
    return lo, a, b, hi


@triton.jit
def _dkv_tile(
    b_dk,
    b_dv,
    b_k,
    b_v,
    i_m,
    i_head,
    q,
    dout,
    lse2,
    delta,
    dq,
    dq_step,
    first,
    o_n,
    b_end,
    q_strides,
    dout_strides,
    num_tokens,
    num_padded,
    qk_scale,
    cap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    FULL: tl.constexpr,
    TMA: tl.constexpr,
):
    """One query tile's part of dK and dV; transposed scores are operands of the next product as they lie."""
    o_row = tl.arange(0, BM)
    m0 = i_m * BM
    num_rows = num_tokens - m0
    p_row = i_head.to(tl.int64) * num_padded + m0
    b_q = load_tile(head_of(q, i_head, q_strides, TMA), i_head, m0, q_strides, num_tokens, BM, D, BD, not FULL, TMA)
    b_lse = tl.load(lse2 + p_row + o_row)
    b_s = capped(dot(b_k, tl.trans(b_q), tl.zeros((BN, BM), tl.float32)), qk_scale, cap, HAS_CAP)
    b_p = tl.exp2(b_s - b_lse[None, :])
    if not FULL:
        o_m = m0 + o_row
        b_first = o_m
        if HAS_WINDOW:
            b_first = tl.load(first + o_m, mask=o_row < num_rows, other=0)
        m_seen = visible(o_m[None, :], o_n[:, None], b_end[:, None], b_first[None, :], HAS_WINDOW)
        b_p = tl.where(m_seen, b_p, 0.0)
    b_dout = load_tile(
        head_of(dout, i_head, dout_strides, TMA), i_head, m0, dout_strides, num_tokens, BM, DV, BDV, not FULL, TMA
    )
    b_dv = dot(narrow(b_p, b_dout.dtype), b_dout, b_dv)
    if HAS_CAP:
        b_p = b_p * cap_grad(b_s, cap)
    b_delta = tl.load(delta + p_row + o_row)
    b_dp = dot(b_v, tl.trans(b_dout), tl.zeros((BN, BM), tl.float32))
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_ds = narrow(b_ds, b_q.dtype)
    if dq is not None:
        b_dq = dot(tl.trans(b_ds), b_k, tl.zeros((BM, BD), tl.float32))
        if TMA and not INTERPRETED:
            # drops the rows past T by itself; the interpreter has no such reduction
            dq.atomic_add([m0, i_head * BD], b_dq)
        else:
            p_dq = dq + m0.to(tl.int64) * dq_step + i_head * D + o_row[:, None] * dq_step + tl.arange(0, BD)[None, :]
            m_dq = (o_row[:, None] < num_rows) & (tl.arange(0, BD)[None, :] < D)
            tl.atomic_add(p_dq, b_dq, mask=m_dq, sem="relaxed")
    b_dk = dot(b_ds, b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads"])
def tree_attention_bwd_dkv_kernel(
    q,
    k,
    v,
    dout,
    delta,
    lse2,
    dk,
    dv,
    subtree_end,
    first,
    kv_max,
    kv_min,
    kv_order,
    kv_offsets,
    kv_indices,
    dq,
    items,
    partial_dk,
    partial_dv,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    dq_step,
    num_tokens,
    num_kv_heads,
    num_padded,
    scale,
    qk_scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Loops over the group's query heads and the query tiles below a key tile. Longest range first, heads fastest.

    With SPLIT over one piece of that range: see work.py. With ``dq``, a float32 [T, Hq, D] of zeros, the unscaled dQ
    is added to it as well, in no fixed order: five products a tile instead of the two passes' seven.
    """
    i_program = tl.program_id(0)
    i_kv = i_program % num_kv_heads
    p_item = items + i_program // num_kv_heads * 4
    if not SPLIT:
        p_item = kv_order + i_program // num_kv_heads
    i_n = tl.load(p_item)
    n0 = i_n * BN
    start_n = i_n.to(tl.int64) * BN
    o_row = tl.arange(0, BN)
    o_n = n0 + o_row
    num_rows = num_tokens - n0

    i_head = i_kv.to(tl.int64)
    b_k = load_tile(head_of(k, i_kv, k_strides, TMA), i_kv, n0, k_strides, num_tokens, BN, D, BD, True, TMA)
    b_v = load_tile(head_of(v, i_kv, v_strides, TMA), i_kv, n0, v_strides, num_tokens, BN, DV, BDV, True, TMA)
    b_end = tl.load(subtree_end + o_n, mask=o_row < num_rows, other=0)
    if HAS_WINDOW:
        # a window cuts by depth, which is not monotone over branches: here the query tiles are lists, those seen in
        # full first
        p_list = kv_offsets + 2 * i_n
        lo, b, hi = tl.load(p_list), tl.load(p_list + 1), tl.load(p_list + 2)
        a = lo
    else:
        lo, a, b, hi = dkv_bounds(n0, tl.load(kv_max + i_n), tl.load(kv_min + i_n), num_tokens, BM, BN)
    if SPLIT:
        lo = tl.maximum(lo, tl.load(p_item + 1))
        hi = tl.minimum(hi, tl.load(p_item + 2))
        a = tl.minimum(tl.maximum(a, lo), hi)
        b = tl.minimum(tl.maximum(b, a), hi)

    b_dk = tl.zeros((BN, BD), tl.float32)
    b_dv = tl.zeros((BN, BDV), tl.float32)
    # one flat loop per class over (query head, query tile): the pipeline never drains between the heads of the group;
    # counters, for a division in the loop would cost registers
    i_q = i_kv * GROUP
    # fmt: off
    if HAS_WINDOW:
        for i_class in tl.static_range(2):
            start = lo if i_class == 0 else b
            stop = b if i_class == 0 else hi
            e = start
            i_q = i_kv * GROUP
            i_next = start
            if TMA:
                # read ahead as in the forward
                i_next = tl.load(kv_indices + start, mask=start < stop, other=0)
            for _ in tl.range(0, GROUP * (stop - start), num_stages=STAGES):
                i_m = i_next
                if not TMA:
                    i_m = tl.load(kv_indices + e)
                i_now = i_q
                e += 1
                i_q = tl.where(e == stop, i_q + 1, i_q)
                e = tl.where(e == stop, start, e)
                if TMA:
                    i_next = tl.load(kv_indices + e)
                b_dk, b_dv = _dkv_tile(
                    b_dk, b_dv, b_k, b_v, i_m, i_now, q, dout, lse2, delta, dq, dq_step, first, o_n, b_end,
                    q_strides, dout_strides, num_tokens, num_padded, qk_scale, cap, D, DV, BD, BDV, BM, BN,
                    HAS_CAP, True, i_class == 0, TMA,
                )
    else:
        i_m = a
        for _ in tl.range(0, GROUP * (b - a), num_stages=STAGES):
            b_dk, b_dv = _dkv_tile(
                b_dk, b_dv, b_k, b_v, i_m, i_q, q, dout, lse2, delta, dq, dq_step, first, o_n, b_end,
                q_strides, dout_strides, num_tokens, num_padded, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP,
                False, True, TMA,
            )
            i_m += 1
            i_q = tl.where(i_m == b, i_q + 1, i_q)
            i_m = tl.where(i_m == b, a, i_m)
        # the partial ranges [lo, a) and [b, hi) share a loop: a third copy of the body costs more than one compare
        start = tl.where(lo == a, b, lo)
        i_m = start
        i_q = i_kv * GROUP
        for _ in tl.range(0, GROUP * (a - lo + hi - b), num_stages=STAGES):
            b_dk, b_dv = _dkv_tile(
                b_dk, b_dv, b_k, b_v, i_m, i_q, q, dout, lse2, delta, dq, dq_step, first, o_n, b_end,
                q_strides, dout_strides, num_tokens, num_padded, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP,
                False, False, TMA,
            )
            i_m += 1
            i_m = tl.where(i_m == a, b, i_m)
            i_q = tl.where(i_m == hi, i_q + 1, i_q)
            i_m = tl.where(i_m == hi, start, i_m)
    # fmt: on
    if SPLIT:
        slot = tl.load(p_item + 3)
        if slot >= 0:
            row = (slot.to(tl.int64) * num_kv_heads + i_kv) * BN
            store_rows(partial_dk + row * BD, b_dk, o_row, BD, BN, BD, BD)
            store_rows(partial_dv + row * BDV, b_dv, o_row, BDV, BN, BDV, BDV)
            # the whole of this tile is stored by the sum over its pieces
            num_rows = 0
    p_dk = dk + start_n * dk_strides[0] + i_head * dk_strides[1]
    p_dv = dv + start_n * dv_strides[0] + i_head * dv_strides[1]
    store_rows(p_dk, b_dk * scale, o_row, dk_strides[0], num_rows, D, BD)
    store_rows(p_dv, b_dv, o_row, dv_strides[0], num_rows, DV, BDV)


def dkv_launch(
    dk: Tensor,
    dv: Tensor,
    tile: TileConfig,
    lists: list[Tensor],
    partials: tuple[Tensor, Tensor] | None = None,
    dq: Tensor | None = None,
    **shared: Any,
) -> Launch:
    """The dK/dV launch.

    ``lists`` are kv_max and kv_min of the tile sizes in ``tile``, the three of :func:`work.query_lists`, first
    (:func:`work.first_visible`) and the items of :func:`work.work_items`. With ``partials`` (:func:`new_partials`) the
    items are the work, else whole key tiles. With ``dq``, contiguous [T, Hq, D] fp32 zeros, dQ / scale is added there
    by atomics: not deterministic.
    """
    *lists, first, items = lists
    args = backward_args(tile=tile, first=first, **shared) | dict(items=items)
    args.update(zip(("kv_max", "kv_min", "kv_order", "kv_offsets", "kv_indices"), lists, strict=True))
    num_tokens, num_kv_heads, _ = dk.shape
    args.update(dk=dk, dv=dv, dk_strides=strides(dk), dv_strides=strides(dv), num_kv_heads=num_kv_heads)
    partial_dk, partial_dv = partials or (None, None)
    args.update(partial_dk=partial_dk, partial_dv=partial_dv, SPLIT=partials is not None)
    if dq is None:
        args.update(dq=None, dq_step=0)
    else:
        by_tma = shared["tma"] and not triton.knobs.runtime.interpret
        args.update(dq=descriptor(dq, tile.block_m) if by_tma else dq, dq_step=dq.stride(0))
    num_work = cdiv(num_tokens, tile.block_n) if partials is None else items.shape[0]
    return Launch(tree_attention_bwd_dkv_kernel, (num_work * num_kv_heads,), args, tile)


def new_partials(dk: Tensor, dv: Tensor, tile: TileConfig, num_slots: int) -> tuple[Tensor, Tensor]:
    """Uninitialised float32 [slots, Hkv, BN, BD] and [slots, Hkv, BN, BDV]."""
    shape_dk, shape_dv = ((num_slots, x.shape[1], tile.block_n, padded(x.shape[2])) for x in (dk, dv))
    return dk.new_empty(shape_dk, dtype=torch.float32), dk.new_empty(shape_dv, dtype=torch.float32)
