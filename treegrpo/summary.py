"""The numbers of one optimiser step under TRL's names, the same on every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from treegrpo.metrics import StepMetrics
from treegrpo.step import StepData
from treegrpo.tree import RolloutTree


def step_summary(data: StepData, metrics: StepMetrics, accelerator: Any, *, is_chain: bool) -> dict[str, float]:
    """What `metrics` collected in the step on `data`, over all processes (every one calls it); `is_chain` where the
    flattened leaves were forwarded."""
    rows = [row for row in data.rows if not row.is_blank]
    lengths = [int(row.lengths.sum()) if is_chain else row.batch.num_tokens for row in rows]
    if rows:
        metrics.add("batch/longest_row", max(lengths), how="max")
        metrics.add("tree/depth_max", max(int(row.lengths.max()) for row in rows), how="max")
        metrics.add("tree/forks", sum(row.counts["forks"] for row in rows), how="sum")
    # what this process has to do, in FLOPs where they are known
    costs = [row.cost and (row.cost.chain if is_chain else row.cost.tree).training for row in data.rows]
    own = sum(cost for cost in costs if cost) or sum(lengths)
    metrics.add("batch/rank_cost_max", own, how="max")
    metrics.add("batch/rank_cost", own, how="sum")
    values = metrics.reduced(accelerator)
    busiest = values.pop("batch/rank_cost_max") * accelerator.num_processes / values.pop("batch/rank_cost")
    forwarded = values["tree/chain_tokens" if is_chain else "tree/unique_tokens"]
    longest, trained = values.pop("batch/longest_row"), values.pop("tree/trained_tokens")
    ratio = {"tree/flop_ratio": values["tree/chain_flops"] / values["tree/flops"]} if "tree/flops" in values else {}
    return {
        **reward_summary(data.trees),
        **values,
        **ratio,
        "batch/packing_ratio": values["tree/chain_tokens"] / values["tree/unique_tokens"],
        "batch/row_imbalance": longest * values["tree/rows"] / forwarded,
        "batch/rank_imbalance": busiest,
        "batch/forwarded_tokens_per_step": forwarded,
        "batch/masked_token_frac": 1 - trained / values["tree/unique_tokens"],
        "perf/forwarded_tok_s_fwd_bwd": forwarded / values["perf/fwd_bwd_s"],
    }


def reward_summary(trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Rewards and completion lengths of the step's whole trajectories (TRL's names; reward_std is the mean over
    groups)."""
    rewards = [np.array([trajectory.reward for trajectory in tree.trajectories]) for tree in trees]
    stds = np.array([group.std(ddof=1) if group.size > 1 else 0.0 for group in rewards])
    lengths = np.array([trajectory.loss_mask.sum() for tree in trees for trajectory in tree.trajectories])
    return {
        "reward": float(np.concatenate(rewards).mean()),
        "reward_std": float(stds.mean()),
        "frac_reward_zero_std": float(np.mean([group.min() == group.max() for group in rewards])),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
    }
