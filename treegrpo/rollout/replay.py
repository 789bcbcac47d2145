"""Logged rollouts: a file of token trajectories, read group by group in an order that depends on the seed alone."""

from __future__ import annotations

import math

import numpy as np

from treegrpo.advantages import MAX_REWARD
from treegrpo.rollout.answers import MAX_POSITIVE_LOGPROB
from treegrpo.rollout.order import EpochOrder
from treegrpo.tree import RolloutTree, Trajectory, build_forest


class Replay:
    """The groups of a file, epoch after epoch.

    Step data number n holds `reads` times `count` groups, the next ones of the endless sequence of shuffled epochs: a
    resumed run needs no state. With 3 groups, one read of 2 and no shuffling: [0, 1], [2, 0], [1, 2], ...
    """

    def __init__(self, trajectories: list[Trajectory], *, seed: int = 0, shuffle: bool = True) -> None:
        check_rewards(trajectories)
        self.trees: list[RolloutTree] = build_forest(trajectories)
        self.order = EpochOrder(len(self.trees), seed=seed, shuffle=shuffle)

    def read(self, number: int, count: int) -> list[int]:
        """Indices into `trees` of read `number`."""
        return [self.order[place] for place in range(number * count, (number + 1) * count)]

    def step_trees(self, number: int, reads: int, count: int) -> list[list[RolloutTree]]:
        """The groups of step data `number`, `[read][group]`."""
        return [[self.trees[i] for i in self.read(number * reads + j, count)] for j in range(reads)]


def check_rewards(trajectories: list[Trajectory]) -> None:
    """ValueError unless there are trajectories, each has a finite reward, and each group trains a token."""
    if not trajectories:
        raise ValueError("rollouts: the file holds no trajectory, so there is no group to train on")
    trained: dict[str, bool] = {}
    for index, trajectory in enumerate(trajectories):
        if trajectory.reward is None:
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): reward is missing; training needs one for every"
                " trajectory"
            )
        if not math.isfinite(trajectory.reward):
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): reward is {trajectory.reward}; it must be finite"
            )
        if abs(trajectory.reward) > MAX_REWARD:
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): reward is {trajectory.reward}; squares overflow"
                f" beyond {MAX_REWARD:g}, scale the rewards down"
            )
        trained[trajectory.group] = trained.get(trajectory.group, False) or bool(np.any(trajectory.loss_mask))
    for group, is_trained in trained.items():
        if not is_trained:
            raise ValueError(f"group {group!r}: loss_mask is 0 everywhere, nothing to train; remove the group")


def check_vocabulary(trajectories: list[Trajectory], vocab_size: int, model: str = "the model") -> None:
    """ValueError naming the first token id outside `[0, vocab_size)`."""
    for index, trajectory in enumerate(trajectories):
        ids = np.asarray(trajectory.token_ids)
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if bad.size:
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): token_ids[{bad[0]}] = {ids[bad[0]]} is outside"
                f" {model}'s vocabulary of {vocab_size}; use the model the rollouts were sampled from, or convert the"
                " messages with its tokenizer"
            )


def check_logprobs(trajectories: list[Trajectory]) -> None:
    """ValueError naming the first trained token whose recorded log-prob is above 0, as a probability is."""
    for index, trajectory in enumerate(trajectories):
        if trajectory.logprobs is None:
            continue
        bad = np.flatnonzero(trajectory.loss_mask & (trajectory.logprobs > MAX_POSITIVE_LOGPROB))
        if bad.size:
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): logprobs[{bad[0]}] is"
                f" {trajectory.logprobs[bad[0]]}, above 0; record natural logs, not probabilities, or leave them out"
            )


def check_recorded(trajectories: list[Trajectory]) -> None:
    """ValueError unless every trained token has a recorded log-prob (`old_logprobs=recorded` needs them)."""
    for index, trajectory in enumerate(trajectories):
        if trajectory.logprobs is None:
            raise ValueError(
                f"trajectory {index} (group {trajectory.group!r}): logprobs is missing; use --old-logprobs computed,"
                " or record them"
            )
