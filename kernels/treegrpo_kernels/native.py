"""Loads the two shared objects, `_C` (CPU) and `_C_cuda`, and says why one is not usable."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

# a kernel that never ran on a GPU stays out of "auto"
CUDA_VERIFIED = False


@cache
def _load(name: str) -> str | None:
    """None if the object was loaded, else the reason."""
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        return "not built: run TREEGRPO_BUILD=auto python setup.py build_ext --inplace"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error}"
    return None


def load() -> None:
    """Load what is there; idempotent."""
    if _load("_C") is None:
        _load("_C_cuda")


def cpu_reason() -> str | None:
    return _load("_C")


def cuda_reason() -> str | None:
    return _load("_C") or _load("_C_cuda")


def cpu_info() -> str:
    return "unknown"
