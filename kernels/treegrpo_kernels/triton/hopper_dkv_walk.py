"""The walk of dK/dV on Hopper: which query tiles a program's key tile meets, and the producer that streams them.

The query rows that see a key tile are one contiguous range, so nothing is looked up, but under a window, where
work.query_lists says which. The producer counts through the range once for every query head of the group and streams Q,
dO, lse and delta through a ring.

Shape legend: T tokens, D head dim, BM query rows of a tile, BN key rows, ROWS of them in a box. Names as in common.py;
s_ shared memory, bars_ mbarriers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_common import load_box, visible

# of a key tile, in one TMA box
BOX_ROWS = 64
ROWS = gl.constexpr(BOX_ROWS)


@gluon.jit
def _bounds(i_n, kv_max, kv_min, num_tokens, BM: gl.constexpr, BN: gl.constexpr):
    """Query tiles that see a key tile: [lo, a) across the diagonal, [a, b) full, [b, hi) across ends of subtrees."""
    n0 = i_n * BN
    n1 = gl.minimum(n0 + BN, num_tokens)
    lo = n0 // BM
    hi = (gl.load(kv_max + i_n) + BM - 1) // BM
    a = gl.minimum((n1 - 1 + BM - 1) // BM, hi)
    b = gl.maximum(a, gl.minimum(gl.load(kv_min + i_n) // BM, hi))
    return lo, a, b, hi


@gluon.jit
def work_of_program(
    kv_max,
    kv_min,
    work,
    kv_offsets,
    num_tokens,
    num_kv_heads,
    BM: gl.constexpr,
    BN: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """This program's key tile and head, and the bounds of its query tiles; under a window these are places in the key
    tile's list, [lo, a) empty.

    ``work`` are the items of work.work_items, or without SPLIT key tiles in order.
    """
    program = gl.program_id(0)
    i_kv = program % num_kv_heads
    p_item = work + program // num_kv_heads * (4 if SPLIT else 1)
    i_n = gl.load(p_item)
    if HAS_WINDOW:
        lo = gl.load(kv_offsets + 2 * i_n)
        a = lo
        b = gl.load(kv_offsets + 2 * i_n + 1)
        hi = gl.load(kv_offsets + 2 * i_n + 2)
    else:
        lo, a, b, hi = _bounds(i_n, kv_max, kv_min, num_tokens, BM, BN)
    if SPLIT:
        lo = gl.maximum(lo, gl.load(p_item + 1))
        hi = gl.minimum(hi, gl.load(p_item + 2))
        a = gl.minimum(gl.maximum(a, lo), hi)
        b = gl.minimum(gl.maximum(b, a), hi)
    return i_n, i_kv, lo, a, b, hi


@gluon.jit
def probabilities(
    b_s,
    b_lse,
    s_row,
    s_first,
    slot,
    o_k,
    b_span,
    qk_scale,
    HAS_WINDOW: gl.constexpr,
    COLUMN: gl.constexpr,
    MASKED: gl.constexpr,
):
    """exp(s_ij - lse_i) of raw scores [keys, queries]; 0 where the key is not visible."""
    b_p = gl.exp2(b_s * qk_scale - b_lse[None, :])
    if MASKED:
        o_q = s_row.index(slot).load(COLUMN)
        b_first = o_q
        if HAS_WINDOW:
            b_first = s_first.index(slot).load(COLUMN)
        m_seen = visible(o_q[None, :], o_k[:, None], b_span[:, None], b_first[None, :], HAS_WINDOW)
        b_p = gl.where(m_seen, b_p, 0.0)
    return b_p


@gluon.jit
def _next_partial(i_place, lo, a, b, hi):
    """What follows ``i_place`` in [lo, a) and [b, hi), going round."""
    i_place += 1
    i_place = gl.where(i_place == a, b, i_place)
    return gl.where(i_place == hi, gl.where(lo == a, b, lo), i_place)


@gluon.jit
def _fill(
    s_q,
    s_dout,
    s_lse,
    s_delta,
    s_row,
    s_first,
    bars_q,
    bars_q_free,
    q_desc,
    dout_desc,
    lse2,
    delta,
    first,
    kv_indices,
    i_place,
    i_h,
    num_padded,
    ring,
    BM: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """One query tile of one head into the ring: number ``i_place``, or under a window what the list has there."""
    i_m = i_place
    if HAS_WINDOW:
        i_m = gl.load(kv_indices + i_place)
    o_row = gl.arange(0, BM, layout=gl.BlockedLayout([BM // 32], [32], [1], [0]))
    p_row = i_h.to(gl.int64) * num_padded + i_m * BM + o_row
    b_lse = gl.load(lse2 + p_row)
    b_delta = gl.load(delta + p_row)
    b_first = o_row
    if HAS_WINDOW:
        b_first = gl.load(first + i_m * BM + o_row)
    slot = ring % STAGES
    mbarrier.wait(bars_q_free.index(slot), ((ring // STAGES) & 1) ^ 1)
    mbarrier.expect(bars_q.index(slot), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
    load_box(q_desc, [i_m * BM, i_h * D], bars_q.index(slot), s_q.index(slot))
    load_box(dout_desc, [i_m * BM, i_h * D], bars_q.index(slot), s_dout.index(slot))
    s_lse.index(slot).store(b_lse)
    s_delta.index(slot).store(b_delta)
    s_row.index(slot).store(i_m * BM + o_row)
    if HAS_WINDOW:
        s_first.index(slot).store(b_first)
    mbarrier.arrive(bars_q.index(slot), count=1)


@gluon.jit
def producer(
    buffers,
    bars,
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse2,
    delta,
    first,
    kv_max,
    kv_min,
    work,
    kv_offsets,
    kv_indices,
    num_tokens,
    num_padded,
    num_kv_heads,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
):
    """Streams K, V and the query tiles that see them, in the order in which the consumers read."""
    s_k, s_v, s_q, s_dout, s_lse, s_delta, s_row, s_first = buffers
    bars_kv, bars_q, bars_q_free, _bar_k_read = bars
    ring = 0
    i_n, i_kv, lo, a, b, hi = work_of_program(
        kv_max, kv_min, work, kv_offsets, num_tokens, num_kv_heads, BM, BN, SPLIT, HAS_WINDOW
    )
    for i in gl.static_range(BN // ROWS):
        bar = bars_kv.index(i)
        mbarrier.expect(bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        load_box(k_desc, [i_n * BN + i * ROWS, i_kv * D], bar, s_k.index(i))
        load_box(v_desc, [i_n * BN + i * ROWS, i_kv * D], bar, s_v.index(i))
    # fmt: off
    for i_g in range(GROUP):
        for i_place in range(a, b):
            _fill(s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, q_desc, dout_desc, lse2, delta,
                  first, kv_indices, i_place, i_kv * GROUP + i_g, num_padded, ring, BM, D, STAGES, HAS_WINDOW)
            ring += 1
    for i_g in range(GROUP):
        i_place = gl.where(lo == a, b, lo)
        for _ in range(a - lo + hi - b):
            _fill(s_q, s_dout, s_lse, s_delta, s_row, s_first, bars_q, bars_q_free, q_desc, dout_desc, lse2, delta,
                  first, kv_indices, i_place, i_kv * GROUP + i_g, num_padded, ring, BM, D, STAGES, HAS_WINDOW)
            ring += 1
            i_place = _next_partial(i_place, lo, a, b, hi)
    # fmt: on
