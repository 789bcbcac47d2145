"""Whole trajectories, or one sample per model call.

Many agent stacks log one sample per model call: the context so far, and the turn the model added. On a tree these
samples are prefixes of one another and cost almost nothing; flattened, every call pays for its whole context again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from treegrpo.tree import RolloutTree, Trajectory, build_tree


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


def call_trees(
    trees: list[RolloutTree], advantages: list[list[np.ndarray]]
) -> tuple[list[RolloutTree], list[list[np.ndarray]]]:
    """The trees of all calls of `trees`, and the advantage of each call: that of its turn in the whole trajectory.

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
