"""Tree search over an engine and an environment: initialise-then-expand, as Tree-GRPO does (arXiv 2509.21240, alg. 1).

M chains of a prompt grow M trees; then, L times, N nodes of every tree are drawn and continued to the end: M (L N + 1)
leaves. N = 0 or L = 0 is the plain chain sampler. What it cost is counted, not assumed (`RolloutStats`).

Everything waits for its own past alone: a branch for its parent, a round for the branches of its own tree. What is
sampled depends on the seed and the place in the tree, never on what happened to finish first.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from treegrpo.envs.base import Environment, StepResult
from treegrpo.rollout.engine import Completion, EngineError, RolloutEngine
from treegrpo.rollout.nodes import Node, RolloutStats, SearchOptions, select_nodes
from treegrpo.rollout.prompts import encode_prompt
from treegrpo.threads import in_thread
from treegrpo.tree import Trajectory

__all__ = ["Node", "RolloutStats", "SampledGroup", "SearchOptions", "search", "search_async", "search_group"]

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_ERROR_LENGTH = 200
"""Characters of an exception's text that the policy gets to read."""


# no repr: asyncio.run writes out what its task returned, only to compare signal handlers, and that would be every token
@dataclass(kw_only=True, eq=False, repr=False)
class SampledGroup:
    """All leaves of one prompt, tree by tree, in each the first chain and then the expansions in order. Entry i of
    every list belongs to leaf i."""

    group: str
    row: dict[str, Any]
    """The dataset row."""
    prompt: str | list[dict[str, Any]]
    """As the environment gave it: text, or chat messages."""
    trajectories: list[Trajectory]
    """Without a reward. `steps` are the starts of the agent steps' sampled tokens; info holds "truncated" (bool),
    "num_turns" (agent steps) and "end" (see Node.end)."""
    completion_ids: list[list[int]]
    """Token ids behind the prompt."""
    completions: list[str]
    """The same as text, special tokens included but for an end of sequence at the very end."""
    own_texts: list[str]
    """Of that what the policy wrote, a line a step: no observation stands in it."""
    environments: list[Environment]
    """The state each leaf ended in."""
    stats: RolloutStats


def search(
    engine: RolloutEngine,
    make_env: Callable[[], Environment],
    rows: Sequence[dict[str, Any]],
    *,
    groups: Sequence[str],
    options: SearchOptions,
    seeds: Sequence[int],
    on_group: Callable[[SampledGroup], None] | None = None,
) -> list[SampledGroup]:
    """Samples the groups of `rows`, all at the same time, in an event loop of its own; results in the order of `rows`.

    Args:
        make_env: makes an environment that was not reset; called once a row, from a thread.
        groups: a name for each row, no two alike.
        seeds: one for each row. The same seed, row, weights and options give the same leaves.
        on_group: given each group as soon as it is complete, so that what is sampled is not lost when another fails.
            Called in the event loop, so nothing else goes on meanwhile; what it raises ends the search.

    Raises:
        ValueError: lengths differ, a group's name comes twice, a prompt is empty or leaves no room, an environment
            breaks its contract.
        EngineError: the engine failed. As with any exception, an interrupt included, every other branch is cancelled
            and every session released before it is raised; a tool's thread that is still running is left alone.
        RuntimeError: called inside a running event loop; await `search_async` there.
    """
    work = search_async(engine, make_env, rows, groups=groups, options=options, seeds=seeds, on_group=on_group)
    try:
        return _run(work)
    finally:
        work.close()


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """asyncio.run, in which an interrupt cancels `work` and lets it end; that of Python 3.10 breaks out of its loop."""
    if sys.version_info >= (3, 11) or threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)

    async def cancelled_by_interrupt() -> Result:
        loop, task, came = asyncio.get_running_loop(), asyncio.ensure_future(work), []

        def on_interrupt(number: int, frame: Any) -> None:
            came.append(number)
            loop.call_soon_threadsafe(task.cancel)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            return await task
        except asyncio.CancelledError:
            if came:
                raise KeyboardInterrupt from None
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    return asyncio.run(cancelled_by_interrupt())


