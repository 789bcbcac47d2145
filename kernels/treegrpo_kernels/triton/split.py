"""The sum of the partials of parted key tiles (treegrpo_kernels.work), in fixed order. Names as in common.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, TileConfig, store_rows, strides

_SUM_ROWS = 16


@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads"])
def tree_attention_bwd_dkv_sum_kernel(
    partial_dk,
    partial_dv,
    parted,
    dk,
    dv,
    dk_strides,
    dv_strides,
    num_tokens,
    num_kv_heads,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up ROWS rows of one parted key tile and head."""
    PARTS: tl.constexpr = BN // ROWS
    i_program = tl.program_id(0)
    i_part = i_program % PARTS
    i_kv = i_program // PARTS % num_kv_heads
    p_entry = parted + i_program // PARTS // num_kv_heads * 3
    i_n = tl.load(p_entry)
    slot = tl.load(p_entry + 1).to(tl.int64) * num_kv_heads + i_kv
    o_row = tl.arange(0, ROWS)
    p_dk = partial_dk + (slot * BN + i_part * ROWS) * BD + o_row[:, None] * BD + tl.arange(0, BD)[None, :]
    p_dv = partial_dv + (slot * BN + i_part * ROWS) * BDV + o_row[:, None] * BDV + tl.arange(0, BDV)[None, :]
    step = num_kv_heads.to(tl.int64) * BN
    b_dk = tl.zeros((ROWS, BD), tl.float32)
    b_dv = tl.zeros((ROWS, BDV), tl.float32)
    for _ in tl.range(0, tl.load(p_entry + 2)):
        b_dk += tl.load(p_dk)
        b_dv += tl.load(p_dv)
        p_dk += step * BD
        p_dv += step * BDV
    row = i_n.to(tl.int64) * BN + i_part * ROWS
    num_rows = num_tokens - row
    p_out = dk + row * dk_strides[0] + i_kv.to(tl.int64) * dk_strides[1]
    store_rows(p_out, b_dk * scale, o_row, dk_strides[0], num_rows, D, BD)
    p_out = dv + row * dv_strides[0] + i_kv.to(tl.int64) * dv_strides[1]
    store_rows(p_out, b_dv, o_row, dv_strides[0], num_rows, DV, BDV)


def sum_launch(partial_dk: Tensor, partial_dv: Tensor, parted: Tensor, dk: Tensor, dv: Tensor, scale: float) -> Launch:
    """The launch that adds the partials [slots, Hkv, BN, BD] and [slots, Hkv, BN, BDV] into dk and dv."""
    num_kv_heads, block_n, padded_dim = partial_dk.shape[1:]
    args = dict(
        partial_dk=partial_dk,
        partial_dv=partial_dv,
        parted=parted,
        dk=dk,
        dv=dv,
        dk_strides=strides(dk),
        dv_strides=strides(dv),
        num_tokens=dk.shape[0],
        num_kv_heads=num_kv_heads,
        scale=scale,
        D=dk.shape[2],
        DV=dv.shape[2],
        BD=padded_dim,
        BDV=partial_dv.shape[3],
        BN=block_n,
        ROWS=_SUM_ROWS,
    )
    grid = (parted.shape[0] * num_kv_heads * (block_n // _SUM_ROWS),)
    return Launch(tree_attention_bwd_dkv_sum_kernel, grid, args, TileConfig(_SUM_ROWS, block_n, 4, 1))
