"""The plan on the GPU: what ../plan.py computes with torch on the CPU, field by field the same, in a few small kernels.

Shape legend: T packed tokens, NQ/NK query and key tiles. Names in kernels as in common.py; "closing" is, for a token t,
the number of subtrees that end just before t, so that position[t] = t - (closing[0] + ... + closing[t]).

Building waits for the device once (verdict and counts), tile lists once more (the length of the list). Comparing
every query tile with every key tile costs one compare a pair and O(NQ + NK) memory: 2 million pairs for 128k tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED, cdiv

_TOKENS, _TILES, _RANKED = 1024, 512, 64
# int32 words that three int64 sums take; they share a buffer with the counters, which one launch sets to zero
_SUMS = 6


@triton.jit(do_not_specialize=["num_tokens"])
def plan_closing_kernel(subtree_end, end32, closing, sums, num_tokens, BLOCK: tl.constexpr):
    """Narrows subtree_end, counts entries out of range and visible pairs into sums, adds up closing [T].

    Neighbours with one end close together: the run's last token adds its index + 1, its first subtracts its index.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_token = index < num_tokens
    b_end = tl.load(subtree_end + index, mask=m_token, other=0).to(tl.int64)
    b_before = tl.load(subtree_end + index - 1, mask=m_token & (index > 0), other=-1).to(tl.int64)
    b_after = tl.load(subtree_end + index + 1, mask=index < num_tokens - 1, other=-1).to(tl.int64)
    m_bad = m_token & ((b_end <= index) | (b_end > num_tokens))
    tl.atomic_add(sums, tl.sum(m_bad.to(tl.int64)), sem="relaxed")
    tl.atomic_add(sums + 1, tl.sum(tl.where(m_token, b_end - index, 0)), sem="relaxed")
    tl.store(end32 + index, b_end.to(tl.int32), mask=m_token)
    # what ends with the row closes nothing in it, and a bad entry must not count outside
    m_counts = m_token & (b_end >= 0) & (b_end < num_tokens)
    b_slot = tl.where(m_counts, b_end, 0)
    tl.atomic_add(closing + b_slot, index + 1, mask=m_counts & (b_end != b_after), sem="relaxed")
    tl.atomic_add(closing + b_slot, -index, mask=m_counts & (b_end != b_before), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def plan_position_kernel(end32, closed, position, sums, num_tokens, BLOCK: tl.constexpr):
    """position [T] from closed = cumsum(closing), the longest path, and the rule that subtrees nest: where a token's
    subtree ends, no more subtrees are open than where it began (see ../plan.py)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_token = index < num_tokens
    b_end = tl.load(end32 + index, mask=m_token, other=0)
    b_position = index - tl.load(closed + index, mask=m_token, other=0)
    tl.store(position + index, b_position, mask=m_token)
    tl.atomic_max(sums + 2, tl.max(tl.where(m_token, b_position + 1, 0)).to(tl.int64), sem="relaxed")
    m_inner = m_token & (b_end >= 0) & (b_end < num_tokens)
    b_at_end = b_end - tl.load(closed + b_end, mask=m_inner, other=0)
    tl.atomic_add(sums, tl.sum((m_inner & (b_at_end > b_position)).to(tl.int64)), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "num_kv", "block_m", "block_n"])
def plan_tile_ranges_kernel(
    subtree_end,
    position,
    kv_max,
    kv_min,
    kv_pos_min,
    kv_pos_max,
    q_pos_min,
    q_pos_max,
    num_tokens,
    num_kv,
    block_m,
    block_n,
    BLOCK: tl.constexpr,
):
    """One program a tile, the key tiles first: smallest and largest subtree_end and position of its tokens."""
    i_program = tl.program_id(0)
    is_kv = i_program < num_kv
    i_tile = tl.where(is_kv, i_program, i_program - num_kv)
    block = tl.where(is_kv, block_n, block_m)
    o_token = tl.arange(0, BLOCK)
    index = i_tile * block + o_token
    m_token = (o_token < block) & (index < num_tokens)
    b_position = tl.load(position + index, mask=m_token, other=0)
    pos_min = tl.min(tl.where(m_token, b_position, num_tokens))
    pos_max = tl.max(tl.where(m_token, b_position, -1))
    if is_kv:
        b_end = tl.load(subtree_end + index, mask=m_token, other=0)
        # 0 past T: a ragged last tile is never full
        tl.store(kv_min + i_tile, tl.min(tl.where(o_token < block, b_end, num_tokens)))
        tl.store(kv_max + i_tile, tl.max(b_end))
        tl.store(kv_pos_min + i_tile, pos_min)
        tl.store(kv_pos_max + i_tile, pos_max)
    else:
        tl.store(q_pos_min + i_tile, pos_min)
        tl.store(q_pos_max + i_tile, pos_max)


@triton.jit
def _classes(
    i_q, o_kv, kv_max, kv_min, kv_pos_min, kv_pos_max, q_near, q_far, num_tokens, num_kv, block_m, block_n, window
):
    """Which of the key tiles ``o_kv`` the query tile sees, and which of those in full."""
    m0, n0 = i_q * block_m, o_kv * block_n
    m1, n1 = tl.minimum(m0 + block_m, num_tokens), tl.minimum(n0 + block_n, num_tokens)
    m_tile = o_kv < num_kv
    b_max = tl.load(kv_max + o_kv, mask=m_tile, other=0)
    b_min = tl.load(kv_min + o_kv, mask=m_tile, other=0)
    m_seen = m_tile & (n0 < m1) & (m0 < b_max)
    m_full = (m0 >= n1 - 1) & (m1 <= b_min)
    if window > 0:
        m_seen &= q_near - tl.load(kv_pos_max + o_kv, mask=m_tile, other=0) < window
        m_full &= q_far - tl.load(kv_pos_min + o_kv, mask=m_tile, other=0) < window
    return m_seen, m_seen & m_full


@triton.jit(do_not_specialize=["num_tokens", "num_kv", "block_m", "block_n", "window"])
def plan_count_kernel(
    kv_max,
    kv_min,
    kv_pos_min,
    kv_pos_max,
    q_pos_min,
    q_pos_max,
    q_count,
    q_full,
    num_tokens,
    num_kv,
    block_m,
    block_n,
    window,
    BLOCK: tl.constexpr,
):
    """One program a query tile: how many key tiles it sees, and how many in full."""
    i_q = tl.program_id(0)
    q_near, q_far = tl.load(q_pos_min + i_q), tl.load(q_pos_max + i_q)
    num_before = tl.minimum(tl.cdiv((i_q + 1) * block_m, block_n), num_kv)
    b_seen = tl.zeros((BLOCK,), tl.int32)
    b_full = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_before, BLOCK):
        # fmt: off
        m_seen, m_full = _classes(
            i_q, start + tl.arange(0, BLOCK), kv_max, kv_min, kv_pos_min, kv_pos_max, q_near, q_far,
            num_tokens, num_kv, block_m, block_n, window,
        )
        # fmt: on
        b_seen += m_seen.to(tl.int32)
        b_full += m_full.to(tl.int32)
    tl.store(q_count + i_q, tl.sum(b_seen))
    tl.store(q_full + i_q, tl.sum(b_full))


@triton.jit(do_not_specialize=["num_tokens", "num_kv", "block_m", "block_n", "window"])
def plan_fill_kernel(
    kv_max,
    kv_min,
    kv_pos_min,
    kv_pos_max,
    q_pos_min,
    q_pos_max,
    q_offsets,
    q_full,
    q_indices,
    num_tokens,
    num_kv,
    block_m,
    block_n,
    window,
    BLOCK: tl.constexpr,
):
    """One program a query tile: the key tiles it sees in full, then those it sees in part, each ascending."""
    i_q = tl.program_id(0)
    q_near, q_far = tl.load(q_pos_min + i_q), tl.load(q_pos_max + i_q)
    num_before = tl.minimum(tl.cdiv((i_q + 1) * block_m, block_n), num_kv)
    next_full = tl.load(q_offsets + i_q)
    next_partial = next_full + tl.load(q_full + i_q)
    for start in range(0, num_before, BLOCK):
        o_kv = start + tl.arange(0, BLOCK)
        # fmt: off
        m_seen, m_full = _classes(
            i_q, o_kv, kv_max, kv_min, kv_pos_min, kv_pos_max, q_near, q_far,
            num_tokens, num_kv, block_m, block_n, window,
        )
        # fmt: on
        b_full = m_full.to(tl.int32)
        b_partial = (m_seen & (b_full == 0)).to(tl.int32)
        b_slot = tl.where(
            m_full, next_full + tl.cumsum(b_full, 0) - b_full, next_partial + tl.cumsum(b_partial, 0) - b_partial
        )
        tl.store(q_indices + b_slot, o_kv, mask=m_seen)
        next_full += tl.sum(b_full)
        next_partial += tl.sum(b_partial)


@triton.jit(do_not_specialize=["num_q", "num_kv", "block_n"])
def plan_order_kernel(q_count, kv_max, q_order, kv_order, num_q, num_kv, block_n, BLOCK: tl.constexpr):
    """Longest first: a tile's place is the number of longer tiles, and of equally long ones before it."""
    num_q_programs = tl.cdiv(num_q, BLOCK)
    i_program = tl.program_id(0)
    is_q = i_program < num_q_programs
    num_tiles = tl.where(is_q, num_q, num_kv)
    i_tile = tl.where(is_q, i_program, i_program - num_q_programs) * BLOCK + tl.arange(0, BLOCK)
    step = tl.where(is_q, 0, block_n)
    if is_q:
        p_length, p_order = q_count, q_order
    else:
        p_length, p_order = kv_max, kv_order
    # a key tile's range begins at its own first token
    b_length = tl.load(p_length + i_tile, mask=i_tile < num_tiles, other=0) - i_tile * step
    b_place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_tiles, BLOCK):
        o_other = start + tl.arange(0, BLOCK)
        m_other = o_other < num_tiles
        b_other = tl.load(p_length + o_other, mask=m_other, other=0) - o_other * step
        m_before = (b_other[None, :] > b_length[:, None]) | (
            (b_other[None, :] == b_length[:, None]) & (o_other[None, :] < i_tile[:, None])
        )
        b_place += tl.sum((m_before & m_other[None, :]).to(tl.int32), 1)
    tl.store(p_order + b_place, i_tile, mask=i_tile < num_tiles)