async def search_async(
    engine: RolloutEngine,
    make_env: Callable[[], Environment],
    rows: Sequence[dict[str, Any]],
    *,
    groups: Sequence[str],
    options: SearchOptions,
    seeds: Sequence[int],
    on_group: Callable[[SampledGroup], None] | None = None,
) -> list[SampledGroup]:
    """`search` inside a running event loop."""
    for name, values in (("groups", groups), ("seeds", seeds)):
        if len(values) != len(rows):
            raise ValueError(f"{name} has {len(values)} entries for {len(rows)} rows: give one for each")
    if len(set(groups)) < len(groups):
        index, group = next((i, group) for i, group in enumerate(groups) if group in groups[:i])
        raise ValueError(f"groups[{index}] is {group!r}, as is an earlier one: number them, or rewards would mix")
    limit, tool_limit = (asyncio.Semaphore(options.max_concurrency) for _ in range(2))

    async def one(row: dict[str, Any], group: str, seed: int) -> SampledGroup:
        sampled = await search_group(
            engine, make_env, row, group=group, options=options, seed=seed, limit=limit, tool_limit=tool_limit
        )
        if on_group is not None:
            on_group(sampled)
        return sampled

    return await _together([one(*each) for each in zip(rows, groups, seeds, strict=True)])


async def search_group(
    engine: RolloutEngine,
    make_env: Callable[[], Environment],
    row: dict[str, Any],
    *,
    group: str,
    options: SearchOptions,
    seed: int,
    limit: asyncio.Semaphore | None = None,
    tool_limit: asyncio.Semaphore | None = None,
) -> SampledGroup:
    """One prompt's group. `limit` bounds engine requests and `tool_limit` tool calls over all groups that share them;
    None: max_concurrency for this group alone. The rest as in `search`."""
    limit = limit or asyncio.Semaphore(options.max_concurrency)
    tool_limit = tool_limit or asyncio.Semaphore(options.max_concurrency)
    grower = _Grower(engine, group, options, int(seed), limit, tool_limit)
    begun = time.perf_counter()
    try:
        prompt = await grower.begin(make_env, row)
        leaves = await grower.grow()
    finally:
        await engine.release(group)
    stats = grower.stats
    stats.leaves = len(leaves)
    stats.truncated_leaves = sum(leaf.is_truncated for leaf in leaves)
    stats.seconds = time.perf_counter() - begun
    completion_ids = [leaf.context_ids()[len(grower.prompt_ids) :] for leaf in leaves]
    return SampledGroup(
        group=group,
        row=row,
        prompt=prompt,
        trajectories=[_trajectory(leaf, group) for leaf in leaves],
        completion_ids=completion_ids,
        completions=[_text(engine.tokenizer, ids) for ids in completion_ids],
        own_texts=[_own_text(engine.tokenizer, leaf) for leaf in leaves],
        environments=[leaf.environment for leaf in leaves],
        stats=stats,
    )


