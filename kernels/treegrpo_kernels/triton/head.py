"""The two passes of a log-prob head over a chunk of logits, each in one read: log-softmax, and its gradient.

    z = transform(logits) / temperature, transform(x) = cap tanh(scale x / cap), or scale x without a cap
    lse = log sum_j exp z_j       H = lse - sum_j p_j z_j       logp_p = z[label_p] - lse
    dz_j = (sum_p dlogp_p ([label_p = j] - p_j) - dH p_j (log p_j + H)) transform'(x_j) / temperature

Shapes: logits [R, V] fp32, dz [R, V] in what the gradient's products take; rows have pairs p, in CSR form: those of row
r are ``labels[offsets[r] : offsets[r + 1]]``. A program owns a row and adds in a fixed order, so that the same inputs
give the same bits. Bound by memory: a row of 152k logits is 608 KB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, TileConfig, narrow

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_SCORE_TILE = TileConfig(block_m=1, block_n=4096, num_warps=8, num_stages=1)
# half as wide: 128 registers a thread would leave two programs to a multiprocessor
_SLOPE_TILE = TileConfig(block_m=1, block_n=2048, num_warps=8, num_stages=1)
# the interpreter meets several blocks in a small vocabulary
_SMALL_TILE = TileConfig(block_m=1, block_n=16, num_warps=1, num_stages=1)


@triton.jit
def _tanh(b_x):
    """1 - 2 / (exp(2x) + 1); exact at both ends, for exp2 saturates to 0 and infinity."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(b_x * (2.0 * _LOG2E)))


@triton.jit
def _score(b_x, scale, cap, inv_temperature, HAS_CAP: tl.constexpr):
    """z from logits."""
    b_z = b_x * scale
    if HAS_CAP:
        b_z = cap * _tanh(b_z / cap)
    return b_z * inv_temperature


@triton.jit(do_not_specialize=["num_cols"])
def head_score_kernel(
    logits,
    offsets,
    labels,
    lse,
    entropy,
    picked,
    num_cols,
    row_stride,
    scale,
    cap,
    inv_temperature,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BV: tl.constexpr,
):
    """lse [R], entropy [R], and picked [P] = log-probs of the row's labels."""
    i_row = tl.program_id(0)
    p_row = logits + i_row.to(tl.int64) * row_stride
    o_col = tl.arange(0, BV)
    row_max = -float("inf")
    row_sum = 0.0
    row_dot = 0.0
    for start in range(0, num_cols, BV):
        m_col = start + o_col < num_cols
        b_x = tl.load(p_row + start + o_col, mask=m_col, other=0.0)
        b_z = tl.where(m_col, _score(b_x, scale, cap, inv_temperature, HAS_CAP), -float("inf"))
        new_max = tl.maximum(row_max, tl.max(b_z, 0))
        shrink = tl.exp2((row_max - new_max) * _LOG2E)
        b_p = tl.exp2((b_z - new_max) * _LOG2E)
        row_sum = row_sum * shrink + tl.sum(b_p, 0)
        if HAS_ENTROPY:
            row_dot = row_dot * shrink + tl.sum(tl.where(m_col, b_p * b_z, 0.0), 0)
        row_max = new_max
    row_lse = row_max + tl.log2(row_sum) * _LN2
    tl.store(lse + i_row, row_lse)
    if HAS_ENTROPY:
        tl.store(entropy + i_row, row_lse - row_dot / row_sum)
    for i_pair in range(tl.load(offsets + i_row), tl.load(offsets + i_row + 1)):
        label = tl.load(labels + i_pair)
        # a label outside lies in another row's memory, or in none
        x = tl.load(p_row + label, mask=(label >= 0) & (label < num_cols), other=float("nan"))
        tl.store(picked + i_pair, _score(x, scale, cap, inv_temperature, HAS_CAP) - row_lse)


def score_launch(
    logits: Tensor,
    offsets: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    picked: Tensor,
    scale: float,
    cap: float,
    temperature: float,
) -> Launch:
    """The forward pass over ``logits`` [R, V]; ``offsets`` [R+1] point into ``labels`` and ``picked`` [P]."""
    tile = _tile(_SCORE_TILE)
    args = _shared(logits, offsets, labels, lse, entropy, scale, cap, temperature, tile) | dict(picked=picked)
    return Launch(head_score_kernel, (logits.shape[0],), args, tile)


