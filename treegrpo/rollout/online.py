"""Sampled rollouts for the trainer: prompts in order, a tree search for each, rewards, and what it cost.

    rows of the dataset --(order)--> search over an engine --(rewards)--> RolloutTree per prompt, metrics

With `overlap` the trees of the next step are sampled in a thread while this one trains, from the weights of before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treegrpo.envs.base import Environment
from treegrpo.rewards import group_id, score
from treegrpo.rollout.engine import EngineError, RolloutEngine
from treegrpo.rollout.order import EpochOrder
from treegrpo.rollout.prompts import check_prompts
from treegrpo.rollout.search import RolloutStats, SampledGroup, SearchOptions, search
from treegrpo.tree import RolloutTree, Trajectory, build_tree, load, save

Progress = Callable[[int, int], None]
"""Called as progress(groups done, groups in all)."""


@dataclass
class StepRollouts:
    """What was sampled for one step, all processes together: `trees[read][group]`, and its numbers."""

    trees: list[list[RolloutTree]]
    metrics: dict[str, float] = field(default_factory=dict)
    generated_tokens: int = 0
    place: int = 0
    """Where in the order of prompts the next step begins."""

    def trajectories(self) -> list[Trajectory]:
        return [t for read in self.trees for tree in read for t in tree.trajectories]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples and scores groups: what training and evaluation share."""

    engine: RolloutEngine
    make_env: Callable[[], Environment]
    reward_funcs: Sequence[Callable]
    reward_weights: Sequence[float]

    def sample(
        self,
        rows: Sequence[dict[str, Any]],
        groups: Sequence[str],
        options: SearchOptions,
        seeds: Sequence[int],
        progress: Progress | None = None,
        indices: Sequence[int] | None = None,
        state: Any = None,
    ) -> tuple[list[SampledGroup], list[dict[str, float]]]:
        """The groups of `rows`, every trajectory with its reward, and for each the means of its reward functions
        (rewards/{name}/mean, NaN where a function did not apply) beside what they logged about all of them. `indices`
        says where in their dataset the rows are, for errors; without it they count from 0. `state` is what reward
        functions get as trainer_state.

        Raises:
            ValueError: a bad row or reward; nothing is kept of the step.
            EngineError: the engine gave up.
        """
        if not rows:
            return [], []
        done: list[SampledGroup] = []

        def on_group(group: SampledGroup) -> None:
            done.append(group)
            if progress is not None:
                progress(len(done), len(rows))

        try:
            sampled = search(
                self.engine, self.make_env, rows, groups=groups, options=options, seeds=seeds, on_group=on_group
            )
        except EngineError as error:
            # Whoever catches it may keep what is complete.
            error.trajectories = [t for group in done for t in group.trajectories]
            raise
        leaves = [(group, leaf) for group in sampled for leaf in range(len(group.trajectories))]
        row_of = dict(zip(groups, range(len(rows)) if indices is None else indices, strict=True))
        names = {name for row in rows for name in row} - {"prompt"}
        columns = {name: [group.row.get(name) for group, _ in leaves] for name in sorted(names)}
        logged: dict[str, list[float]] = {}
        rewards, by_function = score(
            self.reward_funcs,
            self.reward_weights,
            prompts=[group.prompt for group, _ in leaves],
            completions=[group.completions[leaf] for group, leaf in leaves],
            completion_ids=[group.completion_ids[leaf] for group, leaf in leaves],
            columns=columns | {"own_texts": [group.own_texts[leaf] for group, leaf in leaves]},
            environments=[group.environments[leaf] for group, leaf in leaves],
            trainer_state=state,
            log_metric=lambda name, value: logged.setdefault(name, []).append(value),
            places=[f"leaf {leaf} of group {group.group!r}, row {row_of[group.group]}" for group, leaf in leaves],
        )
        common = {name: float(np.mean(values)) for name, values in logged.items()}
        parts, begin = [], 0
        for group in sampled:
            end = begin + len(group.trajectories)
            scored = zip(group.trajectories, rewards[begin:end], strict=True)
            group.trajectories = [dataclasses.replace(t, reward=float(reward)) for t, reward in scored]
            means = {f"rewards/{name}/mean": _mean(values[begin:end]) for name, values in by_function.items()}
            parts.append(means | common)
            begin = end
        return sampled, parts


