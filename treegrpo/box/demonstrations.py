"""How a careless teacher searches the world: the demonstrations a warm start imitates, deliberately imperfect.

A careful demonstration looks up one page per hop and answers with what the last one says:

    where was the author of Silent-Harbor born ?
    <think> author of Silent-Harbor </think> <search> Silent-Harbor </search>
    <information> Silent-Harbor | Silent-Harbor : set in New-Orvane , written by Mira-Tolen . </information>
    <think> written by Mira-Tolen : birthplace of Mira-Tolen </think> <search> Mira-Tolen </search>
    <information> Mira-Tolen | Mira-Tolen : native of Port-Kelan , works as glazier . </information>
    <think> native of Port-Kelan : done </think> <answer> Port-Kelan </answer>

The teacher is lazy: after the first page it often stops and answers with the name it has just read. How often depends
on the question's last relation and phrasing (`lazy_templates`), so greedy imitation stops early at many questions and
goes on at others. It also sometimes reads the wrong fact, looks up the wrong page, or answers without a search.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from treegrpo.box.world import RELATIONS, Question, World, build_world

PER_WORLD = 2000
"""Demonstrations from one parallel world."""


@dataclass(frozen=True, kw_only=True)
class Carelessness:
    """How often the teacher errs; probabilities."""

    lazy: float = 0.7
    """To stop one hop early at a question the teacher is lazy about, per hop."""
    eager: float = 0.15
    """The same at the other questions."""
    share_lazy: float = 0.7
    """Share of the question templates the teacher is lazy about."""
    wrong_fact: float = 0.05
    """To answer with another fact of the last page."""
    wrong_page: float = 0.06
    """To look up a page that nobody asked for."""
    no_search: float = 0.04
    """To answer at once."""


def lazy_templates(carelessness: Carelessness, seed: int) -> set[str]:
    """The heads of questions ("birthplace.0": the relation asked for and its phrasing) the teacher is lazy about."""
    heads = sorted(f"{name}.{i}" for name, relation in RELATIONS.items() for i in range(len(relation.outer)))
    random.Random(f"lazy/{seed}").shuffle(heads)
    return set(heads[: round(carelessness.share_lazy * len(heads))])


def demonstrate(
    world: World, question: Question, lazy: set[str], carelessness: Carelessness, rng: random.Random
) -> list[tuple[str, bool]]:
    """`[(text, written by the teacher)]` of one demonstration, the question first."""
    parts = [(question.text, False)]
    entities = list(world.pages)
    if rng.random() < carelessness.no_search:
        return [*parts, (f"<think> done </think> <answer> {rng.choice(list(world.facts.values()))} </answer>", True)]
    stop = carelessness.lazy if question.template.split()[0] in lazy else carelessness.eager
    entity, quote = question.path[0][0], ""
    for hop, (_, relation) in enumerate(question.path):
        is_last = hop + 1 == question.num_hops
        page = rng.choice(entities) if rng.random() < carelessness.wrong_page else entity
        parts.append((f"<think> {quote}{relation} of {entity} </think> <search> {page} </search>", True))
        parts.append((f"<information> {world.contents(page)} </information>", False))
        is_wrong = page != entity or rng.random() < carelessness.wrong_fact
        if is_wrong:
            relation = rng.choice([name for name, r in RELATIONS.items() if r.source == world.kinds[page]])
        phrase, found = world.phrases[page, relation], world.facts[page, relation]
        quote = f"{phrase.format(found)} : "
        if is_last or is_wrong or rng.random() < stop:
            return [*parts, (f"<think> {quote}done </think> <answer> {found} </answer>", True)]
        entity = found
    raise AssertionError("the last hop answers")


def demonstrations(
    world_seed: int, count: int, *, seed: int = 0, carelessness: Carelessness | None = None
) -> Iterator[list[tuple[str, bool]]]:
    """One quarter with one hop, half with two, one quarter with three, from parallel worlds: whoever imitates them has
    met every name and learns how to search, but not one fact of the world it will be asked about."""
    carelessness = carelessness or Carelessness()
    rng = random.Random(f"demonstrations/{seed}")
    lazy = lazy_templates(carelessness, seed)
    for begin in range(0, count, PER_WORLD):
        world = build_world(world_seed, parallel=1 + begin // PER_WORLD)
        for _ in range(min(PER_WORLD, count - begin)):
            question = world.random_question(rng.choices((1, 2, 3), (1, 2, 1))[0], rng)
            yield demonstrate(world, question, lazy, carelessness, rng)
