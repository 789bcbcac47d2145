"""The Hopper kernels as one unit: what they take, their tiles, forward and backward.

They need sm_90 and serve what most training steps ask for: bf16 or fp16, head dims of 33 to 256, windows and sinks.
Everything else, softcap among it, goes to the plain Triton kernels. Head dims between 64, 128 and 256 are padded with
zeros to the next of them, in copies of a call's tensors: the plain kernels compute as much for less memory, slower.

Shape legend: T tokens, Tp tokens rounded up to whole tiles, Hq/Hkv query and key/value heads, D query/key head dim, Dv
value head dim.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import work
from ..hopper import refusal as refused_arguments
from .backward import delta_launch
from .common import Launch, cdiv
from .hopper_backward_dkv import dkv_launch, new_partials
from .hopper_backward_dq import dq_launch
from .hopper_common import HopperLaunch, HopperTile
from .hopper_forward import fwd_launch
from .prepared import launch, launches_of, new_shape
from .split import sum_launch

if TYPE_CHECKING:
    from ..plan import TreePlan

# spans are read in whole key tiles, the largest of which this is
LARGEST_TILE = 256
_DENSE = torch.contiguous_format
_FWD, _DQ, _DKV = slice(0, 7), slice(7, 14), slice(14, 24)


@dataclass(frozen=True)
class HopperConfig:
    """Tile configurations of the three attention kernels."""

    fwd: HopperTile
    dq: HopperTile
    dkv: HopperTile
    split: bool = True
    """Part key tiles whose query ranges are longer than a multiprocessor's share of dK/dV; see work.py."""


# Gluon is experimental: each of 3.8 and 3.9 took names away. Compiled with 3.6 to 3.9, run on an H200 with 3.6
KNOWN_RELEASES = ("3.6.", "3.7.", "3.8.", "3.9.")

# 64 and 128 were measured on an H200, see NOTES.md: two stages of dq and dkv wait for memory, four gain nothing over
# three. 256 has what shared memory and registers hold
_CONFIGS = {
    64: HopperConfig(fwd=HopperTile(128, 128, 2), dq=HopperTile(128, 64, 4), dkv=HopperTile(64, 128, 4)),
    128: HopperConfig(fwd=HopperTile(128, 128, 2), dq=HopperTile(128, 64, 3), dkv=HopperTile(64, 128, 3)),
    256: HopperConfig(fwd=HopperTile(128, 64, 2), dq=HopperTile(128, 32, 3), dkv=HopperTile(64, 64, 2)),
}
HEAD_DIMS = tuple(_CONFIGS)


def refusal(q: Tensor, v: Tensor, softcap: float, scale: float, arch: int) -> str | None:
    """None where the kernels serve these arguments of ``tree_attention``, else why not, in a few words."""
    refused = unknown_release() or refused_arguments(q.dtype, softcap, scale, arch)
    if refused is None and padded_head_dim(q.shape[-1], v.shape[-1]) == 0:
        refused = f"head dims {q.shape[-1]} and {v.shape[-1]}"
    return refused


def unknown_release() -> str | None:
    """This Triton, where the kernels were never compiled with it; None where they were."""
    known = triton.__version__.startswith(KNOWN_RELEASES)
    return None if known else f"Triton {triton.__version__} (they know {KNOWN_RELEASES[0]}x to {KNOWN_RELEASES[-1]}x)"


def padded_head_dim(head_dim: int, value_dim: int) -> int:
    """The head dim that the kernels compute with; 0 where no more than half of it would be of use.

    Example: (96, 96) is computed as 128, (192, 128) as 256; (32, 32) is left to the plain kernels.
    """
    padded = next((dim for dim in HEAD_DIMS if dim >= max(head_dim, value_dim)), 0)
    return padded if head_dim + value_dim > padded else 0


def config(head_dim: int, value_dim: int | None = None) -> HopperConfig:
    """Tiles for head dims of which :func:`padded_head_dim` is not 0; ``value_dim`` defaults to ``head_dim``. A pure
    function."""
    return _CONFIGS[padded_head_dim(head_dim, head_dim if value_dim is None else value_dim)]


def tile_tensors(plan: TreePlan, config: HopperConfig, num_kv_heads: int, window: int = 0) -> list[Tensor]:
    """The tile lists of the three kernels as one flat list, for :func:`attn_fwd` and :func:`attn_bwd`.

    Each part opens with an empty tensor whose shape is its tile configuration, (0, *HopperTile); see
    :func:`prepared.new_shape`. ``window`` is 0 for none.
    """
    # only parting depends on the heads
    key = config, num_kv_heads if config.split else 0, window
    return plan.made_once(key, lambda: _make_tile_tensors(plan, config, num_kv_heads, window))


def _make_tile_tensors(plan: TreePlan, config: HopperConfig, num_kv_heads: int, window: int) -> list[Tensor]:
    span, first = work.span(plan, LARGEST_TILE), work.first_visible(plan, window, LARGEST_TILE)
    tensors = []
    for tile in (config.fwd, config.dq):
        lists = plan.tile_lists(tile.block_m, tile.block_n, window or None)
        tensors += [_shape_of(tile, span), lists.q_offsets, lists.q_indices, lists.q_full, lists.q_order, span, first]
    tile = config.dkv
    lists = plan.key_lists(tile.block_m, tile.block_n)
    kv_order, *places = work.query_lists(plan, tile, window)
    tensors += [_shape_of(tile, span), lists.kv_max, lists.kv_min, kv_order, span, first, *places]
    nothing = [span.new_empty((0, n)) for n in (4, 3)]
    return tensors + (work.work_items(plan, tile, num_kv_heads, window) if config.split else nothing)


def attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, tiles: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k [T,Hkv,D], v [T,Hkv,Dv], sinks [Hq] or None -> out [T,Hq,Dv] in q's dtype, lse [T,Hq] fp32
    (natural log)."""
    value_dim = v.shape[2]
    padded = padded_head_dim(q.shape[2], value_dim)
    q, k, v = _packed(q, padded), _packed(k, padded), _packed(v, padded)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    changing = dict(q_desc=q, k_desc=k, v_desc=v, out_desc=out, lse=lse)
    if sinks is not None:
        changing["sinks"] = sinks = sinks.contiguous()

    def make() -> HopperLaunch:
        tile, *lists = tiles[_FWD]
        return fwd_launch(q, k, v, sinks, out, lse, _tile_of(tile), lists, scale)

    key = "fwd", q.shape, k.shape, q.dtype, scale, None if sinks is None else sinks.dtype
    launch(launches_of(tiles[_FWD.start]), key, make, changing)
    return _cut(out, value_dim), lse


def attn_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype and shapes of q, k, v."""
    head_dim, value_dim = q.shape[2], v.shape[2]
    padded = padded_head_dim(head_dim, value_dim)
    # a row's dout . out needs no padding
    narrow_dout, out = _packed(dout, value_dim), _packed(out, value_dim)
    q, k, v, dout = _packed(q, padded), _packed(k, padded), _packed(v, padded), _packed(narrow_dout, padded)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    num_tokens, num_heads, _ = q.shape
    num_padded = cdiv(num_tokens, LARGEST_TILE) * LARGEST_TILE
    delta, lse2 = q.new_empty((2, num_heads, num_padded), dtype=torch.float32).unbind()

    def make_delta() -> Launch:
        return delta_launch(narrow_dout, out, lse, delta, lse2)

    def make_dq() -> HopperLaunch:
        tile, *lists = tiles[_DQ]
        return dq_launch(dout, q, k, v, dq, lse2, delta, _tile_of(tile), lists, scale)

    tile, kv_max, kv_min, kv_order, *rest, items, parted = tiles[_DKV]
    num_partials = work.num_slots(num_tokens, tile.shape[2], items, parted)
    partials = new_partials(k, _tile_of(tile), num_partials) if num_partials else None

    def make_dkv() -> HopperLaunch:
        lists = [kv_max, kv_min, items if partials else kv_order, *rest]
        return dkv_launch(dout, q, k, v, dk, dv, lse2, delta, _tile_of(tile), lists, scale, partials)

    key = q.shape, k.shape, q.dtype, scale
    of_dq, of_dkv = launches_of(tiles[_DQ.start]), launches_of(tile)
    inputs = dict(dout_desc=dout, q_desc=q, k_desc=k, v_desc=v, lse2=lse2, delta=delta)
    parts = dict(zip(("partial_dk", "partial_dv"), partials, strict=True)) if partials else {}
    sums = dict(dout=narrow_dout, out=out, lse=lse, delta=delta, lse2=lse2)
    launch(of_dq, ("delta", out.shape, *key), make_delta, sums)
    launch(of_dq, ("dq", *key), make_dq, inputs | dict(dq_desc=dq))
    launch(of_dkv, ("dkv", *key), make_dkv, inputs | dict(dk_desc=dk, dv_desc=dv) | parts)
    if partials:
        partial_dk, partial_dv = partials

        def make_sum() -> Launch:
            return sum_launch(partial_dk, partial_dv, parted, dk, dv, scale)

        launch(of_dkv, ("sum", *key), make_sum, parts | dict(dk=dk, dv=dv))
    return _cut(dq, head_dim), _cut(dk, head_dim), _cut(dv, value_dim)


def _cut(x: Tensor, head_dim: int) -> Tensor:
    """``x`` without its padding, contiguous: its strides are part of what the operator promises a compiler."""
    return x if x.shape[2] == head_dim else x[..., :head_dim].contiguous()


def _packed(x: Tensor, padded: int) -> Tensor:
    """``x`` itself where TMA can read it as a matrix [T, H * padded], else a copy."""
    if x.shape[2] < padded:
        return F.pad(x, (0, padded - x.shape[2]))
    aligned = x.data_ptr() % 16 == 0
    # the stride of a single token may be anything
    if aligned and x.shape[0] > 1 and x.is_contiguous():
        return x
    _, num_heads, head_dim = x.shape
    step, head_step, unit = x.stride()
    heads_packed = unit == 1 and (num_heads == 1 or head_step == head_dim) and step >= num_heads * head_dim
    # a copy of what is contiguous already would be the same memory
    return x if heads_packed and aligned and step * x.element_size() % 16 == 0 else x.clone(memory_format=_DENSE)


def _shape_of(tile: HopperTile, like: Tensor) -> Tensor:
    return new_shape(map(int, astuple(tile)), like)


def _tile_of(shape: Tensor) -> HopperTile:
    block_m, block_n, num_stages, consumer_regs, producer_regs, persistent = shape.shape[1:]
    return HopperTile(block_m, block_n, num_stages, consumer_regs, producer_regs, bool(persistent))
