"""A scripted engine, its tokenizer of words, environments that take notes, and a short way to search with them; shared
by the tests of the tree search."""

from __future__ import annotations

import asyncio
import collections
import random

from treegrpo.envs.base import Environment, StepResult
from treegrpo.rollout.engine import Completion
from treegrpo.rollout.search import SearchOptions, search

EOS = "<eos>"


class Words:
    """A tokenizer that numbers words as they come."""

    eos_token = EOS

    def __init__(self):
        self.words, self.ids = [], {}

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        for word in text.split():
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return [self.ids[word] for word in text.split()]

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        assert not skip_special_tokens and clean_up_tokenization_spaces is False
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages, **options):
        self.chat = options
        return self.encode(" ".join(f"{m['role']} : {m['content']}" for m in messages), add_special_tokens=False)


def sometimes(text, rng):
    """A tool call or, more likely as the text grows, an answer."""
    if rng.random() < 0.3:
        return f"answer {rng.randrange(100)} {EOS}"
    return f"think {rng.randrange(100)} call {rng.randrange(100)}"


def three_calls(text, rng):
    """Three calls, then the answer: 4 steps of 3 tokens."""
    return f"answer {rng.randrange(1000)} {EOS}" if text.count("call") == 3 else f"call {rng.randrange(1000)} now"


class Engine:
    """Completions depend on the prompt and the seed; how long one takes depends on neither."""

    def __init__(self, policy=sometimes, *, jitter=0, delay=0.0, max_context_length=1000):
        self.tokenizer, self.policy, self.max_context_length = Words(), policy, max_context_length
        self.jitter, self.delay = random.Random(jitter), delay
        self.calls, self.released, self.running, self.most = [], [], 0, 0
        self.sessions, self.most_of_one = collections.Counter(), 0

    async def generate(self, prompt_ids, sampling, *, session=""):
        prompt_ids = tuple(prompt_ids)
        self.running += 1
        self.most = max(self.most, self.running)
        self.sessions[session] += 1
        self.most_of_one = max(self.most_of_one, self.sessions[session])
        try:
            for _ in range(self.jitter.randrange(5)):
                await asyncio.sleep(0)
            await asyncio.sleep(self.delay)
            text = self.tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
            rng = random.Random(f"{text}{sampling.seed}")
            ids = self.tokenizer.encode(self.policy(text, rng), add_special_tokens=False)
        finally:
            self.running -= 1
            self.sessions[session] -= 1
        is_cut = len(ids) > sampling.max_tokens
        ids = ids[: sampling.max_tokens]
        logprobs = [-3 * rng.random() for _ in ids]
        completion = Completion(ids, logprobs, "length" if is_cut else "stop", len(prompt_ids))
        self.calls.append((session, prompt_ids, sampling, completion))
        return completion

    async def release(self, session):
        self.released.append(session)


class Notebook(Environment):
    """Notes every call; the observation tells how many notes there are, and each call whose number ends in 7 raises
    after it has written."""

    stop = ("stop",)

    def __init__(self):
        self.notes = []

    def reset(self, row):
        self.notes = []
        return row["question"]

    def step(self, action, *, is_last=False):
        if "answer" in action or is_last:
            self.notes.append(action)
            return StepResult(done="answer" in action)
        self.notes.append(action)
        if action.endswith("7"):
            raise OSError("disk full")
        return StepResult(observation=f"notes {len(self.notes)} end", num_tool_calls=1)


class Quiet(Notebook):
    def step(self, action, *, is_last=False):
        self.notes.append(action)
        return StepResult(observation="seen", done="answer" in action, num_tool_calls=int("call" in action))


def run(engine, make_env=Notebook, num_rows=1, *, seed=0, on_group=None, **options):
    rows = [{"question": f"question {i} ?"} for i in range(num_rows)]
    groups = [f"g{i}" for i in range(num_rows)]
    seeds = range(seed, seed + num_rows)
    return search(
        engine, make_env, rows, groups=groups, options=SearchOptions(**options), seeds=seeds, on_group=on_group
    )


def as_tuples(groups):
    return [
        (t.group, t.tree, t.token_ids.tolist(), t.logprobs.tolist(), t.steps.tolist(), t.info, text)
        for group in groups
        for t, text in zip(group.trajectories, group.completions, strict=True)
    ]


def same(left, right):
    return repr(as_tuples(left)) == repr(as_tuples(right))


def same_words(left, left_engine, right, right_engine):
    """Ids are numbered as words come, so runs whose order differs are compared by text."""

    def texts(groups, engine):
        words = engine.tokenizer.words
        return [(row[0], row[1], [words[i] for i in row[2]], repr(row[3:])) for row in as_tuples(groups)]

    return texts(left, left_engine) == texts(right, right_engine)
