"""The data of one optimiser step: which trees, packed how, with which advantages and frozen log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treegrpo import balance, flops
from treegrpo.advantages import compute_advantages
from treegrpo.config import TrainConfig
from treegrpo.logprobs import chain_logprobs, prepare, token_logprobs
from treegrpo.loss import grpo_loss, loss_normalizer
from treegrpo.metrics import StepMetrics
from treegrpo.mismatch import importance_sampling_ratio
from treegrpo.models import Reference
from treegrpo.packing import TreeBatch, cut_tree, pack
from treegrpo.samples import call_ends, call_offsets, call_trees, up_to_last_call
from treegrpo.tree import RolloutTree, Trajectory, build_tree


@dataclass
class Row:
    """One packed row and its streams `[L]`; the two log-prob streams stay None where the loss does not need them."""

    batch: TreeBatch
    advantages: Tensor
    offsets: Tensor
    """int64 `[samples + 1]`: the parts of the streams that are a sample each."""
    lengths: np.ndarray
    """int64 `[samples]`: tokens of each sample with all of its context."""
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    cost: flops.ChainVsTree | None = None
    """FLOPs as chains and as a tree; None for a family whose formulas are not known."""
    leaves: tuple[tuple[int, int], ...] = ()
    """`(group of the step, leaf of its tree)` of every leaf, in the order of the stream."""
    is_blank: bool = False
    """Nothing is trained: the row only keeps the processes in step."""

    @classmethod
    def of(cls, batch: TreeBatch, advantages: Tensor, *, calls: bool = False, **more: Any) -> Row:
        """The samples are the leaves, or with `calls` the model calls of leaves that end with a trained token."""
        leaves = [leaf for tree in batch.trees for leaf in tree.trajectories]
        if calls:
            return cls(batch, advantages, call_offsets(batch), np.concatenate([*map(call_ends, leaves)]), **more)
        return cls(batch, advantages, batch.leaf_offsets, np.array([leaf.num_tokens for leaf in leaves]), **more)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Trained leaf tokens, those with a recorded log-prob, unique trained tokens, tokens with two or more
        continuations; read from the device once."""
        mask, known, above = self.batch.leaf_mask, self.batch.leaf_logp.isfinite(), self.batch.prev
        forks = torch.bincount(above[above >= 0], minlength=1) > 1
        sums = torch.stack([mask.sum(), (mask & known).sum(), self.batch.trained.sum(), forks.sum()]).tolist()
        return dict(zip(("leaf_tokens", "known", "unique_tokens", "forks"), sums, strict=True))


@dataclass
class StepData:
    """Everything the updates on one set of groups need, on this process.

    With 4 groups, 2 processes and a budget that one group fills: `trees` has 4 entries on both, `rows` 2 on each.
    """

    trees: list[RolloutTree]
    """Whole trajectories of all groups of the step, over all processes."""
    rows: list[Row]
    """This process's packed rows."""


def pack_step(
    reads: list[list[RolloutTree]],
    config: TrainConfig,
    rank: int,
    world: int,
    device: torch.device,
    model_config: object = None,
) -> StepData:
    """The data of one step from its groups `[read][group]`; of a read this process packs the groups that `balance`
    gives it, by what they cost a model of `model_config`."""
    trees = [tree for read in reads for tree in read]
    # Over the whole step: comparison sets are groups, but scale_rewards="batch" divides by the spread of all of them.
    advantages = compute_advantages(trees, config.advantage_estimator, **config.estimator_options())
    rows, begin = [], 0
    for read in reads:
        own = list(range(len(read)))
        if world > 1:
            own = balance.assign(balance.costs(read, model_config, config.attention), world)[rank]
        rows += _packed_rows([begin + i for i in own], trees, advantages, config, device)
        begin += len(read)
    return StepData(trees, rows)


def _packed_rows(
    groups: list[int],
    trees: list[RolloutTree],
    advantages: list[list[np.ndarray]],
    config: TrainConfig,
    device: torch.device,
) -> list[Row]:
    """The rows of those `groups` of the step's `trees`."""
    own, of_own = [trees[i] for i in groups], [advantages[i] for i in groups]
    # chains repeat the context of every call, a tree has it once
    calls_in_place = config.samples == "call" and config.attention == "tree"
    if config.samples == "call":
        samples_of = up_to_last_call if calls_in_place else call_trees
        # one by one: a group of which nothing is trained is left out
        split = [samples_of([tree], [values]) for tree, values in zip(own, of_own, strict=True)]
        groups = [i for i, (calls, _) in zip(groups, split, strict=True) if calls]
        own, of_own = [tree for calls, _ in split for tree in calls], [x for _, values in split for x in values]
    if not own:
        return []
    leaves = [[(group, leaf) for leaf in range(tree.num_leaves)] for group, tree in zip(groups, own, strict=True)]
    if (budget := config.row_token_budget) is not None:
        for tree in own:
            check_budget(tree, config)
        cuts = [cut_tree(tree, budget) for tree in own]
        leaves = [[of_tree[i] for i in part] for of_tree, parts in zip(leaves, cuts, strict=True) for part in parts]
        of_own = [[of_tree[i] for i in part] for of_tree, parts in zip(of_own, cuts, strict=True) for part in parts]
        own = [
            tree if len(parts) == 1 else build_tree([tree.trajectories[i] for i in part])
            for tree, parts in zip(own, cuts, strict=True)
            for part in parts
        ]
    batches = pack(
        own, token_budget=config.row_token_budget, share_across_groups=config.share_across_groups, device=device
    )
    rows = [
        Row.of(
            batch,
            batch.leaf_stream(of_own),
            calls=calls_in_place,
            leaves=tuple(leaf for i in batch.tree_indices for leaf in leaves[i]),
        )
        for batch in batches
    ]
    for row in rows:
        # what the updates ask for is read now, so that they do not wait for the device
        _ = row.counts
        prepare(row.batch, chain=config.attention == "chain")
    return rows


