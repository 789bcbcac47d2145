"""treegrpo: prefix-tree attention for training. Trees of agent rollouts, trained as one packed row of unique tokens.

Names are imported on first use, so that reading and building trees needs numpy alone.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Trajectory": "tree",
    "RolloutTree": "tree",
    "build_tree": "tree",
    "build_forest": "tree",
    "load": "tree",
    "save": "tree",
    "TreeBatch": "packing",
    "pack": "packing",
    "token_logprobs": "logprobs",
    "compute_advantages": "advantages",
    "grpo_loss": "loss",
    "split_calls": "samples",
}
_SUBMODULES = ("flops", "hf")

__all__ = [*_MODULE_OF, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"treegrpo.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"treegrpo.{name}")
    raise AttributeError(f"module 'treegrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
