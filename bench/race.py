"""Contenders of one forest against each other: inputs, the gate, interleaved rounds.

Shape legend: T packed tokens, R rows of a layout, Hq/Hkv query and key/value heads, G = Hq / Hkv, D head dim.

Layouts, each an index of packed tokens [R]: "tree" the T packed tokens; "blocks" the same and padding up to a multiple
of 128; "leaf" the flattened leaves; "padded" the leaves padded to the longest. The gate: outputs and gradients of one
key/value head and its query heads against the reference in float32, tree by tree, 64 rows at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import treegrpo_kernels as tk
from bench import workloads
from bench.baselines import Contender, Request
from bench.gpu_baselines import FLEX_BLOCK, NOTES
from bench.timing import Stopwatch, rounds_for
from bench.workloads import Forest
from treegrpo_kernels import flops

HEADS, KV_HEADS = 32, 8
# relative error of a block's root mean square; a key tile of 64 left out of 64k keys is 3e-2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHECKED_ROWS = 64
# larger inputs outlast the L2 by themselves and need no second set
ROTATED_BYTES, NUM_SETS = 4 * 2**30, 2
SECONDS_PER_CONTENDER, MIN_ROUNDS, MAX_ROUNDS = 0.2, 3, 7
QUICK_ROUNDS = 3
PASSES = ("forward", "backward", "forward_backward")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """One forest with its heads; inputs are drawn once per set and laid out where a contender wants them."""

    forest: Forest
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    _cache: dict[tuple[str, int], Inputs] = field(default_factory=dict)

    def rows(self, layout: str) -> tuple[Tensor, Tensor | None]:
        """(packed token of every row [R], False where the row is padding [R] or None)."""
        forest, num_tokens = self.forest, self.forest.num_tokens
        match layout:
            case "tree":
                return torch.arange(num_tokens, device=self.device), None
            case "blocks":
                index = torch.arange(-(-num_tokens // FLEX_BLOCK) * FLEX_BLOCK, device=self.device)
                return index.clamp(max=num_tokens - 1), index < num_tokens
            case "leaf":
                return forest.leaf_tokens.to(self.device), None
            case "padded":
                lengths = forest.leaf_offsets.diff()
                columns = torch.arange(int(lengths.max()))
                # pads repeat the leaf's last token, which no real query of a causal leaf sees
                slots = forest.leaf_offsets[:-1, None] + columns.minimum(lengths[:, None] - 1)
                return forest.leaf_tokens[slots].flatten().to(self.device), (columns < lengths[:, None]).flatten().to(
                    self.device
                )
        raise ValueError(f"layout {layout!r} is unknown: use tree, blocks, leaf or padded")

    def num_sets(self, layout: str) -> int:
        width = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads) * self.dtype.itemsize
        return NUM_SETS if self.rows(layout)[0].numel() * width < ROTATED_BYTES else 1

    def inputs(self, layout: str, number: int = 0) -> Inputs:
        """q, dout [R, Hq, D] and k, v [R, Hkv, D], as (q, k, v, dout).

        A shared token's dout is split evenly over its leaves, so that leaf gradients summed per token are the tree's;
        that of padding is 0.
        """
        key = (layout, number)
        if key not in self._cache:
            self._cache[key] = self._draw(number) if layout == "tree" else self._laid_out(layout, number)
        return self._cache[key]

    def _draw(self, number: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(1000 * number + self.forest.num_tokens)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(self.forest.num_tokens, n, self.head_dim) for n in heads]
        draw = [torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for shape in shapes]
        return tuple(draw)

    def _laid_out(self, layout: str, number: int) -> Inputs:
        index, filled = self.rows(layout)
        q, k, v, dout = (x.index_select(0, index) for x in self.inputs("tree", number))
        if layout in ("leaf", "padded"):
            leaves = torch.bincount(self.forest.leaf_tokens.to(self.device), minlength=self.forest.num_tokens)
            dout /= leaves[index][:, None, None].to(dout.dtype)
        if filled is not None:
            dout[~filled] = 0
        return q, k, v, dout

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """{out, dq [T, G, D], dk, dv [T, 1, D]} fp32 of the last key/value head, by the reference."""
        group = self.num_heads // self.num_kv_heads
        q, k, v, dout = (x.float() for x in self.inputs("tree"))
        parts = (q[:, -group:], k[:, -1:], v[:, -1:], dout[:, -group:])
        found = {name: torch.zeros_like(parts[i]) for i, name in enumerate(("dq", "dk", "dv", "out"))}
        for start, end in workloads.roots(self.forest.subtree_end):
            rows = slice(start, end)
            leaves = [x[rows].clone().requires_grad_() for x in parts[:3]]
            end_of = self.forest.subtree_end[rows] - start
            out = tk.reference.tree_attention(*leaves, end_of, window=self.forest.window or None)
            grads = torch.autograd.grad(out, leaves, parts[3][rows])
            for name, value in (("out", out.detach()), *zip(("dq", "dk", "dv"), grads, strict=True)):
                found[name][rows] = value
        return found

    def folded(self, layout: str, name: str, got: Tensor) -> Tensor:
        """A contender's rows [R, H, D] of the checked heads as packed tokens: outs averaged, gradients summed."""
        heads = self.num_heads // self.num_kv_heads if name in ("out", "dq") else 1
        got = got.detach()[:, -heads:].float()
        if layout == "tree":
            return got
        index, filled = self.rows(layout)
        if filled is not None:
            index, got = index[filled], got[filled]
        summed = torch.zeros_like(self.expected[name]).index_add_(0, index, got)
        if name != "out" or layout == "blocks":
            return summed
        # every leaf's copy must be right, not only their mean
        self._compare(f"a leaf's {name}", got, self.expected[name][index])
        return summed / torch.bincount(index, minlength=self.forest.num_tokens)[:, None, None]

    def _compare(self, name: str, got: Tensor, want: Tensor) -> float:
        error = block_error(got, want)
        tolerance = TOLERANCE[self.dtype]
        assert error <= tolerance, f"{name} is off by {error:.1e} > {tolerance:.0e}"
        return error

    def gate(self, layout: str, out: Tensor, grads: tuple[Tensor, ...]) -> float:
        """The largest error of a block of rows; AssertionError over the tolerance."""
        names = ("out", "dq", "dk", "dv")[: 1 + len(grads)]
        results = zip(names, (out, *grads), strict=True)
        return max(self._compare(name, self.folded(layout, name, got), self.expected[name]) for name, got in results)

    def flops(self, passes: str, pairs: int) -> int:
        forward = flops.attention_forward(pairs, self.num_heads, self.head_dim)
        backward = flops.attention_backward(pairs, self.num_heads, self.head_dim)
        return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[passes]


