"""What a tree search is made of: its options, its nodes, which of them are continued next, and what it all cost.

A node is one complete agent step, action and observation, so a branch always starts where the policy is to speak:

    prompt ── search a ── search b ── answer        round 0, one chain a tree
                 └─────── search c ── answer        round 1 drew the node "search a"
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from treegrpo.rollout.engine import SamplingParams

SIBLING_PENALTY = 0.05
"""Nats a step loses under selection "entropy" for each sibling it has (AT2PO, arXiv 2601.04767)."""


@dataclass(slots=True, eq=False)
class Node:
    """One agent step. `Node(token_ids=[8, 9, 5], loss_mask=[1, 1, 0], logprobs=[-0.5, -1.5, nan], depth=1, ...)` has
    sampled 8 and 9 and read the observation 5; mean_nll is 1. The root holds the prompt, depth 0, one root a tree."""

    token_ids: list[int]
    """What the step added: the sampled action, then the observation."""
    loss_mask: list[int]
    """1 where the policy sampled the token."""
    logprobs: list[float]
    """As the engine gave them; NaN where loss_mask is 0."""
    environment: Any
    """The state after the step, an `Environment` here; only ever forked, never stepped on."""
    tree: int
    """Number of the tree in its group."""
    parent: Node | None = None
    depth: int = 0
    """Agent steps from the prompt to here, this one included."""
    end: str | None = None
    """Why the branch ends here, None where it goes on: "done" (the environment said so), "max_turns" (the last step
    allowed), "max_tokens" (the step ran into it), "context" (no room for the observation or for another token)."""
    mean_nll: float = 0.0
    """Mean -logp of the sampled tokens in nats, 0 at the root."""
    num_expansions: int = 0
    """Times it was drawn so far. A node that is no leaf has 1 + num_expansions children."""

    @property
    def is_leaf(self) -> bool:
        return self.end is not None

    @property
    def is_truncated(self) -> bool:
        return self.end in ("max_tokens", "context")

    def path(self) -> list[Node]:
        """From the root to this node."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def context_ids(self) -> list[int]:
        """Every token up to here, the prompt first."""
        return [token for node in self.path() for token in node.token_ids]


Selection = str | Callable[[Sequence[Node], random.Random], Node]
SELECTIONS = ("uniform", "entropy")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The shape of the trees and the bounds of the search. ValueError where a value makes no sense."""

    num_trees: int = 2
    """M: chains sampled from the prompt, each the first branch of a tree."""
    num_expansions: int = 2
    """N: branches a round adds to a tree."""
    num_rounds: int = 1
    """L: rounds of expansion. M (L N + 1) leaves a prompt."""
    selection: Selection = "uniform"
    """"uniform" (Tree-GRPO), "entropy" (AT2PO), or a callable; see nodes.select_nodes."""
    root_eligible: bool = True
    """Whether the prompt itself may be drawn, which gives a fresh chain in the same tree; Tree-GRPO's code does so."""
    with_replacement: bool = True
    """Whether a round may draw a node twice before each was drawn once; Tree-GRPO's code does so."""
    max_turns: int = 4
    """Agent steps that may use tools; a branch that goes on after them gets one last step, which may not."""
    max_tokens: int = 256
    """Sampled tokens of one step."""
    max_context_length: int | None = None
    """Tokens of prompt and branch together; None: what the engine takes."""
    temperature: float = 1.0
    top_p: float = 1.0
    token_budget: int | None = None
    """Sampled tokens of one prompt's group. Branches are then sampled one after another, all first chains before the
    first expansion, and none is begun once this many tokens are sampled; so it is overshot by less than one branch, and
    the first chain always runs."""
    max_concurrency: int = 256
    """Engine requests in flight over all prompts, and as many tool calls."""
    tool_timeout: float = 30.0
    """Seconds one step of the environment may take. A thread cannot be stopped: what times out goes on, on a state that
    nobody reads."""

    def __post_init__(self) -> None:
        least = dict(num_trees=1, num_expansions=0, num_rounds=0, max_turns=0, max_concurrency=1)
        for name, minimum in least.items():
            _refuse_below(name, getattr(self, name), minimum)
        for name, minimum in dict(token_budget=1, max_context_length=2).items():
            if getattr(self, name) is not None:
                _refuse_below(name, getattr(self, name), minimum)
        if not 0 < self.tool_timeout < math.inf:
            raise ValueError(f"tool_timeout={self.tool_timeout}: give a finite number of seconds above 0")
        if not callable(self.selection) and self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection!r}: use one of {SELECTIONS}, or a callable")
        self.sampling()

    @property
    def num_leaves(self) -> int:
        """G = M (L N + 1), unless a token budget stops the search before."""
        return self.num_trees * (self.num_rounds * self.num_expansions + 1)

    def sampling(self, **changes: Any) -> SamplingParams:
        """How one agent step is drawn, with `changes` to it. ValueError where a value makes no sense."""
        params = dict(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)
        return SamplingParams(**(params | changes))


