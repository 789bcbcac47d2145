"""Tree search over a scripted engine: shapes, exact ids, forks of the state, budgets, timing, failures."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import math
import random
import signal
import threading
import time

import numpy as np
import pytest

from treegrpo import build_tree
from treegrpo.envs.base import Environment, StepResult
from treegrpo.rollout.engine import Completion, EngineError
from treegrpo.rollout.nodes import Node, select_nodes
from treegrpo.rollout.search import RolloutStats, SearchOptions, search, search_async

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


@pytest.mark.parametrize("shape", [(1, 0, 0), (3, 0, 2), (4, 2, 0), (2, 2, 1), (1, 5, 1), (2, 1, 3), (3, 3, 2)])
def test_number_and_order_of_leaves(shape):
    trees, expansions, rounds = shape
    options = dict(num_trees=trees, num_expansions=expansions, num_rounds=rounds)
    for group in run(Engine(), num_rows=3, **options):
        each = rounds * expansions + 1
        assert [t.tree for t in group.trajectories] == [tree for tree in range(trees) for _ in range(each)]
        assert len(group.trajectories) == SearchOptions(**options).num_leaves == group.stats.leaves
        assert len(group.completions) == len(group.environments) == len(group.completion_ids) == trees * each
        assert build_tree(group.trajectories).num_leaves == trees * each


def test_ids_and_logprobs_are_the_engines_and_observations_the_environments():
    engine = Engine()
    for group in run(engine, num_rows=4, num_trees=2, num_expansions=4, num_rounds=2):
        calls = [call for call in engine.calls if call[0] == group.group]
        sampled = {(prompt, tuple(done.token_ids)): done for _, prompt, _, done in calls}
        words, seen = engine.tokenizer.words, set()
        for t, ids, text in zip(group.trajectories, group.completion_ids, group.completions, strict=True):
            whole = t.token_ids.tolist()
            start = len(engine.tokenizer.encode(group.prompt, add_special_tokens=False))
            assert t.steps[0] == start and whole[start:] == ids and t.info["num_turns"] == t.num_steps
            ends = [*t.steps[1:].tolist(), len(whole)]
            mask = np.zeros(len(whole), bool)
            for begin, end in zip(t.steps.tolist(), ends, strict=True):
                num = int(np.argmin(np.append(t.loss_mask[begin:end], False)))
                done = sampled[tuple(whole[:begin]), tuple(whole[begin : begin + num])]
                seen.add(id(done))
                assert t.logprobs[begin : begin + num].tolist() == np.float32(done.logprobs).tolist()
                assert np.isnan(t.logprobs[begin + num : end]).all()
                mask[begin : begin + num] = True
                observed = [words[i] for i in whole[begin + num : end]]
                assert observed == [] if end == len(whole) else observed[0] in ("notes", "error:")
            assert t.loss_mask.tolist() == mask.tolist()
            assert text == " ".join(words[i] for i in ids).removesuffix(EOS)
            json.dumps(t.info)
        assert len(seen) == len(calls) == group.stats.steps
        assert group.stats.generated_tokens == sum(len(done.token_ids) for *_, done in calls)
        assert group.stats.prefilled_tokens == sum(done.num_prefilled for *_, done in calls)


def test_branches_leave_their_tree_at_the_start_of_a_step():
    engine = Engine(three_calls)
    shared = set()
    for group in run(engine, num_rows=6, num_trees=2, num_expansions=3, num_rounds=2):
        # A step sampled once is one run of the trie, so its tokens are what the engine generated plus what it read.
        tree = build_tree(group.trajectories)
        assert group.stats.generated_tokens == 3 * group.stats.steps
        for t in group.trajectories:
            assert t.num_steps == 4 and t.steps.tolist() == [3, 9, 15, 21]
        for number in range(2):
            leaves = [t for t in tree.trajectories if t.tree == number]
            for later, leaf in enumerate(leaves[1:], 1):
                forks = [int(np.argmin(leaf.token_ids == other.token_ids)) for other in leaves[:later]]
                shared.add(max(forks) - 1)
    # Behind the prompt or behind an observation stands the word call or answer, shared by chance; then they differ.
    assert shared == {3, 9, 15, 21}


def test_tokens_cost_what_the_reference_says():
    """Chains of T = 4 steps: an expansion costs (T + 1) / (2 T) of a chain's steps and 1/2 of its tool calls."""
    groups = run(Engine(three_calls), Quiet, num_rows=100, num_trees=2, num_expansions=2)
    stats = sum((group.stats for group in groups), RolloutStats())
    assert stats.steps / stats.groups == pytest.approx(2 * 4 + 4 * 2.5, abs=0.6)
    assert stats.tool_calls / stats.groups == pytest.approx(2 * 3 + 4 * 1.5, abs=0.6)


