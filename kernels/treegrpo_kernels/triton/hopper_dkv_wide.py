"""The consumers of dK/dV on Hopper for head dims over 128, where dK and dV of 64 keys fill two warpgroups' registers.

One warpgroup keeps dV, the other dK, both of the same 64 keys. Each computes the scores for itself, one product of five
more than the other kernels need, rather than wait for the other at every tile.

Shape legend: T tokens, D head dim (256), BM query rows of a tile, BN = 64 key rows. Names as in common.py; s_ shared
memory, bars_ mbarriers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import store_box
from .hopper_dkv_walk import ROWS, probabilities, work_of_program


@gluon.jit
def _step(
    OF_K: gl.constexpr,
    b_sum,
    s_k,
    s_v,
    s_q,
    s_dout,
    s_lse,
    s_delta,
    s_row,
    s_first,
    bars_q,
    bars_q_free,
    ring,
    o_k,
    b_span,
    qk_scale,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Adds one query tile's part to dK or to dV."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    slot = ring % STAGES
    mbarrier.wait(bars_q.index(slot), (ring // STAGES) & 1)
    b_zero = gl.zeros([ROWS, BM], gl.float32, layout=S_LAYOUT)
    b_s = warpgroup_mma(s_k, s_q.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_lse = s_lse.index(slot).load(COLUMN)
    if OF_K:
        b_dp = warpgroup_mma(s_v, s_dout.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_p = probabilities(b_s, b_lse, s_row, s_first, slot, o_k, b_span, qk_scale, HAS_WINDOW, COLUMN, MASKED)
        b_delta = s_delta.index(slot).load(COLUMN)
        b_dp = warpgroup_mma_wait(0, deps=[b_dp])
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_ds16 = gl.convert_layout(b_ds.to(s_q.dtype), P_LAYOUT, assert_trivial=True)
        b_sum = warpgroup_mma(b_ds16, s_q.index(slot), b_sum, is_async=True)
    else:
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        b_p = probabilities(b_s, b_lse, s_row, s_first, slot, o_k, b_span, qk_scale, HAS_WINDOW, COLUMN, MASKED)
        b_p16 = gl.convert_layout(b_p.to(s_q.dtype), P_LAYOUT, assert_trivial=True)
        b_sum = warpgroup_mma(b_p16, s_dout.index(slot), b_sum, is_async=True)
    b_sum = warpgroup_mma_wait(0, deps=[b_sum])
    mbarrier.arrive(bars_q_free.index(slot), count=1)
    return b_sum


@gluon.jit
def wide_consumer(
    I_WG: gl.constexpr,
    buffers,
    bars,
    dk_desc,
    dv_desc,
    partial_dk,
    partial_dv,
    span,
    kv_max,
    kv_min,
    work,
    kv_offsets,
    num_tokens,
    num_kv_heads,
    scale,
    qk_scale,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """dV of a key tile in the first warpgroup, dK in the second."""
    OF_K: gl.constexpr = I_WG == 1
    s_k, s_v, s_q, s_dout, s_lse, s_delta, s_row, s_first = buffers
    bars_kv, bars_q, bars_q_free, bar_k_read = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    s_k_tile = s_k.index(0)
    s_v_tile = s_v.index(0)
    ring = 0
    i_n, i_kv, lo, a, b, hi = work_of_program(
        kv_max, kv_min, work, kv_offsets, num_tokens, num_kv_heads, BM, BN, SPLIT, HAS_WINDOW
    )
    o_k = i_n * BN + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    b_span = gl.load(span + o_k)
    b_sum = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
    mbarrier.wait(bars_kv.index(0), 0)
    # fmt: off
    for _ in range(GROUP * (b - a)):
        b_sum = _step(
            OF_K, b_sum, s_k_tile, s_v_tile, s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, ring,
            o_k, b_span, qk_scale, BM, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, False,
        )
        ring += 1
    for _ in range(GROUP * (a - lo + hi - b)):
        b_sum = _step(
            OF_K, b_sum, s_k_tile, s_v_tile, s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, ring,
            o_k, b_span, qk_scale, BM, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, True,
        )
        ring += 1
    # fmt: on
    if OF_K:
        mbarrier.arrive(bar_k_read.index(0), count=1)
    if SPLIT:
        partial = gl.load(work + gl.program_id(0) // num_kv_heads * 4 + 3)
        if partial >= 0:
            row = (partial.to(gl.int64) * num_kv_heads + i_kv) * BN
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
            o_out = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O_LAYOUT))[:, None] * D + o_d[None, :]
            if OF_K:
                gl.store(partial_dk + row * D + o_out, b_sum)
            else:
                gl.store(partial_dv + row * D + o_out, b_sum)
        else:
            _store_whole(OF_K, b_sum, s_k_tile, s_v_tile, bar_k_read, dk_desc, dv_desc, i_n * BN, i_kv * D, scale)
    else:
        _store_whole(OF_K, b_sum, s_k_tile, s_v_tile, bar_k_read, dk_desc, dv_desc, i_n * BN, i_kv * D, scale)


@gluon.jit
def _store_whole(OF_K: gl.constexpr, b_sum, s_k, s_v, bar_k_read, dk_desc, dv_desc, row, column, scale):
    """dK leaves through the buffer of V, which nobody else reads; dV through that of K, once both have read it."""
    if OF_K:
        s_v.store((b_sum * scale).to(s_v.dtype))
        fence_async_shared()
        store_box(dk_desc, [row, column], s_v)
    else:
        mbarrier.wait(bar_k_read.index(0), 0)
        s_k.store(b_sum.to(s_k.dtype))
        fence_async_shared()
        store_box(dv_desc, [row, column], s_k)
    tma.store_wait(0)
