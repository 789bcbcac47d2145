"""Ahead-of-time compilation of the kernels, without a GPU: ``python -m treegrpo_kernels.triton.aot``.

Prints registers, spills and shared memory of each kernel and fails on a register spill, on shared memory over the
architecture's limit, on an sm_90 kernel without wgmma, or on a Hopper kernel whose wgmmas ptxas serialises or whose
warpgroups do not trade registers. The kernels are compiled from the same launch records as a call's, specialised by
Triton's own argument binder: what is checked here is what a launch would compile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from ..plan import TreePlan
from . import _DKV, _DQ, _FWD, head, hopper, state_scan, tile_tensors
from .backward import delta_launch, dq_launch
from .backward_dkv import dkv_launch, new_partials
from .common import Config, Launch, config, tma_fits
from .forward import fwd_launch
from .hopper_common import HopperLaunch
from .split import sum_launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# what the walk from state to state multiplies in, whatever the model's dtype
SCAN_DTYPE = "tf32x3"
# opt-in shared memory per block in bytes: CUDA C++ Programming Guide, technical specifications per compute capability
_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in _KIB.items()}

OF_36 = triton.__version__.startswith("3.6.")
# bytes, stores and loads, by kernel and head dim: ptxas parks loop-invariant words of these on the stack. In the loops
# over tiles the consumers only read: dK/dV one to three words a thread and tile, at 256 none in full tiles and up to
# twenty in others (and its producer up to fifteen). With 3.9 dK reads nineteen in full tiles, dQ at most one
SPILLS_ALLOWED = {
    ("hopper_dkv", 64): 128,
    ("hopper_dkv", 128): 128,
    ("hopper_dkv", 256): 576 if OF_36 else 768,
    ("hopper_dkv_split", 64): 192,
    ("hopper_dkv_split", 128): 192,
    ("hopper_dkv_split", 256): 576 if OF_36 else 768,
    ("hopper_dq", 256): 0 if OF_36 else 608,
    ("hopper_fwd", 256): 64 if OF_36 else 256,
    ("dkv", 256): 0 if OF_36 else 416,
    ("dkv_split", 256): 0 if OF_36 else 416,
}
# the plain kernels' tiles were chosen with Triton 3.6, where none spills: 3.8 and 3.9 do, 12 bytes at sm_80 and up to
# 160 at sm_120
SPILLS_OF_NEWER = 0 if OF_36 else 160

WITHOUT_PRODUCTS = ("delta", "dkv_sum", "head_score", "head_slope")
# what the features of a case ask of its launch, and the kernels that they change
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 30.0, "sinks": True},
    "sinks": {"sinks": True},
    "window": {"window": 1024},
    "channels": {"per_channel": True},
}
HEAD_KERNELS = {"plain": ("head_score", "head_slope"), "cap": ("head_score", "head_slope")}
PLAIN_KERNELS = {
    "plain": ("dkv", "dkv_split", "dq", "fwd", "delta", "dkv_sum"),
    "cap": ("dkv", "dq", "fwd"),
    "window": ("dkv", "dkv_split", "dq", "fwd"),
}
SCAN_KERNELS = {"plain": ("scan_fwd", "scan_bwd"), "channels": ("scan_fwd", "scan_bwd")}
HOPPER_KERNELS = {
    "plain": ("hopper_dkv", "hopper_dkv_split", "hopper_dq", "hopper_fwd"),
    "sinks": ("hopper_fwd",),
    "window": ("hopper_dkv", "hopper_dkv_split", "hopper_dq", "hopper_fwd"),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one head size, dtype and architecture; ``features`` of FEATURES (cap means softcap and entropy for
    the log-prob head, whose head size is 0)."""

    kernel: str
    arch: int
    head_dim: int
    dtype: str
    features: str


@dataclass(frozen=True)
class Result:
    """What ptxas made of a case; ``error`` is None where it passes."""

    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: bool
    seconds: float
    error: str | None


