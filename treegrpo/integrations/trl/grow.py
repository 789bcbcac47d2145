"""Initialise-then-expand through TRL: its back-ends generate, its loop calls the tools, its environments hold state.

M chains of a prompt run to their end; then, L times, N steps of every tree are drawn and continued to the end
(treegrpo.rollout.nodes). A round is one batch over all prompts, so back-ends see few and large requests, and every
process makes as many of them. A branch begins behind a step with the very ids before it, nothing is encoded again, and
with a copy of the environment as it was there.

    row     0       1        2        3       4        5          of a group with M=2, N=2, L=1
    leaf    tree 0  branch   branch   tree 1  branch   branch

A step is one turn of the model with the tools' answer behind it, or, under ``max_step_tokens``, a part of a turn.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any

from trl.chat_template_utils import parse_response

from treegrpo.rollout.nodes import Node, select_nodes

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True, kw_only=True)
class Grown:
    """The trees of a generation batch, one entry of every list a row."""

    trees: list[int]
    """Number of the row's tree in its group."""
    steps: list[list[int]] | None
    """Where its agent steps begin in the completion; None where that is not known."""
    turns: tuple[list[list[int]], tuple] | None = None
    """What TRL asks for: the ids of `_generate_single_turn`, and what `_tool_call_loop` returns. None where a
    rollout_func has answered already."""
    logprobs: list[list[float]] | None = None
    num_sampled: int = 0
    """Tokens sampled for all rows; a completion's share with its siblings was sampled once."""


def check_grown(trees: Sequence[int], steps: Sequence[Sequence[int]] | None, output: dict[str, Any]) -> Grown:
    """What a rollout_func says of its trees. ValueError where that is not one entry a completion, or makes no sense."""
    number = len(output["completion_ids"])
    for name, value in (("tree", trees), ("steps", steps)):
        if value is not None and len(value) != number:
            raise ValueError(
                f"rollout_func returned {len(value)} entries of {name!r} for {number} completions: return one for each"
            )
    numbers = []
    for row, tree in enumerate(trees):
        try:
            numbers.append(index(tree))
        except TypeError:
            raise ValueError(
                f"rollout_func returned tree[{row}]={tree!r}: give an integer, the number of the completion's tree"
            ) from None
    starts = None if steps is None else [list(own) for own in steps]
    if starts is not None:
        for row, (own, ids) in enumerate(zip(starts, output["completion_ids"], strict=True)):
            for i, (before, start) in enumerate(zip([-1, *own], own, strict=False)):
                if not before < start < len(ids):
                    raise ValueError(
                        f"rollout_func returned steps[{row}][{i}]={start}: give where steps begin in the completion's"
                        f" {len(ids)} tokens, in ascending order"
                    )
    return Grown(trees=numbers, steps=starts)


@dataclass(slots=True)
class _Turn:
    """Where a turn of the model begins."""

    start: int
    """Its first token in the completion."""
    num_messages: int
    """Messages of the completion before it."""
    environment: Any
    """A copy of the environment's state there; None without environments."""


@dataclass(slots=True, eq=False)
class _Leaf:
    """One completion as it grows."""

    row: int
    tree: int
    prompt_ids: list[int]
    environment: Any = None
    begins: int = 0
    """Tokens it has from the leaf it branched off."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where the model sampled the token."""
    logprobs: list[float] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: list[_Turn] = field(default_factory=list)
    calls_tools: bool = False
    """Whether its last turn asks for tools that are still to run."""

    def turn_end(self, turn: _Turn) -> int:
        end = turn.start
        while end < len(self.ids) and self.mask[end]:
            end += 1
        return end

    def starts(self, max_step_tokens: int | None) -> list[int]:
        """Where its steps begin."""
        found: list[int] = []
        for turn in self.turns:
            end = self.turn_end(turn)
            found += range(turn.start, end, max_step_tokens or max(1, end - turn.start))
        return found


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a branch may begin: behind the first ``position`` tokens of a leaf's completion."""

    leaf: _Leaf
    position: int


def grow(
    trainer: GRPOTrainer,
    prompts: list,
    generate: Callable[..., tuple],
    call_tools: Callable[..., tuple],
    finish: Callable[[], None],
) -> Grown:
    """Grows the trees of one generation batch; prompts come ``num_generations`` times each, as TRL repeats them.

    Args:
        prompts: changed where an environment gave rows of one tree different prompts: a branch has its tree's.
        generate, call_tools: TRL's `_generate_single_turn`, with ``limits``, and `_tool_call_loop`.
        finish: waits for processes whose agents have turns left.

    Raises:
        ValueError: images among prompts or answers of tools; an environment that cannot be copied.
    """
    return _Forest(trainer, prompts, generate, call_tools, finish).grow()