def chain(nlls, tree=0):
    """Root, one step for each value that is no leaf, and an answer."""
    nodes = [Node([0], [0], [math.nan], Notebook(), tree)]
    for depth, nll in enumerate([*nlls, 9.0], 1):
        end = "done" if depth > len(nlls) else None
        nodes.append(Node([0], [1], [-nll], nodes[-1].environment, tree, nodes[-1], depth, end, nll))
    return nodes


def test_uniform_draws_every_step_that_is_no_leaf_equally_often():
    nodes = chain([1.0, 1.0, 1.0])
    rng = random.Random(0)
    drawn = collections.Counter(node.depth for _ in range(1000) for node in select_nodes(nodes, 4, rng))
    assert set(drawn) == {0, 1, 2, 3} and all(abs(count - 1000) < 120 for count in drawn.values())
    assert [node.num_expansions for node in nodes] == [drawn[depth] for depth in range(5)]
    repeats = [len(set(map(id, select_nodes(nodes, 4, rng)))) for _ in range(50)]
    assert min(repeats) < 4
    without = collections.Counter(node.depth for node in select_nodes(nodes, 300, rng, root_eligible=False))
    assert set(without) == {1, 2, 3}


def test_without_replacement_each_candidate_comes_once_before_any_twice():
    nodes = chain([1.0, 1.0, 1.0])
    orders = set()
    for seed in range(40):
        depths = [node.depth for node in select_nodes(nodes, 10, random.Random(seed), with_replacement=False)]
        assert sorted(depths[:4]) == sorted(depths[4:8]) == [0, 1, 2, 3] and depths[8] != depths[9]
        orders.add(tuple(depths[:4]))
    assert len(orders) > 10


@pytest.mark.parametrize("selection", ["uniform", "entropy"])
def test_the_root_stands_in_where_nothing_else_can_be_drawn(selection):
    options = dict(root_eligible=False, selection=selection)
    assert [n.depth for n in select_nodes(chain([]), 3, random.Random(0), **options)] == [0, 0, 0]
    groups = run(Engine(lambda text, rng: f"answer {rng.randrange(10**6)}"), num_expansions=3, **options)
    assert len(groups[0].trajectories) == 8 and len({tuple(t.token_ids) for t in groups[0].trajectories}) == 8


def test_entropy_continues_the_parent_of_uncertain_steps():
    nodes = chain([0.5, 2.0, 1.0])
    rng = random.Random(0)
    assert [n.depth for n in select_nodes(nodes, 2, rng, selection="entropy")] == [1, 2]
    # The answer is the most uncertain of all, but a leaf; fewer steps than draws start again from the top.
    assert [n.depth for n in select_nodes(chain([0.5, 2.0]), 5, rng, selection="entropy")] == [1, 0, 1, 0, 1]
    assert [n.depth for n in select_nodes(nodes, 3, rng, selection="entropy", root_eligible=False)] == [1, 2, 1]


def test_entropy_takes_a_twentieth_off_for_each_sibling():
    nodes = chain([1.0, 1.08])
    rng = random.Random(0)
    drawn = [select_nodes(nodes, 1, rng, selection="entropy")[0].depth for _ in range(5)]
    # 1.08 - .05 k against 1 - .05 k': the second step twice, then they take turns.
    assert drawn == [1, 1, 0, 1, 0]


