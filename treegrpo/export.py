"""`treegrpo export`: the model of a checkpoint as a folder that `from_pretrained` reads, adapters merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from treegrpo import checkpoint as checkpoints
from treegrpo import models
from treegrpo.config import read_config
from treegrpo.rollout.weights import save_checkpoint
from treegrpo.shards import SHARDS, load_shards


def export(checkpoint: Path, out: Path, *, config: Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Writes `out` from a checkpoint of any kind: whole or sharded, all weights or adapters, whose base is read anew.

    Adapters are merged into the base they were trained on: a 4-bit base becomes what its 4 bits stand for. The
    tokenizer goes along where the checkpoint, or the folder the run took it from, has one.

    Args:
        checkpoint: a checkpoint folder of `treegrpo train`.
        out: the folder to write; it must not exist.
        config: the run's settings; default config.yaml beside the checkpoint.
        dtype: of the weights written.

    Raises:
        ValueError: no whole checkpoint, no settings, `out` exists, an adapter on one of two tied weights.
    """
    from transformers import GenerationConfig

    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    checkpoints.check(checkpoint)
    settings = dataclasses.replace(
        read_config(config or checkpoint.parent / "config.yaml"), gradient_checkpointing=False, bf16=False
    )
    model = models.build_policy(settings, checkpoint, dequantize=True)
    if (checkpoint / SHARDS).is_dir():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
        load_shards(model, None, checkpoint / SHARDS)
    if hasattr(model, "merge_and_unload"):
        _check_tied(model)
        # merged in float32, rounded once
        model = model.merge_and_unload()
    _cast(model, dtype)
    save_checkpoint(model, out)
    _copy_tokenizer((checkpoint, settings.tokenizer, settings.model), out)
    return out


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """To `dtype`, but for what transformers always reads in float32: a router with rounded biases routes otherwise."""
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if wide & set(name.split("."))}
    model.to(dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in kept:
            tensor.data = kept[name]


def _check_tied(model: torch.nn.Module) -> None:
    """ValueError where an adapter sits on one of two tied weights: merging in place would put it on both."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for of_one in names.values():
        if len({".base_layer." in name for name in of_one}) > 1:
            raise ValueError(
                f"{' and '.join(of_one)} are one weight, and an adapter changes one of them, which the base checkpoint"
                " cannot hold: take the embedding and the head out of target_modules, or untie them"
            )


def _copy_tokenizer(folders: tuple[str | Path | None, ...], out: Path) -> None:
    for folder in folders:
        if folder and (Path(folder) / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            loaded.save_pretrained(out)
            return
