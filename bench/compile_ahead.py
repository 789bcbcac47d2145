"""Compiles what a GPU bench needs, in parallel processes: `python -m bench.compile_ahead [--serial JOB]`.

Triton and torch.compile keep what they compile on disk, so that the bench finds it; one after the other it would take
longer than the bench. A job that fails says so and changes nothing: the bench meets the same fault and records it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.workloads import Forest

LIMIT_SECONDS = 120.0
# (contender, head dim, window)
JOBS = {
    "triton-128": ("tree_triton", 128, 0),
    "triton-64": ("tree_triton", 64, 0),
    "triton-96": ("tree_triton", 96, 0),
    "triton-256": ("tree_triton", 256, 0),
    "flex-128": ("flex", 128, 0),
    "flex-64": ("flex", 64, 0),
    "flex-96": ("flex", 96, 0),
    "flex-256": ("flex", 256, 0),
    "triton-window": ("tree_triton", 128, 1024),
    "flex-window": ("flex", 128, 1024),
}
# of a job's two chains
LENGTHS = (2055, 18_439)


def forests(job: str) -> list[Forest]:
    """Two chains: one length alone would have FlexAttention compiled for that length, and our dK/dV parts the key tiles
    of short rows alone, by another kernel than that of long ones."""
    from bench.workloads import chain, lay_out
    from treegrpo import build_forest

    *_, window = JOBS[job]
    return [lay_out(job, tuple(build_forest(chain(length))), window=window) for length in LENGTHS]


def run(job: str) -> None:
    """One forward and backward on each of the job's forests, in this process."""
    import torch

    from bench.gpu_baselines import CONTENDERS
    from bench.race import HEADS, KV_HEADS, Problem

    name, head_dim, _ = JOBS[job]
    device = torch.device("cuda")
    for forest in forests(job):
        problem = Problem(forest, HEADS, KV_HEADS, head_dim, device, torch.bfloat16)
        contender = CONTENDERS[name]
        q, k, v, dout = problem.inputs(contender.layout)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = contender.prepare(forest, device)(*leaves)
        torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()


def run_all(limit: float = LIMIT_SECONDS) -> list[str]:
    """All jobs at once; a line about each. What has not ended after `limit` seconds is stopped."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench.compile_ahead", "--serial"]
    # pytest puts the sources on this process's path only
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = {job: subprocess.Popen([*command, job], **pipes) for job in JOBS}
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
    parser.add_argument("--serial", metavar="JOB", choices=JOBS, help="this job alone, in this process")
    options = parser.parse_args()
    if options.serial:
        run(options.serial)
    else:
        print("\n".join(run_all()))


if __name__ == "__main__":
    main()
