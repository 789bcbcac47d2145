"""Who is compared with whom: leaf rewards of rollout trees -> one advantage per agent step of every leaf.

A RolloutTree is one prompt's whole group: its M sampled trees share the prompt and are told apart by `Trajectory.tree`.
With z(R; S) = (R - mean of S) / (std of S + eps), std unbiased (n - 1), over a comparison set S of leaves:

    inter, grpo   z over all leaves of the prompt                       (DeepSeekMath, arXiv 2402.03300)
    intra         z over the leaves of the leaf's own sampled tree      (Tree-GRPO, arXiv 2509.21240, eq. 6)
    tree_grpo     intra + inter, unweighted                             (Tree-GRPO, arXiv 2509.21240, eq. 7)

Example, M = 2 trees of three leaves, R = [1, .2, .2 | .2, .2, .1]:
    intra [1.1547, -.5773, -.5773 | .5773, .5773, -1.1547], inter [2.0268, -.3460, -.3460 | -.3460, -.3460, -.6427].

Every estimator is a row of PRESETS over one option grid, and "grid" takes the options freely. In order:

    norm          what the leaf rewards R become first, within the comparison set (baselines "tree" and "prompt": that
                  set; others: all leaves under the root): "none" R - mean; "std", "std_population" (n) z-scores;
                  "std_batch" divides by the std over all leaves of the call; "rloo" R - mean of the others.
                  Two act last instead: "std_siblings" divides by the population std of V among the siblings, "whiten"
                  is (A - mean) / std over all trained tokens of the call.
    value         "leaf" its own, or V of the step's node by "leaf_mean", "child_mean", "entropy_softmax" (credit.py)
    baseline      "tree", "prompt", "tree+prompt": whole leaves; "parent", "root", "parent+root", "siblings": steps;
                  "all_ancestors_mean": the mean over the leaf's ancestors of R - V(ancestor)
    root          "prompt": all leaves of the group are one tree of steps; "tree": each sampled tree stands for itself
    multiplicity  what each of the c leaves through a step carries of its credit x: "row" x, "mean" the mean of x over
                  them, "sqrt" x / sqrt(c), "once" x / c

How multiplicity meets the loss: `grpo_loss(shared_tokens="per_leaf")` adds a shared token once per leaf, so at ratio 1
it weighs the sum of what its leaves carry: of "row" and "mean" sum x, of "sqrt" sum x / sqrt(c), of "once" mean x.
"once" has the policy term of "row" under `shared_tokens="mean"`, whose weight 1 / c reaches the KL as well. There c is
`TreeBatch.multiplicity`, counted per token over the whole group; here it is counted per step, and with root="prompt"
the two differ only on tokens that leaves share before they part within a step. Use one of the two, not both: "sqrt" or
"once" under another `shared_tokens` than "per_leaf" divides twice.

Left out, because their formulas are not confirmed at the source: GiGPO, TEMPO, TreeAdv, TreeRPO's own normaliser, and
the credit option of TreeRL's code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treegrpo import credit

if TYPE_CHECKING:
    from treegrpo.tree import RolloutTree

SINGLETONS = ("zero", "official")
SCALES = ("group", "batch", "none")
MAX_REWARD = 1e100
"""Beyond it squares overflow, and an infinite std would make every advantage of the group 0."""
# TRL's names for what the grid calls norm.
_NORM_OF_SCALE = {"group": "std", "batch": "std_batch", "none": "none"}

# A few float32 roundings of a reward near 1: spreads this small are noise, and std + eps would blow them up.
DEFAULT_MIN_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One point of the option grid; see the top of the module."""

    baseline: str
    value: str
    norm: str
    multiplicity: str = "row"
    root: str = "prompt"
    ancestors: str = "mean"


@dataclass(frozen=True)
class Preset:
    """A named estimator."""

    grid: Grid
    options: Mapping[str, tuple[str, ...]]
    """The options it takes beside eps, singleton and min_std, with their valid values."""
    summary: str
    """One line, with its source."""