class _Grower:
    """Grows the trees of one group."""

    def __init__(
        self,
        engine: RolloutEngine,
        group: str,
        options: SearchOptions,
        seed: int,
        limit: asyncio.Semaphore,
        tool_limit: asyncio.Semaphore,
    ) -> None:
        self.engine, self.group, self.options, self.seed = engine, group, options, seed
        self.limit, self.tool_limit = limit, tool_limit
        self.stats = RolloutStats(groups=1)
        self.has_warned = False
        self.max_length = options.max_context_length or engine.max_context_length
        if self.max_length > engine.max_context_length:
            raise ValueError(
                f"max_context_length={self.max_length}, but the engine takes {engine.max_context_length} tokens: give"
                " at most that, or None"
            )

    async def begin(self, make_env: Callable[[], Environment], row: dict[str, Any]) -> str | list[dict[str, Any]]:
        async with self.tool_limit:
            self.environment, prompt = await in_thread(_reset, make_env, row)
        self.prompt_ids = encode_prompt(self.engine.tokenizer, self.environment, prompt)
        if not 0 < len(self.prompt_ids) < self.max_length:
            raise ValueError(
                f"group {self.group!r}: its prompt has {len(self.prompt_ids)} tokens; give at least one, and fewer than"
                f" the {self.max_length} of max_context_length"
            )
        return prompt

    async def grow(self) -> list[Node]:
        """The leaves, ordered by tree, round and pick."""
        trees = range(self.options.num_trees)
        if self.options.token_budget is None:
            grown = await _together([self._tree(tree) for tree in trees])
        else:
            grown = await self._within_budget(trees)
        return [node for nodes in grown for node in nodes if node.is_leaf]

    async def _tree(self, tree: int) -> list[Node]:
        nodes = await self._first(tree)
        for number in range(1, self.options.num_rounds + 1):
            picks = enumerate(self._picks(nodes, number))
            for branch in await _together([self._branch(node, number, pick) for pick, node in picks]):
                nodes += branch
        return nodes

    async def _within_budget(self, trees: range) -> list[list[Node]]:
        grown: list[list[Node]] = []
        for tree in trees:
            if self._is_spent():
                self.stats.budget_stopped += 1
            else:
                grown.append(await self._first(tree))
        for number in range(1, self.options.num_rounds + 1):
            for nodes in grown:
                # Drawn from the tree as the last round left it, so a budget that is never reached changes nothing.
                for pick, node in enumerate(self._picks(nodes, number)):
                    if self._is_spent():
                        self.stats.budget_stopped += 1
                    else:
                        nodes += await self._branch(node, number, pick)
        missing = len(trees) - len(grown)
        self.stats.budget_stopped += missing * self.options.num_rounds * self.options.num_expansions
        return grown

    def _is_spent(self) -> bool:
        budget = self.options.token_budget
        return budget is not None and self.stats.generated_tokens >= budget

    async def _first(self, tree: int) -> list[Node]:
        ids = self.prompt_ids
        root = Node(ids, [0] * len(ids), [math.nan] * len(ids), self.environment, tree)
        return [root, *await self._branch(root, 0, 0)]

    def _picks(self, nodes: list[Node], number: int) -> list[Node]:
        options = self.options
        return select_nodes(
            nodes,
            options.num_expansions,
            random.Random(_derive(self.seed, nodes[0].tree, number, "select")),
            selection=options.selection,
            root_eligible=options.root_eligible,
            with_replacement=options.with_replacement,
        )

    async def _branch(self, node: Node, number: int, pick: int) -> list[Node]:
        """Continues `node` to the end; the new nodes in order."""
        context = node.context_ids()
        nodes = []
        while not node.is_leaf:
            node = await self._step(node, context, _derive(self.seed, node.tree, number, pick, node.depth + 1))
            context = context + node.token_ids
            nodes.append(node)
        return nodes

    async def _step(self, parent: Node, context: list[int], seed: int) -> Node:
        room = self.max_length - len(context)
        max_tokens, stop = min(self.options.max_tokens, room), parent.environment.stop
        sampling = self.options.sampling(max_tokens=max_tokens, stop=stop, seed=seed)
        async with self.limit:
            completion = await self.engine.generate(context, sampling, session=self.group)
        self._check(completion, sampling.max_tokens)
        self.stats.steps += 1
        self.stats.generated_tokens += len(completion.token_ids)
        self.stats.prefilled_tokens += completion.num_prefilled

        is_cut = completion.finish_reason == "length"
        is_last = is_cut or parent.depth >= self.options.max_turns
        action = _text(self.engine.tokenizer, completion.token_ids)
        environment, result = await self._act(parent.environment, action, is_last)
        observation: list[int] = []
        if is_cut:
            end = "max_tokens" if room > self.options.max_tokens else "context"
        elif result.done:
            end = "done"
        elif is_last:
            end = "max_turns"
        else:
            # half a surrogate pair, which JSON can spell and a tool may hand on, has no UTF-8: no tokenizer takes it
            assert result.observation is not None
            text = result.observation.encode("utf-8", "replace").decode()
            observation = self.engine.tokenizer.encode(text, add_special_tokens=False)
            end = None
            if len(completion.token_ids) + len(observation) >= room:
                observation, end = [], "context"
        return Node(
            token_ids=[*completion.token_ids, *observation],
            loss_mask=[1] * len(completion.token_ids) + [0] * len(observation),
            logprobs=[*completion.logprobs, *[math.nan] * len(observation)],
            environment=environment,
            tree=parent.tree,
            parent=parent,
            depth=parent.depth + 1,
            end=end,
            mean_nll=-math.fsum(completion.logprobs) / len(completion.logprobs),
        )

    def _check(self, completion: Completion, max_tokens: int) -> None:
        ids, logprobs, reason = completion.token_ids, completion.logprobs, completion.finish_reason
        is_complete = 0 < len(ids) == len(logprobs) and all(map(math.isfinite, logprobs))
        if not is_complete or len(ids) > max_tokens or reason not in ("stop", "length"):
            raise EngineError(
                f"group {self.group!r}: the engine gave {len(ids)} token ids, {len(logprobs)} log-probs and the finish"
                f" reason {reason!r}; it must give 1 to {max_tokens}, a finite log-prob each, and 'stop' or 'length'"
            )

    async def _act(self, before: Environment, action: str, is_last: bool) -> tuple[Environment, StepResult]:
        """Steps on a fork of `before`; `(state, result)`."""
        environment = before.fork()
        try:
            async with self.tool_limit:
                result = await asyncio.wait_for(_stepped(environment, action, is_last), self.options.tool_timeout)
        except (TimeoutError, asyncio.TimeoutError) as error:
            self.stats.tool_timeouts += 1
            message = str(error) or f"no answer within {self.options.tool_timeout:g} seconds"
            self._warn(message, error)
        except Exception as error:
            self.stats.tool_errors += 1
            message = f"{type(error).__name__}: {error}"
            self._warn(message, error)
        else:
            self._refuse(environment, result, is_last)
            self.stats.tool_calls += result.num_tool_calls
            self.stats.tool_errors += result.num_tool_errors
            return environment, result
        self.stats.tool_calls += 1
        # Not the fork that failed: it may be half changed, and a thread that timed out still writes into it.
        environment = before.fork()
        return environment, StepResult(observation=environment.error_observation(message[:MAX_ERROR_LENGTH]))

    def _warn(self, message: str, error: Exception) -> None:
        if not self.has_warned:
            logger.warning("group %r: a step of the environment failed: %s", self.group, message, exc_info=error)
            self.has_warned = True

    def _refuse(self, environment: Environment, result: Any, is_last: bool) -> None:
        name = type(environment).__name__
        if not isinstance(result, StepResult):
            raise ValueError(f"{name}.step returned a {type(result).__name__}: return a StepResult")
        if not isinstance(result.observation, (str, type(None))):
            raise ValueError(f"{name}.step returned a {type(result.observation).__name__} as observation: give text")
        if result.observation is None and not (result.done or is_last):
            raise ValueError(f"{name}.step returned no observation though it is not done: give one, or set done")


