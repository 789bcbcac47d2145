"""What the Triton kernels share: tile configurations, the launch record, device helpers of forward and backward.

Shape legend: T tokens, Hq/Hkv query and key/value heads, D query/key head dim, Dv value head dim, BM/BN rows of a
query/key tile, BD/BDV the head dims rounded up to powers of two.

Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block values, UPPER compile-time constants; a tensor's
strides travel as one tuple (token, head), the last dim always has stride 1. Scores live in base 2: log2(e) is folded
into the scale, so that every exponential is one ex2 instruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)

# a product and a sum are one operation: Triton's default, which it means to change and warns of from 3.9 on
FUSED = {"enable_fp_fusion": True}

# Triton 3.6's interpreter multiplies bf16 as raw integers and truncates to it; dot() and narrow() step around both
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class TileConfig:
    """One kernel's tile sizes and how it is spread over a thread block."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_of(shape: Tensor) -> TileConfig:
    """The configuration that opens a part of the tile tensors; see :func:`prepared.new_shape`."""
    return TileConfig(*shape.shape[1:])


@dataclass(frozen=True)
class Config:
    """Tile configurations of the three attention kernels."""

    fwd: TileConfig
    dq: TileConfig
    dkv: TileConfig


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is launched with; aot.py compiles from the same record that ``run`` launches."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    tile: TileConfig

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the arguments."""
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, **FUSED}

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device; returns the compiled kernel."""
        device = next(x for x in self.args.values() if isinstance(x, Tensor))
        with torch.cuda.device_of(device):
            return self.kernel[self.grid](**self.args, **self.options)


def config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Config:
    """Tiles for a head size, dtype and compute capability (80, 90, ...; 0 is Triton's interpreter). A pure function."""
    if arch == 0:
        # small, and unequal both ways, so that small forests meet every tile class
        return Config(fwd=TileConfig(32, 16, 4, 1), dq=TileConfig(16, 32, 4, 1), dkv=TileConfig(16, 32, 4, 1))
    width = max(padded(head_dim), padded(value_dim))
    if dtype == torch.float32:
        # IEEE fp32 runs on the FMA units, and its operands take twice the room: accuracy is the point here, not speed
        tile = TileConfig(32, 32, 8, 1) if width <= 64 else TileConfig(16, 16, 8 if width > 128 else 4, 1)
        return Config(fwd=tile, dq=tile, dkv=tile)
    # sm_120 has the 99 KiB of shared memory of sm_86 and sm_89; the tiles for sm_80 stay below that
    return _sm90(width, head_dim == value_dim == width) if 90 <= arch < 120 else _sm80(width, arch)


# from aot.py's table: large tiles that leave no register spill with any feature on (D <= 128); not yet timed on a GPU
def _sm90(width: int, exact: bool) -> Config:
    if width <= 64:
        # dkv: 64 query rows keep both operands of every wgmma fed from shared memory
        return Config(fwd=TileConfig(128, 64, 8, 3), dq=TileConfig(128, 64, 8, 3), dkv=TileConfig(64, 128, 8, 3))
    if width <= 128:
        # dkv: dk and dv alone take 128 of 255 registers, so 32 query rows at a time (64 spill 440 bytes)
        return Config(fwd=TileConfig(128, 64, 8, 3), dq=TileConfig(128, 64, 8, 3), dkv=TileConfig(32, 128, 8, 3))
    # dkv: through descriptors 64 key rows, the least for wgmma, fit with 16 query rows; else 32 on the older mma
    dkv = TileConfig(16, 64, 8, 3) if exact else TileConfig(64, 32, 8, 2)
    return Config(fwd=TileConfig(128, 32, 8, 2), dq=TileConfig(128, 32, 8, 2), dkv=dkv)


def _sm80(width: int, arch: int) -> Config:
    if width <= 64:
        # dkv: at sm_120 three stages spill under a window
        dkv = TileConfig(32, 128, 8, 3 if arch < 120 else 2)
        # fwd: two blocks of 4 warps share an SM and hide each other's softmax
        return Config(fwd=TileConfig(64, 64, 4, 2), dq=TileConfig(128, 64, 8, 2), dkv=dkv)
    if width <= 128:
        return Config(fwd=TileConfig(64, 64, 4, 2), dq=TileConfig(64, 64, 8, 2), dkv=TileConfig(64, 64, 8, 2))
    return Config(fwd=TileConfig(64, 32, 8, 2), dq=TileConfig(32, 32, 4, 2), dkv=TileConfig(32, 32, 8, 1))


@torch.compiler.assume_constant_result
def arch_of(device: torch.device) -> int:
    """Compute capability as 80, 90, ...; 0 where the kernels run in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head dim is computed at (tl.dot takes nothing smaller)."""
    return max(16, triton.next_power_of_2(head_dim))


def rows(x: Tensor) -> Tensor:
    """``x`` itself if the kernels can address it (last dim contiguous, offsets in a tile fit int32), else a copy."""
    return x if x.stride(-1) == 1 and x.stride(0) < 2**22 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """The (token, head) strides of [T, H, D]."""
    return x.stride(0), x.stride(1)


def tma_fits(arch: int, *tensors: Tensor) -> bool:
    """Whether kernels on ``arch`` can load these [T, H, D] tensors through tensor descriptors (TMA, from sm_90 on).

    They are described as [T, H * D], for Triton 3.6 moves a tile of a three-dimensional one through registers. Not on
    sm_120, whose products read registers: there it does so with every tile, and at D 128 spills up to 5 KB of them.
    """
    return (arch == 0 or 90 <= arch < 120) and all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[2] in (64, 128, 256)
        and x.data_ptr() % 16 == 0
        and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
        # TMA steps by multiples of 16 bytes
        and (x.shape[0] == 1 or (x.stride(0) >= x.shape[1] * x.shape[2] and x.stride(0) % 8 == 0))
        for x in tensors
    )


