"""The weights of a model under the names of its checkpoint, adapters merged, for engines that load them by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from treegrpo.files import writing_weights


def checkpoint_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields `(name, tensor)` for every weight and saved buffer of a transformers or PEFT model; tied ones once.

    Of a PEFT model the base model's weights come with the active adapter merged in, under the base model's names. The
    model itself is bitwise what it was: a layer is merged, copied and put back, one at a time, because merging and
    unmerging in floating point leaves a rounding error in the frozen weights at every call. Tensors that are not
    merged are the model's own, not copies. ValueError where an adapter sits on one of two tied weights.
    """
    is_adapted = hasattr(model, "get_base_model")
    prefix = str(getattr(model, "prefix", ""))
    layers = {n: m for n, m in model.named_modules() if is_adapted and _is_adapter_layer(m)}
    merged: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, torch.Size], bool] = {}
    for name, tensor in model.state_dict().items():
        # taken before merging: a merged copy may be freed before the next one, and its address used again
        key, has_adapter = (tensor.data_ptr(), tensor.shape), False
        owner, _, rest = name.partition(".base_layer.")
        # stacked experts have an adapter a parameter, one inside the other
        rest = rest.replace("base_layer.", "")
        if is_adapted:
            if "original_module" in name or any(part.startswith(prefix) for part in name.split(".")):
                continue
            if rest and owner in layers:
                if not any(key.startswith(f"{owner}.") for key in merged):
                    merged = {f"{owner}.{key}": value for key, value in _merge(layers[owner]).items()}
                tensor, has_adapter = merged[f"{owner}.{rest}"], True
            name = f"{owner}.{rest}" if rest else name
            name = name.removeprefix("base_model.model.")
            name = name.replace("modules_to_save.default.", "")
        if tensor.numel() and key in seen:
            if has_adapter or seen[key]:
                raise ValueError(
                    f"{name}: an adapter changes one of two tied weights, which the base checkpoint cannot hold:"
                    " take the embedding and the head out of target_modules, or untie them"
                )
            continue
        seen[key] = has_adapter
        yield name, tensor


def save_checkpoint(model: Any, folder: str | Path) -> Path:
    """Writes `model` as safetensors with its config, adapters merged, beside `folder`, then renames it to `folder`.

    ValueError where the model has no `save_pretrained` or the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder for the weights")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "save_pretrained"):
        raise ValueError(f"{type(base).__name__} has no save_pretrained: only transformers models can be saved")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = None if base is model else dict(checkpoint_weights(model))
    try:
        with writing_weights(folder, temporary):
            base.save_pretrained(temporary, state_dict=weights)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_adapter_layer(module: torch.nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge") and hasattr(module, "unmerge")


def _merge(layer: Any) -> dict[str, torch.Tensor]:
    base, wrappers = layer.get_base_layer(), [layer]
    # stacked experts have an adapter a parameter, one inside the other
    while _is_adapter_layer(wrappers[-1].base_layer):
        wrappers.append(wrappers[-1].base_layer)
    open_ones = [wrapper for wrapper in wrappers if not wrapper.merged]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for wrapper in open_ones:
        wrapper.merge()
    try:
        return {name: tensor.clone() for name, tensor in base.state_dict().items()}
    finally:
        for wrapper in open_ones:
            wrapper.unmerge()
        if open_ones:
            for name, tensor in base.state_dict().items():
                tensor.copy_(before[name])
