"""Triton forward: one program per (query tile, head) walks its CSR list of key tiles with an online softmax.

    s_ij = q_i . k_j * scale (soft-capped)      m_i = max_j s_ij      l_i = sum_j exp(s_ij - m_i) (+ exp(sink - m_i))
    out_i = sum_j exp(s_ij - m_i) v_j / l_i     lse_i = m_i + log l_i

The list gives the full tiles first (no mask arithmetic), then the partial ones. Shapes and names: common.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Launch,
    TileConfig,
    arch_of,
    capped,
    cdiv,
    descriptor,
    dot,
    head_of,
    load_tile,
    narrow,
    padded,
    rows,
    score_scales,
    store_rows,
    strides,
    tile_of,
    tma_fits,
    visible,
)
from .prepared import launch, launches_of


@triton.jit
def _fwd_tiles(
    b_q,
    b_acc,
    b_l,
    b_m,
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
        b_s = dot(b_q, tl.trans(b_k), tl.zeros((BM, BN), tl.float32))
        if FULL and not HAS_CAP:
            # qk_scale >= 0: scaling the row maximum alone leaves one fused multiply-add per score
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
            b_p = tl.exp2(b_s * qk_scale - b_m_new[:, None])
            b_shift = b_m_new
        else:
            b_s = capped(b_s, qk_scale, cap, HAS_CAP)
            if not FULL:
                o_n = n0 + o_row
                b_end = tl.load(subtree_end + o_n, mask=o_n < num_tokens, other=0)
                m_seen = visible(o_m[:, None], o_n[None, :], b_end[None, :], b_first[:, None], HAS_WINDOW)
                b_s = tl.where(m_seen, b_s, float("-inf"))
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            # a row may have met no visible key yet: subtract 0 rather than -inf
            b_shift = b_m_new if FULL else tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
            b_p = tl.exp2(b_s - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_v = load_tile(p_v, i_kv, n0, v_strides, num_tokens, BN, DV, BDV, not FULL, TMA)
        b_acc = dot(narrow(b_p, b_v.dtype), b_v, b_acc * b_alpha[:, None])
        b_m = b_m_new
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def tree_attention_fwd_kernel(
    q,
    k,
    v,
    sinks,
    out,
    lse,
    subtree_end,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    first,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    num_tokens,
    num_heads,
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
    b_first = o_m
    if HAS_WINDOW:
        b_first = tl.load(first + o_m, mask=o_row < num_rows, other=0)

    b_acc = tl.zeros((BM, BDV), tl.float32)
    b_l = tl.zeros((BM,), tl.float32)
    b_m = tl.full((BM,), float("-inf"), tl.float32)
    lo = tl.load(q_offsets + i_m)
    mid = lo + tl.load(q_full + i_m)
    hi = tl.load(q_offsets + i_m + 1)
    # fmt: off
    b_acc, b_l, b_m = _fwd_tiles(
        b_q, b_acc, b_l, b_m, p_k, p_v, i_kv, subtree_end, q_indices, lo, mid, o_m, b_first,
        k_strides, v_strides, num_tokens, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP, HAS_WINDOW, True,
        STAGES, TMA,
    )
    b_acc, b_l, b_m = _fwd_tiles(
        b_q, b_acc, b_l, b_m, p_k, p_v, i_kv, subtree_end, q_indices, mid, hi, o_m, b_first,
        k_strides, v_strides, num_tokens, qk_scale, cap, D, DV, BD, BDV, BM, BN, HAS_CAP, HAS_WINDOW, False,
        STAGES, TMA,
    )
    # fmt: on
    if sinks is not None:
        b_sink = tl.load(sinks + i_h).to(tl.float32) * 1.4426950408889634
        b_m_new = tl.maximum(b_m, b_sink)
        b_alpha = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_alpha + tl.exp2(b_sink - b_m_new)
        b_acc = b_acc * b_alpha[:, None]
        b_m = b_m_new
    # rows past T met no key
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    b_acc = b_acc / b_l[:, None]
    store_rows(
        out + start_m * out_strides[0] + i_head * out_strides[1], b_acc, o_row, out_strides[0], num_rows, DV, BDV
    )
    p_lse = lse + start_m * num_heads + i_h + o_row * num_heads
    tl.store(p_lse, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=o_row < num_rows)


def fwd_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    tile: TileConfig,
    lists: list[Tensor],
    scale: float,
    softcap: float,
    tma: bool,
) -> Launch:
    """The forward launch; ``lists`` are q_offsets, q_indices, q_full, q_order, first of the tile sizes in ``tile``,
    first (work.first_visible) empty without a window."""
    num_tokens, num_heads, head_dim = q.shape
    qk_scale, cap = score_scales(scale, softcap)
    args = dict(
        zip(("q_offsets", "q_indices", "q_full", "q_order", "first"), lists, strict=True),
        q=descriptor(q, tile.block_m) if tma else q,
        k=descriptor(k, tile.block_n) if tma else k,
        v=descriptor(v, tile.block_n) if tma else v,
        sinks=sinks,
        out=out,
        lse=lse,
        subtree_end=subtree_end,
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        out_strides=strides(out),
        num_tokens=num_tokens,
        num_heads=num_heads,
        qk_scale=qk_scale,
        cap=cap,
        GROUP=num_heads // k.shape[1],
        D=head_dim,
        DV=v.shape[2],
        BD=padded(head_dim),
        BDV=padded(v.shape[2]),
        BM=tile.block_m,
        BN=tile.block_n,
        HAS_CAP=softcap > 0,
        HAS_WINDOW=lists[-1].shape[0] > 0,
        STAGES=tile.num_stages,
        TMA=tma,
    )
    return Launch(tree_attention_fwd_kernel, (cdiv(num_tokens, tile.block_m) * num_heads,), args, tile)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    tiles: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [T,Hq,Dv] in q's dtype, lse [T,Hq] fp32 (natural log); ``tiles`` are the forward's part of all tiles."""
    num_tokens, num_heads, _ = q.shape
    out = torch.empty((num_tokens, num_heads, v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device)
    if scale < 0:
        # the kernel takes row maxima before scaling; the sign moves to q exactly
        q, scale = -q, -scale
    q, k, v = rows(q), rows(k), rows(v)
    shape, *lists = tiles
    changing = dict(q=q, k=k, v=v, out=out, lse=lse, subtree_end=subtree_end)
    if sinks is not None:
        changing["sinks"] = sinks = sinks.contiguous()

    def make() -> Launch:
        tma = tma_fits(arch_of(q.device), q, k, v)
        return fwd_launch(q, k, v, sinks, out, lse, subtree_end, tile_of(shape), lists, scale, softcap, tma)

    key = "fwd", q.shape, k.shape, v.shape, q.dtype, scale, softcap, None if sinks is None else sinks.dtype
    launch(launches_of(shape), key, make, changing)
    return out, lse