def _reset(make_env: Callable[[], Environment], row: dict[str, Any]) -> tuple[Environment, Any]:
    environment = make_env()
    return environment, environment.reset(row)


async def _stepped(environment: Environment, action: str, is_last: bool) -> StepResult:
    """The step; an exit or a cancellation that began in it is an error of the step, not the end of the search."""
    try:
        step: Callable[..., Any] = environment.step
        if inspect.iscoroutinefunction(step):
            return await step(action, is_last=is_last)
        return await in_thread(step, action, is_last=is_last)
    except SystemExit as error:
        raise RuntimeError(f"it called exit({error.code!r})") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        # Python 3.10 does not tell whether somebody asked for it
        if sys.version_info < (3, 11) or task is None or task.cancelling():
            raise
        raise RuntimeError("something in it was cancelled") from None


def _text(tokenizer: Any, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removesuffix(tokenizer.eos_token or "")


def _own_text(tokenizer: Any, leaf: Node) -> str:
    # a step's observation stands behind what was sampled
    return "\n".join(_text(tokenizer, node.token_ids[: sum(node.loss_mask)]) for node in leaf.path()[1:])


def _trajectory(leaf: Node, group: str) -> Trajectory:
    path = leaf.path()
    steps, length = [], 0
    for node in path:
        if node.depth:
            steps.append(length)
        length += len(node.token_ids)
    return Trajectory(
        token_ids=leaf.context_ids(),
        loss_mask=[value for node in path for value in node.loss_mask],
        logprobs=[value for node in path for value in node.logprobs],
        group=group,
        tree=leaf.tree,
        steps=steps,
        info={"truncated": leaf.is_truncated, "num_turns": leaf.depth, "end": leaf.end},
    )


def _derive(*key: int | str) -> int:
    """A seed below 2**31, which every engine takes, from the seed of the group and a place in its trees."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big") >> 1


async def _together(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order; where one raises, or the caller is cancelled, none of the others is left running."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