def _refuse_below(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r}: give an integer, at least {minimum}")


def select_nodes(
    nodes: Sequence[Node],
    count: int,
    rng: random.Random,
    *,
    selection: Selection = "uniform",
    root_eligible: bool = True,
    with_replacement: bool = True,
) -> list[Node]:
    """The `count` nodes of one tree that the next round's branches continue; their num_expansions go up by one each.

    Candidates are the steps that are no leaf and, if `root_eligible`, the root; the root alone where the first step of
    every branch answered, eligible or not, so that the number of leaves never depends on what was sampled.

    - "uniform" draws independently (Tree-GRPO, arXiv 2509.21240, and its code) or, without replacement, in random order
      each candidate once before any twice.
    - "entropy" re-samples uncertain steps, as the code of AT2PO (arXiv 2601.04767) does: the steps that are no leaf are
      ranked by mean_nll - 0.05 * (their siblings so far), the first `count` are taken, from the top again where there
      are fewer, and the branch continues their *parent*: it gets a new sibling of the uncertain step.
      `with_replacement` plays no part. A step whose parent is no candidate is left out; where none is left the draw is
      uniform. Unlike there, the root itself, which has no step to score, is no entry of the ranking.
    - A callable is given the candidates (the root first, then in the order of branches and turns) and a seeded
      random.Random and returns one of them; it is called `count` times and sees num_expansions grow.

    Args:
        nodes: all nodes of the tree, the root first, every parent before its children.

    Raises:
        ValueError: the callable returned something else.
    """
    root = nodes[0]
    candidates = [node for node in nodes if not node.is_leaf and (root_eligible or node is not root)] or [root]
    if not isinstance(selection, str):
        return [_called(selection, candidates, rng) for _ in range(count)]
    chosen = _uncertain(nodes, candidates, count) if selection == "entropy" else []
    if not chosen:
        chosen = _uniform(candidates, count, rng, with_replacement)
    for node in chosen:
        node.num_expansions += 1
    return chosen


def _uniform(candidates: list[Node], count: int, rng: random.Random, with_replacement: bool) -> list[Node]:
    if with_replacement:
        return rng.choices(candidates, k=count)
    chosen: list[Node] = []
    while len(chosen) < count:
        chosen += rng.sample(candidates, min(len(candidates), count - len(chosen)))
    return chosen


def _uncertain(nodes: Sequence[Node], candidates: list[Node], count: int) -> list[Node]:
    continued = set(map(id, candidates))
    steps = [(node, node.parent) for node in nodes if node.parent and not node.is_leaf and id(node.parent) in continued]
    # Every node that is no leaf has one first child, so its siblings are the draws of its parent.
    steps.sort(key=lambda pair: pair[0].mean_nll - SIBLING_PENALTY * pair[1].num_expansions, reverse=True)
    return [parent for _, parent in (steps * math.ceil(count / max(len(steps), 1)))[:count]]


def _called(
    selection: Callable[[Sequence[Node], random.Random], Node], candidates: list[Node], rng: random.Random
) -> Node:
    node = selection(tuple(candidates), rng)
    if not any(node is candidate for candidate in candidates):
        raise ValueError(
            f"selection returned {node!r:.80}, which is none of the {len(candidates)} candidates: return one of them"
        )
    node.num_expansions += 1
    return node


@dataclass(kw_only=True)
class RolloutStats:
    """What a search cost; add them up with `sum(stats, RolloutStats())`."""

    groups: int = 0
    generated_tokens: int = 0
    """Sampled tokens."""
    prefilled_tokens: int = 0
    """Prompt tokens the engine computed rather than read from a cache."""
    tool_calls: int = 0
    """As the environment reports them, and one for each step that raised or timed out."""
    tool_errors: int = 0
    """Failed calls the environment reports, and steps that raised."""
    tool_timeouts: int = 0
    """Steps that took longer than tool_timeout, or raised TimeoutError; not among tool_errors."""
    steps: int = 0
    """Agent steps, that is engine calls."""
    leaves: int = 0
    truncated_leaves: int = 0
    """Leaves that ended because max_tokens or the context was full."""
    budget_stopped: int = 0
    """Branches, first chains included, that token_budget kept from being sampled."""
    seconds: float = 0.0
    """Wall-clock time of a group, added up; groups run at the same time."""

    def __add__(self, other: RolloutStats) -> RolloutStats:
        names = [field.name for field in dataclasses.fields(self)]
        return RolloutStats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def as_metrics(self) -> dict[str, float]:
        """`rollout/<field>` for each field, and TRL's `tools/call_frequency` (calls per leaf) and
        `tools/failure_frequency` (failures, time-outs included, per call)."""
        metrics = {f"rollout/{field.name}": getattr(self, field.name) for field in dataclasses.fields(self)}
        metrics["tools/call_frequency"] = self.tool_calls / max(self.leaves, 1)
        metrics["tools/failure_frequency"] = (self.tool_errors + self.tool_timeouts) / max(self.tool_calls, 1)
        return metrics
