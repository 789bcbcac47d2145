"""The CUDA kernels for Hopper on the imitated multiprocessor of csrc/test, with the very lists that Python gives them.

`make ctest` builds the program and runs this; without it there is nothing to run.
"""

import subprocess
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

import treegrpo_kernels as tk
from treegrpo_kernels import hopper_cuda, work

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "build" / "cmake" / "test_sm90"
SOURCES = [path for folder in ("csrc/test", "csrc/cuda/sm90") for path in (ROOT / folder).iterdir()]
IS_BUILT = PROGRAM.exists() and PROGRAM.stat().st_mtime >= max(path.stat().st_mtime for path in SOURCES)
pytestmark = pytest.mark.skipif(not IS_BUILT, reason="csrc/test is not built, or older than its sources: make ctest")
FORESTS = {
    "chain": cases.nested_subtree_end((400, [])),
    "star": cases.nested_subtree_end((200, [(130, []), (40, []), (90, [(20, []), (61, [])])])),
    "search": cases.nested_subtree_end((20, []), cases.searched([90, 60, 60, 20], [1, 2], 40)),
    "random": cases.random_subtree_end(517, 3, branch=0.02),
    "binary": cases.nested_subtree_end(cases.balanced(60, 2, 3, 40)),
}


def write(
    path: Path,
    subtree_end: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    d: int,
    is_bfloat16: bool,
    has_sinks: bool = False,
) -> int:
    """The problem as test_sm90.cpp reads it; how many key tiles are parted."""
    plan = tk.TreePlan.build(torch.from_numpy(subtree_end))
    tensors = hopper_cuda.tile_tensors(plan, num_kv_heads)
    lines = [[num_heads, num_kv_heads, d, int(is_bfloat16), int(has_sinks)]]
    for x in (plan.subtree_end, *tensors):
        lines.append([x.numel(), *x.flatten().tolist()])
    path.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    *_, parted, _ = tensors
    return len(parted)


def run(*paths: Path) -> None:
    done = subprocess.run([PROGRAM, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kernels agree with the definition") == len(paths)


@pytest.mark.parametrize("number", range(len(FORESTS)))
def test_forests(number, tmp_path):
    d, is_bfloat16 = ((64, False), (128, True))[number % 2]
    write(tmp_path / "problem", list(FORESTS.values())[number], 3, 1, d, is_bfloat16, has_sinks=number % 2 == 0)
    run(tmp_path / "problem")


@pytest.mark.parametrize("rest", [1, 63, 64, 65, 128])
def test_lengths_of_the_last_tile(rest, tmp_path):
    """Up to 64 tokens: one of two consumers has none, and full key tiles to pass on all the same."""
    subtree_end = cases.nested_subtree_end((30, []), (226, [(128 + rest, [])]))
    assert (len(subtree_end) - 1) % 128 + 1 == rest
    write(tmp_path / "problem", subtree_end, 2, 1, 64 if rest % 2 else 128, True)
    run(tmp_path / "problem")


@pytest.mark.parametrize("d", [64, 128])
def test_parted_key_tiles(d, tmp_path, monkeypatch):
    """As on a GPU for few heads: the pieces of a root's key tiles, their partials, whole tiles beside them."""
    monkeypatch.setattr(work, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(work, "SHORTEST_PIECE", 2)
    num_parted = write(tmp_path / "problem", FORESTS["search"], 6, 1, d, True)
    assert num_parted > 1
    run(tmp_path / "problem")
