"""Tree estimators under verl's registry: ``algorithm.adv_estimator=tree_grpo``, ``tree_siblings``, ...

verl hands an estimator rewards and masks, not tokens: trainer.py gives those around the call, by :func:`known_rows`.
Sessions of a prompt are its trees, and steps are those of :mod:`treegrpo.integrations.credit`.

A session whose agent was sampled several times (a row per model call) is compared once, as verl's GRPO does it: its
last row, with the reward of that, is the leaf, and rows that are beginnings of it are earlier turns of it.

Shape legend: B rows, R response columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from treegrpo.advantages import ESTIMATORS, PRESETS
from treegrpo.integrations.credit import chain_steps, on_tokens, step_advantages
from treegrpo.tree import Trajectory

# our name -> verl's; "grid" is nothing without options, for which its registry has no place, and grpo is its own
_NAMES = {
    name: name if name.startswith("tree_") else f"tree_{name}" for name in ESTIMATORS if name not in ("grid", "grpo")
}
ESTIMATOR_NAMES = tuple(_NAMES.values())
NEED_LOGPROBS = tuple(own for name, own in _NAMES.items() if PRESETS[name].grid.value == "entropy_softmax")
"""Those that weigh steps by their entropy."""


@dataclass(frozen=True)
class Rows:
    """What verl keeps from its estimators, row by row."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int]]
    """1 for response tokens that the policy sampled, before rollout correction takes any out: steps begin where it
    speaks again."""
    sessions: Sequence[str]
    """Which rollout of its prompt a row comes from."""
    numbers: Sequence[int]
    """Which sample of its session a row is."""
    logprobs: Sequence[Sequence[float]] | None = None
    """Of the responses' tokens, for those of NEED_LOGPROBS."""


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def known_rows(rows: Rows) -> Iterator[None]:
    """Within, the estimators know the tokens of the rows they are asked about."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def tree_advantages(
    rows: Rows, rewards: Sequence[float], groups: Sequence[Any], estimator: str, columns: int, **options: Any
) -> Tensor:
    """Advantages float32 [B, columns]; where the policy sampled nothing they mean nothing.

    A row that is no beginning of its session's last one (its agent had dropped or rewritten something) takes the mean
    over the steps of the last.

    Args:
        rewards: of each row, the sum of its token-level rewards.
        groups: verl's uid of each row; sessions of equal uid are compared.
        options: of the estimator, as `treegrpo.compute_advantages` takes them.
    """
    sessions: dict[str, dict[str, list[int]]] = {}
    for row, group in enumerate(groups):
        sessions.setdefault(str(group), {}).setdefault(rows.sessions[row], []).append(row)
    leaves, lengths, on_path, off_path = [], [], [], []
    for group, own in sessions.items():
        for tree, members in enumerate(own.values()):
            last = max(members, key=lambda row: rows.numbers[row])
            ids = [*rows.prompts[last], *rows.responses[last]]
            mask = np.zeros(len(ids), np.int8)
            logprobs = np.full(len(ids), math.nan)
            turns, others = [], []
            for row in members:
                start = len(rows.prompts[row])
                end = start + len(rows.responses[row])
                if [*rows.prompts[row], *rows.responses[row]] == ids[:end]:
                    sampled = np.asarray(rows.masks[row], np.bool_)
                    mask[start:end] |= sampled
                    if rows.logprobs is not None:
                        logprobs[start:end][sampled] = np.asarray(rows.logprobs[row])[sampled]
                    turns.append((row, start, end))
                else:
                    others.append(row)
            known = None if rows.logprobs is None else logprobs
            leaves.append(Trajectory(ids, mask, reward=rewards[last], logprobs=known, group=group, tree=tree))
            lengths.append(min(start for _, start, _ in turns))
            on_path.append(turns)
            off_path.append(others)
    steps = chain_steps(leaves, lengths)
    leaves = [replace(leaf, steps=np.array(own)) for leaf, own in zip(leaves, steps, strict=True)]
    advantages = torch.zeros(len(groups), columns)
    found = step_advantages(leaves, estimator, options)
    for leaf, per_step, turns, others in zip(leaves, found, on_path, off_path, strict=True):
        if not per_step.size:
            continue
        path = on_tokens([leaf], [per_step], [0], leaf.num_tokens).expand(1, leaf.num_tokens)[0]
        for row, start, end in turns:
            advantages[row, : end - start] = path[start:end]
        advantages[others] = float(per_step.mean())
    return advantages


def _register(name: str, estimator: str) -> None:
    takes_std = PRESETS[estimator].grid.norm in ("std", "std_population")

    @register_adv_est(name)
    def estimate(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = _rows.get()
        if rows is None:
            raise ValueError(
                f"adv_estimator={name} needs the rows' tokens, which verl gives no estimator: set"
                " trainer.v1.trainer_mode=tree_sync"
            )
        rewards = token_level_rewards.sum(-1).tolist()
        without_std = takes_std and config is not None and not config.get("norm_adv_by_std_in_grpo", True)
        options = {"norm": "none"} if without_std else {}
        found = tree_advantages(rows, rewards, index, estimator, response_mask.shape[1], **options)
        found = found.to(response_mask.device) * (response_mask != 0)
        return found, found


for _estimator, _name in _NAMES.items():
    _register(_name, _estimator)
