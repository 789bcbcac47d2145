"""Forward for Hopper (sm_90): one producer warp and two consumer warpgroups, written in Gluon.

    s_ij = q_i . k_j * scale      m_i = max_j s_ij      l_i = sum_j exp(s_ij - m_i) (+ exp(sink - m_i))
    out_i = sum_j exp(s_ij - m_i) v_j / l_i             lse_i = m_i + log l_i

The producer streams the key tiles of each query tile's CSR list through a ring in shared memory by TMA; each consumer
owns 64 query rows and keeps two products in flight: while the softmax of one key tile runs, the tensor cores multiply
the last tile's probabilities with its values. Partial tiles come first, so that the loop over full tiles has no mask
arithmetic. Programs are persistent and take (query tile, head) pairs longest first.

Shape legend: T tokens, Hq/Hkv query and key/value heads, D head dim (64, 128 or 256), BM = 128 query rows, BN key rows
of a tile. Names as in common.py; s_ shared memory, bars_ mbarriers.
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

LN2 = gl.constexpr(0.6931471805599453)
NEG_INF = gl.constexpr(float("-inf"))


@gluon.jit
def _softmax(b_s, b_m, b_l, o_q, o_k, b_span, b_first, qk_scale, HAS_WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """One online-softmax step on a tile's raw scores: (probabilities, alpha, row sums, row maxima), base 2."""
    if MASKED:
        m_seen = visible(o_q[:, None], o_k[None, :], b_span[None, :], b_first[:, None], HAS_WINDOW)
        b_s = gl.where(m_seen, b_s, NEG_INF)
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * qk_scale)
    b_shift = b_m_new
    if MASKED:
        # a row may have met no visible key yet: subtract 0 rather than -inf
        b_shift = gl.where(b_m_new == NEG_INF, 0.0, b_m_new)
    b_p = gl.exp2(b_s * qk_scale - b_shift[:, None])
    b_alpha = gl.exp2(b_m - b_shift)
    b_l = b_l * b_alpha + gl.sum(b_p, 1)
    return b_p, b_alpha, b_l, b_m_new