def block_error(got: Tensor, want: Tensor) -> float:
    """The largest error of 64 rows [R, H, D]: its root mean square over that of what is wanted there.

    Where nearly nothing is wanted (dq of a root) a thousandth of the mean of all rows stands in. NaN counts as 1e9.
    """
    difference = torch.nan_to_num(got - want, nan=1e9, posinf=1e9, neginf=-1e9)

    def square(x: Tensor) -> Tensor:
        return F.pad(x.square().mean((1, 2)), (0, -x.shape[0] % CHECKED_ROWS)).view(-1, CHECKED_ROWS).sum(1)

    wanted = square(want)
    floor = 1e-6 * wanted.mean()
    return float((square(difference) / torch.maximum(wanted, floor)).max().sqrt())


@dataclass
class Outcome:
    """What became of a contender: times per pass, or the reason why there are none."""

    reason: str | None = None
    error: float | None = None
    peak_bytes: int | None = None
    note: str | None = None
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})


@dataclass
class _Runner:
    contender: Contender
    sets: list[Inputs]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rounds: int = 1

    def pass_of(self, number: int) -> tuple[Callable[[], None], Callable[[], None], dict]:
        """(forward, backward, where their results are) on one set of inputs."""
        q, k, v, dout = self.sets[number % len(self.sets)]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        results: dict[str, object] = {}

        def forward() -> None:
            results["out"] = self.attend(*leaves)

        def backward() -> None:
            results["grads"] = torch.autograd.grad(results["out"], leaves, dout)

        return forward, backward, results


def race(problem: Problem, contenders: Mapping[str, Contender], *, quick: bool) -> dict[str, Outcome]:
    """Every contender's outcome: each is checked, then all take turns, one pass a round. No failure ends the race."""
    outcomes: dict[str, Outcome] = {}
    runners: dict[str, _Runner] = {}
    watch = Stopwatch(problem.device)
    for name, contender in contenders.items():
        outcome = outcomes[name] = Outcome()
        outcome.reason = contender.unsupported(Request(problem.forest, problem.device, True, quick))
        if outcome.reason is None:
            runner = _guarded(outcome, lambda c=contender, o=outcome: _prepare(problem, c, o, watch, quick))
            if runner is not None:
                runners[name] = runner
        outcome.note = NOTES.get(name)
    for number in range(max((runner.rounds for runner in runners.values()), default=0)):
        for name, runner in runners.items():
            outcome = outcomes[name]
            if number < runner.rounds and outcome.reason is None:
                _guarded(outcome, lambda r=runner, o=outcome, n=number: _one_round(r, o, watch, n))
    return outcomes


def _guarded(outcome: Outcome, work: Callable[[], object]) -> object:
    """`work`'s result; an exception becomes the outcome's reason, for a rival's fault must not hide the others."""
    try:
        return work()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        outcome.reason = f"failed: {type(error).__name__}: {lines[0][:300]}"
        error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _prepare(problem: Problem, contender: Contender, outcome: Outcome, watch: Stopwatch, quick: bool) -> _Runner:
    layout = contender.layout
    sets = [problem.inputs(layout, i) for i in range(problem.num_sets(layout))]
    runner = _Runner(contender, sets, contender.prepare(problem.forest, problem.device))
    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    forward, backward, results = runner.pass_of(0)
    forward()
    backward()
    if on_gpu:
        torch.cuda.synchronize()
        outcome.peak_bytes = torch.cuda.max_memory_allocated() - before
    outcome.error = problem.gate(layout, results["out"], results["grads"])
    results.clear()
    if not quick:
        forward, backward, _ = runner.pass_of(1)
        once = sum(watch.once(forward, backward))
        runner.rounds = rounds_for(once, SECONDS_PER_CONTENDER, MIN_ROUNDS, MAX_ROUNDS)
    elif on_gpu:
        runner.rounds = QUICK_ROUNDS
    return runner


def _one_round(runner: _Runner, outcome: Outcome, watch: Stopwatch, number: int) -> None:
    forward, backward, _ = runner.pass_of(number)
    spent = watch.once(forward, backward)
    for name, seconds in zip(PASSES, (*spent, sum(spent)), strict=True):
        outcome.times[name].append(seconds)