def test_entropy_where_only_answers_are_below_draws_uniformly():
    nodes = chain([1.0])
    drawn = select_nodes(nodes, 4, random.Random(0), selection="entropy", root_eligible=False)
    assert [node.depth for node in drawn] == [1, 1, 1, 1]


def test_entropy_in_a_search():
    engine = Engine(three_calls)
    (group,) = run(engine, num_trees=1, num_expansions=1, selection="entropy")
    first, second = group.trajectories
    nll = [-first.logprobs[begin : begin + 3].mean() for begin in first.steps[:3]]
    begin = first.steps[int(np.argmax(nll))]
    assert first.token_ids[:begin].tolist() == second.token_ids[:begin].tolist()
    assert first.token_ids[begin + 1] != second.token_ids[begin + 1]


def test_a_callable_selects():
    seen = []

    def deepest(candidates, rng):
        seen.append([(node.depth, node.num_expansions) for node in candidates])
        rng.random()
        return candidates[-1]

    (group,) = run(Engine(three_calls), Quiet, num_trees=1, num_expansions=2, selection=deepest)
    assert seen == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 0), (1, 0), (2, 0), (3, 1)]]
    assert group.stats.steps == 4 + 2
    with pytest.raises(ValueError, match=r"selection returned None, which is none of the 4 candidates"):
        run(Engine(three_calls), selection=lambda candidates, rng: None)


def test_every_draw_has_random_numbers_of_its_own():
    numbers = []

    def record(candidates, rng):
        numbers.append(rng.random())
        return candidates[0]

    options = dict(num_rows=3, num_trees=3, num_expansions=2, num_rounds=2, selection=record)
    run(Engine(), **options)
    assert len(set(numbers)) == len(numbers) == 3 * 3 * 2 * 2
    first = sorted(numbers)
    numbers.clear()
    run(Engine(jitter=1), **options)
    assert sorted(numbers) == first


@pytest.mark.parametrize("selection", ["uniform", "entropy"])
def test_what_is_sampled_does_not_depend_on_what_finishes_first(selection):
    engines = [Engine(jitter=jitter) for jitter in range(4)]
    options = dict(num_rows=5, num_trees=3, num_expansions=3, num_rounds=2, selection=selection)
    runs = [run(engine, **options) for engine in engines]
    orders = {tuple(call[1:3] for call in engine.calls) for engine in engines}
    assert len(orders) == 4
    for sampled, engine in zip(runs[1:], engines[1:], strict=True):
        assert same_words(runs[0], engines[0], sampled, engine)
    other = Engine()
    assert not same_words(runs[0], engines[0], run(other, seed=100, **options), other)


def test_every_call_has_a_seed_of_its_own():
    engine = Engine(three_calls)
    run(engine, num_rows=4, num_trees=3, num_expansions=3, num_rounds=2)
    seeds = [sampling.seed for _, _, sampling, _ in engine.calls]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert {sampling.stop for _, _, sampling, _ in engine.calls} == {("stop",)}


@pytest.mark.parametrize(
    ("budget", "leaves", "steps"),
    [(1, 1, 4), (12, 1, 4), (13, 2, 8), (24, 2, 8), (25, 3, None), (10_000, 6, None)],
)
def test_token_budget(budget, leaves, steps):
    """Chains of 4 steps of 3 tokens; (M, N, L) = (2, 2, 1)."""
    engine = Engine(three_calls)
    groups = run(engine, Quiet, num_rows=3, token_budget=budget)
    free = Engine(three_calls)
    whole = run(free, Quiet, num_rows=3)
    for group, full in zip(groups, whole, strict=True):
        stats = group.stats
        assert len(group.trajectories) == stats.leaves == leaves and stats.budget_stopped == 6 - leaves
        assert steps is None or stats.steps == steps
        assert stats.generated_tokens == 3 * stats.steps
        assert stats.generated_tokens < budget + 12
        trees = [t.tree for t in group.trajectories]
        assert sorted(set(trees)) == list(range(len(set(trees)))) and trees == sorted(trees)
        words = lambda e, t: [e.tokenizer.words[i] for i in t.token_ids]  # noqa: E731
        everything = [words(free, t) for t in full.trajectories]
        assert all(words(engine, t) in everything for t in group.trajectories)
    if leaves == 6:
        assert same_words(groups, engine, whole, free)


