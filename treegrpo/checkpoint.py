"""Checkpoints that are whole or not there: written under a temporary name with a list of file sizes, then renamed.

checkpoint-40/
    config.json, model.safetensors | adapter_config.json, adapter_model.safetensors    (from_pretrained reads it)
    shards/                      instead of model.safetensors under FSDP2: weights and AdamW's state, a file a process
    optimizer.pt                 AdamW's state (unless in shards/) and the schedule's, read with weights_only=True
    rollouts-<i>.jsonl.gz        trees that were sampled but not trained to the end, and the tokenizer's files
    old_logprobs-<rank>.pt       old log-probs of the groups in use, those that this process held
    trainer_state.json           step, the settings that decide the order of the data
    manifest.json                size of every file above

Nothing in it depends on how many processes wrote it: any number of them resumes, sharded or not.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treegrpo.files import writing_weights
from treegrpo.parallel import Parallel, full, full_like
from treegrpo.shards import SHARDS, load_shards, save_shards

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"
_OLD = "old_logprobs-"
_SUPERSEDED = "superseded-"
# What a run writes beside its checkpoints; those of a server's engine are the weights it was last told to load.
_FILES = ("metrics.jsonl", "unfinished-step-*.jsonl.gz")
_HALF_WRITTEN = (f".{_PREFIX}*.tmp", ".best*.tmp", "weights/.weights-*.tmp")
_FOLDERS = (f"{_SUPERSEDED}*", "best", "rollouts", "weights/weights-*", *_HALF_WRITTEN)


def path_of(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"{_PREFIX}{step}"


def listed(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def save(
    parallel: Parallel,
    policy: PreTrainedModel | PeftModel,
    optimizer: torch.optim.Optimizer,
    schedule: dict[str, Any],
    old_logprobs: dict[tuple[int, int], torch.Tensor],
    state: dict[str, Any],
    path: Path,
    write_more: Callable[[Path], None],
) -> None:
    """Writes `path` so that it never exists half written; every process calls it. `policy` is the unwrapped model;
    `write_more(folder)` adds files and may still change `state`."""
    accelerator = parallel.accelerator
    temporary = path.with_name(f".{path.name}.tmp")
    if parallel.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with writing_weights(path, temporary):
        torch.save(old_logprobs, temporary / f"{_OLD}{accelerator.process_index}.pt")
    # adapters are small: they are always written in one piece
    is_sharded = parallel.sharding is not None and not parallel.sharding.full_checkpoints and not _has_adapters(policy)
    if is_sharded:
        save_shards(policy, optimizer, temporary / SHARDS)
        weights, moments = None, None
    else:
        weights = _whole_weights(policy, parallel.is_main)
        moments = _mapped(optimizer.state_dict(), lambda value, _: _whole(value, parallel.is_main))
    if parallel.is_main:
        with writing_weights(path, temporary):
            if is_sharded:
                policy.config.save_pretrained(temporary)
                policy.generation_config.save_pretrained(temporary)
            else:
                policy.save_pretrained(temporary, state_dict=weights)
            torch.save({"optimizer": moments, "schedule": schedule}, temporary / "optimizer.pt")
        write_more(temporary)
        (temporary / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    if parallel.is_main:
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files}
        (temporary / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        before = path.with_name(f".{path.name}.old.tmp")
        if path.exists():
            # renamed, for removing it takes time in which the run may be killed
            shutil.rmtree(before, ignore_errors=True)
            os.replace(path, before)
        os.replace(temporary, path)
        shutil.rmtree(before, ignore_errors=True)
    accelerator.wait_for_everyone()


def _has_adapters(policy: torch.nn.Module) -> bool:
    return hasattr(policy, "get_base_model")


def _whole_weights(policy: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict, whole; with adapters only what is trained."""
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    wanted = {n: x for n, x in policy.state_dict().items() if not _has_adapters(policy) or n in trained}
    return {name: _whole(value, keep) for name, value in wanted.items()}


def _whole(value: torch.Tensor, keep: bool) -> torch.Tensor:
    """`value` in one piece; where it is not to be kept, a process only takes its part in gathering it."""
    whole = full(value)
    if whole is value:
        return value
    return whole.cpu() if keep else whole.new_empty(0)