def check_budget(tree: RolloutTree, config: TrainConfig) -> None:
    """ValueError where no cut between leaves brings `tree` under `row_token_budget`."""
    budget = config.row_token_budget
    if budget is None or tree.num_tokens <= budget:
        return
    for leaf, trajectory in enumerate(tree.trajectories):
        if trajectory.num_tokens > budget:
            raise ValueError(
                f"group {tree.group!r}: leaf {leaf} has {trajectory.num_tokens} tokens, over row_token_budget={budget};"
                " raise the budget, give a smaller max_context_length, or drop the leaf"
            )
    if config.shared_tokens != "per_leaf":
        raise ValueError(
            f"group {tree.group!r}: its tree has {tree.num_tokens} unique tokens, over row_token_budget={budget}, and"
            f" shared_tokens={config.shared_tokens!r} needs it in one row; raise the budget, or use per_leaf"
        )


def old_logprobs(data: StepData) -> dict[tuple[int, int], Tensor]:
    """The old log-probs this process holds, as `{(group of the step, leaf): its stream}`."""
    found: dict[tuple[int, int], Tensor] = {}
    for row in data.rows:
        if row.old_logp is not None and not row.is_blank:
            lengths = row.batch.leaf_offsets.diff().tolist()
            found |= dict(zip(row.leaves, row.old_logp.cpu().split(lengths), strict=True))
    return found


def restore_old_logprobs(data: StepData, saved: dict[tuple[int, int], Tensor]) -> None:
    """Puts back what `old_logprobs` gave, of all processes together, on rows that may be dealt otherwise now.

    Raises:
        ValueError: a leaf of these rows is not in `saved`, or has another length there.
    """
    for row in data.rows:
        if row.is_blank:
            continue
        lengths = zip(row.leaves, row.batch.leaf_offsets.diff().tolist(), strict=True)
        if missing := [leaf for leaf, length in lengths if leaf not in saved or saved[leaf].numel() != length]:
            group, leaf = missing[0]
            raise ValueError(
                f"the checkpoint has no old log-probs of leaf {leaf} of group {data.trees[group].group!r}; resume from"
                " another one"
            )
        row.old_logp = torch.cat([saved[leaf] for leaf in row.leaves]).to(row.batch.device)


def fill_up(data: StepData, num_rows: int, device: torch.device) -> None:
    """Blank rows until there are `num_rows`: one token each, nothing trained.

    Every process must enter the model as often as the others, whose gradients and shards wait for it.
    """
    if len(data.rows) >= num_rows:
        return
    first = data.trees[0].trajectories[0]
    leaf = Trajectory(first.token_ids[:1], [0], reward=0.0)
    while len(data.rows) < num_rows:
        (batch,) = pack([build_tree([leaf])], device=device)
        data.rows.append(Row.of(batch, batch.leaf_stream([[np.zeros(1)]]), is_blank=True))


def policy_logprobs(
    model: torch.nn.Module, batch: TreeBatch, config: TrainConfig, *, entropy: bool = False
) -> tuple[Tensor, ...]:
    """`(log-probs,)` or `(log-probs, entropies)` on the leaf stream `[L]`, through the tree or through flattened
    chains."""
    options: dict[str, Any] = {"temperature": config.temperature, "entropy": entropy, "backend": config.backend}
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.bf16):
        if config.attention == "chain":
            streams = chain_logprobs(model, batch, **options)
            return streams if entropy else (streams,)
        values = token_logprobs(model, batch, **options)
    return tuple(batch.expand(x) for x in (values if entropy else (values,)))


@torch.no_grad()
def freeze_logprobs(
    data: StepData, model: torch.nn.Module, policy: torch.nn.Module, reference: Reference | None, config: TrainConfig
) -> None:
    """Fills `old_logp` and `ref_logp` from before the first update on these groups.

    `policy` is the unwrapped `model`. With one iteration the old log-probs are those of the update itself, so no extra
    pass is made: they stay None.
    """
    for row in data.rows:
        if config.old_logprobs == "recorded":
            row.old_logp = row.batch.leaf_logp
        elif config.num_iterations > 1:
            row.old_logp = policy_logprobs(model, row.batch, config)[0]
        if reference is not None:
            with reference.of(policy) as frozen:
                row.ref_logp = policy_logprobs(frozen, row.batch, config)[0]