def test_a_budget_runs_one_branch_of_a_prompt_at_a_time_but_all_prompts():
    engine = Engine(three_calls, delay=0.005)
    run(engine, Quiet, num_rows=5, token_budget=1000)
    assert engine.most_of_one == 1 < engine.most


def test_budget_counts_chains_that_were_not_begun():
    (group,) = run(Engine(three_calls), Quiet, num_trees=3, num_expansions=2, num_rounds=2, token_budget=13)
    assert [t.tree for t in group.trajectories] == [0, 1]
    assert group.stats.budget_stopped == 15 - 2


def replayed(group, t, words):
    """The notes and observations of a fresh environment that takes this leaf's actions alone; a step that raises leaves
    no trace."""
    notes, observations = [], []
    ends = [*t.steps[1:].tolist(), t.num_tokens]
    for begin, end in zip(t.steps.tolist(), ends, strict=True):
        text = [words[i] for i in t.token_ids[begin:end]]
        trained = int(t.loss_mask[begin:end].sum())
        action = " ".join(text[:trained]).removesuffix(EOS)
        failed = action.endswith("7") and end != t.num_tokens
        if not failed:
            notes.append(action)
        observations.append("error: OSError: disk full" if failed else f"notes {len(notes)} end")
        if end != t.num_tokens:
            assert " ".join(text[trained:]) == observations[-1]
    return notes


def test_siblings_never_see_each_others_changes():
    engine = Engine()
    errors = forks = 0
    for group in run(engine, num_rows=8, num_trees=2, num_expansions=4, num_rounds=2):
        for t, environment in zip(group.trajectories, group.environments, strict=True):
            assert environment.notes == replayed(group, t, engine.tokenizer.words)
        assert len(set(map(id, group.environments))) == len(group.environments)
        errors += group.stats.tool_errors
        forks += group.stats.steps < sum(t.num_steps for t in group.trajectories)
        assert group.stats.tool_calls >= group.stats.tool_errors and group.stats.tool_timeouts == 0
    assert errors > 10 and forks == 8


def test_a_failing_step_is_observed_counted_and_logged_once(caplog):
    class Broken(Notebook):
        def step(self, action, *, is_last=False):
            self.notes.append("half done")
            raise KeyError("x" * 1000)

        def error_observation(self, message):
            return f"<error> {message} </error>"

    engine = Engine(lambda text, rng: "call it")
    with caplog.at_level(logging.WARNING):
        groups = run(engine, Broken, num_rows=2, num_trees=1, num_expansions=1, max_turns=2)
    assert len(caplog.records) == 2 and all(record.exc_info for record in caplog.records)
    for group in groups:
        assert group.stats.tool_errors == group.stats.tool_calls == group.stats.steps
        assert [environment.notes for environment in group.environments] == [[], []]
        assert all(t.info == {"truncated": False, "num_turns": 3, "end": "max_turns"} for t in group.trajectories)
        assert group.completions[0].count("<error> KeyError:") == 2 and len(group.completions[0]) < 600
        assert group.stats.as_metrics()["tools/failure_frequency"] == 1.0


def test_reported_failures_are_counted():
    class Counting(Notebook):
        def step(self, action, *, is_last=False):
            return StepResult(observation="seen", done="answer" in action, num_tool_calls=2, num_tool_errors=1)

    (group,) = run(Engine(three_calls), Counting, num_trees=1, num_expansions=0)
    metrics = group.stats.as_metrics()
    assert (group.stats.tool_calls, group.stats.tool_errors) == (8, 4)
    assert metrics["tools/call_frequency"] == 8 and metrics["tools/failure_frequency"] == 0.5
    assert metrics["rollout/generated_tokens"] == 12 and metrics["rollout/leaves"] == 1
    assert {f"rollout/{field.name}" for field in dataclasses.fields(RolloutStats)} < set(metrics)


