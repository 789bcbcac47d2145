"""Which tiles are fastest here: every candidate compiled, checked and timed; ``python -m bench.tune --out FILE``.

The parent process touches no GPU. It has candidates compiled by as many child processes as there are cores, while one
other child holds the GPU: it checks each candidate against float64 on a small forest, then times it by CUDA events from
a cold L2 on three forests. A candidate that fails, hangs or is wrong costs its own row only: the child is ended and
started again. The table comes last; rates are over visible pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch

from bench.candidates import OUTPUTS, Candidate, Problem, Solution, candidates, make_problem, solve

FORESTS = ("chain_16k", "star_2k", "search_2_2_16k")
NUM_HEADS, NUM_KV_HEADS = 32, 8
KERNELS = ("fwd", "dq", "dkv", "one")
START_SECONDS, COMPILE_SECONDS = 60, 45
# what printing and writing need at the end
RESERVE_SECONDS = 3


@dataclass
class Row:
    """What became of one candidate. ``error`` is None where it ran and was right."""

    kernel: str
    name: str
    error: str | None = "not tried: out of time"
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    compile_seconds: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tflops: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Geometric mean rate over the forests; for kernels without FLOPs one over the time. 0 where it failed."""
        values = [*self.tflops.values()] if any(self.tflops.values()) else [1 / s for s in self.seconds.values()]
        return math.exp(statistics.fmean(map(math.log, values))) if values and not self.error else 0.0


@dataclass(frozen=True)
class Setup:
    """What a child process needs to know. ``device`` is cuda, or cpu for Triton's interpreter (tests)."""

    kernels: tuple[str, ...]
    head_dim: int
    rounds: int
    device: str
    tiny: bool = False
    listed: Callable[[list[str]], list[Candidate]] = candidates