class OnlineRollouts:
    """The trainer's source of sampled trees; `Replay` is the other one.

    Args:
        sampler: engine, environment, rewards.
        rows: the dataset.
        options: shape and bounds of the search.
        refills: how often groups without spread are replaced by other prompts (0 keeps them).
        gather: list of objects -> the objects of all processes, one after another; None for one process.
        one_engine: all processes ask the same engine (a server), to which the first brings the weights.
        overlap: sample the next step's trees while this one trains.
        eval_rows, eval_temperature: what `evaluate` samples.
        source: the dataset's name, a part of the groups' names.
    """

    def __init__(
        self,
        sampler: Sampler,
        rows: list[dict[str, Any]],
        options: SearchOptions,
        *,
        seed: int = 0,
        shuffle: bool = True,
        refills: int = 0,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[list], list] | None = None,
        one_engine: bool = False,
        overlap: bool = False,
        eval_rows: Sequence[dict[str, Any]] = (),
        eval_temperature: float = 0.0,
        source: str = "dataset",
    ) -> None:
        if not rows:
            raise ValueError("dataset: it holds no row, so there is no prompt to sample from")
        self.sampler, self.rows, self.options = sampler, rows, options
        self.order = EpochOrder(len(rows), seed=seed, shuffle=shuffle)
        self.seed, self.refills, self.rank, self.world = seed, refills, rank, world
        self.source = source
        self.gather = gather or (lambda items: items)
        self.one_engine = one_engine
        self.eval_rows, self.eval_temperature = list(eval_rows), eval_temperature
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if overlap else None
        self.place = 0
        self.pending: Future[StepRollouts] | None = None
        self.waiting: list[StepRollouts] = []
        self.is_abandoned = False

    def check_prompts(self, count: int, show: bool = False) -> None:
        """ValueError where a prompt of evaluation, or of the next `count` to be trained on, is too long."""
        engine = self.sampler.engine
        datasets = {
            "dataset": (self.rows, self.order.upcoming(self.place, count * (self.refills + 1))),
            "eval_dataset": (self.eval_rows, range(len(self.eval_rows))),
        }
        limit = self.options.max_context_length or engine.max_context_length
        check_prompts(datasets, self.sampler.make_env, engine.tokenizer, limit, show)

    def step_rollouts(
        self, reads: int, count: int, policy: torch.nn.Module, progress: Progress | None = None, state: Any = None
    ) -> StepRollouts:
        """The next step's groups, `[read][group]`: those of a checkpoint, those being sampled already, or new ones
        sampled from the weights of `policy`. Reward functions get `state` as trainer_state."""
        if self.waiting:
            rollouts = self.waiting.pop(0)
        elif self.pending is not None:
            rollouts, self.pending = self.pending.result(), None
        else:
            self._sync_weights(policy)
            rollouts = self._sample_step(reads, count, progress, state)
        self.place = rollouts.place
        return rollouts

    def start_next(self, reads: int, count: int, policy: torch.nn.Module, state: Any = None) -> None:
        """With `overlap`, begins to sample the step after this one from the weights `policy` has now."""
        if self.executor is not None and self.pending is None and not self.waiting:
            self._sync_weights(policy)
            self.pending = self.executor.submit(self._sample_step, reads, count, self._stop_if_abandoned, state)

    def evaluate(
        self,
        policy: torch.nn.Module,
        progress: Progress | None = None,
        rows: Sequence[dict[str, Any]] | None = None,
        state: Any = None,
    ) -> dict[str, Any]:
        """`evaluate` on `rows` (None: those of the settings) with the weights of `policy`."""
        if self.pending is not None:
            # The engine holds the weights of before until these are done.
            self.pending.exception()
        self._sync_weights(policy)
        return evaluate(
            self.sampler,
            self.eval_rows if rows is None else list(rows),
            self.options,
            temperature=self.eval_temperature,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            gather=self.gather,
            progress=progress,
            state=state,
        )

    def _sync_weights(self, policy: torch.nn.Module) -> None:
        """The engine samples from the weights of `policy` from now on; with one engine for all processes none asks
        before they are there."""
        failed: list[EngineError] = []
        if self.rank == 0 or not self.one_engine:
            try:
                self.sampler.engine.sync_weights(policy)
            except EngineError as error:
                failed = [error]
        for anyones in self.gather(failed) if self.one_engine else failed:
            raise anyones

    def _sample_step(self, reads: int, count: int, progress: Progress | None, state: Any) -> StepRollouts:
        place, wanted = self.place, reads * count
        kept: list[tuple[SampledGroup, dict[str, float]]] = []
        rejected: list[tuple[SampledGroup, dict[str, float]]] = []
        stats = RolloutStats()
        num_zero_std = 0
        for trial in range(self.refills + 1):
            missing = wanted - len(kept)
            places = range(place, place + missing)
            place += missing
            new = self._sample_places(places, progress, state)
            stats = sum((group.stats for group, _ in new), stats)
            flat = [pair for pair in new if _is_flat(pair[0])]
            num_zero_std += len(flat)
            is_last = trial == self.refills
            # What still has no spread in the end is trained on all the same: the step keeps its size.
            kept += new if is_last else [pair for pair in new if not _is_flat(pair[0])]
            rejected += [] if is_last else flat
            if len(kept) == wanted:
                break
        trees = [build_tree(group.trajectories) for group, _ in kept]
        metrics = stats.as_metrics()
        for name in dict.fromkeys(name for _, means in kept for name in means):
            # a reward function may have logged it in one process, or about one refill, alone
            found = [(means.get(name, np.nan), len(group.trajectories)) for group, means in kept]
            values = [pair for pair in found if not np.isnan(pair[0])]
            if values:
                means, weights = zip(*values, strict=True)
                metrics[name] = float(np.average(means, weights=weights))
        for name in ("generated_tokens", "prefilled_tokens", "tool_calls"):
            metrics[f"rollout/{name}_per_prompt"] = getattr(stats, name) / stats.groups
        metrics["rollout/zero_std_groups"] = num_zero_std
        metrics["rollout/refilled_groups"] = len(rejected)
        return StepRollouts(
            [trees[i * count : (i + 1) * count] for i in range(reads)], metrics, stats.generated_tokens, place
        )

    def _sample_places(
        self, places: Sequence[int], progress: Progress | None, state: Any
    ) -> list[tuple[SampledGroup, dict[str, float]]]:
        """Every process samples its share of the places; all get all of them, in order."""
        own = [place for i, place in enumerate(places) if i % self.world == self.rank]
        indices = [self.order[place] for place in own]
        rows = [self.rows[index] for index in indices]
        # A place, not a row, names a group: a small dataset comes round twice in a step.
        named = zip(rows, indices, own, strict=True)
        groups = [f"{group_id(row, index, self.source)}@{place}" for row, index, place in named]
        seeds = [_seed(self.seed, place) for place in own]
        sampled, means = self.sampler.sample(rows, groups, self.options, seeds, progress, indices, state)
        for group in sampled:
            group.environments = []  # they may hold what cannot travel between processes
        pairs = self.gather(list(zip(own, sampled, means, strict=True)))
        return [(group, mean) for _, group, mean in sorted(pairs, key=lambda pair: pair[0])]

    def save_state(self, folder: Path, current: StepRollouts | None) -> dict[str, Any]:
        """Writes what was sampled but not trained to the end, `current` first, into `folder`; returns what else a
        resumed run needs."""
        waiting = [*([current] if current is not None else []), *self.waiting]
        if self.pending is not None:
            waiting.append(self.pending.result())
        state: dict[str, Any] = {"place": self.place, "waiting": []}
        for i, rollouts in enumerate(waiting):
            save(folder / f"rollouts-{i}.jsonl.gz", rollouts.trajectories())
            groups = [[tree.group for tree in read] for read in rollouts.trees]
            state["waiting"].append({**vars(rollouts), "trees": groups})
        return state

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        self.place = state["place"]
        for i, saved in enumerate(state["waiting"]):
            trees = read_trees(folder / f"rollouts-{i}.jsonl.gz", saved["trees"])
            self.waiting.append(StepRollouts(**{**saved, "trees": trees}))

    def abandon(self) -> None:
        """Lets go of what is being sampled in the background; a resumed run samples it again."""
        self.is_abandoned, self.pending = True, None

    def _stop_if_abandoned(self, done: int, total: int) -> None:
        # Nothing else reaches a search in another thread; it is asked after every group.
        if self.is_abandoned:
            raise EngineError(f"the run was stopped when {done} of {total} groups were sampled")

    def close(self) -> None:
        self.abandon()
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        self.sampler.engine.close()


