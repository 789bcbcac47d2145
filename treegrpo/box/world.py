"""A fictional world of people, places and works: pages to search in, and questions of one, two and three hops.

Every page tells the facts of one entity in one of several phrasings; every question follows a path of facts:

    page       Silent-Harbor : takes place in New-Orvane , written by Mira-Tolen .
    question   what is the profession of the author of Silent-Harbor ?     (two hops: author, profession)
    path       (("Silent-Harbor", "author"), ("Mira-Tolen", "profession")), answer "glazier"

Words are separated by blanks, so that a word-level tokenizer reads what is written here; a name is one word. Each
entity belongs to one split and is linked to entities of its split alone: no fact on the path of a held-out question is
on the path of a training or validation question. Parallel worlds have the same entities and other facts.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from treegrpo.files import write_whole

SPLITS = {"train": 0.7, "validation": 0.1, "heldout": 0.2}


@dataclass(frozen=True)
class Relation:
    """What links an entity of one kind to an entity of another, or to a plain word."""

    source: str
    target: str
    page: tuple[str, ...]
    """Phrasings on the page of the source."""
    inner: tuple[str, ...]
    """Phrasings of "the <relation> of x" inside a question; empty where the target has no page."""
    outer: tuple[str, ...]
    """Phrasings of a question that asks for it."""


RELATIONS = {
    "birthplace": Relation(
        "person",
        "city",
        ("born in {}", "native of {}", "comes from {}"),
        ("the birthplace of {}", "the home town of {}"),
        ("where was {} born ?", "what is the birthplace of {} ?"),
    ),
    "profession": Relation(
        "person",
        "trade",
        ("works as {}", "earns a living as {}"),
        (),
        ("what is the profession of {} ?", "what does {} do for a living ?"),
    ),
    "teacher": Relation(
        "person",
        "person",
        ("taught by {}", "pupil of {}"),
        ("the teacher of {}", "the mentor of {}"),
        ("who taught {} ?", "who was the teacher of {} ?"),
    ),
    "author": Relation(
        "work",
        "person",
        ("written by {}", "from the pen of {}"),
        ("the author of {}", "the writer of {}"),
        ("who wrote {} ?", "who is the author of {} ?"),
    ),
    "setting": Relation(
        "work",
        "city",
        ("takes place in {}", "set in {}"),
        ("the setting of {}", "the city described in {}"),
        ("where does {} take place ?", "what is the setting of {} ?"),
    ),
    "year": Relation(
        "work",
        "year",
        ("appeared in {}", "published in {}"),
        (),
        ("when did {} appear ?", "in which year was {} published ?"),
    ),
    "country": Relation(
        "city",
        "country",
        ("lies in {}", "part of {}"),
        (),
        ("in which country is {} ?", "what country does {} belong to ?"),
    ),
    "mayor": Relation(
        "city",
        "person",
        ("governed by {}", "led by {}"),
        ("the mayor of {}", "the head of {}"),
        ("who governs {} ?", "who is the mayor of {} ?"),
    ),
}

_COUNTS = {"person": 700, "city": 160, "work": 280}
_ONSETS = "b br c d dr f g gr h j k l m n p r s st t v w z".split()
_VOWELS = "a e i o u ae ia ou".split()
_CODAS = "l n r s th x m nd rk".split()
_QUALITIES = "Silent Broken Golden Distant Hidden Burning Frozen Hollow Crimson Wandering Patient Bitter Last".split()
_QUALITIES += "Second Forgotten Quiet Restless Pale Iron Glass".split()
_THINGS = "Harbor River Garden Mirror Lantern Winter Orchard Bridge Letter Tower Voyage Shadow Kingdom Candle".split()
_THINGS += "Window Forest Island Crown Promise Door".split()
_TRADES = "glazier painter surgeon baker sailor judge potter miner actor farmer tailor singer chemist printer".split()


@dataclass(frozen=True)
class Question:
    """One question, its answer and the facts that lead there."""

    text: str
    answer: str
    path: tuple[tuple[str, str], ...]
    """(entity, relation) of each hop, in the order in which they are looked up."""
    split: str
    template: str
    """Which relations in which phrasings, without the entity: "profession.0 author.1"."""

    @property
    def num_hops(self) -> int:
        return len(self.path)


@dataclass
class World:
    """Entities, their facts and their pages.

    >>> world = build_world(seed=0)
    >>> world.num_facts > 3000
    True
    """

    kinds: dict[str, str] = field(default_factory=dict)
    """Entity -> person, city or work."""
    splits: dict[str, str] = field(default_factory=dict)
    facts: dict[tuple[str, str], str] = field(default_factory=dict)
    """(entity, relation) -> entity or word."""
    phrases: dict[tuple[str, str], str] = field(default_factory=dict)
    """(entity, relation) -> how the entity's page puts it, with {} for what is there."""
    pages: dict[str, str] = field(default_factory=dict)

    @property
    def num_facts(self) -> int:
        return len(self.facts)

    def contents(self, entity: str) -> str:
        """A page as the index holds it: the title stands before it, so that it outranks pages that mention it."""
        return f"{entity} | {self.pages[entity]}"

    def questions(self, split: str, num_hops: int) -> list[Question]:
        """Every path of `num_hops` facts in `split`, once, in phrasings that depend on the path alone; sorted."""
        found = []
        for start in sorted(entity for entity, own in self.splits.items() if own == split):
            for path in self._paths(start, num_hops):
                found.append(self._question(path, split))
        return found

    def _paths(self, start: str, num_hops: int) -> list[tuple[tuple[str, str], ...]]:
        paths: list[tuple[tuple[str, str], ...]] = [()]
        for hop in range(num_hops):
            longer = []
            for path in paths:
                entity = self.facts[path[-1]] if path else start
                for name, relation in RELATIONS.items():
                    is_last = hop + 1 == num_hops
                    if relation.source != self.kinds[entity] or (not is_last and not relation.inner):
                        continue
                    # A path that comes back to where it was would let the last search be skipped.
                    if self.facts[entity, name] in [start, *(self.facts[step] for step in path)]:
                        continue
                    longer.append((*path, (entity, name)))
            paths = longer
        return paths

    def random_question(self, num_hops: int, rng: random.Random) -> Question:
        """A question of any split."""
        while True:
            path: list[tuple[str, str]] = []
            entity = start = rng.choice(list(self.kinds))
            for hop in range(num_hops):
                names = [
                    name
                    for name, relation in RELATIONS.items()
                    if relation.source == self.kinds[entity] and (hop + 1 == num_hops or relation.inner)
                ]
                path.append((entity, rng.choice(names)))
                entity = self.facts[path[-1]]
            if len({start, *(self.facts[step] for step in path)}) == num_hops + 1:
                return self._question(tuple(path), self.splits[start])

    def _question(self, path: tuple[tuple[str, str], ...], split: str) -> Question:
        rng = random.Random(repr(path))
        text, chosen = path[0][0], []
        for _, name in path[:-1]:
            which = rng.randrange(len(RELATIONS[name].inner))
            text = RELATIONS[name].inner[which].format(text)
            chosen.append(f"{name}.{which}")
        name = path[-1][1]
        which = rng.randrange(len(RELATIONS[name].outer))
        text = RELATIONS[name].outer[which].format(text)
        template = " ".join([f"{name}.{which}", *reversed(chosen)])
        return Question(text, self.facts[path[-1]], path, split, template)

    def words(self) -> list[str]:
        """Every word of pages and questions, sorted: the vocabulary of a word-level tokenizer."""
        phrases = [phrase for r in RELATIONS.values() for phrase in (*r.page, *r.inner, *r.outer)]
        text = " ".join([*self.pages.values(), *phrases, *RELATIONS]).replace("{}", " ")
        return sorted(set(text.split()))


