"""Who is compared with whom: leaf rewards of rollout trees -> one advantage per agent step of every leaf.

A RolloutTree is one prompt's whole group: its M sampled trees share the prompt and are told apart by `Trajectory.tree`.
With z(R; S) = (R - mean of S) / (std of S + eps), std unbiased (n - 1), over a comparison set S of leaves:

    inter, grpo   z over all leaves of the prompt                       (DeepSeekMath, arXiv 2402.03300)
    intra         z over the leaves of the leaf's own sampled tree      (Tree-GRPO, arXiv 2509.21240, eq. 6)
    tree_grpo     intra + inter, unweighted                             (Tree-GRPO, arXiv 2509.21240, eq. 7)

Example, M = 2 trees of three leaves, R = [1, .2, .2 | .2, .2, .1]:
    intra [1.1547, -.5773, -.5773 | .5773, .5773, -1.1547], inter [2.0268, -.3460, -.3460 | -.3460, -.3460, -.6427].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from treegrpo.tree import RolloutTree

SINGLETONS = ("zero", "official")
SCALES = ("group", "batch", "none")
OPTIONS = ("min_std", "scale_rewards")

# A few float32 roundings of a reward near 1: spreads this small are noise, and std + eps would blow them up.
DEFAULT_MIN_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """How a centred reward is divided; `batch_std` is the std over every leaf of the call, used by scale "batch"."""

    mode: str
    eps: float
    singleton: str
    min_std: float
    batch_std: float


def _std(rewards: np.ndarray) -> float:
    return float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0


def _z_scores(rewards: np.ndarray, scale: _Scale) -> np.ndarray:
    """z-scores of one comparison set, float64 [n] -> float64 [n]; a set without spread gives exact zeros."""
    if rewards.size == 1:
        return rewards.copy() if scale.singleton == "official" else np.zeros(1)
    # The mean of n equal floats may differ from them by a rounding, so equality is asked of the rewards themselves.
    if rewards.min() == rewards.max():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if scale.mode == "none":
        return centred
    std = scale.batch_std if scale.mode == "batch" else _std(rewards)
    if std <= scale.min_std * max(1.0, float(np.abs(rewards).max())):
        return np.zeros_like(rewards)
    return centred / (std + scale.eps)


def _inter(rewards: np.ndarray, tree_ids: np.ndarray, scale: _Scale) -> np.ndarray:
    return _z_scores(rewards, scale)


def _intra(rewards: np.ndarray, tree_ids: np.ndarray, scale: _Scale) -> np.ndarray:
    advantages = np.empty_like(rewards)
    for tree_id in np.unique(tree_ids):
        members = tree_ids == tree_id
        advantages[members] = _z_scores(rewards[members], scale)
    return advantages


def _tree_grpo(rewards: np.ndarray, tree_ids: np.ndarray, scale: _Scale) -> np.ndarray:
    return _intra(rewards, tree_ids, scale) + _inter(rewards, tree_ids, scale)


# Per-leaf estimators: (rewards float64 [leaves], sampled-tree ids [leaves], scale) -> advantages float64 [leaves].
ESTIMATORS: dict[str, Callable[[np.ndarray, np.ndarray, _Scale], np.ndarray]] = {
    "grpo": _inter,
    "tree_grpo": _tree_grpo,
    "intra": _intra,
    "inter": _inter,
}


def _leaf_rewards(tree: RolloutTree, index: int) -> np.ndarray:
    if not tree.trajectories:
        raise ValueError(f"trees[{index}] (group {tree.group!r}) has no trajectories: leave empty groups out")
    rewards = np.empty(len(tree.trajectories))
    for leaf, trajectory in enumerate(tree.trajectories):
        reward = trajectory.reward
        where = f"trees[{index}] (group {tree.group!r}), leaf {leaf}"
        if reward is None:
            raise ValueError(f"reward is missing at {where}: score the trajectory or leave it out")
        if not math.isfinite(reward):
            raise ValueError(f"reward is {reward} at {where}: it must be finite; fix the reward function")
        rewards[leaf] = reward
    return rewards


def _num_steps(trajectory) -> int:
    """Agent steps of a leaf; one whose steps were not recorded counts as a single step."""
    return 1 if trajectory.steps is None else len(trajectory.steps)


def _choice(name: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(map(repr, valid))}")


def compute_advantages(
    trees: Sequence[RolloutTree],
    estimator: str = "tree_grpo",
    *,
    eps: float = 1e-6,
    singleton: str = "zero",
    **options: object,
) -> list[list[np.ndarray]]:
    """Advantages `[tree][leaf]` -> float64 `[num_steps of that leaf]`, leaves in the order of `tree.trajectories`.

    The estimators here give one number per leaf, repeated over its steps (a trajectory without recorded steps has one).
    Needs of a tree: `.group`, `.trajectories`, and of each trajectory `.reward`, `.tree`, `.steps`.

    Args:
        estimator: "grpo" (= "inter"), "tree_grpo" (= "intra" + "inter"), "intra", "inter".
        eps: added to the std; 1e-6 as in Tree-GRPO and verl (TRL uses 1e-4).
        singleton: a comparison set of one leaf gets 0 ("zero") or its raw reward R ("official", what the code published
            with Tree-GRPO does: mean := 0, std := 1, hence a lasting offset).
        scale_rewards (option): TRL's meaning. "group" divides by the std of the comparison set itself, "batch" by the
            std over the leaves of all `trees`, "none" only centres. True means "group", False "none".
        min_std (option): a set whose std is at most `min_std * max(1, max |R|)` counts as equal rewards and gets exact
            zeros; default 1e-6, a few float32 roundings. Without it rounding noise is divided by `eps`: six rewards of
            0.3 in float32 gave |A| = 0.03. 0 turns it off; exactly equal rewards give zeros even then.

    Raises:
        ValueError: unknown estimator, option or value (the valid ones are listed); an empty group; a reward that is
            missing, NaN or infinite (group and leaf are named).
    """
    _choice("estimator", estimator, tuple(ESTIMATORS))
    _choice("singleton", singleton, SINGLETONS)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for estimator {estimator!r}: valid options are {OPTIONS}")
    mode = options.get("scale_rewards", "group")
    if isinstance(mode, bool):
        mode = "group" if mode else "none"
    _choice("scale_rewards", mode, SCALES)
    min_std = options.get("min_std", DEFAULT_MIN_STD)
    for name, value in (("eps", eps), ("min_std", min_std)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}: give a finite number >= 0")

    rewards = [_leaf_rewards(tree, index) for index, tree in enumerate(trees)]
    batch_std = _std(np.concatenate(rewards)) if rewards else 0.0
    scale = _Scale(mode=mode, eps=eps, singleton=singleton, min_std=min_std, batch_std=batch_std)
    advantages = []
    for tree, tree_rewards in zip(trees, rewards, strict=True):
        tree_ids = np.array([trajectory.tree for trajectory in tree.trajectories])
        per_leaf = ESTIMATORS[estimator](tree_rewards, tree_ids, scale)
        leaves = zip(tree.trajectories, per_leaf, strict=True)
        advantages.append([np.full(_num_steps(trajectory), value) for trajectory, value in leaves])
    return advantages
