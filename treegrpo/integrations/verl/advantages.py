"""Tree estimators under verl's registry: ``algorithm.adv_estimator=tree_grpo``, ``tree_siblings``, ...

verl hands an estimator rewards and masks, not tokens: trainer.py gives those around the call, by :func:`known_rows`.
Sessions of a prompt are its trees, and steps are those of :mod:`treegrpo.integrations.credit`.

Shape legend: B rows, R response columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from treegrpo.advantages import ESTIMATORS
from treegrpo.integrations.credit import chain_steps, on_tokens, step_advantages
from treegrpo.tree import Trajectory

# our name -> verl's; "grid" is nothing without options, for which its registry has no place, and grpo is its own
_NAMES = {
    name: name if name.startswith("tree_") else f"tree_{name}" for name in ESTIMATORS if name not in ("grid", "grpo")
}
ESTIMATOR_NAMES = tuple(_NAMES.values())


@dataclass(frozen=True)
class Rows:
    """What verl keeps from its estimators."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    sessions: Sequence[str]
    """Which rollout of its prompt a row comes from; rows of one session are samples of one trajectory."""


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
    rows: Rows, rewards: Sequence[float], response_mask: np.ndarray, groups: Sequence[Any], estimator: str
) -> Tensor:
    """Advantages float32 [B, R], 0 outside the mask.

    Args:
        rewards: of each row, the sum of its token-level rewards.
        response_mask: [B, R], nonzero where the policy sampled the token.
        groups: verl's uid of each row; rows of equal uid are compared.
    """
    sessions: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    leaves = []
    for row, (prompt, response, reward, group) in enumerate(
        zip(rows.prompts, rows.responses, rewards, groups, strict=True)
    ):
        key = str(group), str(rows.sessions[row])
        if key not in sessions:
            sessions[key] = counts.setdefault(key[0], 0)
            counts[key[0]] += 1
        mask = (response_mask[row, : len(response)] != 0).astype(int)
        leaves.append(
            Trajectory(
                [*prompt, *response], [0] * len(prompt) + mask.tolist(), reward=reward, group=key[0], tree=sessions[key]
            )
        )
    # build_forest goes by groups: rows in that order, and back
    order = sorted(range(len(leaves)), key=lambda i: list(counts).index(leaves[i].group))
    lengths = [len(rows.prompts[i]) for i in order]
    sorted_leaves = [leaves[i] for i in order]
    steps = chain_steps(sorted_leaves, lengths)
    sorted_leaves = [replace(leaf, steps=own) for leaf, own in zip(sorted_leaves, steps, strict=True)]
    found = on_tokens(sorted_leaves, step_advantages(sorted_leaves, estimator, {}), lengths, response_mask.shape[1])
    advantages = found.new_zeros(response_mask.shape)
    advantages[order] = found if found.dim() == 2 else found[:, None].expand(-1, response_mask.shape[1])
    return advantages


def _register(name: str, estimator: str) -> None:
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
        found = tree_advantages(rows, rewards, response_mask.cpu().numpy(), index, estimator)
        found = found.to(response_mask.device) * (response_mask != 0)
        return found, found


for _estimator, _name in _NAMES.items():
    _register(_name, _estimator)