def count_flops(data: StepData, model_config: object) -> None:
    """Fills `cost` of every row."""
    for row in data.rows:
        if row.is_blank:
            continue
        try:
            row.cost = flops.report_batch(model_config, row.batch, row.lengths)
        except ValueError:
            # The metric is left out for families without formulas; training does not depend on it.
            return


def normalizers(rows: Sequence[Row], config: TrainConfig, device: torch.device) -> Tensor:
    """`[Z of the loss, Z of the entropy]` of this process's rows, float64; the step's are their sums over processes."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for row in rows:
        if row.is_blank:
            continue
        batch = row.batch
        for i, loss_type in enumerate((config.loss_type, "dapo")):
            total[i] += loss_normalizer(
                loss_type,
                batch.leaf_mask,
                row.offsets,
                shared_tokens=config.shared_tokens,
                multiplicity=batch.multiplicity,
                max_completion_length=config.max_completion_length,
            )
    return total


def row_loss(
    model: torch.nn.Module,
    row: Row,
    config: TrainConfig,
    normalizer: Tensor,
    entropy_normalizer: Tensor,
    metrics: StepMetrics,
) -> tuple[Tensor, Tensor]:
    """`(loss, log-probs [L])` of one packed row, its numbers added to `metrics`. Reads nothing from the device."""
    batch = row.batch
    logp, entropy = policy_logprobs(model, batch, config, entropy=True)
    old_logp = logp.detach() if row.old_logp is None else row.old_logp
    ratio, mismatch = importance_sampling_ratio(
        old_logp,
        batch.leaf_logp,
        batch.leaf_mask,
        row.offsets,
        mode=config.vllm_importance_sampling_mode,
        clip_min=config.vllm_importance_sampling_clip_min,
        clip_max=config.vllm_importance_sampling_clip_max,
        any_known=row.counts["known"] > 0,
    )
    loss, loss_metrics = grpo_loss(
        logp,
        old_logp,
        row.advantages,
        batch.leaf_mask,
        row.offsets,
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        ref_logp=row.ref_logp,
        use_bias_correction_kl=config.use_bias_correction_kl,
        importance_sampling_level=config.importance_sampling_level,
        shared_tokens=config.shared_tokens,
        multiplicity=batch.multiplicity,
        normalizer=normalizer,
        entropy=entropy,
        entropy_coef=config.entropy_coef,
        entropy_normalizer=entropy_normalizer,
        max_completion_length=config.max_completion_length,
        importance_sampling_ratio=ratio if config.corrects_sampling else None,
    )
    if row.is_blank:
        return loss, logp
    num_ratios = row.lengths.size if config.importance_sampling_level == "sequence" else None
    metrics.add_loss(loss_metrics, row.counts["leaf_tokens"], num_ratios)
    for name, (value, weight) in mismatch.items():
        metrics.add_loss({name: value}, weight)
    metrics.add("tree/unique_tokens", batch.num_tokens, how="sum")
    metrics.add("tree/chain_tokens", int(row.lengths.sum()), how="sum")
    metrics.add("tree/pairs", batch.num_pairs, how="sum")
    metrics.add("tree/chain_pairs", int((row.lengths * (row.lengths + 1) // 2).sum()), how="sum")
    metrics.add("tree/rows", 1, how="sum")
    if row.cost is not None:
        metrics.add("tree/chain_flops", row.cost.chain.training, how="sum")
        metrics.add("tree/flops", row.cost.tree.training, how="sum")
    metrics.add("tree/trained_tokens", row.counts["unique_tokens"], how="sum")
    return loss, logp


def check_finite(rows: Sequence[Row], losses: list[Tensor], logps: list[Tensor], where: str) -> None:
    """ValueError naming the group of a loss that is not finite; the device is waited for once."""
    for row, value, logp in zip(rows, torch.stack(losses).tolist(), logps, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{where}: the loss is {value}, stopped before the update; {blame(row, logp)}")


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
            leaves = (torch.searchsorted(batch.leaf_offsets, bad, right=True) - 1).tolist()
            place = int(bad[0] - batch.leaf_offsets[leaves[0]])
            value = float(stream[bad[0]].detach())
            first, *others = dict.fromkeys(groups[leaf] for leaf in leaves)
            found = f"group {first!r}: {name} of token {place} of its leaf is {value}"
            if not others:
                return found
            # kernels multiply what a mask hides by 0, and 0 * NaN is NaN
            return (
                f"{found}; so are values of {', '.join(map(repr, others))}, and attention can spread them within a"
                " packed row: train with groups_per_step=1 to see whose they are"
            )
    return f"groups {', '.join(dict.fromkeys(map(repr, groups)))}: all log-probs are finite, so a ratio overflowed"
