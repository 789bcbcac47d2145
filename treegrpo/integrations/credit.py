"""Rewards of a group's completions -> advantages on their tokens, by any estimator; what TRL and verl share.

What a step is: where a tree was grown, its agent steps. Where completions are plain chains, a step begins with the
completion, where the model speaks again behind a tool's answer, and where completions of the group part: so estimators
that look at steps find a tree in chains as well, that of their equal beginnings.

Shape legend: B rows (leaves), C completion columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treegrpo.advantages import compute_advantages
from treegrpo.packing import pack
from treegrpo.tree import Trajectory, build_forest


def leaves_of(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    rewards: Sequence[float],
    *,
    group_size: int,
    name: str,
    trees: Sequence[int] | None = None,
    steps: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> list[Trajectory]:
    """One Trajectory a row, ``group_size`` rows in turn a group.

    Args:
        masks: for each completion token 1 where the policy sampled it and it is trained.
        rewards: NaN where no reward function had a say; such a leaf has reward None.
        name: what group names begin with; other processes give others.
        trees: the number of each row's tree in its group; None: every chain is a tree of its own.
        steps: where steps begin in the completion; None: see the top of the module.
        logprobs: of the completion's tokens, where they were recorded.

    Raises:
        ValueError: what Trajectory refuses.
    """
    leaves = []
    for row, (prompt, completion, mask, reward) in enumerate(
        zip(prompt_ids, completion_ids, masks, rewards, strict=True)
    ):
        known = None
        if logprobs is not None:
            own = [lp if m else math.nan for lp, m in zip(logprobs[row], mask, strict=True)]
            known = [math.nan] * len(prompt) + own
        leaves.append(
            Trajectory(
                token_ids=[*prompt, *completion],
                loss_mask=[0] * len(prompt) + list(mask),
                reward=None if math.isnan(reward) else reward,
                logprobs=known,
                group=f"{name}/{row // group_size}",
                tree=row % group_size if trees is None else trees[row],
                steps=None if steps is None else [len(prompt) + start for start in steps[row]],
            )
        )
    if steps is None:
        starts = chain_steps(leaves, [len(prompt) for prompt in prompt_ids])
        leaves = [dataclasses.replace(leaf, steps=np.array(own)) for leaf, own in zip(leaves, starts, strict=True)]
    return leaves


def chain_steps(leaves: Sequence[Trajectory], prompt_lengths: Sequence[int]) -> list[list[int]]:
    """Starts of the steps of chains, group by group: see the top of the module."""
    found = []
    lengths = iter(prompt_lengths)
    for tree in build_forest(leaves):
        opens = np.zeros(tree.num_tokens, np.bool_)
        opens[[segment.start for segment in tree.segments()]] = True
        offsets = tree.trie.leaf_offsets
        for leaf, a, b in zip(tree.trajectories, offsets, offsets[1:], strict=False):
            begins = opens[tree.trie.leaf_tokens[a:b]].copy()
            begins[1:] |= leaf.loss_mask[1:] & ~leaf.loss_mask[:-1]
            length = next(lengths)
            begins[:length] = False
            begins[length : length + 1] = True
            found.append(np.flatnonzero(begins).tolist())
    return found


def step_advantages(
    leaves: Sequence[Trajectory], estimator: str, options: dict[str, Any], others: Sequence[Trajectory] = ()
) -> list[np.ndarray]:
    """For each leaf float64 [its steps]; 0 for leaves without a reward, which nothing is compared with.

    ``others``: leaves of other groups that norms over the whole call ("std_batch", "whiten") look at too.
    """
    scored = [leaf for leaf in [*leaves, *others] if leaf.reward is not None]
    forest = build_forest(scored) if scored else []
    values = {}
    for tree, own in zip(forest, compute_advantages(forest, estimator, **options), strict=True):
        values[tree.group] = iter(own)
    return [np.zeros(leaf.num_steps) if leaf.reward is None else next(values[leaf.group]) for leaf in leaves]


def on_tokens(
    leaves: Sequence[Trajectory], advantages: Sequence[np.ndarray], prompt_lengths: Sequence[int], columns: int
) -> Tensor:
    """Advantages as the trainers take them: float32 [B] where they do not change along a leaf, [B, C] where they do."""
    if all(own.size == 0 or (own == own[0]).all() for own in advantages):
        return torch.tensor([float(own[0]) if own.size else 0.0 for own in advantages])
    rows = np.zeros((len(leaves), columns), np.float32)
    for row, leaf, own, prompt in zip(rows, leaves, advantages, prompt_lengths, strict=True):
        assert leaf.steps is not None, "what compares steps was given them"
        starts = leaf.steps - prompt
        if starts.size:
            row[starts[0] : leaf.num_tokens - prompt] = np.repeat(own, np.diff([*starts, leaf.num_tokens - prompt]))
    return torch.from_numpy(rows)


def token_shares(leaves: Sequence[Trajectory], prompt_lengths: Sequence[int], columns: int) -> Tensor:
    """float32 [B, C]: 1 / c for a token that c leaves of the group train, 0 where this leaf does not train it."""
    (batch,) = pack(build_forest(leaves))
    shares = torch.where(batch.leaf_mask, 1 / batch.multiplicity, 0)
    rows = torch.zeros(len(leaves), columns)
    offsets = batch.leaf_offsets.tolist()
    for row, a, b, prompt in zip(rows, offsets, offsets[1:], prompt_lengths, strict=False):
        row[: b - a - prompt] = shares[a + prompt : b]
    return rows
