"""The hf engine in an event loop: cancelled callers, failing forwards, torn-down loops, slow tasks, joining a batch."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import tiny_engine
from tiny_engine import PROMPTS, alone, greedy, make_model, together

from treegrpo.rollout.engine import EngineError, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine


def test_a_cancelled_caller_leaves_and_the_others_go_on(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)

    async def run():
        tasks = [asyncio.ensure_future(engine.generate(p, greedy(200), session="s")) for p in PROMPTS]
        while engine.num_generated < 20:
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        if i in (0, 3):
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert result.token_ids == alone(model, prompt, 200, ends=False)
    assert not engine._rows and not engine._in_flight


def test_a_failing_forward_reaches_every_caller_and_the_engine_recovers(make_engine, monkeypatch):
    engine = make_engine(max_batch=2)
    forward, calls = engine._forward, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", failing)

    async def run():
        tasks = [engine.generate(prompt, greedy(60)) for prompt in PROMPTS]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    results = asyncio.run(run())
    assert len(results) == 5
    for result in results:
        assert isinstance(result, EngineError)
        assert isinstance(result.__cause__, RuntimeError)
    assert together(engine, [(PROMPTS[0], greedy())])[0].token_ids == alone(engine._model, PROMPTS[0])


def test_two_event_loops_in_a_row_also_after_one_was_torn_down(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)

    async def leave_behind():
        task = asyncio.ensure_future(engine.generate([9, 8], greedy(200), session="s"))
        while not engine.num_generated:
            await asyncio.sleep(0)
        return task

    asyncio.run(leave_behind())
    for _ in range(2):
        assert together(engine, [(PROMPTS[1], greedy())], "s")[0].token_ids == alone(model, PROMPTS[1], ends=False)
    assert not engine._rows and not engine._in_flight


def test_a_slow_forward_does_not_stall_the_loop_nor_a_slow_task_the_engine(make_engine, monkeypatch):
    engine = make_engine()
    forward, threads = engine._forward, set()

    def slow(*args):
        threads.add(threading.current_thread())
        time.sleep(0.02)
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", slow)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def slow_tool():
        await engine.generate([5], greedy(1))
        await asyncio.sleep(0.5)
        return time.perf_counter()

    async def chain():
        await engine.generate([6], greedy(6))
        await engine.generate([7], greedy(6))
        return time.perf_counter()

    async def run():
        ticker = asyncio.ensure_future(tick())
        late, early = await asyncio.gather(slow_tool(), chain())
        ticker.cancel()
        return late - early

    assert asyncio.run(run()) > 0.05
    assert ticks > 30
    assert threading.main_thread() not in threads and len(threads) == 1


def test_requests_that_follow_each_other_join_the_running_batch(make_engine, monkeypatch):
    engine = make_engine(ends=False)
    forward, sizes = engine._forward, []
    monkeypatch.setattr(engine, "_forward", lambda *args: sizes.append(args[0].shape) or forward(*args))

    async def chain(first):
        for turn in range(3):
            await engine.generate([first, turn], SamplingParams(max_tokens=4, seed=first))

    async def run():
        await asyncio.gather(*(chain(first) for first in range(5, 13)))

    asyncio.run(run())
    # three turns of a prefill and three steps, always all eight rows
    assert [tuple(size) for size in sizes] == [(8, 2), (8, 1), (8, 1), (8, 1)] * 3


def test_closed_engines_refuse(make_engine):
    engine = make_engine()
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        together(engine, [([5], greedy())])


def test_closed_in_the_middle_of_a_completion_the_loop_ends_quietly(make_engine, caplog):
    engine = make_engine(ends=False)

    async def run():
        task = asyncio.ensure_future(engine.generate([5], greedy(200)))
        while engine.num_generated < 5:
            await asyncio.sleep(0)
        task.cancel()
        engine.close()

    asyncio.run(run())
    assert not caplog.records
