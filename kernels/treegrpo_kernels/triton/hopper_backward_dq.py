"""dQ for Hopper (sm_90): one producer warp and two consumer warpgroups, written in Gluon.

    p_ij = exp(s_ij - lse_i)     dp_ij = dout_i . v_j     ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale * sum_j ds_ij k_j

The walk is the forward's: the producer streams the key tiles of each query tile's list through rings, each consumer
owns 64 query rows. The product that adds a tile to dQ runs while the next tile's scores begin. Sums run in a fixed
order: the same inputs give the same bits.

Shape legend: T tokens, Tp tokens rounded up to whole tiles, Hq/Hkv query and key/value heads, D head dim, BM = 128
query rows, BN key rows of a tile. Names as in common.py; s_ shared memory, bars_ mbarriers.
"""

from __future__ import annotations

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
from .hopper_common import HopperLaunch, HopperTile, descriptor, load_box, num_rounds, store_box, visible, work_of


@gluon.jit
def _step(
    b_dq,
    b_ds,
    s_q,
    s_dout,
    s_k,
    s_v,
    bars_k,
    bars_v,
    bars_k_free,
    bars_v_free,
    span,
    n0,
    ring,
    o_q,
    b_first,
    b_lse,
    b_delta,
    qk_scale,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Score gradients of ring entry ``ring`` while those of the entry before it, ``b_ds``, meet its keys."""
    o_k = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
    b_span = o_k
    if MASKED:
        b_span = gl.load(span + o_k)
    slot = ring % STAGES
    phase = (ring // STAGES) & 1
    last = (ring + STAGES - 1) % STAGES
    b_zero = gl.zeros([o_q.shape[0], BN], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(bars_k.index(slot), phase)
    b_s = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(bars_v.index(slot), phase)
    b_dp = warpgroup_mma(s_dout, s_v.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dq = warpgroup_mma(b_ds, s_k.index(last), b_dq, is_async=True)
    b_s = warpgroup_mma_wait(2, deps=[b_s])
    b_p = gl.exp2(b_s * qk_scale - b_lse[:, None])
    if MASKED:
        m_seen = visible(o_q[:, None], o_k[None, :], b_span[None, :], b_first[:, None], HAS_WINDOW)
        b_p = gl.where(m_seen, b_p, 0.0)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    mbarrier.arrive(bars_v_free.index(slot), count=1)
    b_ds32 = b_p * (b_dp - b_delta[:, None])
    # passes at once; its branch keeps ptxas from moving the next wait above the arithmetic
    mbarrier.wait(bars_k.index(slot), phase)
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    mbarrier.arrive(bars_k_free.index(last), count=1)
    return b_dq, gl.convert_layout(b_ds32.to(s_k.dtype), P_LAYOUT, assert_trivial=True)


@gluon.jit
def _consumer(
    I_WG: gl.constexpr,
    s_q,
    s_dout,
    s_k,
    s_v,
    bars,
    dq_desc,
    lse2,
    delta,
    span,
    first,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    num_padded,
    num_heads,
    num_work,
    scale,
    qk_scale,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """64 query rows of every work item of this program."""
    bars_q, bars_q_free, bars_k, bars_k_free, bars_v, bars_v_free = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = BM // 2
    o_row = I_WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    s_q_own = s_q.index(I_WG)
    s_dout_own = s_dout.index(I_WG)
    ring = 0
    for item in range(num_rounds(num_work)):
        work = work_of(item)
        i_m = gl.load(q_order + work // num_heads)
        i_h = work % num_heads
        lo = gl.load(q_offsets + i_m)
        hi = gl.load(q_offsets + i_m + 1)
        mid = lo + gl.load(q_full + i_m)
        o_q = i_m * BM + o_row
        b_first = o_q
        if HAS_WINDOW:
            b_first = gl.load(first + o_q)
        p_row = i_h.to(gl.int64) * num_padded + o_q
        b_lse = gl.load(lse2 + p_row)
        b_delta = gl.load(delta + p_row)
        b_dq = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
        # the tile on the diagonal is never full, so every list has a partial tile to begin with
        o_k = gl.load(q_indices + mid) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        b_span = gl.load(span + o_k)
        n0 = gl.load(q_indices + gl.minimum(mid + 1, hi - 1)) * BN
        mbarrier.wait(bars_q.index(I_WG), item & 1)
        slot = ring % STAGES
        phase = (ring // STAGES) & 1
        b_zero = gl.zeros([ROWS, BN], gl.float32, layout=S_LAYOUT)
        mbarrier.wait(bars_k.index(slot), phase)
        b_s = warpgroup_mma(s_q_own, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(bars_v.index(slot), phase)
        b_dp = warpgroup_mma(s_dout_own, s_v.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s, b_dp = warpgroup_mma_wait(0, deps=[b_s, b_dp])
        mbarrier.arrive(bars_v_free.index(slot), count=1)
        b_p = gl.exp2(b_s * qk_scale - b_lse[:, None])
        m_seen = visible(o_q[:, None], o_k[None, :], b_span[None, :], b_first[:, None], HAS_WINDOW)
        b_p = gl.where(m_seen, b_p, 0.0)
        b_ds32 = b_p * (b_dp - b_delta[:, None])
        b_ds = gl.convert_layout(b_ds32.to(s_k.dtype), P_LAYOUT, assert_trivial=True)
        ring += 1
        # fmt: off
        for e in range(mid + 1, hi):
            n0_next = gl.load(q_indices + gl.minimum(e + 1, hi - 1)) * BN
            b_dq, b_ds = _step(
                b_dq, b_ds, s_q_own, s_dout_own, s_k, s_v, bars_k, bars_v, bars_k_free, bars_v_free, span, n0, ring,
                o_q, b_first, b_lse, b_delta, qk_scale, BN, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, True,
            )
            n0 = n0_next
            ring += 1
        for _ in range(lo, mid):
            b_dq, b_ds = _step(
                b_dq, b_ds, s_q_own, s_dout_own, s_k, s_v, bars_k, bars_v, bars_k_free, bars_v_free, span, n0, ring,
                o_q, b_first, b_lse, b_delta, qk_scale, BN, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, False,
            )
            ring += 1
        # fmt: on
        last = (ring + STAGES - 1) % STAGES
        b_dq = warpgroup_mma(b_ds, s_k.index(last), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=[b_dq])
        mbarrier.arrive(bars_k_free.index(last), count=1)
        # every product has read Q by now: its buffer carries the result out
        s_q_own.store((b_dq * scale).to(s_q.dtype))
        fence_async_shared()
        store_box(dq_desc, [i_m * BM + I_WG * ROWS, i_h * D], s_q_own)
        tma.store_wait(0)
        mbarrier.arrive(bars_q_free.index(I_WG), count=1)


@gluon.jit
def _producer(
    s_q,
    s_dout,
    s_k,
    s_v,
    bars,
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    num_heads,
    num_work,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the query buffers and the key and value rings, in the order in which the consumers read them."""
    bars_q, bars_q_free, bars_k, bars_k_free, bars_v, bars_v_free = bars
    ROWS: gl.constexpr = BM // 2
    ring = 0
    for item in range(num_rounds(num_work)):
        work = work_of(item)
        i_m = gl.load(q_order + work // num_heads)
        i_h = work % num_heads
        i_kv = i_h // GROUP
        lo = gl.load(q_offsets + i_m)
        num_tiles = gl.load(q_offsets + i_m + 1) - lo
        num_full = gl.load(q_full + i_m)
        for i_wg in gl.static_range(2):
            bar = bars_q.index(i_wg)
            mbarrier.wait(bars_q_free.index(i_wg), (item & 1) ^ 1)
            mbarrier.expect(bar, q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
            load_box(q_desc, [i_m * BM + i_wg * ROWS, i_h * D], bar, s_q.index(i_wg))
            load_box(dout_desc, [i_m * BM + i_wg * ROWS, i_h * D], bar, s_dout.index(i_wg))
        for j in range(num_tiles):
            # the partial tiles, behind the full ones in the list, come first
            e = gl.where(j < num_tiles - num_full, lo + num_full + j, lo + j - (num_tiles - num_full))
            n0 = gl.load(q_indices + e) * BN
            slot = ring % STAGES
            free = ((ring // STAGES) & 1) ^ 1
            mbarrier.wait(bars_k_free.index(slot), free)
            mbarrier.expect(bars_k.index(slot), k_desc.block_type.nbytes)
            load_box(k_desc, [n0, i_kv * D], bars_k.index(slot), s_k.index(slot))
            mbarrier.wait(bars_v_free.index(slot), free)
            mbarrier.expect(bars_v.index(slot), v_desc.block_type.nbytes)
            load_box(v_desc, [n0, i_kv * D], bars_v.index(slot), s_v.index(slot))
            ring += 1


@gluon.jit(do_not_specialize=["num_padded", "num_heads", "num_work"])
def tree_attention_bwd_dq_hopper_kernel(
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    dq_desc,
    lse2,
    delta,
    span,
    first,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    num_padded,
    num_heads,
    num_work,
    scale,
    qk_scale,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):
    """Allocates the buffers and barriers and splits into two consumers and a producer."""
    ROWS: gl.constexpr = BM // 2
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    s_q = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    s_dout = gl.allocate_shared_memory(dout_desc.dtype, [2, ROWS, D], dout_desc.layout)
    s_k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    s_v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, D], v_desc.layout)
    bars_q = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    bars_q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    bars_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(bars_q.index(i), count=1)
        mbarrier.init(bars_q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars_k.index(i), count=1)
        mbarrier.init(bars_v.index(i), count=1)
        # both consumers read every tile
        mbarrier.init(bars_k_free.index(i), count=2)
        mbarrier.init(bars_v_free.index(i), count=2)
    bars = (bars_q, bars_q_free, bars_k, bars_k_free, bars_v, bars_v_free)
    # fmt: off
    gl.warp_specialize(
        [
            (_consumer, (0, s_q, s_dout, s_k, s_v, bars, dq_desc, lse2, delta, span, first, q_offsets, q_indices,
                         q_full, q_order, num_padded, num_heads, num_work, scale, qk_scale, BM, BN, D, STAGES,
                         HAS_WINDOW)),
            (_consumer, (1, s_q, s_dout, s_k, s_v, bars, dq_desc, lse2, delta, span, first, q_offsets, q_indices,
                         q_full, q_order, num_padded, num_heads, num_work, scale, qk_scale, BM, BN, D, STAGES,
                         HAS_WINDOW)),
            (_producer, (s_q, s_dout, s_k, s_v, bars, q_desc, dout_desc, k_desc, v_desc, q_offsets, q_indices, q_full,
                         q_order, num_heads, num_work, GROUP, BM, BN, D, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
    # fmt: on


def dq_launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    lse2: Tensor,
    delta: Tensor,
    tile: HopperTile,
    lists: list[Tensor],
    scale: float,
) -> HopperLaunch:
    """The dQ launch; ``lists`` as in the forward; lse2 (base 2) and delta are [Hq, Tp]."""
    num_tokens, num_heads, head_dim = q.shape
    rows = tile.block_m // 2
    num_work = cdiv(num_tokens, tile.block_m) * num_heads
    args = dict(
        zip(("q_offsets", "q_indices", "q_full", "q_order", "span", "first"), lists, strict=True),
        q_desc=descriptor(q, rows),
        dout_desc=descriptor(dout, rows),
        k_desc=descriptor(k, tile.block_n),
        v_desc=descriptor(v, tile.block_n),
        dq_desc=descriptor(dq, rows),
        lse2=lse2,
        delta=delta,
        num_padded=delta.shape[1],
        num_heads=num_heads,
        num_work=num_work,
        scale=scale,
        qk_scale=scale * LOG2E,
        GROUP=num_heads // k.shape[1],
        BM=tile.block_m,
        BN=tile.block_n,
        D=head_dim,
        STAGES=tile.num_stages,
        HAS_WINDOW=lists[-1].shape[0] > 0,
        CONSUMER_REGS=tile.consumer_regs,
        PRODUCER_REGS=tile.producer_regs,
    )
    return HopperLaunch(tree_attention_bwd_dq_hopper_kernel, (tile.num_programs(num_work, q.device),), args)
