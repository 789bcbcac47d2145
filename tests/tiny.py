"""A model and rollouts so small that a training run takes a second; shared by the tests of the command line and the
trainer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from treegrpo import Trajectory, save
from treegrpo.config import TrainConfig

VOCAB = 48
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def trajectories(num_groups: int = 4, seed: int = 0, logprobs: bool = False) -> list[Trajectory]:
    """Groups of five leaves: a prompt, two turns that fork, a duplicate and a leaf that is a prefix of another; rewards
    differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(num_groups):
        prompt = [1, 2, 3, *rng.integers(4, VOCAB, 5).tolist()]
        first, second, observation = (rng.integers(4, VOCAB, n).tolist() for n in (4, 5, 3))
        third = rng.integers(4, VOCAB, 6).tolist()
        other = rng.integers(4, VOCAB, 3).tolist()
        start = len(prompt)
        long = prompt + first + observation + second
        for tree, ids, turns in (
            (0, long, ((start, 4), (start + 7, 5))),
            (0, long, ((start, 4), (start + 7, 5))),
            (0, prompt + first, ((start, 4),)),
            (1, prompt + first + observation + third, ((start, 4), (start + 7, 6))),
            (1, prompt + other, ((start, 3),)),
        ):
            mask = np.zeros(len(ids), int)
            for begin, length in turns:
                mask[begin : begin + length] = 1
            recorded = np.where(mask, -rng.uniform(2.0, 5.0, len(ids)), np.nan) if logprobs else None
            reward = float(rng.integers(0, 5)) / 4
            steps = [begin for begin, _ in turns]
            rows.append(
                Trajectory(ids, mask, reward=reward, logprobs=recorded, group=f"g{group}", tree=tree, steps=steps)
            )
    return rows


def write(folder: Path, rows: list[Trajectory] | None = None, **model) -> tuple[Path, Path]:
    """`(rollouts file, model file)` in `folder`."""
    rollouts, config = folder / "rollouts.jsonl", folder / "model.json"
    save(rollouts, trajectories() if rows is None else rows)
    config.write_text(json.dumps({**MODEL, **model}))
    return rollouts, config


def settings(files, folder, **changes) -> TrainConfig:
    """Three steps on what `write` wrote."""
    rollouts, model = files
    base = {
        "rollouts": f"replay:{rollouts}",
        "model": str(model),
        "output_dir": str(folder),
        "groups_per_step": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainConfig(**{**base, **changes})


def run(files, folder, **changes):
    """`(logged rows, parameters by name)` of one run."""
    from treegrpo.trainer import Trainer

    trainer = Trainer(settings(files, folder, **changes))
    history = trainer.train()
    return history, {name: p.detach().cpu().clone() for name, p in trainer.policy.named_parameters()}


def largest_difference(a, b) -> float:
    """Of two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].cpu() - b[name].cpu()).detach().abs().max()) for name in a)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
