"""What bench/tune.py tries: kernel configurations, the tensors they run on, and the checks they must pass.

Shape legend: T tokens, Hq/Hkv query and key/value heads, D head dim, Tp T rounded up to whole query tiles.

A candidate is a name and a function from a :class:`Problem` to the launches of one pass, in order. A launch has
``run()``, and ``kernel``, ``args`` and ``options`` where it can be compiled before it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import treegrpo_kernels as tk
from treegrpo_kernels.plan import TileLists
from treegrpo_kernels.triton.backward import delta_launch, dq_launch
from treegrpo_kernels.triton.backward_dkv import dkv_launch, new_partials
from treegrpo_kernels.triton.common import TileConfig
from treegrpo_kernels.triton.forward import fwd_launch
from treegrpo_kernels.triton.split import sum_launch
from treegrpo_kernels.work import first_visible, num_slots, query_lists, span, work_items

# every query tile tried divides it
ROW_MULTIPLE = 256
# executed FLOPs of a visible pair per query head and head dim: matmuls of each pass times two
FLOPS = {"fwd": 4, "dq": 6, "dkv": 8, "one": 10, "delta": 0}
OUTPUTS = {
    "fwd": ("out", "lse"),
    "dq": ("dq",),
    "dkv": ("dk", "dv"),
    "one": ("dq", "dk", "dv"),
    "delta": ("delta", "lse2"),
}
# half a unit in the last place, relative to the largest value
BAND = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-19}


@dataclass(frozen=True)
class Problem:
    """Inputs and outputs of every pass on one forest; lse and delta are given, so that each pass is judged alone."""

    plan: tk.TreePlan
    scale: float
    tensors: dict[str, Tensor]
    """q, dout, out, dq [T,Hq,D]; k, v, dk, dv [T,Hkv,D]; lse [T,Hq] fp32; delta, lse2 [Hq,Tp] fp32."""

    @property
    def num_heads(self) -> int:
        return self.tensors["q"].shape[1]

    @property
    def head_dim(self) -> int:
        return self.tensors["q"].shape[2]

    def lists(self, tile: Any) -> TileLists:
        return self.plan.tile_lists(tile.block_m, tile.block_n)

    def flops(self, kernel: str) -> int:
        """Over visible pairs."""
        return FLOPS[kernel] * self.head_dim * self.num_heads * self.plan.num_pairs


@dataclass(frozen=True)
class Candidate:
    kernel: str
    """fwd, dq, dkv, one (dq and dkv together) or delta: what it computes."""
    name: str
    build: Callable[[Problem], list[Any]]


def make_problem(
    subtree_end: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Random inputs on ``device``; lse and delta are zeros, which times the same as true ones (see :func:`solve`)."""
    plan = tk.TreePlan.build(subtree_end, device=device)
    num_tokens = plan.num_tokens
    num_padded = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    gen = torch.Generator(device).manual_seed(1)
    shapes = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads, "dout": num_heads}
    tensors = {
        name: torch.randn(num_tokens, heads, head_dim, generator=gen, device=device).to(dtype)
        for name, heads in shapes.items()
    }
    for name, like in {"out": "q", "dq": "q", "dk": "k", "dv": "v"}.items():
        tensors[name] = torch.zeros_like(tensors[like])
    # large: p = exp2(s - lse2) stays finite
    tensors["lse"] = torch.full((num_tokens, num_heads), 20.0, device=device)
    tensors["delta"] = torch.zeros(num_heads, num_padded, device=device)
    tensors["lse2"] = torch.full((num_heads, num_padded), 30.0, device=device)
    return Problem(plan, head_dim**-0.5, tensors)