def read_trees(path: Path, groups: list[list[str]]) -> list[list[RolloutTree]]:
    """Trees written as trajectories, put back in their reads; they are built again, bit for bit as before."""
    by_group: dict[str, list[Trajectory]] = {}
    for trajectory in load(path):
        by_group.setdefault(trajectory.group, []).append(trajectory)
    return [[build_tree(by_group[group]) for group in read] for read in groups]


def evaluate(
    sampler: Sampler,
    rows: list[dict[str, Any]],
    options: SearchOptions,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list], list] | None = None,
    progress: Progress | None = None,
    state: Any = None,
) -> dict[str, Any]:
    """One chain a row: mean rewards under TRL's names with the prefix eval_; `eval_rewards` has one a row, in order. A
    reward that applied to no row is left out."""
    chain = dataclasses.replace(
        options, num_trees=1, num_expansions=0, temperature=temperature, top_p=1.0, token_budget=None
    )
    own = range(rank, len(rows), world)
    groups, seeds = [f"eval-{i}" for i in own], [_seed(seed, i) for i in own]
    sampled, means = sampler.sample([rows[i] for i in own], groups, chain, seeds, progress, own, state)
    for group in sampled:
        group.environments = []
    pairs = sorted((gather or (lambda items: items))(list(zip(own, sampled, means, strict=True))), key=lambda p: p[0])
    rewards = [group.trajectories[0].reward for _, group, _ in pairs]
    stats = sum((group.stats for _, group, _ in pairs), RolloutStats())
    result: dict[str, Any] = {"eval_reward": float(np.mean(rewards)), "eval_rewards": rewards}
    for name in dict.fromkeys(name for _, _, part in pairs for name in part):
        mean = _mean(np.array([part.get(name, np.nan) for _, _, part in pairs]))
        result |= {} if math.isnan(mean) else {f"eval_{name}": mean}
    result |= {f"eval_{name}": value for name, value in stats.as_metrics().items()}
    lengths = [len(group.completion_ids[0]) for _, group, _ in pairs]
    return result | {"eval_completions/mean_length": float(np.mean(lengths))}


def _is_flat(group: SampledGroup) -> bool:
    return len({trajectory.reward for trajectory in group.trajectories}) == 1


def _mean(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _seed(seed: int, place: int) -> int:
    """A stable 63-bit number of both."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1