def launches(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    tiles: Config,
    *,
    num_tokens: int = 256,
    group: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    tma: bool = False,
) -> dict[str, Launch]:
    """The launch records of all kernels for CPU tensors of these shapes; nothing is launched."""
    num_kv_heads = 2
    num_heads = num_kv_heads * group
    plan = TreePlan.build(torch.full((num_tokens,), num_tokens))
    q, dq = torch.empty(2, num_tokens, num_heads, head_dim, dtype=dtype).unbind()
    k, dk = torch.empty(2, num_tokens, num_kv_heads, head_dim, dtype=dtype).unbind()
    v, dv = torch.empty(2, num_tokens, num_kv_heads, value_dim, dtype=dtype).unbind()
    out, dout = torch.empty(2, num_tokens, num_heads, value_dim, dtype=dtype).unbind()
    lse = torch.empty(num_tokens, num_heads)
    block = max(tiles.dq.block_m, tiles.dkv.block_m)
    delta, lse2 = torch.empty(2, num_heads, -(-num_tokens // block) * block).unbind()
    sink = torch.empty(num_heads) if sinks else None
    lists = tile_tensors(plan, q, v, window, tiles)
    scale = head_dim**-0.5
    shared = dict(
        dout=dout,
        q=q,
        k=k,
        v=v,
        delta=delta,
        lse2=lse2,
        subtree_end=plan.subtree_end,
        scale=scale,
        softcap=softcap,
        tma=tma,
    )
    fwd = (q, k, v, sink, out, lse, plan.subtree_end, tiles.fwd, lists[_FWD][1:], scale, softcap)
    whole = lists[_DKV][1:-1]
    partials = new_partials(dk, dv, tiles.dkv, 4)
    return {
        "fwd": fwd_launch(*fwd, tma),
        "delta": delta_launch(dout, out, lse, delta, lse2),
        "dq": dq_launch(dq, tiles.dq, lists[_DQ][1:], **shared),
        "dkv": dkv_launch(dk, dv, tiles.dkv, whole, **shared),
        "dkv_split": dkv_launch(dk, dv, tiles.dkv, whole, partials, **shared),
        "dkv_atomic": dkv_launch(dk, dv, tiles.dkv, whole, dq=torch.empty(q.shape), **shared),
        "dkv_sum": sum_launch(*partials, lists[_DKV][-1], dk, dv, scale),
    }


def hopper_launches(
    head_dim: int, dtype: torch.dtype, *, num_tokens: int = 256, window: int = 0, sinks: bool = False
) -> dict[str, HopperLaunch]:
    """The launch records of the Hopper kernels with the tiles they are launched with; nothing is launched."""
    num_heads, num_kv_heads, scale = 8, 2, head_dim**-0.5
    plan = TreePlan.build(torch.full((num_tokens,), num_tokens))
    q, dq, dout, out = torch.empty(4, num_tokens, num_heads, head_dim, dtype=dtype).unbind()
    k, v, dk, dv = torch.empty(4, num_tokens, num_kv_heads, head_dim, dtype=dtype).unbind()
    lse = torch.empty(num_tokens, num_heads)
    delta, lse2 = torch.empty(2, num_heads, hopper.LARGEST_TILE * -(-num_tokens // hopper.LARGEST_TILE)).unbind()
    tiles = hopper.config(head_dim)
    lists = hopper.tile_tensors(plan, tiles, num_kv_heads, window)
    fwd, dq_lists, dkv = (lists[part][1:] for part in (hopper._FWD, hopper._DQ, hopper._DKV))
    whole = dkv[:-2]
    items = [*dkv[:2], torch.zeros(5, 4, dtype=torch.int32), *dkv[3:-2]]
    sink = torch.empty(num_heads) if sinks else None
    partials = hopper.new_partials(k, tiles.dkv, 4)
    return {
        "hopper_fwd": hopper.fwd_launch(q, k, v, sink, out, lse, tiles.fwd, fwd, scale),
        "hopper_dq": hopper.dq_launch(dout, q, k, v, dq, lse2, delta, tiles.dq, dq_lists, scale),
        "hopper_dkv": hopper.dkv_launch(dout, q, k, v, dk, dv, lse2, delta, tiles.dkv, whole, scale),
        "hopper_dkv_split": hopper.dkv_launch(dout, q, k, v, dk, dv, lse2, delta, tiles.dkv, items, scale, partials),
    }


def source_of(launch: Launch | HopperLaunch, arch: int) -> tuple[ASTSource, dict, GPUTarget]:
    """What a launch on ``arch`` compiles: source with signature, constants and argument attributes; options; target."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**launch.args, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes), parsed.__dict__, target


def specialization_key(launch: Launch | HopperLaunch, arch: int) -> str:
    """Two launches with one key share one compiled kernel."""
    source, options, _ = source_of(launch, arch)
    return f"{source.hash()} {options['num_warps']} {options['num_stages']}"


class Compiled(NamedTuple):
    """The kernel a launch would run, and what ptxas said of it."""

    kernel: CompiledKernel
    registers: int
    spilled_bytes: int
    serialised: bool
    """Whether each wgmma waits for the one before it: ptxas could not prove that registers are left alone meanwhile."""


def compile_launch(launch: Launch | HopperLaunch, arch: int) -> Compiled:
    """Compile what ``launch`` would run on ``arch``; warms Triton's disk cache."""
    source, parsed, target = source_of(launch, arch)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        # a cached kernel would come without ptxas's account of it
        triton.knobs.compilation.always_compile = True
        kernel = triton.compile(source, target=target, options=parsed)
    said = log.getvalue()
    [registers] = map(int, re.findall(r"Used (\d+) registers", said))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return Compiled(kernel, registers, spilled, "serialized" in said)


def compile_case(case: Case, tiles: Config | None = None, tma: bool | None = None) -> Result:
    """``tiles`` and ``tma`` default to what a launch would choose."""
    dtype = DTYPES.get(case.dtype, torch.float32)
    tiles = tiles or config(case.head_dim, case.head_dim, dtype, case.arch)
    options = FEATURES[case.features]
    if tma is None:
        tma = tma_fits(case.arch, torch.empty(1, 1, case.head_dim, dtype=dtype))
    specialised = case.kernel.startswith("hopper")
    launch: Launch | HopperLaunch
    if case.head_dim == 0:
        launch = head.launches(dtype, entropy=case.features == "cap", cap=options.get("softcap", 0.0))[case.kernel]
    elif case.kernel.startswith("scan"):
        launch = state_scan.launches(case.head_dim, case.arch, **options)[case.kernel]
    elif specialised:
        launch = hopper_launches(case.head_dim, dtype, **options)[case.kernel]
    else:
        launch = launches(case.head_dim, case.head_dim, dtype, tiles, tma=tma, **options)[case.kernel]
    start = time.perf_counter()
    kernel, registers, spilled, serialised = compile_launch(launch, case.arch)
    seconds = time.perf_counter() - start
    shared = kernel.metadata.shared
    ptx = kernel.asm["ptx"]
    wgmma = "wgmma.mma_async" in ptx
    errors = []
    if spilled > SPILLS_ALLOWED.get((case.kernel, case.head_dim), SPILLS_OF_NEWER):
        errors.append(f"{spilled} bytes of register spills")
    if specialised and serialised:
        errors.append("wgmmas are serialised")
    if specialised and "setmaxnreg" not in ptx:
        errors.append("no setmaxnreg")
    limit = SHARED_LIMIT.get(case.arch, 99 * 1024)
    if shared > limit:
        errors.append(f"{shared} bytes of shared memory, limit {limit}")
    # head dims over 128 leave dK/dV too few registers for the 64 key rows that wgmma wants
    wants_wgmma = case.arch == 90 and case.dtype not in ("fp32", "tf32x3") and case.head_dim <= 128
    if wants_wgmma and case.kernel not in WITHOUT_PRODUCTS and not wgmma:
        errors.append("no wgmma")
    return Result(case, registers, spilled, shared, wgmma, seconds, "; ".join(errors) or None)


def cases(archs: list[int], head_dims: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every kernel plain; and, for the first dtype, with softcap and sinks (those for Hopper with sinks), and with a
    window. On Blackwell the first dtype alone. The walk from state to state has one dtype; on Hopper it comes
    with all head dims, elsewhere with the largest, which leaves the fewest registers, and on sm_100, whose tiles are
    Hopper's, plain alone."""
    for arch in archs:
        walked = sorted(head_dim for head_dim in head_dims if head_dim <= state_scan.LARGEST_DIM)
        for head_dim in walked if 90 <= arch < 100 else walked[-1:]:
            for features, kernels in SCAN_KERNELS.items():
                if features == "plain" or not 100 <= arch < 120:
                    yield from (Case(kernel, arch, head_dim, SCAN_DTYPE, features) for kernel in kernels)
        for dtype, head_dim in product(dtypes[:1] if arch >= 100 else dtypes, (0, *head_dims)):
            families = [PLAIN_KERNELS if head_dim else HEAD_KERNELS]
            if 90 <= arch < 100 and head_dim in hopper.HEAD_DIMS and dtype != "fp32":
                families.append(HOPPER_KERNELS)
            for features, kernel in ((name, x) for of in families for name, kernels in of.items() for x in kernels):
                if features == "plain" or head_dim == 0 or dtype == dtypes[0]:
                    yield Case(kernel, arch, head_dim, dtype, features)


def _line(*cells: object) -> str:
    widths = (16, 5, 5, 6, 9, 5, 8, 9, 6, 6, 0)
    return " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m treegrpo_kernels.triton.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100, 120], help="compute capabilities")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["bf16", "fp16"])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: the interpreter compiles nothing. Unset it and run again.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    todo = list(cases(args.arch, args.head_dim, args.dtype))
    print(_line("kernel", "arch", "D", "dtype", "features", "regs", "spills", "shared", "wgmma", "s", ""))
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(args.jobs) as pool:
            for r in pool.map(compile_case, todo):
                c = r.case
                made = r.registers, r.spilled_bytes, r.shared_bytes, "yes" if r.wgmma else "-", round(r.seconds, 1)
                print(_line(*astuple(c), *made, r.error or ""), flush=True)
                failed += r.error is not None
    print(f"{len(todo)} kernels in {time.perf_counter() - start:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