def _mapped(state: dict[str, Any], change: Callable[[torch.Tensor, Any], torch.Tensor]) -> dict[str, Any]:
    """An optimiser's state dict with `change(value, index of its parameter)` in place of every tensor."""
    moments = {
        index: {key: change(value, index) if torch.is_tensor(value) else value for key, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    return {**state, "state": moments}


def set_aside(output_dir: str | Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step`, from which a run goes on, to `superseded-<step>`; returns where they are.

    They belong to another continuation: as checkpoints they would be the newest, and push out those to come. One that
    was set aside before stays: the next of the same step is `superseded-<step>-2`.
    """
    moved = []
    for path in listed(output_dir):
        number = int(path.name.removeprefix(_PREFIX))
        if number > step:
            names = (f"{_SUPERSEDED}{number}{f'-{again}' if again > 1 else ''}" for again in itertools.count(1))
            aside = next(free for name in names if not (free := path.with_name(name)).exists())
            os.replace(path, aside)
            moved.append(aside)
    return moved


def is_own(path: Path, output_dir: str | Path) -> bool:
    """Whether the checkpoint `path` is one of the run in `output_dir`."""
    return Path(output_dir).resolve() in (path.absolute().parent.resolve(), path.resolve().parent)


def _written(output_dir: Path) -> list[Path]:
    """Files and folders that a run wrote into its folder; config.yaml, which the next run replaces, is not among
    them."""
    folders = [*listed(output_dir), *(path for pattern in _FOLDERS for path in output_dir.glob(pattern))]
    files = [path for pattern in _FILES for path in output_dir.glob(pattern)]
    return [*(path for path in folders if path.is_dir()), *files]


def check_removable(output_dir: str | Path, inputs: dict[str, str | Path]) -> None:
    """ValueError where `remove_run` would remove one of the `inputs`, paths by the names of their settings."""
    written = {path.resolve(): path for path in _written(Path(output_dir))}
    for name, given in inputs.items():
        place = Path(given).resolve()
        for path in (place, *place.parents):
            if path in written:
                raise ValueError(
                    f"{name}: the run needs {given}, which overwrite_output_dir would remove with {written[path]};"
                    " leave that out, give another output_dir, or move it out of there first"
                )


def remove_run(output_dir: str | Path) -> None:
    """Removes what a run wrote into its folder, and nothing else."""
    output_dir = Path(output_dir)
    for path in _written(output_dir):
        _remove(path, ignore_errors=True)
    weights = output_dir / "weights"
    if weights.is_dir() and not any(weights.iterdir()):
        weights.rmdir()


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    for path in listed(output_dir)[:-keep] if keep else []:
        _remove(path)


def _remove(path: Path, ignore_errors: bool = False) -> None:
    # a checkpoint may have been moved to another disk: only the link is the run's
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


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
    cure = "give another checkpoint"
    if not (path / _MANIFEST).exists() and (of_run := listed(path)):
        raise ValueError(f"{path} is the folder of a run: give one of its checkpoints, such as {of_run[-1]}")
    try:
        sizes = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        wrong = {
            name: (path / name).stat().st_size if (path / name).exists() else None
            for name, size in sizes.items()
            if not (path / name).exists() or (path / name).stat().st_size != size
        }
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: cannot read its {_MANIFEST} ({error}); {cure}") from error
    for name, size in wrong.items():
        state = "is missing" if size is None else f"has {size:,} bytes instead of {sizes[name]:,}"
        raise ValueError(f"checkpoint {path} is damaged: {name} {state}; {cure}")


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[int, int], torch.Tensor]]:
    """`(trainer state, {"optimizer", "schedule"}, old log-probs of all processes)`; ValueError where a file does not
    read."""
    old: dict[tuple[int, int], torch.Tensor] = {}
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        for file in sorted(path.glob(f"{_OLD}*.pt")):
            old |= torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}); resume from another checkpoint") from error
    return state, optimizer, old


def load_optimizer(
    path: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None
) -> None:
    """Puts AdamW's state back, `saved` or, where that is None, from the shards, whose weights are read too. Every
    process calls it, however many wrote it.

    Raises:
        ValueError: what was saved does not fit the model.
    """
    if saved is None:
        load_shards(policy, optimizer, path / SHARDS)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        optimizer.load_state_dict(_mapped(saved, lambda value, index: full_like(value, parameters[index])))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: its optimiser does not fit this model ({error}); resume with the same settings"
        ) from error