def build_world(seed: int = 0, *, parallel: int = 0) -> World:
    """The world of a seed, the same on every machine; with `parallel` > 0 another one with the same entities."""
    rng = random.Random(f"world/{seed}")
    word_source = _invented_words(rng)
    take = lambda count: tuple(itertools.islice(word_source, count))  # noqa: E731
    pools = {
        "person": (take(40), take(40)),
        "city": (("New", "Old", "Port", "Upper", "Lower", "Saint", "Mount", "East", "West", "Fort"), take(30)),
        "work": (_QUALITIES, _THINGS),
    }
    endings = {"trade": _TRADES, "year": tuple(str(y) for y in range(1900, 1912)), "country": take(16)}
    world = World()
    for kind, count in _COUNTS.items():
        names = ["-".join(pair) for pair in itertools.product(*pools[kind])]
        rng.shuffle(names)
        for index, name in enumerate(names[:count]):
            world.kinds[name] = kind
            world.splits[name] = _split_of(index / count)
    rng = random.Random(f"facts/{seed}/{parallel}")
    members = {
        (kind, split): sorted(e for e in world.kinds if world.kinds[e] == kind and world.splits[e] == split)
        for kind in pools
        for split in SPLITS
    }
    for entity, kind in world.kinds.items():
        for name, relation in RELATIONS.items():
            if relation.source == kind:
                choices = endings.get(relation.target) or members[relation.target, world.splits[entity]]
                world.facts[entity, name] = rng.choice([choice for choice in choices if choice != entity])
    for entity, kind in world.kinds.items():
        own = [name for name, relation in RELATIONS.items() if relation.source == kind]
        rng.shuffle(own)
        for name in own:
            world.phrases[entity, name] = rng.choice(RELATIONS[name].page)
        told = [world.phrases[entity, name].format(world.facts[entity, name]) for name in own]
        world.pages[entity] = f"{entity} : {' , '.join(told)} ."
    return world


def _split_of(share: float) -> str:
    total = 0.0
    for split, part in SPLITS.items():
        total += part
        if share < total - 1e-9:
            return split
    return split


def _invented_words(rng: random.Random):
    seen: set[str] = set()
    while True:
        word = (
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        )
        if word not in seen:
            seen.add(word)
            yield word.capitalize()


def write_corpus(world: World, path: Path) -> None:
    """Search-R1's corpus format: JSON lines of `{"id", "contents"}`."""
    _write(path, [json.dumps({"id": entity, "contents": world.contents(entity)}) for entity in world.pages])


def write_questions(questions: list[Question], path: Path) -> None:
    """Rows for `--dataset`: question, answers, num_hops, index."""
    rows = [
        {"question": q.text, "answers": [q.answer], "num_hops": q.num_hops, "split": q.split, "index": i}
        for i, q in enumerate(questions)
    ]
    _write(path, [json.dumps(row) for row in rows])


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")
