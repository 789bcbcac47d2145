"""What stops a run at its start, before weights are read: shared by the trainer and its dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import treegrpo_kernels
from treegrpo import checkpoint as checkpoints
from treegrpo import models, step
from treegrpo.config import TrainConfig
from treegrpo.rollout.build import missing_package
from treegrpo.rollout.replay import check_logprobs, check_recorded, check_vocabulary
from treegrpo.tree import RolloutTree, Trajectory


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that the run resumes, None for a fresh one.

    Raises:
        ValueError: there is no such checkpoint, output_dir holds another run that is to stay, or what this one reads
            would go with it.
    """
    resume = config.resume_from_checkpoint
    found = checkpoints.find(config.output_dir, resume) if resume else None
    if config.overwrite_output_dir:
        inputs = {
            "rollouts": config.rollouts_file if config.is_replay else "",
            "retriever": config.retriever.removeprefix("bm25:"),
            "resume_from_checkpoint": found,
            **{name: getattr(config, name) for name in ("model", "tokenizer", "dataset", "eval_dataset")},
        }
        checkpoints.check_removable(config.output_dir, {name: path for name, path in inputs.items() if path})
    elif found is not None and checkpoints.is_own(found, config.output_dir):
        pass
    else:
        check_unused(config.output_dir)
    return found


def check_unused(output_dir: str) -> None:
    """ValueError where a run has begun to write into `output_dir`; asked again before this one does, for another may
    have begun while weights were read."""
    if (Path(output_dir) / "metrics.jsonl").exists():
        raise ValueError(
            f"output_dir {output_dir} already holds a run: give another, or --overwrite-output-dir, or"
            " --resume-from-checkpoint latest"
        )


def check_logged(config: TrainConfig, trajectories: list[Trajectory], trees: list[RolloutTree]) -> None:
    """ValueError for logged trajectories that the model or a packed row cannot take."""
    if config.old_logprobs == "recorded":
        check_recorded(trajectories)
    check_logprobs(trajectories)
    model_config = models.read_model_config(config.model)
    check_vocabulary(trajectories, models.vocabulary_size(model_config), config.model)
    _check_text(trajectories, model_config)
    for tree in trees:
        step.check_budget(tree, config)


def _check_text(trajectories: list[Trajectory], model_config: Any) -> None:
    """ValueError naming the first token in whose place a model is given what an encoder made of an image or sound."""
    for kind in ("image", "video", "audio"):
        # transformers has both names
        token = getattr(model_config, f"{kind}_token_id", getattr(model_config, f"{kind}_token_index", None))
        for index, trajectory in enumerate(trajectories if isinstance(token, int) else ()):
            found = np.flatnonzero(trajectory.token_ids == token)
            if found.size:
                raise ValueError(
                    f"trajectory {index} (group {trajectory.group!r}): token_ids[{found[0]}] = {token} stands for"
                    f" {kind} input, but models are trained on text alone; leave such trajectories out"
                )


def check_engine(config: TrainConfig) -> None:
    """ValueError where the engine that samples wants a package that is not installed."""
    if missing := missing_package(config.rollouts):
        raise ValueError(f"rollouts={config.rollouts}: {missing}; or sample with another engine")


def check_backend(backend: str, device: torch.device | None = None) -> None:
    """ValueError unless the backend works on ``device``, by default the one that a run here takes."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend != "auto" and (reason := treegrpo_kernels.backends(device)[backend]):
        raise ValueError(f"backend {backend!r} does not work here: {reason}; `treegrpo doctor` shows which do")


def schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule over all steps. ValueError where its kind does not go with the rate."""
    from transformers import get_scheduler

    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
    except ValueError as error:
        raise ValueError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} with learning_rate={config.learning_rate:g}: {error}"
        ) from error