def test_observations_are_encoded_once():
    engine = Engine(three_calls)
    encoded = []

    class Recording(Words):
        def encode(self, text, add_special_tokens=True):
            encoded.append(text)
            return super().encode(text, add_special_tokens=add_special_tokens)

    engine.tokenizer = Recording()
    (group,) = run(engine, Quiet, num_trees=2, num_expansions=5, num_rounds=2)
    assert encoded.count("seen") == group.stats.tool_calls < sum(t.num_steps - 1 for t in group.trajectories)
    assert encoded.count(group.prompt) == 1


def test_stats_add_up():
    stats = [group.stats for group in run(Engine(), num_rows=3)]
    total = sum(stats, RolloutStats())
    assert total.groups == 3 and total.leaves == 18
    assert total.generated_tokens == sum(each.generated_tokens for each in stats) > 0
    assert total.seconds == pytest.approx(sum(each.seconds for each in stats)) and total.seconds > 0


def test_a_slow_tool_holds_up_nobody_else():
    class Slow(Quiet):
        def step(self, action, *, is_last=False):
            if self.is_slow:
                time.sleep(0.25)
            return super().step(action, is_last=is_last)

        def reset(self, row):
            self.is_slow = "0" in row["question"]
            return super().reset(row)

    begun, delivered = time.perf_counter(), {}

    def note(group):
        delivered[group.group] = time.perf_counter() - begun

    groups = run(Engine(three_calls), Slow, num_rows=6, num_expansions=0, on_group=note)
    assert [group.group for group in groups] == [f"g{i}" for i in range(6)]
    slow = delivered.pop("g0")
    assert slow >= 4 * 0.25 and max(delivered.values()) < slow / 2


def test_a_tree_expands_while_another_still_waits_for_its_first_chain():
    first = threading.Event()

    class Waiting(Quiet):
        def step(self, action, *, is_last=False):
            if "slow" in action:
                assert first.wait(5), "tree 1 waited for tree 0"
            return super().step(action, is_last=is_last)

    count = iter(range(100))

    def policy(text, rng):
        # The first call of all is slow; the seventh can only be an expansion of the other tree.
        number = next(count)
        if number == 6:
            first.set()
        return "call slow" if number == 0 else "call it" if "call" not in text else "answer it"

    (group,) = run(Engine(policy), Waiting, num_expansions=5, root_eligible=False)
    assert first.is_set() and group.stats.tool_errors == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_hangs_times_out_and_its_late_changes_are_not_seen(is_async):
    release, late = threading.Event(), []

    class Hanging(Notebook):
        def step(self, action, *, is_last=False):
            if "answer" in action:
                return StepResult(done=True)
            assert threading.current_thread().daemon, "the program could not end"
            release.wait(5)
            self.notes.append("late")
            late.append(self)
            return StepResult(observation="never")

    class AsyncHanging(Notebook):
        async def step(self, action, *, is_last=False):
            if "answer" in action:
                return StepResult(done=True)
            self.notes.append("late")
            await asyncio.sleep(5)

    engine = Engine(lambda text, rng: "answer" if "error:" in text else "call it")
    try:
        begun = time.perf_counter()
        # One tool call at a time: one that hangs must give its place to the next.
        (group,) = run(engine, AsyncHanging if is_async else Hanging, tool_timeout=0.05, max_concurrency=1)
        assert time.perf_counter() - begun < 4.5
    finally:
        release.set()
    while not is_async and len(late) < group.stats.tool_timeouts:
        time.sleep(0.01)
    assert group.stats.tool_timeouts == group.stats.tool_calls >= 2 and group.stats.tool_errors == 0
    assert group.stats.as_metrics()["tools/failure_frequency"] == 1
    assert all("error: no answer within 0.05 seconds" in text for text in group.completions)
    assert all(environment.notes == [] for environment in group.environments)


