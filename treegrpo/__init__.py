"""treegrpo: prefix-tree attention for training. Trees of agent rollouts, trained as one packed row of unique tokens.

Names are imported on first use, so that reading and building trees needs numpy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # for editors and type checkers, which run nothing
    from treegrpo import flops as flops
    from treegrpo import hf as hf
    from treegrpo.advantages import compute_advantages as compute_advantages
    from treegrpo.logprobs import token_logprobs as token_logprobs
    from treegrpo.loss import grpo_loss as grpo_loss
    from treegrpo.packing import TreeBatch as TreeBatch
    from treegrpo.packing import pack as pack
    from treegrpo.samples import call_offsets as call_offsets
    from treegrpo.samples import split_calls as split_calls
    from treegrpo.tree import RolloutTree as RolloutTree
    from treegrpo.tree import Trajectory as Trajectory
    from treegrpo.tree import build_forest as build_forest
    from treegrpo.tree import build_tree as build_tree
    from treegrpo.tree import load as load
    from treegrpo.tree import save as save

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
    "call_offsets": "samples",
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
