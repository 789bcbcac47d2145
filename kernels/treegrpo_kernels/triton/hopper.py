"""The Hopper kernels as one unit: what they take, their tiles, forward and backward.

They need sm_90 and serve what a training step of a full-attention model asks for: bf16 or fp16, head dim 64 or 128, no
window, softcap or sinks. Everything else goes to the plain Triton kernels.

Shape legend: T tokens, Tp tokens rounded up to whole tiles, Hq/Hkv query and key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .backward import delta_launch
from .common import cdiv
from .hopper_backward_dkv import dkv_launch
from .hopper_backward_dq import dq_launch
from .hopper_common import HopperTile
from .hopper_forward import fwd_launch

if TYPE_CHECKING:
    from ..plan import TreePlan

# spans are read in whole key tiles, the largest of which this is
LARGEST_TILE = 256
_FWD, _DQ, _DKV = slice(0, 6), slice(6, 12), slice(12, 17)


@dataclass(frozen=True)
class HopperConfig:
    """Tile configurations of the three attention kernels."""

    fwd: HopperTile
    dq: HopperTile
    dkv: HopperTile


# measured on an H200, see NOTES.md; two stages of dq and dkv wait for memory, four gain nothing over three
_CONFIGS = {
    64: HopperConfig(fwd=HopperTile(128, 128, 2), dq=HopperTile(128, 64, 4), dkv=HopperTile(64, 128, 4)),
    128: HopperConfig(fwd=HopperTile(128, 128, 2), dq=HopperTile(128, 64, 3), dkv=HopperTile(64, 128, 3)),
}


def config(head_dim: int) -> HopperConfig:
    """Tiles for a head dim of 64 or 128. A pure function."""
    return _CONFIGS[head_dim]


def takes(
    q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, sinks: Tensor | None, scale: float, arch: int
) -> bool:
    """Whether the kernels serve these arguments of ``tree_attention`` on compute capability ``arch``."""
    return (
        90 <= arch < 100
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and not window
        and not softcap
        and sinks is None
        # the kernels take row maxima before scaling, and -inf * 0 is no score
        and scale > 0
    )


def tile_tensors(plan: TreePlan, config: HopperConfig) -> list[Tensor]:
    """The tile lists of the three kernels as one flat list, for :func:`attn_fwd` and :func:`attn_bwd`.

    Each part opens with an empty tensor whose shape is its tile configuration, (0, *HopperTile).
    """
    made = plan.derived.get(config)
    if made is None:
        made = plan.derived[config] = _make_tile_tensors(plan, config)
    return made


def _make_tile_tensors(plan: TreePlan, config: HopperConfig) -> list[Tensor]:
    span = _span(plan)
    tensors = []
    for tile in (config.fwd, config.dq):
        lists = plan.tile_lists(tile.block_m, tile.block_n)
        tensors += [_shape_of(tile, span), lists.q_offsets, lists.q_indices, lists.q_full, lists.q_order, span]
    lists = plan.tile_lists(config.dkv.block_m, config.dkv.block_n)
    tensors += [_shape_of(config.dkv, span), lists.kv_max, lists.kv_min, lists.kv_order, span]
    return tensors


def attn_fwd(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k and v [T,Hkv,D] -> out [T,Hq,D] in q's dtype, lse [T,Hq] fp32 (natural log)."""
    tile, *lists = tiles[_FWD]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    fwd_launch(_packed(q), _packed(k), _packed(v), out, lse, _tile_of(tile), lists, scale).run()
    return out, lse


def attn_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype and shapes of q, k, v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q, k, v, dout = (_packed(x) for x in (q, k, v, dout))
    num_tokens, num_heads, _ = q.shape
    num_padded = cdiv(num_tokens, LARGEST_TILE) * LARGEST_TILE
    delta, lse2 = torch.empty((2, num_heads, num_padded), dtype=torch.float32, device=q.device).unbind()
    delta_launch(dout, out, lse, delta, lse2).run()
    dq_tile, *dq_lists = tiles[_DQ]
    dkv_tile, *dkv_lists = tiles[_DKV]
    dq_launch(dout, q, k, v, dq, lse2, delta, _tile_of(dq_tile), dq_lists, scale).run()
    dkv_launch(dout, q, k, v, dk, dv, lse2, delta, _tile_of(dkv_tile), dkv_lists, scale).run()
    return dq, dk, dv


def _packed(x: Tensor) -> Tensor:
    """``x`` itself where TMA can read it as a matrix [T, H * D], else a copy."""
    _, num_heads, head_dim = x.shape
    heads_packed = x.stride(2) == 1 and (num_heads == 1 or x.stride(1) == head_dim)
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if heads_packed and aligned and x.stride(0) >= num_heads * head_dim else x.contiguous()


def _span(plan: TreePlan) -> Tensor:
    """subtree_end[j] - j, int32, padded with zeros to whole tiles: keys past T are visible to nobody."""
    index = torch.arange(plan.num_tokens, dtype=torch.int32, device=plan.device)
    return F.pad(plan.subtree_end - index, (0, -plan.num_tokens % LARGEST_TILE))


def _shape_of(tile: HopperTile, like: Tensor) -> Tensor:
    return torch.empty((0, *map(int, astuple(tile))), dtype=torch.int32, device=like.device)


def _tile_of(shape: Tensor) -> HopperTile:
    *sizes, persistent = shape.shape[1:]
    return HopperTile(*sizes, persistent=bool(persistent))
