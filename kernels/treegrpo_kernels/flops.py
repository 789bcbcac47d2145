"""Exact FLOP formulas of tree attention, by visible pairs; registered with torch's ``FlopCounterMode``.

Shape legend: T packed tokens, Hq query heads, D query/key head dim, Dv value head dim.

A visible (query, key) pair costs, per query head and counting a multiply-add as two: forward q.k (2D) and p*v (2Dv);
backward the score again (2D), dP and dV (2Dv each), dQ and dK (2D each). With D = Dv: 4D forward, 10D backward, the
convention of FlashAttention. Masked elements of partial tiles are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attention_forward(num_pairs: int, num_heads: int, head_dim: int, value_dim: int | None = None) -> int:
    """FLOPs of one forward over ``num_pairs`` visible pairs."""
    return 2 * num_heads * num_pairs * (head_dim + (value_dim or head_dim))


def attention_backward(num_pairs: int, num_heads: int, head_dim: int, value_dim: int | None = None) -> int:
    """FLOPs of one backward over ``num_pairs`` visible pairs, the recomputed scores included."""
    return 2 * num_heads * num_pairs * (3 * head_dim + 2 * (value_dim or head_dim))


def register(forward: torch._ops.OpOverloadPacket, backward: torch._ops.OpOverloadPacket) -> None:
    """Teach ``FlopCounterMode`` the two operators."""
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(forward)
    def _forward(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: object, **_: object) -> int:
        return attention_forward(_num_pairs(rest[7]), q[1], q[2], v[2])

    @register_flop_formula(backward)
    def _backward(
        dout: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: object, **_: object
    ) -> int:
        return attention_backward(_num_pairs(rest[9]), q[1], q[2], v[2])


def _num_pairs(value: object) -> int:
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"expected num_pairs, got {value!r}: the operator's schema and its FLOP formula disagree")
    return int(value)