@triton.jit(do_not_specialize=["num_cols"])
def head_slope_kernel(
    logits,
    offsets,
    labels,
    lse,
    entropy,
    dpicked,
    dentropy,
    dz,
    num_cols,
    row_stride,
    dz_stride,
    scale,
    cap,
    inv_temperature,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BV: tl.constexpr,
):
    """dz [R, V]: the gradient of sum(dpicked picked) + sum(dentropy entropy) with respect to the logits."""
    i_row = tl.program_id(0)
    p_row = logits + i_row.to(tl.int64) * row_stride
    p_out = dz + i_row.to(tl.int64) * dz_stride
    o_col = tl.arange(0, BV)
    row_lse = tl.load(lse + i_row)
    first = tl.load(offsets + i_row)
    last = tl.load(offsets + i_row + 1)
    total = 0.0
    for i_pair in range(first, last):
        total += tl.load(dpicked + i_pair)
    if HAS_ENTROPY:
        row_entropy = tl.load(entropy + i_row)
        slant = tl.load(dentropy + i_row)
    for start in range(0, num_cols, BV):
        m_col = start + o_col < num_cols
        b_z = _score(tl.load(p_row + start + o_col, mask=m_col, other=0.0), scale, cap, inv_temperature, HAS_CAP)
        b_logp = b_z - row_lse
        b_p = tl.exp2(b_logp * _LOG2E)
        b_dz = -total * b_p
        if HAS_ENTROPY:
            b_dz -= slant * b_p * (b_logp + row_entropy)
        for i_pair in range(first, last):
            b_dz += tl.where(start + o_col == tl.load(labels + i_pair), tl.load(dpicked + i_pair), 0.0)
        if HAS_CAP:
            b_t = b_z / (cap * inv_temperature)
            b_dz *= 1.0 - b_t * b_t
        b_dz *= scale * inv_temperature
        tl.store(p_out + start + o_col, narrow(b_dz, p_out.dtype.element_ty), mask=m_col)


def slope_launch(
    logits: Tensor,
    offsets: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    dpicked: Tensor,
    dentropy: Tensor | None,
    dz: Tensor,
    scale: float,
    cap: float,
    temperature: float,
) -> Launch:
    """The backward pass; ``dentropy`` [R] and ``entropy`` [R] come together or not at all."""
    tile = _tile(_SLOPE_TILE)
    entropy = None if dentropy is None else entropy
    args = _shared(logits, offsets, labels, lse, entropy, scale, cap, temperature, tile)
    args |= dict(dpicked=dpicked, dentropy=lse if dentropy is None else dentropy, dz=dz, dz_stride=dz.stride(0))
    return Launch(head_slope_kernel, (logits.shape[0],), args, tile)


def _shared(
    logits: Tensor,
    offsets: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    scale: float,
    cap: float,
    temperature: float,
    tile: TileConfig,
) -> dict[str, Any]:
    """The arguments that both passes take."""
    return dict(
        logits=logits,
        offsets=offsets,
        labels=labels,
        lse=lse,
        entropy=lse if entropy is None else entropy,
        num_cols=logits.shape[1],
        row_stride=logits.stride(0),
        scale=float(scale),
        cap=float(cap),
        inv_temperature=1.0 / temperature,
        HAS_CAP=cap > 0,
        HAS_ENTROPY=entropy is not None,
        BV=tile.block_n,
    )


def _tile(tile: TileConfig) -> TileConfig:
    return _SMALL_TILE if triton.knobs.runtime.interpret else tile


def launches(dtype: torch.dtype, *, entropy: bool = False, cap: float = 0.0) -> dict[str, Launch]:
    """Launch records of both passes for CPU tensors; nothing is launched (ahead-of-time compilation)."""
    logits, dz = torch.empty(4, 1000), torch.empty(4, 1000, dtype=dtype)
    offsets, labels = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    rows, pairs = torch.empty(4), torch.empty(4)
    extra = rows if entropy else None
    return {
        "head_score": score_launch(logits, offsets, labels, rows, extra, pairs, 1.0, cap, 1.0),
        "head_slope": slope_launch(logits, offsets, labels, rows, extra, pairs, extra, dz, 1.0, cap, 1.0),
    }
