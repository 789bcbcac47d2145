"""The data of one optimiser step: which trees, packed how, with which advantages and frozen log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treegrpo import flops
from treegrpo.advantages import compute_advantages
from treegrpo.config import TrainConfig
from treegrpo.logprobs import chain_logprobs, token_logprobs
from treegrpo.loss import loss_normalizer
from treegrpo.models import Reference
from treegrpo.packing import TreeBatch, pack
from treegrpo.rollout.replay import Replay
from treegrpo.samples import call_trees
from treegrpo.tree import RolloutTree


@dataclass
class Row:
    """One packed row and its streams `[L]`; the two log-prob streams stay None where the loss does not need them."""

    batch: TreeBatch
    advantages: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    cost: flops.ChainVsTree | None = None
    """FLOPs as chains and as a tree; None for a family whose formulas are not known."""


@dataclass
class StepData:
    """Everything the updates on one set of groups need, on this process.

    With 4 groups, 2 processes and a budget that one group fills: `trees` has 4 entries on both, `rows` 2 on each.
    """

    trees: list[RolloutTree]
    """Whole trajectories of all groups of the step, over all processes."""
    rows: list[Row]
    """This process's packed rows."""


def read_step(
    replay: Replay, number: int, config: TrainConfig, rank: int, world: int, device: torch.device
) -> StepData:
    """Groups of step data `number` (used num_iterations times); this process packs every world-th."""
    reads = [
        replay.read(number * config.gradient_accumulation_steps + i, config.groups_per_step)
        for i in range(config.gradient_accumulation_steps)
    ]
    trees = [replay.trees[index] for read in reads for index in read]
    # Over the whole step: comparison sets are groups, but scale_rewards="batch" divides by the spread of all of them.
    advantages = compute_advantages(trees, config.advantage_estimator, scale_rewards=config.scale_rewards)
    rows = []
    for i in range(config.gradient_accumulation_steps):
        own = range(i * config.groups_per_step + rank, (i + 1) * config.groups_per_step, world)
        rows += _packed_rows([trees[j] for j in own], [advantages[j] for j in own], config, device)
    return StepData(trees, rows)


def _packed_rows(
    trees: list[RolloutTree], advantages: list[list[np.ndarray]], config: TrainConfig, device: torch.device
) -> list[Row]:
    if config.samples == "call":
        trees, advantages = call_trees(trees, advantages)
    batches = pack(
        trees, token_budget=config.token_budget, share_across_groups=config.share_across_groups, device=device
    )
    return [Row(batch, batch.leaf_stream(advantages)) for batch in batches]


def policy_logprobs(model: torch.nn.Module, batch: TreeBatch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """`(log-probs, entropies)` on the leaf stream `[L]`, through the tree or through flattened chains."""
    options = {"temperature": config.temperature, "entropy": True, "backend": config.backend}
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.bf16):
        if config.attention == "chain":
            return chain_logprobs(model, batch, **options)
        logp, entropy = token_logprobs(model, batch, **options)
    return batch.expand(logp), batch.expand(entropy)


@torch.no_grad()
def freeze_logprobs(
    data: StepData, model: torch.nn.Module, policy: torch.nn.Module, reference: Reference | None, config: TrainConfig
) -> None:
    """Fills `old_logp` and `ref_logp` from before the first update on these groups.

    `policy` is the unwrapped `model`. With one iteration the old log-probs are those of the update itself, so no extra
    pass is
    made: they stay None.
    """
    for row in data.rows:
        if config.old_logprobs == "recorded":
            row.old_logp = row.batch.leaf_logp
        elif config.num_iterations > 1:
            row.old_logp = policy_logprobs(model, row.batch, config)[0]
        if reference is not None:
            with reference.of(policy) as frozen:
                row.ref_logp = policy_logprobs(frozen, row.batch, config)[0]


def count_flops(data: StepData, model_config: object, config: TrainConfig) -> None:
    """Fills `cost` of every row."""
    for row in data.rows:
        share = config.share_across_groups and len(row.batch.trees) > 1
        try:
            row.cost = flops.report(model_config, row.batch.trees, share_across_groups=share)
        except ValueError:
            # The metric is left out for families without formulas; training does not depend on it.
            return


def normalizers(rows: Sequence[Row], config: TrainConfig, device: torch.device) -> Tensor:
    """`[Z of the loss, Z of the entropy]` of this process's rows, float64; the step's are their sums over processes."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for row in rows:
        batch = row.batch
        for i, loss_type in enumerate((config.loss_type, "dapo")):
            total[i] += loss_normalizer(
                loss_type,
                batch.leaf_mask,
                batch.leaf_offsets,
                shared_tokens=config.shared_tokens,
                multiplicity=batch.multiplicity,
                max_completion_length=config.max_completion_length,
            )
    return total


def blame(row: Row, logp: Tensor) -> str:
    """Names the group whose numbers are not finite, for the message that stops the step."""
    batch = row.batch
    groups = [tree.group for tree in batch.trees for _ in tree.trajectories]
    streams = {
        "log-prob": logp,
        "old log-prob": row.old_logp,
        "advantage": row.advantages,
        "reference log-prob": row.ref_logp,
    }
    for name, stream in streams.items():
        if stream is None:
            continue
        bad = (~torch.isfinite(stream) & batch.leaf_mask).nonzero().flatten()
        if bad.numel():
            leaf = int(torch.searchsorted(batch.leaf_offsets, bad[0], right=True)) - 1
            place = int(bad[0] - batch.leaf_offsets[leaf])
            value = float(stream[bad[0]].detach())
            return f"group {groups[leaf]!r}: {name} of token {place} of its leaf is {value}"
    return f"groups {', '.join(dict.fromkeys(map(repr, groups)))}: all log-probs are finite, so a ratio overflowed"


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


def count_forks(batch: TreeBatch) -> int:
    """Packed tokens with two or more continuations."""
    above = batch.prev[batch.prev >= 0]
    return int((torch.bincount(above, minlength=1) > 1).sum())
