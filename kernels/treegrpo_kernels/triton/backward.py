"""Triton backward in two passes over the visible tiles, fp32 accumulators, no atomics: deterministic by construction.

    p_ij = exp(s_ij - lse_i)     dp_ij = dout_i . v_j     delta_i = dout_i . out_i     ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale * sum_j ds_ij k_j      dk_j = scale * sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i

Here the row sums delta and the dQ pass, which walks the forward's lists; the dK/dV pass is in backward_dkv.py. Shapes
and names: common.py; Tp is T rounded up to whole query tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..work import num_slots
from .backward_dkv import dkv_launch, new_partials
from .common import (
    Launch,
    TileConfig,
    arch_of,
    backward_args,
    cap_grad,
    capped,
    cdiv,
    dot,
    head_of,
    load_tile,
    narrow,
    padded,
    rows,
    store_rows,
    strides,
    tile_of,
    tma_fits,
    visible,
)
from .prepared import launch, launches_of
from .split import sum_launch

_DELTA_TILE = TileConfig(block_m=64, block_n=0, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def tree_attention_bwd_delta_kernel(
    dout,
    out,
    lse,
    delta,
    lse2,
    dout_strides,
    out_strides,
    num_tokens,
    num_heads,
    num_padded,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
):
    """delta and base-2 lse as [Hq, Tp], so that the passes read them in contiguous runs; rows from T on get p = 0."""
    i_program = tl.program_id(0)
    i_h = (i_program % num_heads).to(tl.int64)
    start = (i_program // num_heads).to(tl.int64) * BM
    o_row = tl.arange(0, BM)
    num_rows = num_tokens - start
    b_out = load_tile(
        head_of(out, i_h, out_strides, False), i_h, start, out_strides, num_tokens, BM, DV, BDV, True, False
    )
    b_dout = load_tile(
        head_of(dout, i_h, dout_strides, False), i_h, start, dout_strides, num_tokens, BM, DV, BDV, True, False
    )
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    b_lse = tl.load(lse + start * num_heads + i_h + o_row * num_heads, mask=o_row < num_rows, other=float("inf"))
    m_padded = start + o_row < num_padded
    tl.store(delta + i_h * num_padded + start + o_row, b_delta, mask=m_padded)
    tl.store(lse2 + i_h * num_padded + start + o_row, b_lse * 1.4426950408889634, mask=m_padded)


@triton.jit
def _dq_tiles(
    b_q,
    b_dout,
    b_dq,
    b_lse,
    b_delta,
    p_k,
    p_v,
    i_kv,
    subtree_end,
    q_indices,
    lo,
    hi,
    o_m,
    b_first,
    k_strides,
    v_strides,
    num_tokens,
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
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Loop over one class of key tiles: the entries [lo, hi) of the list."""
    o_row = tl.arange(0, BN)
    n_next = lo
    if TMA:
        # read one entry ahead, else the pipeline spends a stage on it; the pointer path has no registers left for that
        n_next = tl.load(q_indices + lo, mask=lo < hi, other=0) * BN
    for e in tl.range(lo, hi, num_stages=STAGES):
        if TMA:
            n0 = n_next
            n_next = tl.load(q_indices + e + 1, mask=e + 1 < hi, other=0) * BN
        else:
            n0 = tl.load(q_indices + e) * BN
        b_k = load_tile(p_k, i_kv, n0, k_strides, num_tokens, BN, D, BD, not FULL, TMA)
        b_v = load_tile(p_v, i_kv, n0, v_strides, num_tokens, BN, DV, BDV, not FULL, TMA)
        b_s = capped(dot(b_q, tl.trans(b_k), tl.zeros((BM, BN), tl.float32)), qk_scale, cap, HAS_CAP)
        b_p = tl.exp2(b_s - b_lse[:, None])
        if not FULL:
            o_n = n0 + o_row
            b_end = tl.load(subtree_end + o_n, mask=o_n < num_tokens, other=0)
            m_seen = visible(o_m[:, None], o_n[None, :], b_end[None, :], b_first[:, None], HAS_WINDOW)
            b_p = tl.where(m_seen, b_p, 0.0)
        if HAS_CAP:
            b_p = b_p * cap_grad(b_s, cap)
        b_dp = dot(b_dout, tl.trans(b_v), tl.zeros((BM, BN), tl.float32))
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(narrow(b_ds, b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def tree_attention_bwd_dq_kernel(
    q,
    k,
    v,
    dout,
    delta,
    lse2,
    dq,
    subtree_end,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    first,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    num_tokens,
    num_heads,
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
):
    """Loops over the key tiles of one query tile. Programs run longest list first, heads fastest."""
    i_program = tl.program_id(0)
    i_h = i_program % num_heads
    i_m = tl.load(q_order + i_program // num_heads)
    start_m = i_m.to(tl.int64) * BM
    o_row = tl.arange(0, BM)
    o_m = i_m * BM + o_row
    num_rows = num_tokens - i_m * BM

    i_head = i_h.to(tl.int64)
    i_kv = i_h // GROUP
    p_k = head_of(k, i_kv, k_strides, TMA)
    p_v = head_of(v, i_kv, v_strides, TMA)
    b_q = load_tile(head_of(q, i_h, q_strides, TMA), i_h, i_m * BM, q_strides, num_tokens, BM, D, BD, True, TMA)
    b_dout = load_tile(
        head_of(dout, i_h, dout_strides, TMA), i_h, i_m * BM, dout_strides, num_tokens, BM, DV, BDV, True, TMA
    )
    b_lse = tl.load(lse2 + i_head * num_padded + o_m)
    b_delta = tl.load(delta + i_head * num_padded + o_m)
    b_first = o_m
    if HAS_WINDOW:
        b_first = tl.load(first + o_m, mask=o_row < num_rows, other=0)

    b_dq = tl.zeros((BM, BD), tl.float32)
    lo = tl.load(q_offsets + i_m)
    mid = lo + tl.load(q_full + i_m)
    hi = tl.load(q_offsets + i_m + 1)
    # fmt: off
    b_dq = _dq_tiles(
        b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, i_kv, subtree_end, q_indices, lo, mid, o_m, b_first,
        k_strides, v_strides, num_tokens, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP, HAS_WINDOW, True,
        STAGES, TMA,
    )
    b_dq = _dq_tiles(
        b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, i_kv, subtree_end, q_indices, mid, hi, o_m, b_first,
        k_strides, v_strides, num_tokens, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP, HAS_WINDOW, False,
        STAGES, TMA,
    )
    # fmt: on
    p_dq = dq + start_m * dq_strides[0] + i_head * dq_strides[1]
    store_rows(p_dq, b_dq * scale, o_row, dq_strides[0], num_rows, D, BD)


def delta_launch(dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor, lse2: Tensor) -> Launch:
    """The launch that fills ``delta`` and ``lse2``, both [Hq, Tp]."""
    num_tokens, num_heads, value_dim = out.shape
    num_padded = delta.shape[1]
    args = dict(
        dout=dout,
        out=out,
        lse=lse,
        delta=delta,
        lse2=lse2,
        dout_strides=strides(dout),
        out_strides=strides(out),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_padded=num_padded,
        DV=value_dim,
        BDV=padded(value_dim),
        BM=_DELTA_TILE.block_m,
    )
    grid = (cdiv(num_padded, _DELTA_TILE.block_m) * num_heads,)
    return Launch(tree_attention_bwd_delta_kernel, grid, args, _DELTA_TILE)


def dq_launch(dq: Tensor, tile: TileConfig, lists: list[Tensor], **shared) -> Launch:
    """The dQ launch; ``lists`` as in the forward, ``shared`` are the other arguments of :func:`backward_args`."""
    *lists, first = lists
    args = backward_args(tile=tile, first=first, **shared)
    args.update(zip(("q_offsets", "q_indices", "q_full", "q_order"), lists, strict=True))
    num_tokens, num_heads, _ = dq.shape
    args.update(dq=dq, dq_strides=strides(dq), num_heads=num_heads)
    return Launch(tree_attention_bwd_dq_kernel, (cdiv(num_tokens, tile.block_m) * num_heads,), args, tile)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    dq_tiles: list[Tensor],
    dkv_tiles: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes and shapes of q, k, v; the tiles are the two passes' parts of the tile tensors."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    num_tokens, num_heads, _ = q.shape
    q, k, v, out, dout, lse = rows(q), rows(k), rows(v), rows(out), rows(dout), lse.contiguous()
    shape, *dq_lists = dq_tiles
    dkv_shape, *dkv_lists, items, parted = dkv_tiles
    dq_tile, dkv_tile = tile_of(shape), tile_of(dkv_shape)
    block = max(dq_tile.block_m, dkv_tile.block_m)
    delta, lse2 = torch.empty(
        (2, num_heads, cdiv(num_tokens, block) * block), dtype=torch.float32, device=q.device
    ).unbind()
    num_partials = num_slots(num_tokens, dkv_tile.block_n, items, parted)
    partials = new_partials(dk, dv, dkv_tile, num_partials) if num_partials else None

    def shared() -> dict[str, Any]:
        return dict(
            dout=dout,
            q=q,
            k=k,
            v=v,
            delta=delta,
            lse2=lse2,
            subtree_end=subtree_end,
            scale=scale,
            softcap=softcap,
            tma=tma_fits(arch_of(q.device), q, k, v, dout),
        )

    def make_dkv() -> Launch:
        return dkv_launch(dk, dv, dkv_tile, [*dkv_lists, items], partials, **shared())

    def make_delta() -> Launch:
        return delta_launch(dout, out, lse, delta, lse2)

    def make_dq() -> Launch:
        return dq_launch(dq, dq_tile, dq_lists, **shared())

    key = q.shape, k.shape, v.shape, q.dtype, scale, softcap
    of_dq, of_dkv = launches_of(shape), launches_of(dkv_shape)
    inputs = dict(dout=dout, q=q, k=k, v=v, delta=delta, lse2=lse2, subtree_end=subtree_end)
    grads = dict(dk=dk, dv=dv)
    parts = dict(zip(("partial_dk", "partial_dv"), partials, strict=True)) if partials else {}
    launch(of_dq, ("delta", *key), make_delta, dict(dout=dout, out=out, lse=lse, delta=delta, lse2=lse2))
    launch(of_dq, ("dq", *key), make_dq, inputs | dict(dq=dq))
    launch(of_dkv, ("dkv", *key), make_dkv, inputs | grads | parts)
    if partials:
        partial_dk, partial_dv = partials

        def make_sum() -> Launch:
            return sum_launch(partial_dk, partial_dv, parted, dk, dv, scale)

        launch(of_dkv, ("sum", *key), make_sum, parts | grads)
    return dq, dk, dv
