"""Weights and AdamW's state in one file a process, read back by any number of processes.

torch.distributed.checkpoint over safetensors, without its pickled metadata: where a part lies in its tensor is in the
header of the file that holds it. Names are `weight.<parameter>`, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and
`step.<parameter>`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

SHARDS = "shards"
"""The folder of a checkpoint that holds them."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes what is trained of `model`, and the state of `optimizer`, into `folder`; every process calls it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach()
    with _alone():
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
    """Reads them back, in place, whatever the number of processes they were written by.

    Raises:
        ValueError: a parameter is missing there or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        key = f"weight.{name}"
        size = getattr(saved.get(key), "size", None)
        if size != parameter.shape:
            shape = "nothing" if size is None else tuple(size)
            raise ValueError(
                f"{folder} holds {shape} for {name}, the model {tuple(parameter.shape)}: resume with the settings and"
                " the model it was made with"
            )
        tensors[key] = parameter.detach()
        # a parameter that never had a gradient has no state
        if optimizer is not None and f"step.{name}" in saved:
            state = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            # where the fused optimiser counts
            state["step"] = torch.zeros((), device=parameter.device)
            optimizer.state[parameter] = state
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
    with _alone():
        dcp.load(tensors, storage_reader=reader)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; a tied one under its first."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class _alone(warnings.catch_warnings):
    """torch warns that without a process group it writes and reads for one process, which is what is meant."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (load|save) in a single process")