_LEAF_NORMS = ("none", "std", "std_population", "std_batch", "rloo", "whiten")
_BACKUPS = ("leaf_mean", "child_mean", "entropy_softmax")
_NORM = {"norm": _LEAF_NORMS, "scale_rewards": SCALES}
_STEPS = {"norm": credit.NORMS, "value": _BACKUPS, "root": credit.ROOTS, "multiplicity": credit.MULTIPLICITIES}
_SHARED = {"root": credit.ROOTS, "multiplicity": credit.MULTIPLICITIES}

PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        Grid(baseline="prompt", value="leaf", norm="std"),
        _NORM | _SHARED,
        "z-score over all leaves of the prompt (DeepSeekMath, arXiv 2402.03300)",
    ),
    "tree_grpo": Preset(
        Grid(baseline="tree+prompt", value="leaf", norm="std"),
        _NORM | _SHARED,
        "intra + inter (Tree-GRPO, arXiv 2509.21240 eq. 7; AMAP-ML/Tree-GRPO verl/trainer/ppo/ray_trainer_ts.py:168)",
    ),
    "intra": Preset(
        Grid(baseline="tree", value="leaf", norm="std"),
        _NORM | _SHARED,
        "z-score over the leaves of the leaf's own sampled tree (Tree-GRPO, arXiv 2509.21240 eq. 6)",
    ),
    "inter": Preset(
        Grid(baseline="prompt", value="leaf", norm="std"),
        _NORM | _SHARED,
        "z-score over all leaves of the prompt, the same as grpo (Tree-GRPO, arXiv 2509.21240 eq. 6)",
    ),
    "treerl": Preset(
        Grid(baseline="parent+root", value="leaf_mean", norm="none", multiplicity="sqrt"),
        _STEPS,
        "(V - V(parent) + V - V(root)) / sqrt(leaves below), the paper's form (TreeRL, arXiv 2506.11902)",
    ),
    "treepo": Preset(
        Grid(baseline="all_ancestors_mean", value="leaf_mean", norm="whiten"),
        {"norm": _LEAF_NORMS, "root": credit.ROOTS, "ancestors": credit.ANCESTORS},
        "mean over the ancestors of R - mean below them, then whitened over the call (TreePO, arXiv 2508.17445; "
        "multimodal-art-projection/TreePO verl/trainer/ppo/core_algos.py:266)",
    ),
    "siblings": Preset(
        Grid(baseline="siblings", value="child_mean", norm="none", multiplicity="once"),
        _STEPS,
        "V - mean V of the parent's children, no std, each step once (omrisapir1/treerpo "
        "treerpo/trainers/treerpo_trainer.py:348; not the normaliser of TreeRPO, arXiv 2506.05183)",
    ),
    "spo": Preset(
        Grid(baseline="parent", value="child_mean", norm="none", multiplicity="once"),
        _STEPS,
        "V - V(parent), V the mean over children, each step once (SPO-tree, arXiv 2505.23564; AIFrameResearch/SPO "
        "src/treetune/episode_generators/tree_episode_generator.py:112)",
    ),
    "at2po": Preset(
        Grid(baseline="prompt", value="entropy_softmax", norm="std_population"),
        _STEPS | {"baseline": ("prompt", "tree", "parent", "root", "parent+root")},
        "V of leaf z-scores, backed up by softmax of the children's entropy (AT2PO, arXiv 2601.04767; "
        "zzfoutofspace/ATPO ATPO/verl_atpo/verl/workers/rollout/vllm_rollout/"
        "vllm_rollout_with_tools_tree_offline.py:1715)",
    ),
    "arpo_hard": Preset(
        Grid(baseline="prompt", value="leaf", norm="std", multiplicity="mean"),
        _NORM | {"root": credit.ROOTS},
        "grpo, leaves that share a step take the mean of their advantages there (ARPO, arXiv 2507.19849)",
    ),
    "arpo_soft": Preset(
        Grid(baseline="prompt", value="leaf", norm="std"),
        _NORM,
        "grpo for every leaf, shared steps included, ARPO's default (ARPO, arXiv 2507.19849)",
    ),
    "lambda_grpo": Preset(
        Grid(baseline="prompt", value="leaf", norm="std", multiplicity="once"),
        _NORM | {"root": credit.ROOTS},
        "grpo x 1 / (leaves through the step) (lambda-GRPO, arXiv 2509.21154; coli-saar/grpo-prm "
        "lambda_grpo/utils.py:97)",
    ),
    "grid": Preset(
        Grid(baseline="tree+prompt", value="leaf", norm="std"),
        {
            "baseline": credit.BASELINES,
            "value": credit.VALUES,
            "norm": credit.NORMS,
            "multiplicity": credit.MULTIPLICITIES,
            "root": credit.ROOTS,
            "ancestors": credit.ANCESTORS,
        },
        "any combination of baseline, value, norm, multiplicity and root; its defaults are those of tree_grpo",
    ),
}