@dataclass(frozen=True)
class Solution:
    """The float64 results of a problem and how far each may be missed."""

    want: dict[str, Tensor]
    allowed: dict[str, float]

    def miss(self, problem: Problem, kernel: str) -> str | None:
        """None where the outputs of ``kernel`` are right, else what is wrong with them."""
        for name in OUTPUTS[kernel]:
            got, want = problem.tensors[name].double(), self.want[name]
            # lse2 is infinite past T
            error = float(torch.where(got == want, 0.0, (got - want).abs()).amax())
            if not error <= self.allowed[name]:
                return f"{name} is off by {error:.2e}, allowed {self.allowed[name]:.2e}"
        return None


def solve(problem: Problem) -> Solution:
    """Solve densely in float64 and in the inputs' own dtype; a kernel may err twice as much as the latter, plus a band.

    Fills in the problem's lse, delta, lse2 and out.
    """
    tensors, num_tokens = problem.tensors, problem.plan.num_tokens
    dtype = tensors["q"].dtype
    exact, low = (_dense(problem, of) for of in (torch.float64, dtype))
    for name in ("out", "lse"):
        tensors[name].copy_(exact[name])
    delta = torch.zeros_like(tensors["delta"], dtype=torch.float64)
    delta[:, :num_tokens] = (tensors["out"].double() * tensors["dout"].double()).sum(-1).T
    lse2 = torch.full_like(tensors["lse2"], float("inf"), dtype=torch.float64)
    lse2[:, :num_tokens] = exact["lse"].T / math.log(2)
    want = exact | {"delta": delta, "lse2": lse2}
    # sums of a few hundred products in float32
    allowed = {"delta": 2**-16 * float(delta.abs().amax()), "lse2": 2**-16 * float(lse2[:, :num_tokens].abs().amax())}
    for name in ("out", "lse", "dq", "dk", "dv"):
        band = BAND[tensors[name].dtype] * float(want[name].abs().amax().clamp(min=1))
        allowed[name] = 2 * float((low[name].double() - want[name]).abs().amax()) + band
    for name in ("delta", "lse2"):
        tensors[name].copy_(want[name])
    return Solution(want, allowed)


