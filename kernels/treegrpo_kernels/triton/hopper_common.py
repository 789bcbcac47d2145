"""What the Hopper kernels share: tile configuration, tensor descriptors, the launch record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import FUSED

# 12 warps a block, the four of the producer's warpgroup included: 384 * 168 registers fill an SM's 65,536
NUM_WARPS, MAX_REGISTERS = 4, 168
# Triton 3.8 renamed these two, 3.9 took the old names away
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclass(frozen=True)
class HopperTile:
    """Tile sizes of one kernel, the depth of its ring, and the registers of a consumer and a producer thread."""

    block_m: int
    block_n: int
    num_stages: int
    consumer_regs: int = 240
    producer_regs: int = 24
    persistent: bool = True
    """One program a multiprocessor, each with its share of the work; else a program a work item."""

    def num_programs(self, num_work: int, device: torch.device) -> int:
        return min(num_work, multiprocessors(device)) if self.persistent else num_work


@dataclass(frozen=True)
class HopperLaunch:
    """A kernel with everything it is launched with; what ``run`` launches is also compiled ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the arguments."""
        return {"num_warps": NUM_WARPS, "maxnreg": MAX_REGISTERS, **FUSED}

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device; returns the compiled kernel."""
        with torch.cuda.device_of(self.args["span"]):
            return self.kernel[self.grid](**self.args, **self.options)


def descriptor(x: Tensor, num_rows: int) -> TensorDescriptor:
    """TMA descriptor of [T, H, D] (heads packed) as a matrix [T, H * D], read in boxes of [num_rows, D]."""
    num_tokens, num_heads, head_dim = x.shape
    block = [num_rows, head_dim]
    return TensorDescriptor(
        x, [num_tokens, num_heads * head_dim], [x.stride(0), 1], block, _layout(num_rows, head_dim, x.dtype)
    )


@cache
def _layout(num_rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([num_rows, head_dim], _GL_DTYPES[dtype])


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 132 where there is none to ask (ahead-of-time compilation)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@gluon.jit
def num_rounds(num_work):
    """How many work items this program has; see :func:`work_of`."""
    programs = gl.num_programs(0)
    rounds = num_work // programs
    return rounds + gl.where(work_of(rounds) < num_work, 1, 0)


@gluon.jit
def work_of(item):
    """This program's work item number ``item``. The items lie longest first; every other round is dealt in reverse, so
    that whoever got the longest of one round gets the shortest of the next."""
    programs = gl.num_programs(0)
    place = gl.where(item % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return item * programs + place


@gluon.jit
def visible(o_q, o_k, b_span, b_first, HAS_WINDOW: gl.constexpr):
    """Key j is visible to query i iff j <= i < end[j]: iff i - j, as unsigned, is below span[j] = end[j] - j. A window
    also asks that j be no older than first[i]: along a path indices grow with positions."""
    m_seen = (o_q - o_k).to(gl.uint32, bitcast=True) < b_span.to(gl.uint32, bitcast=True)
    if HAS_WINDOW:
        m_seen = m_seen & (o_k >= b_first)
    return m_seen
