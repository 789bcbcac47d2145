"""The states that chunks begin with (treegrpo_kernels.state_chunks), a level of runs a launch: a program walks the
chunks of one run with the state of one head, some of its columns, in registers.

    forward, in order         V' = U - W S,      S' = exp(c_C) S + k^T V'
    backward, from behind     dV' += k dS',      dS = dS + exp(c_C) dS' - W^T dV'

Shapes: U, V' [N,H,C,Dv], W and k [N,H,C,D] (k decayed to the chunk's end), S [N,H,D,Dv], the decay [N,H,1] or [N,H,D],
all fp32. A run begins with what its parent's last chunk leaves behind, computed once more from that chunk; in backward
a run ends with the sum of its children's dS, added in their order. Names as in common.py.

Floor: C (2 D + Dv) + 2 D Dv floats a chunk and head and pass, read or written once; 4 C D Dv operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pieces import Runs, runs_of
from ..plan import TreePlan
from .common import INTERPRETED, Launch, TileConfig, arch_of, cdiv, padded

LARGEST_DIM = 128
"""Of keys: at 256 every tile spills."""


def tile_for(head_dim: int, arch: int) -> TileConfig:
    """block_m rows of a chunk at a time, block_n columns of the state; the largest that leave no register spill
    (aot.py; not timed on a GPU). sm_80 and sm_120 hold the operands of products in registers."""
    return TileConfig(16, 32 if head_dim <= 64 or 90 <= arch < 120 else 16, 4, 1)


@triton.jit
def _product(b_x, b_y):
    """fp32 by three products in tf32: as exact, for the units that multiply fast."""
    return tl.dot(b_x, b_y, input_precision="ieee" if INTERPRETED else "tf32x3")


@triton.jit
def _matrix(p_base, i_chunk, i_head, strides, o_row, o_col, m_tile):
    """[rows, columns] of a chunk and head, zero outside the mask; strides: chunk, head, row."""
    p_tile = p_base + i_chunk.to(tl.int64) * strides[0] + i_head * strides[1]
    return tl.load(p_tile + o_row[:, None] * strides[2] + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def _put(p_base, i_chunk, i_head, strides, o_row, o_col, m_tile, b_x):
    p_tile = p_base + i_chunk.to(tl.int64) * strides[0] + i_head * strides[1]
    tl.store(p_tile + o_row[:, None] * strides[2] + o_col[None, :], b_x, mask=m_tile)


@triton.jit
def _decay(p_base, i_chunk, i_head, strides, o_d, D: tl.constexpr, PER_CHANNEL: tl.constexpr):
    p_decay = p_base + i_chunk.to(tl.int64) * strides[0] + i_head * strides[1]
    if PER_CHANNEL:
        b_decay = tl.load(p_decay + o_d * strides[2], mask=o_d < D, other=0.0)
    else:
        b_decay = tl.load(p_decay) + tl.zeros_like(o_d).to(tl.float32)
    return b_decay[:, None]


@triton.jit(do_not_specialize=["first_run", "num_heads"])
def state_scan_fwd_kernel(
    u,
    w,
    k,
    decay,
    state,
    written,
    piece,
    offsets,
    parent,
    u_strides,
    w_strides,
    k_strides,
    decay_strides,
    state_strides,
    written_strides,
    first_run,
    num_heads,
    HAS_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """state and written of one run, head and BV columns."""
    i_run = first_run + tl.program_id(0) // num_heads
    i_head = (tl.program_id(0) % num_heads).to(tl.int64)
    o_row = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_keys = o_d[None, :] < D
    m_values = o_v[None, :] < DV
    m_state = (o_d[:, None] < D) & m_values
    b_state = tl.zeros((BD, BV), tl.float32)
    i_parent = tl.load(parent + i_run)
    if i_parent >= 0:
        i_chunk = tl.load(piece + tl.load(offsets + i_parent + 1) - 1)
        b_state = _matrix(state, i_chunk, i_head, state_strides, o_d, o_v, m_state)
        b_state = b_state * _decay(decay, i_chunk, i_head, decay_strides, o_d, D, PER_CHANNEL)
        for start in range(0, C, BR):
            o_c = start + o_row
            b_written = _matrix(written, i_chunk, i_head, written_strides, o_c, o_v, (o_c[:, None] < C) & m_values)
            b_k = _matrix(k, i_chunk, i_head, k_strides, o_c, o_d, (o_c[:, None] < C) & m_keys)
            b_state += _product(tl.trans(b_k), b_written)
    for i in range(tl.load(offsets + i_run), tl.load(offsets + i_run + 1)):
        i_chunk = tl.load(piece + i)
        _put(state, i_chunk, i_head, state_strides, o_d, o_v, m_state, b_state)
        b_behind = b_state * _decay(decay, i_chunk, i_head, decay_strides, o_d, D, PER_CHANNEL)
        for start in range(0, C, BR):
            o_c = start + o_row
            m_c = o_c[:, None] < C
            b_written = _matrix(u, i_chunk, i_head, u_strides, o_c, o_v, m_c & m_values)
            if HAS_W:
                b_w = _matrix(w, i_chunk, i_head, w_strides, o_c, o_d, m_c & m_keys)
                b_written -= _product(b_w, b_state)
            _put(written, i_chunk, i_head, written_strides, o_c, o_v, m_c & m_values, b_written)
            b_k = _matrix(k, i_chunk, i_head, k_strides, o_c, o_d, m_c & m_keys)
            b_behind += _product(tl.trans(b_k), b_written)
        b_state = b_behind


def fwd_launches(
    u: Tensor,
    w: Tensor | None,
    k: Tensor,
    decay: Tensor,
    state: Tensor,
    written: Tensor,
    runs: Runs,
    tile: TileConfig,
) -> list[Launch]:
    """The launches that fill ``state`` and ``written``, to be run in order."""
    args = _shared(u, w, k, decay, runs, tile)
    args |= dict(u=u, state=state, written=written, parent=runs.parent)
    args |= dict(u_strides=_strides(u), state_strides=_strides(state), written_strides=_strides(written))
    return _by_levels(state_scan_fwd_kernel, args, runs, u, tile)


@triton.jit(do_not_specialize=["first_run", "num_heads"])
def state_scan_bwd_kernel(
    w,
    k,
    decay,
    dstate,
    dwritten,
    dbehind,
    dbegin,
    piece,
    offsets,
    children,
    w_strides,
    k_strides,
    decay_strides,
    dstate_strides,
    dwritten_strides,
    dbehind_strides,
    dbegin_strides,
    first_run,
    num_heads,
    HAS_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """dbehind (dS' of each chunk), dwritten in place, and dbegin (dS of the run) of one run, head and BV columns."""
    i_run = first_run + tl.program_id(0) // num_heads
    i_head = (tl.program_id(0) % num_heads).to(tl.int64)
    o_row = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_keys = o_d[None, :] < D
    m_values = o_v[None, :] < DV
    m_state = (o_d[:, None] < D) & m_values
    b_dstate = tl.zeros((BD, BV), tl.float32)
    first = tl.load(children + i_run)
    for i in range(0, tl.load(children + i_run + 1) - first):
        b_dstate += _matrix(dbegin, first + i, i_head, dbegin_strides, o_d, o_v, m_state)
    begin = tl.load(offsets + i_run)
    end = tl.load(offsets + i_run + 1)
    for i in range(begin, end):
        i_chunk = tl.load(piece + (end - 1 - (i - begin)))
        _put(dbehind, i_chunk, i_head, dbehind_strides, o_d, o_v, m_state, b_dstate)
        b_before = b_dstate * _decay(decay, i_chunk, i_head, decay_strides, o_d, D, PER_CHANNEL)
        b_before += _matrix(dstate, i_chunk, i_head, dstate_strides, o_d, o_v, m_state)
        for start in range(0, C, BR):
            o_c = start + o_row
            m_c = o_c[:, None] < C
            b_k = _matrix(k, i_chunk, i_head, k_strides, o_c, o_d, m_c & m_keys)
            b_dwritten = _matrix(dwritten, i_chunk, i_head, dwritten_strides, o_c, o_v, m_c & m_values)
            b_dwritten += _product(b_k, b_dstate)
            _put(dwritten, i_chunk, i_head, dwritten_strides, o_c, o_v, m_c & m_values, b_dwritten)
            if HAS_W:
                b_w = _matrix(w, i_chunk, i_head, w_strides, o_c, o_d, m_c & m_keys)
                b_before -= _product(tl.trans(b_w), b_dwritten)
        b_dstate = b_before
    _put(dbegin, i_run, i_head, dbegin_strides, o_d, o_v, m_state, b_dstate)


def bwd_launches(
    w: Tensor | None,
    k: Tensor,
    decay: Tensor,
    dstate: Tensor,
    dwritten: Tensor,
    dbehind: Tensor,
    dbegin: Tensor,
    runs: Runs,
    tile: TileConfig,
) -> list[Launch]:
    """The launches that fill ``dbehind`` and ``dbegin`` [S,H,D,Dv] and add to ``dwritten``, to be run in order."""
    args = _shared(dwritten, w, k, decay, runs, tile)
    args |= dict(dstate=dstate, dwritten=dwritten, dbehind=dbehind, dbegin=dbegin, children=runs.children)
    args |= dict(dstate_strides=_strides(dstate), dwritten_strides=_strides(dwritten))
    args |= dict(dbehind_strides=_strides(dbehind), dbegin_strides=_strides(dbegin))
    return _by_levels(state_scan_bwd_kernel, args, runs, dwritten, tile)[::-1]


def _shared(u: Tensor, w: Tensor | None, k: Tensor, decay: Tensor, runs: Runs, tile: TileConfig) -> dict[str, Any]:
    """The arguments that both passes take."""
    return dict(
        w=k if w is None else w,
        k=k,
        decay=decay,
        piece=runs.piece,
        offsets=runs.offsets,
        w_strides=_strides(k if w is None else w),
        k_strides=_strides(k),
        decay_strides=_strides(decay),
        num_heads=u.shape[1],
        HAS_W=w is not None,
        PER_CHANNEL=decay.shape[2] > 1,
        C=u.shape[2],
        D=k.shape[3],
        DV=u.shape[3],
        BR=tile.block_m,
        BD=padded(k.shape[3]),
        BV=min(tile.block_n, padded(u.shape[3])),
    )


def _by_levels(kernel: Any, args: dict[str, Any], runs: Runs, u: Tensor, tile: TileConfig) -> list[Launch]:
    """A launch a level, from the roots on."""
    made, first = [], 0
    for count in runs.level_runs:
        grid = (count * u.shape[1], cdiv(u.shape[3], args["BV"]))
        made.append(Launch(kernel, grid, args | {"first_run": first}, tile))
        first += count
    return made


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The (chunk, head, row) strides of [N, H, rows, columns]."""
    return x.stride(0), x.stride(1), x.stride(2)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def scan(u: Tensor, w: Tensor | None, k: Tensor, decay: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """(state, written) from u, w, k and decay [N,H,1,1] or [N,H,D,1], all fp32 on a GPU."""
    u, w, k = _rows(u), None if w is None else _rows(w), _rows(k)
    state, written = u.new_empty(*u.shape[:2], k.shape[-1], u.shape[-1]), u.new_empty(u.shape)
    tile = tile_for(k.shape[3], arch_of(u.device))
    for launch in fwd_launches(u, w, k, decay, state, written, runs, tile):
        launch.run()
    return state, written


def scan_backward(
    w: Tensor | None, k: Tensor, decay: Tensor, dstate: Tensor, dwritten: Tensor, runs: Runs
) -> tuple[Tensor, Tensor]:
    """(dbehind, all of dwritten) from the gradients of state and written."""
    w, k, dstate = None if w is None else _rows(w), _rows(k), _rows(dstate)
    dwritten, dbehind = dwritten.clone(memory_format=torch.contiguous_format), dstate.new_empty(dstate.shape)
    dbegin = dstate.new_empty(runs.parent.shape[0], *dstate.shape[1:])
    tile = tile_for(k.shape[3], arch_of(k.device))
    for launch in bwd_launches(w, k, decay, dstate, dwritten, dbehind, dbegin, runs, tile):
        launch.run()
    return dbehind, dwritten


def launches(head_dim: int, arch: int, *, per_channel: bool = False) -> dict[str, Launch]:
    """Launch records of both passes for CPU tensors; nothing is launched (ahead-of-time compilation)."""
    u, written, dwritten = torch.empty(3, 2, 4, 64, head_dim).unbind()
    w, k = torch.empty(2, 2, 4, 64, head_dim).unbind()
    state, dstate, dbehind, dbegin = torch.empty(4, 2, 4, head_dim, head_dim).unbind()
    decay = torch.empty(2, 4, head_dim if per_channel else 1, 1)
    runs = runs_of(TreePlan.build(torch.full((128,), 128)), 64)
    tile = tile_for(head_dim, arch)
    [forward] = fwd_launches(u, w, k, decay, state, written, runs, tile)
    [backward] = bwd_launches(w, k, decay, dstate, dwritten, dbehind, dbegin, runs, tile)
    return {"scan_fwd": forward, "scan_bwd": backward}