def descriptor(x: Tensor, num_rows: int) -> TensorDescriptor:
    """Describes [T, H, D] for loads of ``num_rows`` tokens of one head."""
    num_tokens, num_heads, head_dim = x.shape
    width = num_heads * head_dim
    return TensorDescriptor(x, [num_tokens, width], [max(x.stride(0), width), 1], [num_rows, head_dim])


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """(factor on q.k, base-2 cap) for :func:`capped`; without softcap the factor alone takes q.k to base 2."""
    return (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 0.0)


def backward_args(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse2: Tensor,
    subtree_end: Tensor,
    first: Tensor,
    tile: TileConfig,
    scale: float,
    softcap: float,
    tma: bool,
) -> dict[str, Any]:
    """The kernel arguments that the dQ and dK/dV passes share."""
    qk_scale, cap = score_scales(scale, softcap)
    return dict(
        q=descriptor(q, tile.block_m) if tma else q,
        k=descriptor(k, tile.block_n) if tma else k,
        v=descriptor(v, tile.block_n) if tma else v,
        dout=descriptor(dout, tile.block_m) if tma else dout,
        delta=delta,
        lse2=lse2,
        subtree_end=subtree_end,
        first=first,
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        dout_strides=strides(dout),
        num_tokens=q.shape[0],
        num_padded=delta.shape[1],
        scale=scale,
        qk_scale=qk_scale,
        cap=cap,
        GROUP=q.shape[1] // k.shape[1],
        D=q.shape[2],
        DV=v.shape[2],
        BD=padded(q.shape[2]),
        BDV=padded(v.shape[2]),
        BM=tile.block_m,
        BN=tile.block_n,
        HAS_CAP=softcap > 0,
        HAS_WINDOW=first.shape[0] > 0,
        STAGES=tile.num_stages,
        TMA=tma,
    )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def head_of(src, i_head, src_strides, TMA: tl.constexpr):
    """What :func:`load_tile` reads a head from: a pointer to its first row, or the descriptor of all heads."""
    if TMA:
        p_head = src
    else:
        p_head = src + i_head.to(tl.int64) * src_strides[1]
    return p_head


@triton.jit
def load_tile(
    p_head,
    i_head,
    row,
    src_strides,
    num_tokens,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, BD] of a head from token ``row`` on; rows from ``num_tokens`` on and columns from D on read as zero."""
    if TMA:
        # fills the rows past T by itself
        b_tile = p_head.load([row, i_head * BD])
    else:
        o_row = tl.arange(0, ROWS)
        o_d = tl.arange(0, BD)
        p_tile = p_head + row.to(tl.int64) * src_strides[0] + o_row[:, None] * src_strides[0] + o_d[None, :]
        if MASK_ROWS:
            m_tile = o_row[:, None] < num_tokens - row
            if D != BD:
                m_tile = m_tile & (o_d[None, :] < D)
            b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
        elif D != BD:
            b_tile = tl.load(p_tile, mask=o_d[None, :] < D, other=0.0)
        else:
            b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def store_rows(p_base, b_tile, o_rows, stride, num_rows, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    m_tile = (o_rows[:, None] < num_rows) & (o_d[None, :] < D)
    tl.store(p_base + o_rows[:, None] * stride + o_d[None, :], narrow(b_tile, p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """fp32 block in the operand's dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        b_out = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_out = b_x.to(dtype)
    return b_out


@triton.jit
def _widen(b_x):
    return (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def dot(b_x, b_y, b_acc):
    """b_acc + b_x @ b_y in fp32; fp32 operands are multiplied exactly as fp32, not as tf32."""
    if INTERPRETED and b_x.dtype == tl.bfloat16:
        b_out = tl.dot(_widen(b_x), _widen(b_y), b_acc)
    else:
        b_out = tl.dot(b_x, b_y, b_acc, input_precision="ieee")
    return b_out


@triton.jit
def capped(b_s, qk_scale, cap, HAS_CAP: tl.constexpr):
    """Base-2 scores from q.k: scaled, then soft-capped if asked."""
    b_s = b_s * qk_scale
    if HAS_CAP:
        b_s = cap * _tanh(b_s)
    return b_s


@triton.jit
def cap_grad(b_s, cap):
    """d(capped score) / d(score before the cap), from the capped score: 1 - tanh^2."""
    b_t = b_s / cap
    return 1.0 - b_t * b_t


@triton.jit
def _tanh(b_x):
    """tanh through one ex2; a series near 0, where the quotient would cancel (the interpreter has no libdevice)."""
    b_2 = b_x * b_x
    b_series = b_x * (1.0 + b_2 * (-1.0 / 3 + b_2 * (2.0 / 15 + b_2 * (-17.0 / 315 + b_2 * (62.0 / 2835)))))
    b_exact = 1.0 - 2.0 / (1.0 + tl.exp2(b_x * 2.8853900817779268))
    return tl.where(tl.abs(b_x) < 0.25, b_series, b_exact)


@triton.jit
def visible(o_q, o_k, b_end, b_first, HAS_WINDOW: tl.constexpr):
    """Which elements of a partial tile survive; the operands broadcast, so either side may be the row. ``b_first`` are
    the oldest keys that the queries see under a window: along a path indices grow with positions."""
    m_seen = (o_k <= o_q) & (o_q < b_end)
    if HAS_WINDOW:
        m_seen = m_seen & (o_k >= b_first)
    return m_seen