def test_an_answer_after_the_time_out_is_dropped_quietly(caplog):
    answered = threading.Event()

    class Late(Notebook):
        def step(self, action, *, is_last=False):
            if "answer" in action:
                return StepResult(done=True)
            if "second" in action:
                return StepResult(observation=f"late {answered.wait(5)}")
            time.sleep(0.1)
            answered.set()
            return StepResult(observation="too late")

    def policy(text, rng):
        return "answer" if "late" in text else "call second" if "error:" in text else "call first"

    # Behind the event comes a call of the engine, in which the late answer reaches the event loop.
    options = dict(num_trees=1, num_expansions=0, tool_timeout=0.02, max_turns=50)
    (group,) = run(Engine(policy, delay=0.02), Late, **options)
    assert "too late" not in group.completions[0] and group.stats.tool_timeouts >= 1
    assert {record.name for record in caplog.records} == {"treegrpo.rollout.search"}


def test_asynchronous_steps():
    class Async(Notebook):
        async def step(self, action, *, is_last=False):
            await asyncio.sleep(0)
            return Notebook.step(self, action, is_last=is_last)

    first, second = Engine(), Engine()
    assert same_words(run(first, num_rows=3), first, run(second, Async, num_rows=3), second)


@pytest.mark.parametrize("bound", [1, 3])
def test_requests_and_tool_calls_in_flight_are_bounded(bound):
    lock, running = threading.Lock(), []
    most = 0

    class Counting(Quiet):
        def step(self, action, *, is_last=False):
            nonlocal most
            with lock:
                running.append(self)
                most = max(most, len(running))
            time.sleep(0.005)
            with lock:
                running.pop()
            return super().step(action, is_last=is_last)

    engine = Engine(three_calls, delay=0.001)
    run(engine, Counting, num_rows=3, max_concurrency=bound)
    assert engine.most == bound
    assert most == bound if bound == 1 else 1 < most <= bound


def test_without_a_bound_in_the_way_all_branches_run_at_once():
    class Together(Engine):
        async def generate(self, prompt_ids, sampling, *, session=""):
            self.begun = getattr(self, "begun", 0) + 1
            while self.begun < 12:
                await asyncio.sleep(0.001)
            return await super().generate(prompt_ids, sampling, session=session)

    async def main():
        options = SearchOptions(num_trees=3, num_expansions=0)
        rows = [{"question": "q"}] * 4
        work = search_async(Together(), Notebook, rows, groups=list("abcd"), options=options, seeds=range(4))
        return await asyncio.wait_for(work, 20)

    assert len(asyncio.run(main())) == 4


def test_a_failing_engine_cancels_the_rest_and_keeps_complete_groups():
    class Failing(Engine):
        async def generate(self, prompt_ids, sampling, *, session=""):
            if session == "g1" and len(prompt_ids) > 10:
                while not delivered:
                    await asyncio.sleep(0.001)
                raise EngineError("the server does not answer: start it")
            if session == "g2":
                await asyncio.sleep(60)
            return await super().generate(prompt_ids, sampling, session=session)

    delivered = []
    engine = Failing(three_calls)
    begun = time.perf_counter()
    with pytest.raises(EngineError, match="start it"):
        run(engine, num_rows=3, on_group=delivered.append)
    assert time.perf_counter() - begun < 5 and engine.running == 0
    assert [group.group for group in delivered] == ["g0"] and len(delivered[0].trajectories) == 6
    assert sorted(engine.released) == ["g0", "g1", "g2"]