ESTIMATORS = tuple(PRESETS)
"""Names for `compute_advantages(estimator=...)`."""
DESCRIPTIONS = {name: preset.summary for name, preset in PRESETS.items()}
"""What each is, one line with its source."""


def estimator_options(estimator: str) -> tuple[str, ...]:
    """Names of the options an estimator takes beside eps and singleton, sorted."""
    _choice("estimator", estimator, ESTIMATORS)
    return tuple(sorted({"min_std", *PRESETS[estimator].options}))


def parse_options(estimator: str, texts: Sequence[str]) -> dict[str, str | float]:
    """Keywords of `compute_advantages` from texts such as "norm=none" or "eps=1e-8".

    Raises:
        ValueError: no name=value, an option the estimator does not take, a value it does not take.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"advantage_options: {text!r} is not name=value")
        try:
            options[name] = float(value) if name in ("eps", "min_std") else value
        except ValueError:
            raise ValueError(f"advantage_options: {name}={value!r} is no number") from None
    valid = {*estimator_options(estimator), "eps", "singleton"}
    if unknown := sorted(set(options) - valid):
        raise ValueError(
            f"advantage_options: {estimator} has no option {unknown[0]!r}; it takes {', '.join(sorted(valid))}"
        )
    try:
        compute_advantages([], estimator, **options)
    except ValueError as error:
        raise ValueError(f"advantage_options: {error}") from None
    return options


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """How rewards become leaf signals; `batch_std` is the std over every leaf of the call, used by norm "std_batch"."""

    norm: str
    eps: float
    singleton: str
    min_std: float
    batch_std: float


def _std(rewards: np.ndarray, ddof: int = 1) -> float:
    return float(rewards.std(ddof=ddof)) if rewards.size > ddof else 0.0


def _noise(rewards: np.ndarray, min_std: float) -> float:
    """A std up to this is rounding."""
    return min_std * max(1.0, float(np.abs(rewards).max()))


def _z_scores(rewards: np.ndarray, scale: _Scale) -> np.ndarray:
    """Signals of one comparison set, float64 [n] -> float64 [n]; a set without spread gives exact zeros."""
    if rewards.size == 1:
        return rewards.copy() if scale.singleton == "official" else np.zeros(1)
    # The mean of n equal floats may differ from them by a rounding, so equality is asked of the rewards themselves.
    if rewards.min() == rewards.max():
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if scale.norm == "rloo":
        return centred * (rewards.size / (rewards.size - 1))
    if scale.norm not in ("std", "std_population", "std_batch"):
        return centred
    std = scale.batch_std if scale.norm == "std_batch" else _std(rewards, 0 if scale.norm == "std_population" else 1)
    if std <= _noise(rewards, scale.min_std):
        return np.zeros_like(rewards)
    return centred / (std + scale.eps)


def _by_tree(rewards: np.ndarray, tree_ids: np.ndarray, scale: _Scale) -> np.ndarray:
    signals = np.empty_like(rewards)
    for tree_id in np.unique(tree_ids):
        members = tree_ids == tree_id
        signals[members] = _z_scores(rewards[members], scale)
    return signals


def _signals(rewards: np.ndarray, tree_ids: np.ndarray, grid: Grid, scale: _Scale) -> np.ndarray:
    """Leaf signals of one group, float64 [leaves]: rewards compared within the sets that baseline and root name."""
    if grid.baseline == "tree+prompt":
        return _by_tree(rewards, tree_ids, scale) + _z_scores(rewards, scale)
    whole = grid.baseline == "prompt" or (grid.baseline != "tree" and grid.root == "prompt")
    return _z_scores(rewards, scale) if whole else _by_tree(rewards, tree_ids, scale)


def _step_credits(
    trees: Sequence[RolloutTree], rewards: list[np.ndarray], signals: np.ndarray, grid: Grid, scale: _Scale
) -> np.ndarray:
    """Advantages of every step of every leaf, float64 [E], from the leaf signals [F]."""
    nodes = credit.step_nodes(trees, grid.root)
    if grid.value == "leaf":
        credits = signals[nodes.entry_leaf]
    else:
        entropy = credit.step_entropies(trees, nodes) if grid.value == "entropy_softmax" else None
        values = credit.node_values(nodes, signals, grid.value, entropy)
        if grid.baseline == "all_ancestors_mean":
            raw_single = scale.singleton == "official"
            credits = credit.all_ancestors_mean(nodes, signals, values, grid.ancestors, raw_single)[nodes.entry_leaf]
        else:
            credits = credit.compare(nodes, signals, values, grid.baseline)
    if grid.norm == "std_siblings":
        std = credit.sibling_moments(nodes, signals, values)[1][nodes.entry_parent]
        noise = np.repeat([_noise(r, scale.min_std) for r in rewards], [r.size for r in rewards])[nodes.entry_leaf]
        credits = np.where(std > noise, credits, 0.0) / (np.where(std > noise, std, 1.0) + scale.eps)
    if grid.norm == "whiten":
        noise = _noise(np.concatenate(rewards), scale.min_std)
        credits = credit.whiten(credits, credit.trained_tokens(trees), scale.eps, noise)
    return credit.share(nodes, credits, grid.multiplicity)


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
        if abs(reward) > MAX_REWARD:
            raise ValueError(f"reward is {reward} at {where}: beyond {MAX_REWARD:g} squares overflow; scale it down")
        rewards[leaf] = reward
    return rewards


def _num_steps(trajectory) -> int:
    """Agent steps of a leaf; one whose steps were not recorded counts as a single step."""
    return 1 if trajectory.steps is None else len(trajectory.steps)


def _choice(name: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(map(repr, valid))}")


def resolve_grid(estimator: str, options: Mapping[str, object]) -> Grid:
    """The grid point of an estimator with options of its own; ValueError lists what is valid where they do not fit."""
    valid = estimator_options(estimator)
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for estimator {estimator!r}: valid options are {valid}")
    preset = PRESETS[estimator]
    changes: dict[str, Any] = {name: value for name, value in options.items() if name != "min_std"}
    scale = changes.get("scale_rewards")
    if isinstance(scale, bool):
        changes["scale_rewards"] = "group" if scale else "none"
    for name, value in changes.items():
        _choice(name, value, preset.options[name])
    if "scale_rewards" in changes:
        if "norm" in changes:
            raise ValueError("scale_rewards and norm are two names for one choice: give one of them")
        changes["norm"] = _NORM_OF_SCALE[changes.pop("scale_rewards")]
    if changes.get("baseline") in credit.NODE_BASELINES and preset.grid.value == "leaf":
        changes = {"value": "leaf_mean", **changes}
    grid = dataclasses.replace(preset.grid, **changes)
    if grid.value == "leaf" and grid.baseline in credit.NODE_BASELINES:
        raise ValueError(
            f"value is 'leaf', but baseline {grid.baseline!r} compares steps: use one of {_BACKUPS}, or a baseline of "
            f"whole leaves, {credit.LEAF_BASELINES}"
        )
    if grid.norm == "std_siblings" and grid.baseline not in ("parent", "siblings"):
        raise ValueError(
            f"norm is 'std_siblings', but baseline is {grid.baseline!r}: siblings are compared by baseline 'parent' or "
            f"'siblings'; for others use one of {_LEAF_NORMS}"
        )
    if "ancestors" in changes and grid.baseline != "all_ancestors_mean":
        raise ValueError(f"ancestors belongs to baseline 'all_ancestors_mean', but baseline is {grid.baseline!r}")
    return grid


def compute_advantages(
    trees: Sequence[RolloutTree],
    estimator: str = "tree_grpo",
    *,
    eps: float = 1e-6,
    singleton: str = "zero",
    **options: Any,
) -> list[list[np.ndarray]]:
    """Advantages `[tree][leaf]` -> float64 `[num_steps of that leaf]`, leaves in the order of `tree.trajectories`.

    Estimators that compare whole leaves repeat one number over a leaf's steps; a trajectory without recorded steps has
    one step. Needs of a tree: `.group`, `.trajectories`, and of each trajectory `.reward`, `.tree`, `.steps`; what
    looks at steps (a value but "leaf", a multiplicity but "row", "whiten") needs a whole RolloutTree.

    Args:
        estimator: a name of ESTIMATORS; DESCRIPTIONS says what each is and `estimator_options` what it takes.
        eps: added to every std; 1e-6 as in Tree-GRPO, AT2PO and verl (TRL uses 1e-4, SPO 1e-8).
        singleton: a comparison set of one leaf gets 0 ("zero") or its raw reward R ("official", what the code published
            with Tree-GRPO does: mean := 0, std := 1, hence a lasting offset). It does nothing to differences of values.
        scale_rewards (option): TRL's meaning. "group" divides by the std of the comparison set itself, "batch" by the
            std over the leaves of all `trees`, "none" only centres. True means "group", False "none".
        min_std (option): a set whose std is at most `min_std * max(1, max |R|)` counts as equal rewards and gets exact
            zeros; default 1e-6, a few float32 roundings. Without it rounding noise is divided by `eps`: six rewards of
            0.3 in float32 gave |A| = 0.03. 0 turns it off; exactly equal rewards give zeros even then.
        baseline, value, norm, multiplicity, root (options): the grid at the top of the module. A baseline over steps
            has value "leaf_mean" unless another is given.
        ancestors (option): baseline "all_ancestors_mean" weighs ancestors equally ("mean") or by their leaves ("size").

    Raises:
        ValueError: unknown estimator, option, value or combination (the valid ones are listed); an empty group; a
            reward that is missing, NaN or infinite, log-probs that are missing for "entropy_softmax", steps that cut
            equal tokens differently (group and leaf are named).
    """
    _choice("estimator", estimator, ESTIMATORS)
    _choice("singleton", singleton, SINGLETONS)
    grid = resolve_grid(estimator, options)
    min_std = options.get("min_std", DEFAULT_MIN_STD)
    for name, value in (("eps", eps), ("min_std", min_std)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}: give a finite number >= 0")

    rewards = [_leaf_rewards(tree, index) for index, tree in enumerate(trees)]
    if not rewards:
        return []
    batch_std = _std(np.concatenate(rewards)) if grid.norm == "std_batch" else 0.0
    scale = _Scale(norm=grid.norm, eps=eps, singleton=singleton, min_std=min_std, batch_std=batch_std)
    signals = [
        _signals(tree_rewards, np.array([trajectory.tree for trajectory in tree.trajectories]), grid, scale)
        for tree, tree_rewards in zip(trees, rewards, strict=True)
    ]
    if grid.value == "leaf" and grid.multiplicity == "row" and grid.norm != "whiten":
        return [
            [
                np.full(_num_steps(trajectory), value)
                for trajectory, value in zip(tree.trajectories, per_leaf, strict=True)
            ]
            for tree, per_leaf in zip(trees, signals, strict=True)
        ]
    credits = _step_credits(trees, rewards, np.concatenate(signals), grid, scale)
    cuts = np.cumsum([0, *(_num_steps(trajectory) for tree in trees for trajectory in tree.trajectories)]).tolist()
    leaves = iter([credits[begin:end].copy() for begin, end in zip(cuts, cuts[1:], strict=False)])
    return [[next(leaves) for _ in tree.trajectories] for tree in trees]
