"""dK and dV for Hopper (sm_90): one producer warp and two consumer warpgroups, written in Gluon.

    p_ij = exp(s_ij - lse_i)     dp_ij = dout_i . v_j     ds_ij = p_ij (dp_ij - delta_i)
    dk_j = scale * sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i

A program is one key tile of one key/value head, or with SPLIT a piece of its query range (work.py): few key/value
heads leave too few programs to even out a root's long ranges. Programs run longest query range first, and walk it as
hopper_dkv_walk.py says. Each consumer owns 64 of the keys and keeps their dK and dV in registers; where these are too
many (D = 256), one keeps dK and one dV: hopper_dkv_wide.py. Scores are held transposed, [keys, queries], as operands of
the next product. Sums run in a fixed order: the same inputs give the same bits.

Shape legend: T tokens, Tp tokens rounded up to whole tiles, Hq/Hkv query and key/value heads, D head dim, BM query rows
of a tile, BN key rows, 128 or 64 (D = 256). Names as in common.py; s_ shared memory, bars_ mbarriers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import LOG2E, cdiv
from .hopper_common import HopperLaunch, HopperTile, descriptor, store_box
from .hopper_dkv_walk import BOX_ROWS, ROWS, probabilities, producer, work_of_program
from .hopper_dkv_wide import wide_consumer


@gluon.jit
def _step(
    b_dk,
    b_dv,
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
    """Adds one query tile's part."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    slot = ring % STAGES
    phase = (ring // STAGES) & 1
    mbarrier.wait(bars_q.index(slot), phase)
    b_zero = gl.zeros([o_k.shape[0], BM], gl.float32, layout=S_LAYOUT)
    b_s = warpgroup_mma(s_k, s_q.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(s_v, s_dout.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_lse = s_lse.index(slot).load(COLUMN)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = probabilities(b_s, b_lse, s_row, s_first, slot, o_k, b_span, qk_scale, HAS_WINDOW, COLUMN, MASKED)
    b_p16 = gl.convert_layout(b_p.to(s_q.dtype), P_LAYOUT, assert_trivial=True)
    b_dv = warpgroup_mma(b_p16, s_dout.index(slot), b_dv, is_async=True)
    b_delta = s_delta.index(slot).load(COLUMN)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_ds16 = gl.convert_layout(b_ds.to(s_q.dtype), P_LAYOUT, assert_trivial=True)
    b_dk = warpgroup_mma(b_ds16, s_q.index(slot), b_dk, is_async=True)
    b_dk, b_dv = warpgroup_mma_wait(0, deps=[b_dk, b_dv])
    mbarrier.arrive(bars_q_free.index(slot), count=1)
    return b_dk, b_dv


@gluon.jit
def _consumer(
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
    """64 keys of a key tile."""
    s_k, s_v, s_q, s_dout, s_lse, s_delta, s_row, s_first = buffers
    bars_kv, bars_q, bars_q_free, _bar_k_read = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    o_row = I_WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    s_k_own = s_k.index(I_WG)
    s_v_own = s_v.index(I_WG)
    ring = 0
    i_n, i_kv, lo, a, b, hi = work_of_program(
        kv_max, kv_min, work, kv_offsets, num_tokens, num_kv_heads, BM, BN, SPLIT, HAS_WINDOW
    )
    o_k = i_n * BN + o_row
    b_span = gl.load(span + o_k)
    b_dk = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
    b_dv = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
    mbarrier.wait(bars_kv.index(I_WG), 0)
    # fmt: off
    for _ in range(GROUP * (b - a)):
        b_dk, b_dv = _step(
            b_dk, b_dv, s_k_own, s_v_own, s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, ring,
            o_k, b_span, qk_scale, BM, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, False,
        )
        ring += 1
    for _ in range(GROUP * (a - lo + hi - b)):
        b_dk, b_dv = _step(
            b_dk, b_dv, s_k_own, s_v_own, s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, ring,
            o_k, b_span, qk_scale, BM, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, True,
        )
        ring += 1
    # fmt: on
    if SPLIT:
        # read here, for a register would have to carry it through the loops
        partial = gl.load(work + gl.program_id(0) // num_kv_heads * 4 + 3)
        if partial >= 0:
            row = (partial.to(gl.int64) * num_kv_heads + i_kv) * BN + I_WG * ROWS
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
            o_out = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O_LAYOUT))[:, None] * D + o_d[None, :]
            gl.store(partial_dk + row * D + o_out, b_dk)
            gl.store(partial_dv + row * D + o_out, b_dv)
        else:
            _store_whole(b_dk, b_dv, s_k_own, s_v_own, dk_desc, dv_desc, i_n * BN + I_WG * ROWS, i_kv * D, scale)
    else:
        _store_whole(b_dk, b_dv, s_k_own, s_v_own, dk_desc, dv_desc, i_n * BN + I_WG * ROWS, i_kv * D, scale)


@gluon.jit
def _store_whole(b_dk, b_dv, s_k, s_v, dk_desc, dv_desc, row, column, scale):
    """Every product has read K and V by now: their buffers carry the results out."""
    s_k.store((b_dk * scale).to(s_k.dtype))
    s_v.store(b_dv.to(s_v.dtype))
    fence_async_shared()
    store_box(dk_desc, [row, column], s_k)
    store_box(dv_desc, [row, column], s_v)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "num_padded", "num_kv_heads"])
def tree_attention_bwd_dkv_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dk_desc,
    dv_desc,
    partial_dk,
    partial_dv,
    lse2,
    delta,
    span,
    first,
    kv_max,
    kv_min,
    work,
    kv_offsets,
    kv_indices,
    num_tokens,
    num_padded,
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
    CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):
    """Allocates the buffers and barriers and splits into two consumers and a producer."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_k = gl.allocate_shared_memory(k_desc.dtype, [BN // ROWS, ROWS, D], k_desc.layout)
    s_v = gl.allocate_shared_memory(v_desc.dtype, [BN // ROWS, ROWS, D], v_desc.layout)
    s_q = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BM, D], q_desc.layout)
    s_dout = gl.allocate_shared_memory(dout_desc.dtype, [STAGES, BM, D], dout_desc.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROW)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ROW)
    s_row = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROW)
    s_first = s_row
    if HAS_WINDOW:
        s_first = gl.allocate_shared_memory(gl.int32, [STAGES, BM], ROW)
    bars_kv = gl.allocate_shared_memory(gl.int64, [BN // ROWS, 1], BAR)
    bars_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(BN // ROWS):
        mbarrier.init(bars_kv.index(i), count=1)
    for i in gl.static_range(STAGES):
        # one arrival announces the bytes that TMA brings, one what the producer itself wrote
        mbarrier.init(bars_q.index(i), count=2)
        mbarrier.init(bars_q_free.index(i), count=2)
    # only consumers that share K tell each other
    bar_k_read = bars_kv
    if BN == ROWS:
        bar_k_read = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
        mbarrier.init(bar_k_read.index(0), count=1)
    bars = (bars_kv, bars_q, bars_q_free, bar_k_read)
    buffers = (s_k, s_v, s_q, s_dout, s_lse, s_delta, s_row, s_first)
    # Gluon takes no function chosen by an expression, and a tuple bound to a name loses its constants: hence two lists
    # fmt: off
    if BN == ROWS:
        gl.warp_specialize(
            [
                (wide_consumer, (0, buffers, bars, dk_desc, dv_desc, partial_dk, partial_dv, span, kv_max, kv_min, work,
                                 kv_offsets, num_tokens, num_kv_heads, scale, qk_scale, GROUP, BM, BN, D, STAGES, SPLIT,
                                 HAS_WINDOW)),
                (wide_consumer, (1, buffers, bars, dk_desc, dv_desc, partial_dk, partial_dv, span, kv_max, kv_min, work,
                                 kv_offsets, num_tokens, num_kv_heads, scale, qk_scale, GROUP, BM, BN, D, STAGES, SPLIT,
                                 HAS_WINDOW)),
                (producer, (buffers, bars, q_desc, k_desc, v_desc, dout_desc, lse2, delta, first, kv_max, kv_min, work,
                            kv_offsets, kv_indices, num_tokens, num_padded, num_kv_heads, GROUP, BM, BN, D, STAGES,
                            SPLIT, HAS_WINDOW)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, buffers, bars, dk_desc, dv_desc, partial_dk, partial_dv, span, kv_max, kv_min, work,
                             kv_offsets, num_tokens, num_kv_heads, scale, qk_scale, GROUP, BM, BN, D, STAGES, SPLIT,
                             HAS_WINDOW)),
                (_consumer, (1, buffers, bars, dk_desc, dv_desc, partial_dk, partial_dv, span, kv_max, kv_min, work,
                             kv_offsets, num_tokens, num_kv_heads, scale, qk_scale, GROUP, BM, BN, D, STAGES, SPLIT,
                             HAS_WINDOW)),
                (producer, (buffers, bars, q_desc, k_desc, v_desc, dout_desc, lse2, delta, first, kv_max, kv_min, work,
                            kv_offsets, kv_indices, num_tokens, num_padded, num_kv_heads, GROUP, BM, BN, D, STAGES,
                            SPLIT, HAS_WINDOW)),
            ],
            [4, 1],
            [CONSUMER_REGS, PRODUCER_REGS],
        )
    # fmt: on


def dkv_launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    lse2: Tensor,
    delta: Tensor,
    tile: HopperTile,
    lists: list[Tensor],
    scale: float,
    partials: tuple[Tensor, Tensor] | None = None,
) -> HopperLaunch:
    """The dK/dV launch; lse2 (base 2) and delta are [Hq, Tp].

    ``lists`` are kv_max, kv_min, work, span, first, kv_offsets, kv_indices, the last three empty without a window.
    ``work`` are key tiles in order, or with ``partials`` (:func:`new_partials`) the items of work.work_items.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    partial_dk, partial_dv = partials or (None, None)
    args = dict(
        zip(("kv_max", "kv_min", "work", "span", "first", "kv_offsets", "kv_indices"), lists, strict=True),
        q_desc=descriptor(q, tile.block_m),
        k_desc=descriptor(k, BOX_ROWS),
        v_desc=descriptor(v, BOX_ROWS),
        dout_desc=descriptor(dout, tile.block_m),
        dk_desc=descriptor(dk, BOX_ROWS),
        dv_desc=descriptor(dv, BOX_ROWS),
        partial_dk=partial_dk,
        partial_dv=partial_dv,
        lse2=lse2,
        delta=delta,
        num_tokens=num_tokens,
        num_padded=delta.shape[1],
        num_kv_heads=num_kv_heads,
        scale=scale,
        qk_scale=scale * LOG2E,
        GROUP=q.shape[1] // num_kv_heads,
        BM=tile.block_m,
        BN=tile.block_n,
        D=head_dim,
        STAGES=tile.num_stages,
        SPLIT=partials is not None,
        HAS_WINDOW=lists[4].shape[0] > 0,
        CONSUMER_REGS=tile.consumer_regs,
        PRODUCER_REGS=tile.producer_regs,
    )
    num_work = cdiv(num_tokens, tile.block_n) if partials is None else lists[2].shape[0]
    return HopperLaunch(tree_attention_bwd_dkv_hopper_kernel, (num_work * num_kv_heads,), args)


def new_partials(k: Tensor, tile: HopperTile, num_slots: int) -> tuple[Tensor, Tensor]:
    """Uninitialised float32 partials of dK and dV, each [slots, Hkv, BN, D]."""
    dk, dv = k.new_empty((2, num_slots, k.shape[1], tile.block_n, k.shape[2]), dtype=torch.float32).unbind()
    return dk, dv
