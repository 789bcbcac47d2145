"""Tree-shaped rollouts of a small scripted agent with tools: data for the demo and the tests where no real rollouts are
at hand.

A customer asks what a basket costs; the agent looks prices up, calculates and answers, and sometimes errs. Every group
is sampled as Tree-GRPO samples: a few whole chains, then branches from random steps of each (initialise, then expand).
Tokens are the bytes of the conversation in ChatML plus two special tokens; the rollouts are the same on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from treegrpo.tree import Trajectory

VOCAB_SIZE = 258
TURN_START, TURN_END = 256, 257

_PRICES = {"lamp": 12, "chair": 35, "table": 80, "stool": 41, "rug": 27, "mirror": 19, "clock": 23, "vase": 9}
_SYSTEM = (
    "You sell furniture. Find out what the customer's basket costs. Call one tool per turn and wait for its result.\n"
    'price: {"item": name} gives the price of one piece.\n'
    'multiply_add: {"terms": [[count, price], ...]} gives the sum of the products.\n'
    "Never guess a price. When you know the total, answer with it as the last number of one sentence.\n"
)
_THOUGHTS = ("I need the price of one {item}.", "Next I look up the {item}.", "What does a {item} cost?")


@dataclass(frozen=True)
class Step:
    """One agent step: what it wrote, and what came back (None: it answered)."""

    action: str
    observation: str | None


def sample_groups(num_groups: int, *, num_trees: int = 2, num_expansions: int = 3) -> list[Trajectory]:
    """`num_trees * (1 + num_expansions)` trajectories for each of `num_groups` prompts, with reward 1.0 for the right
    total, else 0.0."""
    trajectories = []
    for group in range(num_groups):
        rng = random.Random(f"0/{group}")
        basket = {item: rng.randint(2, 9) for item in rng.sample(sorted(_PRICES), 3)}
        for tree in range(num_trees):
            first = _finish(basket, [], rng)
            chains = [first, *(_finish(basket, first[: rng.randrange(len(first))], rng) for _ in range(num_expansions))]
            trajectories += [_trajectory(basket, chain, f"toy-{group}", tree) for chain in chains]
    return trajectories


def _finish(basket: dict[str, int], steps: list[Step], rng: random.Random) -> list[Step]:
    """The steps given, then new ones until the agent answers."""
    steps = list(steps)
    while not steps or steps[-1].observation is not None:
        steps.append(_next_step(basket, steps, rng))
    return steps


def _next_step(basket: dict[str, int], steps: list[Step], rng: random.Random) -> Step:
    results = [step.observation or "" for step in steps]
    unknown = [item for item in basket if not any(result.startswith(f"{item}: ") for result in results)]
    if unknown:
        item = rng.choice(unknown)
        thought = rng.choice(_THOUGHTS).format(item=item)
        asked = item if rng.random() < 0.85 else item + "s"
        result = f"{item}: {_PRICES[item]}" if asked == item else f"error: no piece is called {asked}"
        return Step(f'{thought}\nprice {{"item": "{asked}"}}', result)
    sums = [result.removeprefix("sum: ") for result in results if result.startswith("sum: ")]
    if not sums and rng.random() < 0.75:
        counts = {item: count + (rng.random() < 0.15) for item, count in basket.items()}
        terms = ", ".join(f"[{count}, {_PRICES[item]}]" for item, count in counts.items())
        total = sum(count * _PRICES[item] for item, count in counts.items())
        return Step(f'All prices are known.\nmultiply_add {{"terms": [{terms}]}}', f"sum: {total}")
    total = int(sums[-1]) if sums else _total(basket) + rng.choice((0, 0, 10, -1))
    return Step(f"{rng.choice(('Together that is', 'Your basket costs'))} {total}", None)


def _total(basket: dict[str, int]) -> int:
    return sum(count * _PRICES[item] for item, count in basket.items())


def _trajectory(basket: dict[str, int], chain: list[Step], group: str, tree: int) -> Trajectory:
    wanted = ", ".join(f"{count} {item}s" for item, count in basket.items())
    token_ids = _turn("system", _SYSTEM) + _turn("user", f"What do {wanted} cost together?")
    loss_mask = [0] * len(token_ids)
    starts = []
    for step in chain:
        header, body = [TURN_START, *b"assistant\n"], [*step.action.encode(), TURN_END]
        starts.append(len(token_ids) + len(header))
        after = [*b"\n"] + ([] if step.observation is None else _turn("tool", step.observation))
        token_ids += header + body + after
        loss_mask += [0] * len(header) + [1] * len(body) + [0] * len(after)
    is_right = chain[-1].action.split()[-1] == str(_total(basket))
    return Trajectory(token_ids, loss_mask, reward=float(is_right), group=group, tree=tree, steps=starts)


def _turn(role: str, text: str) -> list[int]:
    return [TURN_START, *f"{role}\n{text}".encode(), TURN_END, *b"\n"]