class Child:
    """A process with a pipe; it may be ended at any moment."""

    def __init__(self, method: str, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.started = time.monotonic()

    def ask(self, message: object, seconds: float) -> object:
        """The answer to ``message``; TimeoutError when it takes longer, EOFError when the process dies."""
        if message is not None:
            try:
                self.pipe.send(message)
            except OSError as error:
                raise EOFError(str(error)) from error
        if not self.pipe.poll(max(seconds, 0)):
            raise TimeoutError
        try:
            return self.pipe.recv()
        except ConnectionResetError as error:
            raise EOFError(str(error)) from error

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def last_line(text: str) -> str:
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")[:300]


def small_forest() -> torch.Tensor:
    """subtree_end of three ragged trees that branch often, 1,111 tokens."""
    rng = np.random.default_rng(5)
    end = np.empty(1111, dtype=np.int32)
    for start, stop in ((0, 700), (700, 1109), (1109, 1111)):
        _branch(end, start, stop, rng)
    return torch.from_numpy(end)


def _branch(end: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> None:
    """A node of random length from ``start``, then children until ``stop``."""
    first = min(stop, start + int(rng.integers(1, 150)))
    end[start:first] = stop
    while first < stop:
        cut = stop if stop - first < 8 else int(rng.integers(first + 1, stop + 1))
        _branch(end, first, cut, rng)
        first = cut


def large_forests(tiny: bool) -> dict[str, torch.Tensor]:
    from bench import gpu_workloads

    return {name: gpu_workloads.forest(name, tiny).subtree_end for name in FORESTS}


def compile_one(pipe: Connection, candidate: Candidate, problem: Problem, arch: int) -> None:
    """Compile a candidate's launches for CPU tensors: (registers, spilled bytes, shared bytes) of the largest."""
    from treegrpo_kernels.triton.aot import compile_launch

    try:
        worst = (0, 0, 0)
        for launch in candidate.build(problem):
            compiled, registers, spilled, _ = compile_launch(launch, arch)
            worst = tuple(map(max, worst, (registers, spilled, compiled.metadata.shared)))
        pipe.send(worst)
    except Exception as error:
        pipe.send(f"does not compile: {type(error).__name__}: {last_line(str(error))}")


def serve(pipe: Connection, setup: Setup) -> None:
    """Hold the GPU: say what it is, then answer each index of a candidate with (error, seconds by forest)."""
    from bench.timing import Stopwatch

    torch.set_num_threads(1)
    device = torch.device(setup.device)
    pipe.send(_describe(device))
    dtype = torch.bfloat16
    heads = (4, 1) if setup.tiny else (NUM_HEADS, NUM_KV_HEADS)
    small_end = small_forest()
    if setup.tiny:
        small_end = torch.full((70,), 70, dtype=torch.int32)
        small_end[30:50] = 50
    small = make_problem(
        small_end, 8 if not setup.tiny else 4, 2 if not setup.tiny else 1, setup.head_dim, device, dtype
    )
    solution = solve(small)
    given = {name: tensor.clone() for name, tensor in small.tensors.items()}
    large = {
        name: make_problem(end, *heads, setup.head_dim, device, dtype)
        for name, end in large_forests(setup.tiny).items()
    }
    watch = Stopwatch(device)
    listed = setup.listed(list(setup.kernels))
    pipe.send({name: {kernel: problem.flops(kernel) for kernel in OUTPUTS} for name, problem in large.items()})
    while True:
        candidate = listed[pipe.recv()]
        seconds: dict[str, float] = {}
        try:
            error = _check(candidate, small, given, solution)
            if error is None:
                seconds = {name: _time(candidate, problem, watch, setup.rounds) for name, problem in large.items()}
        except Exception as problem:
            error = f"{type(problem).__name__}: {last_line(str(problem))}"
            traceback.print_exc()
        pipe.send((error, seconds))


def _describe(device: torch.device) -> dict[str, object]:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return {"device": "cpu", "arch": 0, **versions}
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "arch": major * 10 + minor,
        "multiprocessors": properties.multi_processor_count,
        **versions,
    }


def _run(candidate: Candidate, problem: Problem) -> Callable[[], None]:
    launches = candidate.build(problem)

    def run() -> None:
        for launch in launches:
            launch.run()

    return run


def _check(candidate: Candidate, small: Problem, given: dict[str, torch.Tensor], solution: Solution) -> str | None:
    for name, tensor in small.tensors.items():
        tensor.copy_(given[name])
    run = _run(candidate, small)
    first: dict[str, torch.Tensor] = {}
    for attempt in range(3):
        for name in OUTPUTS[candidate.kernel]:
            small.tensors[name].fill_(float("nan"))
        run()
        if small.plan.device.type == "cuda":
            torch.cuda.synchronize()
        error = solution.miss(small, candidate.kernel)
        if error is not None:
            return f"wrong: {error}" + (f" (run {attempt + 1})" if attempt else "")
        for name in OUTPUTS[candidate.kernel]:
            # one pass adds dQ in no fixed order
            ordered = candidate.kernel != "one"
            if ordered and not torch.equal(first.setdefault(name, small.tensors[name].clone()), small.tensors[name]):
                return f"{name} differs from run to run"
    return None


def _time(candidate: Candidate, problem: Problem, watch, rounds: int) -> float:
    run = _run(candidate, problem)
    watch.once(run)
    return statistics.median(watch.once(*[run] * rounds))


def compile_all(rows: list[Row], listed: list[Candidate], arch: int, head_dim: int, deadline: float, jobs: int) -> None:
    """Warm Triton's disk cache with every candidate; a row whose candidate does not compile says why."""
    small = make_problem(small_forest(), 8, 2, head_dim, torch.device("cpu"), torch.bfloat16)
    todo = list(range(len(listed)))[::-1]
    running: dict[Connection, tuple[int, Child]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            index = todo.pop()
            child = Child("fork", compile_one, listed[index], small, arch)
            running[child.pipe] = index, child
        for pipe in wait(list(running), timeout=0.2):
            index, child = running.pop(pipe)
            try:
                made = child.ask(None, 0)
            except EOFError:
                made = "does not compile: the compiler crashed"
            if isinstance(made, str):
                rows[index].error = made
            else:
                rows[index].registers, rows[index].spilled_bytes, rows[index].shared_bytes = made
            rows[index].compile_seconds = time.monotonic() - child.started
            child.end()
        for pipe, (index, child) in list(running.items()):
            if time.monotonic() > min(child.started + COMPILE_SECONDS, deadline):
                rows[index].error = f"does not compile within {time.monotonic() - child.started:.0f} s"
                child.end()
                del running[pipe]
        if time.monotonic() > deadline:
            return


class Timer:
    """The child that holds the GPU, started again whenever it had to be ended."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.child: Child | None = None
        self.device: dict[str, object] = {}
        self.flops: dict[str, dict[str, int]] = {}

    def start(self) -> dict[str, object]:
        """Begin; returns what the device is. The forests are laid out while the parent goes on."""
        self.child = Child("spawn", serve, self.setup)
        self.device = self.child.ask(None, START_SECONDS)
        self.flops = {}
        return self.device

    def measure(self, index: int, seconds: float) -> tuple[str | None, dict[str, float]]:
        try:
            if self.child is None:
                self.start()
            if not self.flops:
                self.flops = self.child.ask(None, START_SECONDS)
            return self.child.ask(index, seconds)
        except TimeoutError:
            error = f"hangs: no answer within {seconds:.0f} s"
        except EOFError:
            error = "the process died"
        self.stop()
        return error, {}

    def stop(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None


def tune(setup: Setup, seconds: float, limit: float, jobs: int) -> dict[str, object]:
    """Everything but the table: device, rows (asdict of :class:`Row`), sorted by kernel and rate."""
    deadline = time.monotonic() + seconds - RESERVE_SECONDS
    listed = setup.listed(list(setup.kernels))
    rows = [Row(candidate.kernel, candidate.name) for candidate in listed]
    timer = Timer(setup)
    began = time.monotonic()
    device = timer.start()
    print(f"{device} after {time.monotonic() - began:.1f} s")
    if device["arch"]:
        compile_all(rows, listed, device["arch"], setup.head_dim, deadline, jobs)
        print(f"{len(rows)} candidates compiled after {time.monotonic() - began:.1f} s")
    for index, row in enumerate(rows):
        if row.error is not None and not row.error.startswith("not tried"):
            continue
        left = deadline - time.monotonic()
        if left < 1:
            continue
        row.error, row.seconds = timer.measure(index, min(limit, left))
        row.tflops = {name: timer.flops[name][row.kernel] / s / 1e12 for name, s in row.seconds.items()}
        print(f"{row.kernel} {row.name}: {row.error or ' '.join(f'{s * 1e3:.3f} ms' for s in row.seconds.values())}")
    timer.stop()
    rows.sort(key=lambda row: (row.kernel, -row.mean))
    return {**device, "head_dim": setup.head_dim, "seconds": time.monotonic() - began, "rows": list(map(asdict, rows))}


def table(found: dict[str, object]) -> str:
    """One line a candidate, fastest first within its kernel; then the fastest backward pass."""
    rows = [Row(**row) for row in found["rows"]]
    lines = [f"{'kernel':6} {'config':24} " + " ".join(f"{name:>15}" for name in FORESTS) + "  regs spill  shared"]
    for row in rows:
        if row.error is not None:
            continue
        rates = (row.tflops[name] or row.seconds[name] * 1e3 for name in FORESTS)
        made = f"{row.registers or '':>5} {row.spilled_bytes if row.registers else '':>5} {row.shared_bytes or '':>7}"
        lines.append(f"{row.kernel:6} {row.name:24} " + " ".join(f"{rate:15.1f}" for rate in rates) + f" {made}")
    best = {row.kernel: row for row in reversed(rows) if row.error is None}
    if {"dq", "dkv", "delta"} <= best.keys():
        parts = [best[kernel] for kernel in ("dq", "dkv", "delta")]
        # the convention of the field: a backward pass counts as five matmuls, whatever was executed
        counted = {name: best["dq"].tflops[name] * best["dq"].seconds[name] / 6 * 10 for name in FORESTS}
        rates = (counted[name] / sum(part.seconds[name] for part in parts) for name in FORESTS)
        lines.append(f"{'bwd':6} {'best three, 10 D Hq/pair':24} " + " ".join(f"{rate:15.1f}" for rate in rates))
    lines += [f"{row.kernel:6} {row.name:24} {row.error}" for row in rows if row.error is not None]
    lines.append(
        "TFLOP/s over visible pairs: 4 D Hq a pair forward, 6 dq, 8 dkv, 10 one pass, as executed; delta in ms"
    )
    return "\n".join(lines)


def commit() -> str:
    """COMMIT names it on a machine that has a copy of the tree and no git."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=90, help="for everything")
    parser.add_argument("--limit", type=float, default=6, help="seconds for one candidate, compiled")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compiling processes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    setup = Setup(tuple(args.kernels), args.head_dim, args.rounds, "cuda")
    try:
        found = tune(setup, args.seconds, args.limit, args.jobs)
    except (EOFError, TimeoutError):
        print("the process that holds the GPU did not start; its traceback is above", file=sys.stderr)
        return 1
    found["commit"] = commit()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
