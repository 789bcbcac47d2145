"""backend="cuda" on Hopper: the kernels of csrc/cuda/sm90, their tile lists and their calls.

``backend="auto"`` does not take them yet. On an H200 they were right, and as fast as the Triton ones for Hopper or
faster (NOTES.md), but waited for ever on rows whose last query tile has at most 64 tokens. That is mended, shown on an
imitated multiprocessor in the unit tests (csrc/test/machine.h), and has not been rerun on a GPU.

Shape legend: T tokens, Hq/Hkv query and key/value heads, D head dim (64 or 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, work
from .hopper import refusal as hopper_refusal

if TYPE_CHECKING:
    from .plan import TreePlan

NOTE = "the Hopper kernels of csrc/cuda/sm90, mended since they last ran on a GPU"

_FWD = slice(0, 7)
_BWD = slice(7, 18)
# the C++ side pads rows to this
_PADDING = 128


@dataclass(frozen=True)
class _Tile:
    block_m: int
    block_n: int


# those of csrc/cuda/sm90/params.h
_FWD_TILE, _DQ_TILE, _DKV_TILE = _Tile(128, 128), _Tile(128, 64), _Tile(64, 128)


def refusal(q: Tensor, v: Tensor, window: int, softcap: float, scale: float) -> str | None:
    """None where the kernels serve these arguments of ``tree_attention`` on q's GPU, else why not, in a few words."""
    refused = hopper_refusal(q.dtype, softcap, scale, _arch_of(q.device))
    if refused is None and (q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128)):
        refused = f"head dims {q.shape[-1]} and {v.shape[-1]}"
    return refused or ("window" if window else None)


@torch.compiler.assume_constant_result
def _arch_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_tensors(plan: TreePlan, num_kv_heads: int) -> list[Tensor]:
    """What the kernels read of a plan, as one flat list for :func:`attn_fwd` and :func:`attn_bwd`; made once a plan."""
    return plan.made_once(("cuda sm90", num_kv_heads), lambda: _make_tile_tensors(plan, num_kv_heads))


def _make_tile_tensors(plan: TreePlan, num_kv_heads: int) -> list[Tensor]:
    span = work.span(plan, _PADDING)
    fwd, dq = (plan.tile_lists(t.block_m, t.block_n) for t in (_FWD_TILE, _DQ_TILE))
    dkv = plan.key_lists(_DKV_TILE.block_m, _DKV_TILE.block_n)
    ends = [fwd.kv_min, fwd.kv_max]
    # a key tile has two halves, the last one too
    odd = len(dq.kv_min) % 2
    half_ends = [F.pad(x, (0, odd)) for x in (dq.kv_min, dq.kv_max)]
    items, parted = work.work_items(plan, _DKV_TILE, num_kv_heads)
    if not len(items):
        low = dkv.kv_order * _DKV_TILE.block_n // _DKV_TILE.block_m
        high = -(-dkv.kv_max[dkv.kv_order.long()] // _DKV_TILE.block_m)
        items = torch.stack([dkv.kv_order, low, high, torch.full_like(low, -1)], 1).contiguous()
    forward = [fwd.q_offsets, fwd.q_indices, fwd.q_full, fwd.q_order, *ends, span]
    backward = [dq.q_offsets, dq.q_indices, dq.q_full, dq.q_order, *ends, *half_ends, items, parted, span]
    return forward + backward


def attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, tiles: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k and v [T,Hkv,D], sinks [Hq] or None -> out [T,Hq,D] in q's dtype, lse [T,Hq] fp32 (natural log)."""
    native.load()
    return torch.ops.treegrpo_native.sm90_fwd(q, k, v, sinks, *tiles[_FWD], scale)


def attn_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: list[Tensor],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype and shapes of q, k, v.

    Not ``deterministic``: dQ comes out of the dK/dV pass, five products a tile instead of seven, summed in the order in
    which programs come to it.
    """
    native.load()
    return torch.ops.treegrpo_native.sm90_bwd(dout, q, k, v, out, lse, *tiles[_BWD], scale, deterministic)
