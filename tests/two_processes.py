"""Starts distributed_worker.py in two gloo processes, and what accelerate's launcher would have put in their
environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# the sources tested here, whatever is installed
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",
}
DDP = {"ACCELERATE_USE_FSDP": "false"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP2 |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
RESHARD, KEEP = {"FSDP_RESHARD_AFTER_FORWARD": "true"}, {"FSDP_RESHARD_AFTER_FORWARD": "false"}


def two_processes(folder: Path, jobs: dict[str, dict]) -> dict:
    """What each job gave, by name; jobs are those of distributed_worker.py but for `out`."""
    spec = [job | dict(out=str(folder / f"{name}.pt")) for name, job in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(spec))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_command([*launch, str(ROOT / "tests" / "distributed_worker.py"), str(folder / "jobs.json")])
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in jobs}


def run_command(command: list[str]) -> str:
    """What it printed; fails with the end of its errors."""
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
