"""Checkpoints that are whole or not there: written under a temporary name with a list of file sizes, then renamed.

checkpoint-40/
    config.json, model.safetensors | adapter_config.json, adapter_model.safetensors    (from_pretrained reads it)
    optimizer.pt                 AdamW's state and the schedule's, read with weights_only=True
    rollouts-<i>.jsonl.gz        trees that were sampled but not trained to the end, and the tokenizer's files
    old_logprobs-<rank>.pt       old log-probs of the groups in use, one file per process
    trainer_state.json           step, the settings that decide the order of the data
    manifest.json                size of every file above
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"


def path_of(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"{_PREFIX}{step}"


def listed(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def save(
    accelerator,
    model,
    optimizer: torch.optim.Optimizer,
    schedule: dict[str, Any],
    old_logprobs: list[torch.Tensor],
    state: dict[str, Any],
    path: Path,
    write_more: Callable[[Path], None],
) -> None:
    """Writes `path` so that it never exists half written; every process calls it. `write_more(folder)` adds files and
    may still change `state`."""
    temporary = path.with_name(f".{path.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save([x.cpu() for x in old_logprobs], temporary / _old_name(accelerator))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(temporary)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule}, temporary / "optimizer.pt")
        write_more(temporary)
        (temporary / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    for path in listed(output_dir)[:-keep] if keep else []:
        shutil.rmtree(path)


def find(output_dir: str | Path, wanted: str) -> Path:
    """The checkpoint `wanted` (a folder, or "latest"), checked whole.

    Raises:
        ValueError: there is none, or a file is missing or shorter or longer than it was written.
    """
    if wanted == "latest":
        if not (found := listed(output_dir)):
            raise ValueError(f"resume_from_checkpoint=latest: no {_PREFIX}* in {output_dir}")
        wanted = str(found[-1])
    path = Path(wanted)
    check(path)
    return path


def check(path: Path) -> None:
    """ValueError unless every file of the checkpoint has the size it was written with."""
    cure = "resume from another checkpoint"
    try:
        sizes = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        wrong = {
            name: (path / name).stat().st_size if (path / name).exists() else None
            for name, size in sizes.items()
            if not (path / name).exists() or (path / name).stat().st_size != size
        }
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: cannot read its {_MANIFEST} ({error}); {cure}") from error
    for name, size in wrong.items():
        state = "is missing" if size is None else f"has {size:,} bytes instead of {sizes[name]:,}"
        raise ValueError(f"checkpoint {path} is damaged: {name} {state}; {cure}")


def load_state(path: Path, accelerator) -> tuple[dict[str, Any], dict[str, Any], list[torch.Tensor]]:
    """`(trainer state, {"optimizer", "schedule"}, old log-probs of this process)`; ValueError where a file does not
    read."""
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        name = _old_name(accelerator)
        old = torch.load(path / name, map_location="cpu", weights_only=True) if (path / name).exists() else []
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}); resume from another checkpoint") from error
    return state, optimizer, old


def _old_name(accelerator) -> str:
    return f"old_logprobs-{accelerator.process_index}.pt"