def _dense(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv by dense attention in ``dtype``."""
    q, k, v = leaves = [problem.tensors[name].detach().to(dtype).requires_grad_() for name in "qkv"]
    group = q.shape[1] // k.shape[1]
    scores = problem.scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1))
    mask = tk.reference.dense_mask(problem.plan.subtree_end)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
    grads = torch.autograd.grad(out, leaves, problem.tensors["dout"].to(dtype))
    wide = scores if dtype == torch.float64 else scores.float()
    return dict(
        zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), wide.logsumexp(-1).T.detach(), *grads), strict=True)
    )


def no_window(problem: Problem) -> Tensor:
    return first_visible(problem.plan, 0, 1)


def _fwd(tile: TileConfig, tma: bool) -> Callable[[Problem], list[Any]]:
    def build(problem: Problem) -> list[Any]:
        t, at = problem.tensors, problem.lists(tile)
        lists = [at.q_offsets, at.q_indices, at.q_full, at.q_order, no_window(problem)]
        qkv, end = (t["q"], t["k"], t["v"]), problem.plan.subtree_end
        return [fwd_launch(*qkv, None, t["out"], t["lse"], end, tile, lists, problem.scale, 0.0, tma)]

    return build


def _shared(problem: Problem, tma: bool) -> dict[str, Any]:
    names = ("dout", "q", "k", "v", "delta", "lse2")
    return dict(
        {name: problem.tensors[name] for name in names},
        subtree_end=problem.plan.subtree_end,
        scale=problem.scale,
        softcap=0.0,
        tma=tma,
    )


def _dq(tile: TileConfig, tma: bool) -> Callable[[Problem], list[Any]]:
    def build(problem: Problem) -> list[Any]:
        at = problem.lists(tile)
        lists = [at.q_offsets, at.q_indices, at.q_full, at.q_order, no_window(problem)]
        return [dq_launch(problem.tensors["dq"], tile, lists, **_shared(problem, tma))]

    return build


def _key_lists(problem: Problem, tile: TileConfig) -> list[Tensor]:
    """What dkv_launch reads of a plan, without a window."""
    at = problem.lists(tile)
    return [at.kv_max, at.kv_min, *query_lists(problem.plan, tile, 0), no_window(problem)]


def _dkv(tile: TileConfig, tma: bool) -> Callable[[Problem], list[Any]]:
    def build(problem: Problem) -> list[Any]:
        t, lists = problem.tensors, _key_lists(problem, tile)
        return [dkv_launch(t["dk"], t["dv"], tile, [*lists, _no_items(problem)], **_shared(problem, tma))]

    return build


def _dkv_split(tile: TileConfig, tma: bool) -> Callable[[Problem], list[Any]]:
    def build(problem: Problem) -> list[Any]:
        t, plan = problem.tensors, problem.plan
        items, parted = work_items(plan, tile, t["k"].shape[1])
        partials = new_partials(t["dk"], t["dv"], tile, num_slots(plan.num_tokens, tile.block_n, items, parted))
        lists = [*_key_lists(problem, tile), items]
        split = dkv_launch(t["dk"], t["dv"], tile, lists, partials, **_shared(problem, tma))
        return [split, sum_launch(*partials, parted, t["dk"], t["dv"], problem.scale)]

    return build


def _no_items(problem: Problem) -> Tensor:
    return problem.plan.subtree_end.new_empty((0, 4))


class _AtomicDq:
    """dK, dV and dQ in one pass: zeros, the pass, a scaled copy. What it takes beyond dK/dV is dQ's price."""

    def __init__(self, problem: Problem, tile: TileConfig, tma: bool) -> None:
        t, lists = problem.tensors, [*_key_lists(problem, tile), _no_items(problem)]
        self.sum = torch.zeros_like(t["q"], dtype=torch.float32)
        self.dq, self.scale = t["dq"], problem.scale
        self.launch = dkv_launch(t["dk"], t["dv"], tile, lists, dq=self.sum, **_shared(problem, tma))
        self.kernel, self.args, self.options = self.launch.kernel, self.launch.args, self.launch.options

    def run(self) -> None:
        self.sum.zero_()
        self.launch.run()
        torch.mul(self.sum, self.scale, out=self.sum)
        self.dq.copy_(self.sum)


def _atomic(tile: TileConfig, tma: bool) -> Callable[[Problem], list[Any]]:
    return lambda problem: [_AtomicDq(problem, tile, tma)]


def _delta(problem: Problem) -> list[Any]:
    t = problem.tensors
    return [delta_launch(t["dout"], t["out"], t["lse"], t["delta"], t["lse2"])]


# (block_m, block_n, warps, stages); the first of each list is what common.config chooses
_TRITON = {
    "fwd": [
        *[(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3)],
        *[(64, 128, 4, 2), (128, 64, 4, 2), (128, 32, 8, 4), (128, 128, 8, 3), (64, 128, 8, 2)],
        *[(256, 64, 8, 2)],
    ],
    "dq": [
        *[(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (64, 128, 4, 2)],
        *[(128, 128, 8, 2), (64, 32, 4, 3), (128, 32, 8, 4), (64, 128, 8, 2)],
    ],
    "dkv": [
        *[(32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2)],
        *[(32, 128, 8, 4), (32, 64, 4, 2), (32, 64, 4, 3), (128, 64, 8, 2), (16, 128, 8, 4)],
    ],
}
# one pass for dQ, dK and dV
_ONE = [(64, 64, 8, 2), (64, 64, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3)]
# (block_m, block_n, stages); "grid": a program a work item instead of a persistent one a multiprocessor
_HOPPER = {
    "fwd": [(128, 128, 2), (128, 64, 4), (128, 64, 3), (128, 128, 2, "grid"), (128, 64, 4, "grid")],
    "dq": [(128, 64, 3), (128, 64, 2), (128, 32, 4), (128, 64, 3, "grid")],
    "dkv": [(64, 128, 2), (32, 128, 3), (64, 128, 1), (32, 128, 4)],
}
_BUILD = {"fwd": _fwd, "dq": _dq, "dkv": _dkv}


def _triton() -> list[Candidate]:
    found = [Candidate("delta", "ptr 64", _delta)]
    for kernel, tiles in _TRITON.items():
        for i, tile in enumerate(tiles):
            m, n, warps, stages = tile
            name = f"{m}x{n} w{warps} s{stages}"
            found.append(Candidate(kernel, f"tma {name}", _BUILD[kernel](TileConfig(*tile), True)))
            if i < 1:
                found.append(Candidate(kernel, f"ptr {name}", _BUILD[kernel](TileConfig(*tile), False)))
            if i < 1 and kernel == "dkv":
                found.append(Candidate(kernel, f"tma {name} split", _dkv_split(TileConfig(*tile), True)))
    for m, n, warps, stages in _ONE:
        name = f"tma {m}x{n} w{warps} s{stages} atomic"
        found.append(Candidate("one", name, _atomic(TileConfig(m, n, warps, stages), True)))
    return found


def _hopper() -> list[Candidate]:
    from treegrpo_kernels.triton import hopper, hopper_backward_dkv, hopper_backward_dq, hopper_forward
    from treegrpo_kernels.triton.hopper_common import HopperTile

    def ends(problem: Problem) -> list[Tensor]:
        return [span(problem.plan, hopper.LARGEST_TILE), no_window(problem)]

    def fwd(problem: Problem, tile: HopperTile) -> list[Any]:
        t, at = problem.tensors, problem.lists(tile)
        lists = [at.q_offsets, at.q_indices, at.q_full, at.q_order, *ends(problem)]
        q, k, v, out, lse = (t[name] for name in ("q", "k", "v", "out", "lse"))
        return [hopper_forward.fwd_launch(q, k, v, None, out, lse, tile, lists, problem.scale)]

    def dq(problem: Problem, tile: HopperTile) -> list[Any]:
        t, at = problem.tensors, problem.lists(tile)
        lists = [at.q_offsets, at.q_indices, at.q_full, at.q_order, *ends(problem)]
        args = (t[name] for name in ("dout", "q", "k", "v", "dq", "lse2", "delta"))
        return [hopper_backward_dq.dq_launch(*args, tile, lists, problem.scale)]

    def dkv(problem: Problem, tile: HopperTile) -> list[Any]:
        t, at = problem.tensors, problem.lists(tile)
        kv_order, *places = query_lists(problem.plan, tile, 0)
        lists = [at.kv_max, at.kv_min, kv_order, *ends(problem), *places]
        args = (t[name] for name in ("dout", "q", "k", "v", "dk", "dv", "lse2", "delta"))
        return [hopper_backward_dkv.dkv_launch(*args, tile, lists, problem.scale)]

    builds = {"fwd": fwd, "dq": dq, "dkv": dkv}
    found = []
    for kernel, tiles in _HOPPER.items():
        for m, n, stages, *persistent in tiles:
            tile = HopperTile(m, n, stages, persistent=not persistent)
            name = f"gluon {m}x{n} s{stages}" + (" grid" if persistent else "")
            found.append(Candidate(kernel, name, partial(builds[kernel], tile=tile)))
    return found


def candidates(kernels: list[str]) -> list[Candidate]:
    """In the order to try them: each kernel's first choice, then each one's second, ..."""
    found = [*_triton(), *_hopper()]
    ranked = {kernel: [c for c in found if c.kernel == kernel] for kernel in ("delta", *kernels)}
    # the hand-pipelined ones lead each list
    for row in ranked.values():
        row.sort(key=lambda c: not c.name.startswith("gluon"))
    longest = max(map(len, ranked.values()))
    return [row[i] for i in range(longest) for row in ranked.values() if i < len(row)]
