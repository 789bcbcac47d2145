"""Tree search when a step raises or hangs, the engine fails, the caller cancels or interrupts, and on bad arguments."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import signal
import sys
import threading
import time

import pytest
from scripted import Engine, Notebook, run, three_calls

from treegrpo.envs.base import StepResult
from treegrpo.rollout.engine import Completion, EngineError
from treegrpo.rollout.search import RolloutStats, SearchOptions, search, search_async


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


def test_a_step_that_exits_is_a_failing_step():
    class Interpreter(Notebook):
        def step(self, action, *, is_last=False):
            exec("raise SystemExit(3)")

    (group,) = run(Engine(lambda text, rng: "call it"), Interpreter, num_trees=1, num_expansions=1, max_turns=2)
    assert group.stats.tool_errors == group.stats.steps > 0
    assert "error: RuntimeError: it called exit(3)" in group.completions[0]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(3),
        pytest.param(
            asyncio.CancelledError(),
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not tell who cancelled"),
        ),
    ],
)
def test_a_step_that_is_cancelled_or_exits_within_is_a_failing_step(raised, is_async):
    class Cancelled(Notebook):
        def step(self, action, *, is_last=False):
            raise raised

    class Later(Cancelled):
        async def step(self, action, *, is_last=False):
            raise raised

    engine = Engine(lambda text, rng: "call it")
    (group,) = run(engine, Later if is_async else Cancelled, num_trees=1, num_expansions=1, max_turns=2)
    assert group.stats.tool_errors == group.stats.steps > 0
    assert "error: RuntimeError:" in group.completions[0]


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


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_search():
    def interrupt(text, rng):
        signal.raise_signal(signal.SIGINT)
        return "call it"

    engine = Engine(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, num_rows=3)
    assert sorted(engine.released) == ["g0", "g1", "g2"] and engine.running == 0


@pytest.mark.usefixtures("interruptible")
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

    class Binary(Notebook):
        def step(self, action, *, is_last=False):
            return StepResult(observation=b"bytes")

    class Spelled(Notebook):
        stop = "</a>"

    class Locked(Notebook):
        def reset(self, row):
            self.lock = threading.Lock()
            return super().reset(row)

    with pytest.raises(ValueError, match=r"stop='</a>' is one text: give a tuple of texts"):
        run(Engine(), Spelled)
    with pytest.raises(ValueError, match=r"Locked cannot be copied \(.*lock.*\), .*: give it, or what it holds"):
        run(Engine(), Locked)
    with pytest.raises(ValueError, match=r"Silent\.step returned no observation though it is not done"):
        run(Engine(), Silent)
    with pytest.raises(ValueError, match=r"Textual\.step returned a str: return a StepResult"):
        run(Engine(), Textual)
    with pytest.raises(ValueError, match=r"Binary\.step returned a bytes as observation: give text"):
        run(Engine(), Binary)


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