class _Forest:
    def __init__(self, trainer: Any, prompts: list, generate: Callable, call_tools: Callable, finish: Callable) -> None:
        self.trainer, self.prompts = trainer, prompts
        self.generate, self.call_tools, self.finish = generate, call_tools, finish
        self.options = trainer.args.search_options()
        self.max_step_tokens = trainer.args.max_step_tokens
        self.num_sampled = self.num_calls = self.num_failures = 0
        self.nodes: dict[int, list[Node]] = {}
        """Of each tree, by the row of its chain."""

    def grow(self) -> Grown:
        options, trainer = self.options, self.trainer
        prompt_ids, images, _ = trainer._tokenize_prompts(self.prompts)
        if images is not None:
            raise ValueError("trees of text only: prompts with images cannot be grown into trees, set num_expansions=0")
        size, branches = options.num_leaves, options.num_rounds * options.num_expansions + 1
        chains = []
        for row in range(0, len(self.prompts), branches):
            environment = trainer.environments[row] if trainer.environments else None
            leaf = _Leaf(row, row % size // branches, list(prompt_ids[row]), environment)
            leaf.turns.append(_Turn(0, 0, self._snapshot(environment)))
            chains.append(leaf)
        self._run(chains)
        for leaf in chains:
            root = Node([], [], [], _Place(leaf, 0), leaf.tree)
            self.nodes[leaf.row] = [root]
            self._add_nodes(leaf.row, leaf, root)
        leaves = list(chains)
        for number in range(options.num_rounds):
            begun = [
                (row, node, self._branch(row + 1 + number * options.num_expansions + pick, node))
                for row in self.nodes
                for pick, node in enumerate(self._picks(row, number))
            ]
            self._run([leaf for _, _, leaf in begun])
            for row, node, leaf in begun:
                self._add_nodes(row, leaf, node)
                leaves.append(leaf)
        return self._result(sorted(leaves, key=lambda leaf: leaf.row))

    def _picks(self, row: int, number: int) -> list[Node]:
        trainer, options = self.trainer, self.options
        # an optimiser step may take several generation batches
        batch = (trainer.state.global_step, trainer._step, trainer.accelerator.process_index)
        place = (trainer.args.seed, *batch, row, number)
        return select_nodes(
            self.nodes[row],
            options.num_expansions,
            random.Random(repr(place)),
            selection=options.selection,
            root_eligible=options.root_eligible,
            with_replacement=options.with_replacement,
        )

    def _branch(self, row: int, node: Node) -> _Leaf:
        """A leaf that begins where the step ``node`` ends."""
        trainer, parent, position = self.trainer, node.environment.leaf, node.environment.position
        turns = [turn for turn in parent.turns if turn.start <= position]
        leaf = _Leaf(row, parent.tree, parent.prompt_ids, begins=position, turns=turns)
        leaf.ids, leaf.mask = parent.ids[:position], parent.mask[:position]
        leaf.logprobs = None if parent.logprobs is None else parent.logprobs[:position]
        leaf.messages = parent.messages[: turns[-1].num_messages]
        self.prompts[row] = self.prompts[parent.row]
        if trainer.environments:
            unused, leaf.environment = trainer.environments[row], self._snapshot(turns[-1].environment)
            trainer.environments[row] = leaf.environment
            for tools in (trainer._sync_tool_dicts[row], trainer._async_tool_dicts[row]):
                for name, function in tools.items():
                    if getattr(function, "__self__", None) is unused:
                        tools[name] = getattr(leaf.environment, name)
        return leaf

    def _snapshot(self, environment: Any) -> Any:
        try:
            return copy.deepcopy(environment)
        except Exception as error:
            raise ValueError(
                f"{type(environment).__name__} cannot be copied ({error}), so its tree cannot branch: give it, or what"
                " it holds, a __deepcopy__ (one that returns itself shares it between branches)"
            ) from error

    def _run(self, leaves: list[_Leaf]) -> None:
        """Continues every leaf to its end."""
        trainer = self.trainer
        ids, logprobs = self.generate(
            [leaf.prompt_ids + leaf.ids for leaf in leaves],
            None,
            {},
            num_generations=1,
            limits=[trainer.max_completion_length - len(leaf.ids) for leaf in leaves],
        )
        for number, (leaf, new) in enumerate(zip(leaves, ids, strict=True)):
            new = list(new[: trainer.max_completion_length - len(leaf.ids)])
            if logprobs is not None:
                leaf.logprobs = [*(leaf.logprobs or []), *logprobs[number][: len(new)]]
            leaf.ids += new
            leaf.mask += [1] * len(new)
            self.num_sampled += len(new)
            if trainer.tools:
                self._read_turn(leaf)
        limit = trainer.max_tool_calling_iterations
        while active := [leaf for leaf in leaves if leaf.calls_tools and len(leaf.turns) <= limit]:
            self._tool_turn(active)
        if trainer.tools:
            self.finish()

    def _read_turn(self, leaf: _Leaf) -> None:
        trainer, start = self.trainer, leaf.turns[-1].start
        tools = trainer.tools
        if trainer.environment_factories is not None:
            tools = trainer._env_tools[trainer._batch_environments[leaf.row]]
        prefix = leaf.prompt_ids + leaf.ids[:start]
        message = parse_response(trainer._tokenizer, leaf.ids[start:], prefix=prefix, tools=tools)
        leaf.messages = [*leaf.messages, message]
        leaf.calls_tools = bool(message.get("tool_calls"))

    def _tool_turn(self, leaves: list[_Leaf]) -> None:
        """Runs the tools that the leaves' last turns ask for, and one more turn of each: one pass of TRL's loop."""
        before = [len(leaf.ids) for leaf in leaves]
        with self._only(leaves):
            masks, completions, ids, logprobs, num_calls, num_failures, images = self.call_tools(
                [list(self.prompts[leaf.row]) for leaf in leaves],
                [leaf.prompt_ids for leaf in leaves],
                [list(leaf.ids) for leaf in leaves],
                [[leaf.messages[-1]] for leaf in leaves],
                None if leaves[0].logprobs is None else [list(leaf.logprobs or []) for leaf in leaves],
                None,
                {},
            )
        if any(images):
            raise ValueError("trees of text only: a tool answered with an image, set num_expansions=0")
        self.num_calls += num_calls
        self.num_failures += num_failures
        for number, leaf in enumerate(leaves):
            leaf.ids = list(ids[number])
            # TRL counts all it was given as the model's
            leaf.mask = leaf.mask + masks[number][before[number] :]
            leaf.logprobs = None if logprobs is None else list(logprobs[number])
            answers = completions[number][1:]
            start = before[number] + masks[number][before[number] :].count(0)
            leaf.calls_tools = bool(answers) and bool(answers[-1].get("tool_calls"))
            if start < len(leaf.ids):
                self.num_sampled += len(leaf.ids) - start
                num_messages = len(leaf.messages) + sum(answer["role"] == "tool" for answer in answers)
                leaf.turns.append(_Turn(start, num_messages, self._snapshot(leaf.environment)))
            leaf.messages = [*leaf.messages, *answers]

    @contextmanager
    def _only(self, leaves: list[_Leaf]) -> Iterator[None]:
        """TRL's lists of a batch's rows hold these rows alone, and its loop ends after one pass."""
        trainer = self.trainer
        names = ["_sync_tool_dicts", "_async_tool_dicts"]
        if trainer.environment_factories is not None:
            names.append("_batch_environments")
        whole = {name: getattr(trainer, name) for name in names}
        limit = trainer.max_tool_calling_iterations
        for name, values in whole.items():
            setattr(trainer, name, [values[leaf.row] for leaf in leaves])
        trainer.max_tool_calling_iterations = 1
        try:
            yield
        finally:
            trainer.max_tool_calling_iterations = limit
            for name, values in whole.items():
                setattr(trainer, name, values)

    def _add_nodes(self, row: int, leaf: _Leaf, parent: Node) -> None:
        """The leaf's own steps as nodes of its tree."""
        starts = [start for start in leaf.starts(self.max_step_tokens) if start >= leaf.begins]
        for start, end in zip(starts, [*starts[1:], len(leaf.ids)], strict=True):
            logprobs = [math.nan] * (end - start) if leaf.logprobs is None else leaf.logprobs[start:end]
            # None where vLLM could not score a token
            known = [lp for lp, own in zip(logprobs, leaf.mask[start:end], strict=True) if own and lp is not None]
            nll = 0.0 if leaf.logprobs is None or not known else -math.fsum(known) / len(known)
            parent = Node(
                leaf.ids[start:end],
                leaf.mask[start:end],
                logprobs,
                _Place(leaf, end),
                leaf.tree,
                parent,
                parent.depth + 1,
                "done" if end == len(leaf.ids) else None,
                nll,
            )
            self.nodes[row].append(parent)

    def _result(self, leaves: list[_Leaf]) -> Grown:
        ids = [leaf.ids for leaf in leaves]
        recorded = [leaf.logprobs for leaf in leaves if leaf.logprobs is not None]
        logprobs = recorded if len(recorded) == len(leaves) else None
        first = ids
        if self.trainer.tools:
            first = [leaf.ids[: leaf.turn_end(leaf.turns[0])] for leaf in leaves]
        loop: tuple = (
            [leaf.mask for leaf in leaves],
            [leaf.messages for leaf in leaves],
            ids,
            logprobs,
            self.num_calls,
            self.num_failures,
            [[] for _ in leaves],
        )
        return Grown(
            trees=[leaf.tree for leaf in leaves],
            steps=[leaf.starts(self.max_step_tokens) for leaf in leaves],
            turns=(first, loop),
            logprobs=logprobs,
            num_sampled=self.num_sampled,
        )
