"""Whole trajectories, or one sample per model call.

Many agent stacks log one sample per model call: the context so far, and the turn the model added. On a tree these
samples are prefixes of one another and cost almost nothing; flattened, every call pays for its whole context again.
So a tree needs no samples of their own: a call is a part of its trajectory's stream, and `call_offsets` says which.
`split_calls` writes the samples out, for what takes nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from treegrpo.tree import RolloutTree, Trajectory, build_tree

if TYPE_CHECKING:
    from torch import Tensor

    from treegrpo.packing import TreeBatch


def split_calls(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """One trajectory per assistant turn of each trajectory, in order.

    A turn is one entry of `steps`, or without `steps` a maximal run of trained tokens; turns without a trained token
    are no call. Each sample is the prefix up to the turn's last trained token, and only the turn is trained.
    `info["trajectory"]` is the index of the source, `info["step"]` the index of its turn. Trajectory [s u a a u a],
    mask [0 0 1 1 0 1] gives [s u a a] with mask [0 0 1 1] and [s u a a u a] with mask [0 0 0 0 0 1].
    """
    calls = []
    for index, trajectory in enumerate(trajectories):
        for step, (begin, end) in enumerate(turn_spans(trajectory)):
            trained = np.flatnonzero(np.asarray(trajectory.loss_mask[begin:end]))
            if trained.size == 0:
                continue
            stop = begin + int(trained[-1]) + 1
            mask = np.array(trajectory.loss_mask[:stop])
            mask[:begin] = 0
            calls.append(
                dataclasses.replace(
                    trajectory,
                    token_ids=trajectory.token_ids[:stop],
                    loss_mask=mask,
                    logprobs=None if trajectory.logprobs is None else trajectory.logprobs[:stop],
                    steps=None,
                    info={**(trajectory.info or {}), "trajectory": index, "step": step},
                )
            )
    return calls


def turn_spans(trajectory: Trajectory) -> list[tuple[int, int]]:
    """`[begin, end)` of each assistant turn with what follows it, from `steps` or else from the loss mask's runs; none
    where nothing is trained."""
    if trajectory.steps is not None:
        begins = [int(step) for step in trajectory.steps]
    else:
        mask = np.concatenate([[0], np.asarray(trajectory.loss_mask, dtype=np.int8)])
        begins = np.flatnonzero(np.diff(mask) == 1).tolist()
    if not begins:
        return []
    return list(zip(begins, [*begins[1:], len(trajectory.token_ids)], strict=True))


def call_ends(trajectory: Trajectory) -> np.ndarray:
    """int64 [calls]: the index behind the last trained token of each call, which is the call's length as a sample."""
    trained = np.flatnonzero(trajectory.loss_mask)
    # of every turn, how many trained tokens there are up to its end; turns without one add nothing
    counts = np.searchsorted(trained, [end for _, end in turn_spans(trajectory)])
    return trained[np.unique(counts[counts > 0]) - 1] + 1


def call_offsets(batch: TreeBatch) -> Tensor:
    """int64 [calls + 1]: the parts of a batch's streams [L] that are its model calls, for `grpo_loss` in place of
    `batch.leaf_offsets`.

    Loss and gradients are then those of `split_calls`, whose streams repeat every context: a trajectory of 10,000
    tokens in 100 calls has L = 10,000 here and some 500,000 there. What is not trained may lie in any part.

    >>> from treegrpo.packing import pack
    >>> [batch] = pack([build_tree([Trajectory([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 0])])])
    >>> batch.leaf_offsets.tolist(), call_offsets(batch).tolist()
    ([0, 7], [0, 4, 7])

    Raises ValueError where nothing is trained, so that there is no call.
    """
    import torch

    begins = batch.leaf_offsets.tolist()
    trajectories = (trajectory for tree in batch.trees for trajectory in tree.trajectories)
    ends = np.concatenate([begin + call_ends(t) for begin, t in zip(begins, trajectories, strict=False)])
    if not ends.size:
        raise ValueError("batch: loss_mask is 0 everywhere, so there is no call; leave such groups out")
    ends[-1] = begins[-1]
    return torch.from_numpy(np.append(0, ends)).to(batch.device)


def up_to_last_call(
    trees: list[RolloutTree], advantages: list[list[np.ndarray]]
) -> tuple[list[RolloutTree], list[list[np.ndarray]]]:
    """What the calls of `trees` need, and its advantages: trajectories end with their last trained token; one without
    any is left out, and so is a tree of nothing else."""
    kept_trees, kept_advantages = [], []
    for tree, per_leaf in zip(trees, advantages, strict=True):
        leaves = [_up_to_last_call(t, values) for t, values in zip(tree.trajectories, per_leaf, strict=True)]
        kept = [leaf for leaf in leaves if leaf is not None]
        if not kept:
            continue
        trajectories = tuple(trajectory for trajectory, _ in kept)
        is_whole = all(a is b for a, b in zip(trajectories, tree.trajectories, strict=False))
        kept_trees.append(tree if is_whole and len(kept) == tree.num_leaves else build_tree(trajectories))
        kept_advantages.append([values for _, values in kept])
    return kept_trees, kept_advantages


def _up_to_last_call(trajectory: Trajectory, advantage: np.ndarray) -> tuple[Trajectory, np.ndarray] | None:
    trained = np.flatnonzero(trajectory.loss_mask)
    if not trained.size:
        return None
    stop = int(trained[-1]) + 1
    if stop == trajectory.num_tokens:
        return trajectory, advantage
    steps = trajectory.steps
    if steps is not None:
        steps = steps[steps < stop]
        advantage = advantage[: steps.size]
    cut = dataclasses.replace(
        trajectory,
        token_ids=trajectory.token_ids[:stop],
        loss_mask=trajectory.loss_mask[:stop],
        logprobs=None if trajectory.logprobs is None else trajectory.logprobs[:stop],
        steps=steps,
    )
    return cut, advantage


def call_trees(
    trees: list[RolloutTree], advantages: list[list[np.ndarray]]
) -> tuple[list[RolloutTree], list[list[np.ndarray]]]:
    """The trees of all calls of `trees`, written out, and the advantage of each: that of its turn in the trajectory.

    Advantages compare whole trajectories, so they are computed before the split; comparing calls would count long
    trajectories more often.
    """
    split_trees, split_advantages = [], []
    for tree, per_leaf in zip(trees, advantages, strict=True):
        calls = split_calls(tree.trajectories)
        if not calls:
            # nothing of this group is trained
            continue
        split_trees.append(build_tree(calls))
        places = [(call.info or {}) for call in calls]
        split_advantages.append([_of_call(per_leaf[at["trajectory"]], at["step"]) for at in places])
    return split_trees, split_advantages


def _of_call(advantage: np.ndarray, step: int) -> np.ndarray:
    # Trajectories without steps have one value however many turns the loss mask shows.
    return advantage[step : step + 1] if len(advantage) > 1 else advantage[:1]