@gluon.jit
def _step(
    b_acc,
    b_p,
    b_l,
    b_m,
    s_q,
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
    qk_scale,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Scores of ring entry ``ring`` while the probabilities of the entry before it meet its values."""
    o_k = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
    b_span = o_k
    if MASKED:
        b_span = gl.load(span + o_k)
    slot = ring % STAGES
    last = (ring - 1) % STAGES
    mbarrier.wait(bars_k.index(slot), (ring // STAGES) & 1)
    b_zero = gl.zeros([o_q.shape[0], BN], gl.float32, layout=S_LAYOUT)
    b_s = warpgroup_mma(s_q, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(bars_v.index(last), ((ring - 1) // STAGES) & 1)
    b_acc = warpgroup_mma(b_p, s_v.index(last), b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(bars_k_free.index(slot), count=1)
    b_p32, b_alpha, b_l, b_m = _softmax(b_s, b_m, b_l, o_q, o_k, b_span, b_first, qk_scale, HAS_WINDOW, MASKED)
    # passes at once; its branch keeps ptxas from moving the next wait above the softmax, which would leave the
    # tensor cores idle meanwhile
    mbarrier.wait(bars_v.index(last), ((ring - 1) // STAGES) & 1)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    mbarrier.arrive(bars_v_free.index(last), count=1)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout), assert_trivial=True)[:, None]
    b_p = gl.convert_layout(b_p32.to(s_v.dtype), P_LAYOUT, assert_trivial=True)
    return b_acc, b_p, b_l, b_m


@gluon.jit
def _consumer(
    I_WG: gl.constexpr,
    s_q,
    s_k,
    s_v,
    bars,
    out_desc,
    lse,
    sinks,
    span,
    first,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    num_tokens,
    num_heads,
    num_work,
    qk_scale,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    Q_BUFFERS: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """64 query rows of every work item of this program."""
    bars_q, bars_q_free, bars_k, bars_k_free, bars_v, bars_v_free = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = BM // 2
    o_row = I_WG * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    ring = 0
    for item in range(num_rounds(num_work)):
        place = (item % Q_BUFFERS) * 2 + I_WG
        s_own = s_q.index(place)
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

        b_acc = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
        b_l = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        b_m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        # the tile on the diagonal is never full, so every list has a partial tile to begin with
        n0 = gl.load(q_indices + mid) * BN
        o_k = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        b_span = gl.load(span + o_k)
        n0 = gl.load(q_indices + gl.minimum(mid + 1, hi - 1)) * BN
        mbarrier.wait(bars_q.index(place), (item // Q_BUFFERS) & 1)
        slot = ring % STAGES
        mbarrier.wait(bars_k.index(slot), (ring // STAGES) & 1)
        b_zero = gl.zeros([ROWS, BN], gl.float32, layout=S_LAYOUT)
        b_s = warpgroup_mma(s_own, s_k.index(slot).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(bars_k_free.index(slot), count=1)
        if Q_BUFFERS == 2:
            # the last item's result has left its buffer by now
            tma.store_wait(0)
            mbarrier.arrive(bars_q_free.index(((item + 1) % 2) * 2 + I_WG), count=1, pred=item > 0)
        b_p32, _, b_l, b_m = _softmax(b_s, b_m, b_l, o_q, o_k, b_span, b_first, qk_scale, HAS_WINDOW, True)
        b_p = gl.convert_layout(b_p32.to(s_v.dtype), P_LAYOUT, assert_trivial=True)
        ring += 1
        # fmt: off
        for e in range(mid + 1, hi):
            b_acc, b_p, b_l, b_m = _step(
                b_acc, b_p, b_l, b_m, s_own, s_k, s_v, bars_k, bars_v, bars_k_free, bars_v_free, span, n0, ring, o_q,
                b_first, qk_scale, BN, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, True,
            )
            n0 = gl.load(q_indices + gl.minimum(e + 1, hi - 1)) * BN
            ring += 1
        for _ in range(lo, mid):
            b_acc, b_p, b_l, b_m = _step(
                b_acc, b_p, b_l, b_m, s_own, s_k, s_v, bars_k, bars_v, bars_k_free, bars_v_free, span, n0, ring, o_q,
                b_first, qk_scale, BN, STAGES, HAS_WINDOW, S_LAYOUT, P_LAYOUT, False,
            )
            ring += 1
        # fmt: on
        last = (ring - 1) % STAGES
        mbarrier.wait(bars_v.index(last), ((ring - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_p, s_v.index(last), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(bars_v_free.index(last), count=1)

        b_alpha = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
        if sinks is not None:
            b_sink = gl.load(sinks + i_h).to(gl.float32) / LN2
            b_m_new = gl.maximum(b_m, b_sink)
            b_alpha = gl.exp2(b_m - b_m_new)
            b_l = b_l * b_alpha + gl.exp2(b_sink - b_m_new)
            b_m = b_m_new
        # rows past T met no key
        b_l = gl.where(b_l == 0.0, 1.0, b_l)
        b_r = gl.convert_layout(b_alpha / b_l, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
        s_own.store((b_acc * b_r[:, None]).to(s_v.dtype))
        fence_async_shared()
        store_box(out_desc, [i_m * BM + I_WG * ROWS, i_h * D], s_own)
        gl.store(lse + o_q * num_heads + i_h, (b_m + gl.log2(b_l)) * LN2, mask=o_q < num_tokens)
        if Q_BUFFERS == 1:
            tma.store_wait(0)
            mbarrier.arrive(bars_q_free.index(I_WG), count=1)
    tma.store_wait(0)


@gluon.jit
def _producer(
    s_q,
    s_k,
    s_v,
    bars,
    q_desc,
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
    Q_BUFFERS: gl.constexpr,
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
            place = (item % Q_BUFFERS) * 2 + i_wg
            bar = bars_q.index(place)
            mbarrier.wait(bars_q_free.index(place), ((item // Q_BUFFERS) & 1) ^ 1)
            mbarrier.expect(bar, q_desc.block_type.nbytes)
            load_box(q_desc, [i_m * BM + i_wg * ROWS, i_h * D], bar, s_q.index(place))
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


@gluon.jit(do_not_specialize=["num_tokens", "num_heads", "num_work"])
def tree_attention_fwd_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse,
    sinks,
    span,
    first,
    q_offsets,
    q_indices,
    q_full,
    q_order,
    num_tokens,
    num_heads,
    num_work,
    qk_scale,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    Q_BUFFERS: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):
    """Allocates the buffers and barriers and splits into two consumers and a producer."""
    ROWS: gl.constexpr = BM // 2
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    s_q = gl.allocate_shared_memory(q_desc.dtype, [2 * Q_BUFFERS, ROWS, D], q_desc.layout)
    s_k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    s_v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, D], v_desc.layout)
    bars_q = gl.allocate_shared_memory(gl.int64, [2 * Q_BUFFERS, 1], BAR)
    bars_q_free = gl.allocate_shared_memory(gl.int64, [2 * Q_BUFFERS, 1], BAR)
    bars_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    bars_v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(2 * Q_BUFFERS):
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
            (_consumer, (0, s_q, s_k, s_v, bars, out_desc, lse, sinks, span, first, q_offsets, q_indices, q_full,
                         q_order, num_tokens, num_heads, num_work, qk_scale, BM, BN, D, STAGES, Q_BUFFERS, HAS_WINDOW)),
            (_consumer, (1, s_q, s_k, s_v, bars, out_desc, lse, sinks, span, first, q_offsets, q_indices, q_full,
                         q_order, num_tokens, num_heads, num_work, qk_scale, BM, BN, D, STAGES, Q_BUFFERS, HAS_WINDOW)),
            (_producer, (s_q, s_k, s_v, bars, q_desc, k_desc, v_desc, q_offsets, q_indices, q_full, q_order,
                         num_heads, num_work, GROUP, BM, BN, D, STAGES, Q_BUFFERS)),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
    # fmt: on


def fwd_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tile: HopperTile,
    lists: list[Tensor],
    scale: float,
) -> HopperLaunch:
    """The forward launch; ``lists`` are q_offsets, q_indices, q_full, q_order, span, first of the tile sizes in
    ``tile``, first empty without a window."""
    num_tokens, num_heads, head_dim = q.shape
    rows = tile.block_m // 2
    num_work = cdiv(num_tokens, tile.block_m) * num_heads
    args = dict(
        zip(("q_offsets", "q_indices", "q_full", "q_order", "span", "first"), lists, strict=True),
        q_desc=descriptor(q, rows),
        k_desc=descriptor(k, tile.block_n),
        v_desc=descriptor(v, tile.block_n),
        out_desc=descriptor(out, rows),
        lse=lse,
        sinks=sinks,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_work=num_work,
        qk_scale=scale * LOG2E,
        GROUP=num_heads // k.shape[1],
        BM=tile.block_m,
        BN=tile.block_n,
        D=head_dim,
        STAGES=tile.num_stages,
        Q_BUFFERS=1 if head_dim > 128 else 2,
        HAS_WINDOW=lists[-1].shape[0] > 0,
        CONSUMER_REGS=tile.consumer_regs,
        PRODUCER_REGS=tile.producer_regs,
    )
    return HopperLaunch(tree_attention_fwd_hopper_kernel, (tile.num_programs(num_work, q.device),), args)
