"""Loads the two shared objects, `_C` (CPU) and `_C_cuda`, and says why one is not usable.

Both are built from csrc/ and register operators under `torch.ops.treegrpo_native`: schema and CPU kernels in `_C`, CUDA
kernels in `_C_cuda`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_NEEDS = {"_C": "a C++ compiler", "_C_cuda": "a C++ compiler and a CUDA toolkit (nvcc)"}


def load() -> None:
    """Load what was built; idempotent."""
    if _failure("_C") is None:
        _failure("_C_cuda")


def cpu_reason() -> str | None:
    """None if the CPU kernel is usable, else why not."""
    return _failure("_C")


def cuda_reason() -> str | None:
    """None if the CUDA kernel is usable, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _failure("_C") or _failure("_C_cuda")


def cpu_info() -> str:
    """Instruction set and threads of the CPU kernel, for people."""
    reason = cpu_reason()
    return reason or f"{isa()}, {torch.get_num_threads()} threads"


def isa() -> str:
    """Instruction set in use: avx512, avx2 or portable."""
    load()
    return torch.ops.treegrpo_native.isa()


def set_isa(name: str) -> None:
    """Use another instruction set this machine has ("" for the best); for tests. ValueError if it has not."""
    load()
    try:
        torch.ops.treegrpo_native.set_isa(name)
    except RuntimeError as error:
        # which of the two a C++ exception becomes is up to torch
        raise ValueError(str(error)) from error


@cache
def _failure(name: str) -> str | None:
    """Loads one object: None if that worked, else the reason."""
    # without the flag pip builds where there is no torch, and leaves the objects out
    cure = f"in treegrpo's folder run `pip install --no-build-isolation .` (editable: `-e .`) with {_NEEDS[name]}"
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        return f"{name} was not built: {cure}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load ({error.__cause__ or error}): built for another torch? {cure}"
    return None