def positions(subtree_end: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """subtree_end [T] of any integer dtype, T > 0 -> (int32 copy, position [T] int32, violations, visible pairs,
    longest path).

    Where there are violations, the others mean nothing. Waits for the device once.
    """
    num_tokens, device = subtree_end.shape[0], subtree_end.device
    subtree_end = subtree_end.contiguous()
    zeros = torch.zeros(_SUMS + num_tokens, dtype=torch.int32, device=device)
    sums, closing = zeros[:_SUMS].view(torch.int64), zeros[_SUMS:]
    end32, position = (torch.empty(num_tokens, dtype=torch.int32, device=device) for _ in range(2))
    grid = (cdiv(num_tokens, _TOKENS),)
    with torch.cuda.device_of(subtree_end):
        plan_closing_kernel[grid](subtree_end, end32, closing, sums, num_tokens, BLOCK=_TOKENS, **FUSED)
        closed = torch.cumsum(closing, 0, dtype=torch.int32)
        plan_position_kernel[grid](end32, closed, position, sums, num_tokens, BLOCK=_TOKENS, **FUSED)
    return end32, position, *sums.tolist()


def tile_lists(subtree_end: Tensor, position: Tensor, block_m: int, block_n: int, window: int) -> dict[str, Tensor]:
    """The tensors of ``TileLists`` by name, for T > 0. Waits for the device once, for the length of q_indices."""
    num_tokens, device = subtree_end.shape[0], subtree_end.device
    num_q, num_kv = cdiv(num_tokens, block_m), cdiv(num_tokens, block_n)

    def empty(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=device)

    made = {name: empty(num_kv) for name in ("kv_max", "kv_min", "kv_pos_min", "kv_pos_max", "kv_order")}
    made |= {name: empty(num_q) for name in ("q_pos_min", "q_pos_max", "q_full", "q_order")}
    ranges = [made[name] for name in ("kv_max", "kv_min", "kv_pos_min", "kv_pos_max", "q_pos_min", "q_pos_max")]
    sizes = (num_tokens, num_kv, block_m, block_n)
    q_count = empty(num_q)
    made["q_offsets"] = torch.zeros(num_q + 1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(subtree_end):
        widest = triton.next_power_of_2(max(block_m, block_n))
        plan_tile_ranges_kernel[(num_kv + num_q,)](subtree_end, position, *ranges, *sizes, BLOCK=widest, **FUSED)
        plan_count_kernel[(num_q,)](*ranges, q_count, made["q_full"], *sizes, window, BLOCK=_TILES, **FUSED)
        torch.cumsum(q_count, 0, dtype=torch.int32, out=made["q_offsets"][1:])
        orders = (q_count, made["kv_max"], made["q_order"], made["kv_order"])
        grid = (cdiv(num_q, _RANKED) + cdiv(num_kv, _RANKED),)
        plan_order_kernel[grid](*orders, num_q, num_kv, block_n, BLOCK=_RANKED, **FUSED)
        made["q_indices"] = empty(int(made["q_offsets"][-1]))
        lists = (made["q_offsets"], made["q_full"], made["q_indices"])
        plan_fill_kernel[(num_q,)](*ranges, *lists, *sizes, window, BLOCK=_TILES, **FUSED)
    return made
