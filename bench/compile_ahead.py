"""Compiles what a GPU bench needs, in parallel processes: `python -m bench.compile_ahead SUITE [--serial JOB]`.

Triton and torch.compile keep what they compile on disk, so that the bench finds it; one after the other it would take
longer than the bench. A job that fails says so and changes nothing: the bench meets the same fault and records it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.workloads import Forest

LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Job:
    """One contender of the race on one kind of attention."""

    contender: str
    head_dim: int
    window: int = 0
    # those of the race
    num_heads: int = 32
    num_kv_heads: int = 8


JOBS = {
    "attention": {
        "triton-128": Job("tree_triton", 128),
        "triton-64": Job("tree_triton", 64),
        "triton-96": Job("tree_triton", 96),
        "triton-256": Job("tree_triton", 256),
        "flex-128": Job("flex", 128),
        "flex-64": Job("flex", 64),
        "flex-96": Job("flex", 96),
        "flex-256": Job("flex", 256),
        "triton-window": Job("tree_triton", 128, 1024),
        "flex-window": Job("flex", 128, 1024),
    },
    # the heads of real_step.MODELS: how many queries share a key is compiled in
    "step": {
        "1.5b": Job("tree_triton", 128, num_heads=12, num_kv_heads=2),
        "0.5b": Job("tree_triton", 64, num_heads=14, num_kv_heads=2),
        "3b": Job("tree_triton", 128, num_heads=16, num_kv_heads=2),
    },
}
# of a job's two chains
LENGTHS = (2055, 18_439)


def forests(job: Job) -> list[Forest]:
    """Two chains: one length alone would have FlexAttention compiled for that length, and our dK/dV parts the key tiles
    of short rows alone, by another kernel than that of long ones."""
    from bench.workloads import chain, lay_out
    from treegrpo import build_forest

    return [lay_out("chain", tuple(build_forest(chain(length))), window=job.window) for length in LENGTHS]


def run(job: Job) -> None:
    """One forward and backward on each of the job's forests, in this process."""
    import torch

    from bench.gpu_baselines import CONTENDERS
    from bench.race import Problem

    device = torch.device("cuda")
    for forest in forests(job):
        problem = Problem(forest, job.num_heads, job.num_kv_heads, job.head_dim, device, torch.bfloat16)
        contender = CONTENDERS[job.contender]
        q, k, v, dout = problem.inputs(contender.layout)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = contender.prepare(forest, device)(*leaves)
        torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()


def run_all(suite: str, limit: float = LIMIT_SECONDS) -> list[str]:
    """All jobs of a suite at once; a line about each. What has not ended after `limit` seconds is stopped."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench.compile_ahead", suite, "--serial"]
    # pytest puts the sources on this process's path only
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = {job: subprocess.Popen([*command, job], **pipes) for job in JOBS[suite]}
    lines = []
    for job, process in running.items():
        try:
            _, errors = process.communicate(timeout=max(1.0, limit - (time.monotonic() - start)))
            last = (errors.strip().splitlines() or ["no message"])[-1]
            state = "compiled" if process.returncode == 0 else f"failed: {last[:300]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            state = f"stopped after {limit:.0f} s"
        lines.append(f"{job}: {state} ({time.monotonic() - start:.0f} s)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_ahead")
    parser.add_argument("suite", choices=JOBS)
    parser.add_argument("--serial", metavar="JOB", help="this job of the suite alone, in this process")
    options = parser.parse_args()
    if options.serial and options.serial not in JOBS[options.suite]:
        parser.error(f"{options.suite} has no job {options.serial!r}: {', '.join(JOBS[options.suite])}")
    if options.serial:
        run(JOBS[options.suite][options.serial])
    else:
        print("\n".join(run_all(options.suite)))


if __name__ == "__main__":
    main()
