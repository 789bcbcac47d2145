"""backend="triton": prefix-tree attention on NVIDIA GPUs from sm_80, and on the CPU under Triton's interpreter.

Triton itself is imported only where a kernel is about to run, so that this package imports everywhere and can say what
is missing. (The functions are attn_fwd and attn_bwd: the submodule forward would hide a function of that name.)

Shape legend: T tokens, Hq/Hkv query and key/value heads, D query/key head dim, Dv value head dim.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..plan import TreePlan
    from .common import Config, TileConfig
    from .hopper import HopperConfig

_FWD, _DQ, _DKV = slice(0, 6), slice(6, 12), slice(12, 21)


def reason(device: torch.device) -> str | None:
    """None where the kernels run on ``device``, else why they do not, as a sentence."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton; it exists for Linux only)"
    try:
        import triton
    except ImportError as error:
        return f"the triton package does not import: {error}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        interpreted = "TRITON_INTERPRET=1, set before the start, interprets them, slowly"
        return f"Triton kernels need an NVIDIA GPU, not {device.type!r} ({interpreted})"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"


def refusal(dtype: torch.dtype) -> str | None:
    """None where the kernels take inputs of this dtype, else which they take, as a sentence."""
    taken = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return None if taken else f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"


def config_for(q: Tensor, v: Tensor, softcap: float, scale: float) -> Config | HopperConfig:
    """The tiles for these arguments of ``tree_attention``: those of the Hopper kernels where they serve them."""
    from .common import arch_of, config

    arch = arch_of(q.device)
    if 90 <= arch < 100:
        from . import hopper

        if hopper.refusal(q, v, softcap, scale, arch) is None:
            return hopper.config(q.shape[-1], v.shape[-1])
    return config(q.shape[-1], v.shape[-1], q.dtype, arch)


def kernels_for(q: Tensor, v: Tensor, softcap: float, scale: float) -> str:
    """Which of the two families :func:`config_for` takes, for the log."""
    from .common import arch_of

    arch = arch_of(q.device)
    if not 90 <= arch < 100:
        return "plain kernels"
    from . import hopper

    why = hopper.refusal(q, v, softcap, scale, arch)
    return "Hopper kernels" if why is None else f"plain kernels, for the Hopper ones do not serve {why}"


def tile_tensors(
    plan: TreePlan, q: Tensor, v: Tensor, window: int, config: Config | HopperConfig | None = None
) -> list[Tensor]:
    """The tile lists of the three kernels as one flat list, for :func:`attn_fwd` and :func:`attn_bwd`.

    Each part opens with an empty tensor whose shape is the tile configuration, (0, *TileConfig): it travels with the
    lists made for it, so that backward cannot pair them with other tiles; see :func:`prepared.new_shape`. ``config``
    pins the tiles.
    """
    from .common import Config, arch_of
    from .common import config as choose

    if config is not None and not isinstance(config, Config):
        from . import hopper

        return hopper.tile_tensors(plan, config, v.shape[1], window)
    config = config or choose(q.shape[-1], v.shape[-1], q.dtype, arch_of(q.device))
    key = config, v.shape[1], window
    return plan.made_once(key, lambda: _make_tile_tensors(plan, config, v.shape[1], window))


def _make_tile_tensors(plan: TreePlan, config: Config, num_kv_heads: int, window: int) -> list[Tensor]:
    from ..work import first_visible, query_lists, work_items

    first, tensors = first_visible(plan, window, 1), []
    for tile in (config.fwd, config.dq):
        lists = plan.tile_lists(tile.block_m, tile.block_n, window or None)
        tensors += [_shape_of(tile, first), lists.q_offsets, lists.q_indices, lists.q_full, lists.q_order, first]
    tile = config.dkv
    lists = plan.tile_lists(tile.block_m, tile.block_n, window or None)
    tensors += [_shape_of(tile, first), lists.kv_max, lists.kv_min, *query_lists(plan, tile, window), first]
    return tensors + work_items(plan, tile, num_kv_heads, window)


def attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    tiles: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """q [T,Hq,D], k [T,Hkv,D], v [T,Hkv,Dv], sinks [Hq] or None -> out [T,Hq,Dv] in q's dtype, lse [T,Hq] fp32; T > 0.

    lse is a natural logarithm. A window is in the tiles. Sums run in a fixed order: the same inputs give the same bits.
    """
    # the Hopper kernels' lists are more
    if len(tiles) != _DKV.stop:
        from . import hopper

        return hopper.attn_fwd(q, k, v, sinks, tiles, scale)
    from .forward import forward as run

    return run(q, k, v, sinks, subtree_end, tiles[_FWD], scale, softcap)


def attn_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    tiles: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq, dk, dv for dout [T,Hq,Dv], in a fixed order too."""
    if len(tiles) != _DKV.stop:
        from . import hopper

        return hopper.attn_bwd(dout, q, k, v, out, lse, tiles, scale)
    from .backward import backward as run

    return run(dout, q, k, v, out, lse, subtree_end, tiles[_DQ], tiles[_DKV], scale, softcap)


def _shape_of(tile: TileConfig, like: Tensor) -> Tensor:
    from .prepared import new_shape

    return new_shape((tile.block_m, tile.block_n, tile.num_warps, tile.num_stages), like)
