"""What a tree search runs at the same time: slow tools, trees that are ahead of others, bounds, budgets."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from scripted import Engine, Notebook, Quiet, run, three_calls

from treegrpo.rollout.search import SearchOptions, search_async


def test_a_budget_runs_one_branch_of_a_prompt_at_a_time_but_all_prompts():
    engine = Engine(three_calls, delay=0.005)
    run(engine, Quiet, num_rows=5, token_budget=1000)
    assert engine.most_of_one == 1 < engine.most


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
