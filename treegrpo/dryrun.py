"""`treegrpo train --dry-run`: reads and checks everything a run needs, loads no weights, prints what it would do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from treegrpo import models
from treegrpo.advantages import compute_advantages
from treegrpo.config import TrainConfig
from treegrpo.rollout import build
from treegrpo.tree import Trajectory, build_forest, load


def run_plan(config: TrainConfig) -> list[tuple[str, str]]:
    """`(what, value)` rows of the plan.

    Raises:
        ValueError: whatever would stop the run at its start: a missing file, a bad row, an unknown name.
    """
    config.check_paths()
    model_config = models.read_model_config(config.model)
    # An unknown estimator would otherwise show only after the first step was sampled.
    compute_advantages(_two_leaves(), config.advantage_estimator, **config.estimator_options())
    weights = "from the folder" if Path(config.model).is_dir() else f"random, seed {config.seed}"
    rows = [
        ("model", f"{model_config.model_type}, {_num_parameters(model_config):,} parameters, weights {weights}"),
        ("trained", f"LoRA rank {config.lora_r}" if config.lora_r else "all weights"),
        ("rollouts", config.rollouts),
    ]
    rows += _logged(config, model_config) if config.is_replay else _sampled(config)
    per_step = config.groups_per_step * config.gradient_accumulation_steps
    rows += [
        ("optimiser step", f"{per_step} groups, whole trees, used {config.num_iterations}x"),
        ("loss", f"{config.loss_type}, {config.advantage_estimator}, shared tokens {config.shared_tokens}"),
        ("KL to the initial model", f"{config.beta:g}" if config.beta else "none"),
        (
            "optimiser",
            f"AdamW, peak {config.learning_rate:g}, {config.lr_scheduler_type}, warm-up {config.warmup_steps} of"
            f" {config.max_steps} steps",
        ),
        ("precision", "bf16 compute, float32 weights and loss" if config.bf16 else "float32"),
        ("output", config.output_dir),
    ]
    return rows


def _logged(config: TrainConfig, model_config: Any) -> list[tuple[str, str]]:
    from treegrpo.rollout.replay import check_recorded, check_rewards, check_vocabulary

    trajectories = load(config.rollouts_file)
    check_rewards(trajectories)
    check_vocabulary(trajectories, models.vocabulary_size(model_config), config.model)
    if config.old_logprobs == "recorded":
        check_recorded(trajectories)
    trees = build_forest(trajectories)
    chain, unique = sum(tree.num_chain_tokens for tree in trees), sum(tree.num_tokens for tree in trees)
    return [
        ("groups", f"{len(trees):,}, {len(trajectories):,} trajectories"),
        ("tokens", f"{chain:,} in chains, {unique:,} unique ({chain / unique:.2f}x)"),
        ("epochs", _epochs(config, len(trees))),
    ]


def _sampled(config: TrainConfig) -> list[tuple[str, str]]:
    from treegrpo.envs.data import read_rows

    dataset = read_rows(config.dataset)
    tokenizer = build.load_tokenizer(config)
    build.make_environment(config, tokenizer)
    options = build.search_options(config)
    per_step = config.groups_per_step * config.gradient_accumulation_steps
    shape = f"M={options.num_trees} trees, N={options.num_expansions} branches, L={options.num_rounds} rounds"
    rows = [
        ("prompts", f"{len(dataset):,} in {config.dataset}; {_epochs(config, len(dataset))}"),
        ("tokenizer", f"{len(tokenizer):,} tokens"),
        ("environment", f"{config.env}, {config.retriever or 'no retriever'}, top {config.topk}"),
        ("rewards", ", ".join(build.reward_names(config))),
        ("a prompt", f"{options.num_leaves} leaves: {shape}, selection {config.selection}"),
        ("a step", f"{per_step * options.num_leaves:,} leaves, {config.max_turns} turns of {config.max_step_tokens}"),
    ]
    if config.token_budget:
        rows.append(("token budget", f"{config.token_budget:,} sampled tokens a prompt"))
    if config.overlap_rollouts:
        rows.append(("overlap", "rollouts one step ahead, importance-weighted"))
    if config.eval_steps:
        num = len(read_rows(config.eval_dataset)[: config.eval_rows])
        rows.append(("evaluation", f"{num:,} prompts every {config.eval_steps} steps, best kept"))
    return rows


def _epochs(config: TrainConfig, num_groups: int) -> str:
    per_step = config.groups_per_step * config.gradient_accumulation_steps
    reads = math.ceil(config.max_steps / config.num_iterations) * per_step
    return f"{reads / num_groups:.2f} epochs in {config.max_steps:,} steps"


def _num_parameters(model_config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())


def _two_leaves() -> list:
    leaves = [
        Trajectory([1, 2, i], [0, 1, 1], reward=float(i), logprobs=[float("nan"), -1.0, -1.0], steps=[1])
        for i in (0, 1)
    ]
    return build_forest(leaves)


def table(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    result = Table(title="Plan (nothing was loaded, sampled or written)", title_justify="left", show_header=False)
    result.add_column(style="bold")
    result.add_column()
    for row in rows:
        result.add_row(*row)
    return result
