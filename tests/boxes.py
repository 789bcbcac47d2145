"""A warm start that has seen two steps: enough to sample nonsense in the right format, made in a second."""

from __future__ import annotations

from pathlib import Path

from treegrpo.box.warmstart import ROLLOUT_SETTINGS, WarmStart, warm_start
from treegrpo.config import TrainConfig
from treegrpo.envs.base import Environment, StepResult

QUICK = WarmStart(num_steps=60, batch_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=2)


def quick_box(folder: Path) -> Path:
    return warm_start(QUICK, folder=folder)


def token_reward(prompts, completions, completion_ids, **columns) -> list[float]:
    """What so small a model earns for an answer is always 0; this differs from leaf to leaf."""
    return [sum(ids) % 7 / 6 for ids in completion_ids]


def online_config(box: Path, output: Path, **changes) -> TrainConfig:
    """A sampled run of three small steps."""
    base = {
        "rollouts": "hf",
        "model": str(box),
        "dataset": str(box / "train.jsonl"),
        "retriever": f"bm25:{box / 'corpus.jsonl'}",
        **ROLLOUT_SETTINGS,
        "reward_funcs": ("boxes:token_reward",),
        "max_turns": 2,
        "max_step_tokens": 12,
        "num_trees": 2,
        "num_expansions": 1,
        "groups_per_step": 3,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "output_dir": str(output),
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainConfig(**{**base, **changes})


class EchoEnv(Environment):
    """Answers every step with two words, until it is the last."""

    stop = ("</search>",)

    def reset(self, row):
        return row["prompt"]

    def step(self, action, *, is_last=False):
        return StepResult(done=is_last, observation=None if is_last else "w3 w4", num_tool_calls=int(not is_last))