@pytest.mark.parametrize("budget", [None, 100])
def test_cancelling_leaves_no_task(budget):
    async def main():
        engine = Engine(three_calls, delay=0.2)
        options = SearchOptions(token_budget=budget)
        rows = [{"question": "q"}] * 3
        work = search_async(engine, Notebook, rows, groups=["a", "b", "c"], options=options, seeds=[0, 1, 2])
        task = asyncio.ensure_future(work)
        while len(engine.calls) < 3 or not engine.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert engine.running == 0 and sorted(engine.released) == ["a", "b", "c"]

    asyncio.run(main())


def test_an_interrupt_ends_the_search():
    def interrupt(text, rng):
        signal.raise_signal(signal.SIGINT)
        return "call it"

    engine = Engine(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, num_rows=3)
    assert sorted(engine.released) == ["g0", "g1", "g2"] and engine.running == 0


def test_an_interrupt_while_a_tool_hangs_does_not_wait_for_it():
    release = threading.Event()

    class Hanging(Notebook):
        def step(self, action, *, is_last=False):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            release.wait(20)

    begun = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Engine(three_calls), Hanging, num_trees=1)
        assert time.perf_counter() - begun < 5
    finally:
        release.set()


def test_last_steps():
    last = []

    class Noting(Quiet):
        def step(self, action, *, is_last=False):
            last.append(is_last)
            return super().step(action, is_last=is_last)

    (group,) = run(Engine(three_calls), Noting, num_trees=1, num_expansions=0, max_turns=2)
    assert last == [False, False, True]
    assert group.trajectories[0].info == {"truncated": False, "num_turns": 3, "end": "max_turns"}
    assert group.completions[0].endswith("now"), "nothing follows the last step"
    (group,) = run(Engine(three_calls), Quiet, num_trees=2, num_expansions=2, max_turns=0)
    assert all(t.num_steps == 1 for t in group.trajectories)


def test_a_step_cut_by_max_tokens_ends_its_branch_but_may_hold_the_answer():
    seen = []

    class Noting(Quiet):
        def step(self, action, *, is_last=False):
            seen.append((action, is_last))
            return super().step(action, is_last=is_last)

    (group,) = run(Engine(three_calls), Noting, num_trees=1, num_expansions=2, max_tokens=2)
    assert len(seen) == 3 and all(is_last and action.startswith("call") for action, is_last in seen)
    assert group.stats.truncated_leaves == 3
    assert [t.info for t in group.trajectories] == [{"truncated": True, "num_turns": 1, "end": "max_tokens"}] * 3
    assert all(t.num_tokens == 3 + 2 for t in group.trajectories)


@pytest.mark.parametrize(
    ("length", "tokens", "turns", "end"),
    [
        # Prompt 3, steps of 3 sampled tokens, observations of 1.
        (5, 5, 1, "context"),  # room for 2 tokens of the step
        (6, 6, 1, "context"),  # for the step, not for its observation
        (7, 6, 1, "context"),  # for the observation, but then for no token
        (8, 8, 2, "context"),
        (18, 18, 4, "done"),
    ],
)
def test_a_full_context_ends_the_branch(length, tokens, turns, end):
    engine = Engine(three_calls)
    (group,) = run(engine, Quiet, num_trees=1, num_expansions=1, max_context_length=length)
    for t in group.trajectories:
        assert (t.num_tokens, t.num_steps, t.info["end"]) == (tokens, turns, end)
        assert t.info["truncated"] == (end == "context")
    assert all(len(prompt) + sampling.max_tokens <= length for _, prompt, sampling, _ in engine.calls)
    engine = Engine(three_calls, max_context_length=length)
    assert run(engine, Quiet, num_trees=1)[0].trajectories[0].num_tokens == tokens


def test_chat_prompts():
    class Chat(Notebook):
        def reset(self, row):
            return [{"role": "user", "content": row["question"]}]

        def tools(self):
            return [len]

    engine = Engine()
    (group,) = run(engine, Chat)
    assert engine.tokenizer.chat == dict(tools=[len], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert group.prompt == [{"role": "user", "content": "question 0 ?"}]
    prompt = engine.tokenizer.encode("user : question 0 ?", add_special_tokens=False)
    assert all(t.token_ids[:5].tolist() == prompt and t.steps[0] == 5 for t in group.trajectories)


def test_a_transformers_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", EOS, "user", "question", "?", "call", "answer", "now", "seen", *map(str, range(1000))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=EOS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"

    class Chat(Quiet):
        def reset(self, row):
            return [{"role": "user", "content": row["question"]}]

    engine = Engine(three_calls)
    engine.tokenizer = tokenizer
    (group,) = run(engine, Chat, num_trees=1)
    leaf = group.trajectories[0]
    assert leaf.token_ids[:4].tolist() == tokenizer.encode("user question 0 ?")
    assert leaf.steps.tolist() == [4, 8, 12, 16] and leaf.token_ids[7] == words.index("seen")
    assert leaf.token_ids[-1] == tokenizer.eos_token_id and group.environments[0].notes[-1].startswith("answer ")
    assert not group.environments[0].notes[-1].endswith(EOS)


def test_no_rows():
    assert run(Engine(), num_rows=0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_trees=0), "num_trees=0: give an integer, at least 1"),
        (dict(num_expansions=-1), "num_expansions=-1"),
        (dict(num_rounds=1.5), "num_rounds=1.5"),
        (dict(max_turns=-1), "max_turns=-1"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(max_context_length=1), "max_context_length=1"),
        (dict(token_budget=0), "token_budget=0"),
        (dict(max_concurrency=0), "max_concurrency=0"),
        (dict(tool_timeout=0), "tool_timeout=0"),
        (dict(tool_timeout=math.nan), "tool_timeout=nan"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(selection="best"), "selection='best': use one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_bad_input():
    options = SearchOptions()
    with pytest.raises(ValueError, match="seeds has 1 entries for 2 rows"):
        search(Engine(), Notebook, [{}, {}], groups=["a", "b"], options=options, seeds=[0])
    with pytest.raises(ValueError, match=r"groups\[1\] is 'a'"):
        search(Engine(), Notebook, [{}, {}], groups=["a", "a"], options=options, seeds=[0, 1])
    with pytest.raises(ValueError, match="max_context_length=2000, but the engine takes 1000"):
        run(Engine(), max_context_length=2000)
    with pytest.raises(ValueError, match="group 'g0': its prompt has 3 tokens"):
        run(Engine(max_context_length=3))
    with pytest.raises(ValueError, match="'a': its prompt has 0 tokens"):
        search(Engine(), Notebook, [{"question": ""}], groups=["a"], options=options, seeds=[0])
    with pytest.raises(KeyError):
        search(Engine(), Notebook, [{}], groups=["a"], options=options, seeds=[0])


def test_search_inside_a_loop_says_so():
    async def main():
        run(Engine())

    with pytest.raises(RuntimeError, match="running event loop"):
        asyncio.run(main())


def test_an_environment_that_breaks_its_contract_is_an_error():
    class Silent(Notebook):
        def step(self, action, *, is_last=False):
            return StepResult()

    class Textual(Notebook):
        def step(self, action, *, is_last=False):
            return "text"

    with pytest.raises(ValueError, match=r"Silent\.step returned no observation though it is not done"):
        run(Engine(), Silent)
    with pytest.raises(ValueError, match=r"Textual\.step returned a str: return a StepResult"):
        run(Engine(), Textual)


@pytest.mark.parametrize(
    "answer",
    [
        Completion([], [], "stop", 0),
        Completion([0], [-0.1, -0.2], "stop", 0),
        Completion([0], [math.nan], "stop", 0),
        Completion([0] * 9, [-0.1] * 9, "length", 0),
        Completion([0], [-0.1], "abort", 0),
    ],
)
def test_an_engine_that_breaks_its_contract_is_an_error(answer):
    class Wrong(Engine):
        async def generate(self, prompt_ids, sampling, *, session=""):
            return answer

    with pytest.raises(EngineError, match=r"group 'g0': the engine gave .* and the finish reason"):
        run(Wrong(), max_tokens=8)
