"""Agent steps written with tags, `<think> <search> <information> <answer>` as in Search-R1 (arXiv 2503.09516): reading
a step, reading a whole completion, and the environment that answers one tool written as a tag."""

from __future__ import annotations

import copy
import re
import string
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treegrpo.envs.base import Environment, StepResult, markup, without

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Tags:
    """Names of the four tags, without brackets. `Tags(search="calc", information="result")` is a calculator's set."""

    think: str = "think"
    """The model reasons."""
    search: str = "search"
    """The model calls the tool."""
    information: str = "information"
    """The environment answers the call; never the model's own words."""
    answer: str = "answer"
    """The model ends the episode."""

    def __post_init__(self) -> None:
        for field, name in vars(self).items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise ValueError(f"tags.{field}={name!r}: give a word without brackets")
        if len(set(vars(self).values())) < 4:
            raise ValueError(f"tags {list(vars(self).values())} are not four different names")

    @property
    def marks(self) -> re.Pattern[str]:
        """Matches any opening or closing tag; the whole of it is group 1."""
        return re.compile(rf"(</?(?:{'|'.join(map(re.escape, vars(self).values()))})>)")


def first_action(text: str, tags: Tags | None = None) -> tuple[str, str] | None:
    """`("search" | "answer", content)` of the block of one agent step that is closed first, None where there is none.
    What follows it is ignored; content is stripped.

    >>> first_action("<think> a </think> <search> b </search> </answer>")
    ('search', 'b')
    """
    tags = tags or Tags()
    found = _blocks(text, tags)
    return found[0] if found else None


def last_answer(completion: str, tags: Tags | None = None) -> str | None:
    """Content of the last answer block of a completion's `own_text`, stripped; None where there is none. Give the
    completion alone: prompts quote the tag.

    >>> last_answer("<information> <answer> x </answer> </information> <answer> y </answer>")
    'y'
    """
    tags = tags or Tags()
    answers = [content for kind, content in _blocks(own_text(completion, tags), tags) if kind == "answer"]
    return answers[-1] if answers else None


def own_text(completion: str, tags: Tags | None = None) -> str:
    """A completion without its information blocks, and without the `<tool_response>` blocks of chat templates such as
    Qwen's: what an environment wrote is nobody's answer.

    >>> own_text("a <information> b </information> c <tool_response> d </tool_response> e")
    'a   c   e'
    """
    for name in ((tags or Tags()).information, "tool_response"):
        # what is opened behind the last closing tag is no block, and looking for its end takes as long as the text is
        closed, close, rest = completion.rpartition(f"</{name}>")
        completion = re.sub(rf"<{re.escape(name)}>.*?</{re.escape(name)}>", " ", closed + close, flags=re.DOTALL) + rest
    return completion


def _blocks(text: str, tags: Tags) -> list[tuple[str, str]]:
    kinds = {tags.search: "search", tags.answer: "answer"}
    found = []
    opened: dict[str, int] = {}
    for mark in re.finditer(rf"<(/?)({'|'.join(map(re.escape, kinds))})>", text):
        if not mark[1]:
            # a block holds no other opening tag of its own name: `<answer> x <answer> y </answer>` answers y
            opened[mark[2]] = mark.end()
        elif mark[2] in opened:
            # the block closed first, wherever it was opened: that is where generation stopped
            found.append((kinds[mark[2]], text[opened[mark[2]] : mark.start()].strip()))
            opened = {}
    return found


# what a chat template or a tokenizer may leave at the end of a decoded completion: <|...|> </s> <eos> <end_of_turn>,
# backwards, for looking for it from the front takes the square of a long run of white space
_END_OF_TURN = re.compile(r"(?:>\|[^|<>]*\|<|>s/<|>soe<|>nrut_fo_dne<|\s)*")


def format_valid(completion: str, tags: Tags | None = None) -> bool:
    """True where a completion reads think, search, information, think, ..., think, answer, with nothing but white
    space between blocks and no tag inside one. Special tokens at its very end are overlooked; no chat template is
    looked for, so that any model's passes (the official check wants `<|im_start|>assistant`, qa_em_format.py:127).

    >>> format_valid("<think> a </think> <answer> b </answer><|eot_id|>")
    True
    >>> format_valid("<think> a </think> well <answer> b </answer>")
    False
    """
    tags = tags or Tags()
    think, search, information, answer = tags.think, tags.search, tags.information, tags.answer
    follows = {"start": (think,), think: (search, answer), search: (information,), information: (think,), answer: ()}
    state, inside = "start", False
    ending = _END_OF_TURN.match(completion[::-1])
    end = len(completion) - (ending.end() if ending else 0)
    for index, part in enumerate(tags.marks.split(completion[:end])):
        if index % 2 == 0:
            if not inside and part.strip():
                return False
        elif inside:
            if part != f"</{state}>":
                return False
            inside = False
        else:
            if part.startswith("</") or part[1:-1] not in follows[state]:
                return False
            state, inside = part[1:-1], True
    return state == answer and not inside


def check_template(name: str, template: str, fields: Sequence[str], required: Sequence[str] = ()) -> None:
    """ValueError where `template` (of str.format) holds a field that is not in `fields`, or misses a required one."""
    try:
        used = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name}={template!r}: {error}; double the braces that are no field") from error
    for field in used:
        if field not in fields:
            raise ValueError(f"{name} holds {{{field}}}: use {', '.join(fields)}, and double the braces of other text")
    for field in required:
        if field not in used:
            raise ValueError(f"{name}={template!r} has no {{{field}}}: add it")


class TagEnv(Environment):
    """One tool behind one tag: `<search> text </search>` runs it, `<answer> text </answer>` ends the episode, a step
    with neither gets an error observation and goes on. A subclass writes `call`.

    Forks share everything but what `call` recorded: `queries`, `num_truncated` and what the subclass copies.
    """

    def __init__(
        self,
        *,
        tags: Tags,
        tokenizer: Any,
        prompt_template: str,
        chat: bool,
        observation_template: str,
        error_text: str,
        max_observation_chars: int,
    ) -> None:
        check_template("prompt_template", prompt_template, ["question"], ["question"])
        check_template("observation_template", observation_template, ["content", "information"], ["content"])
        if max_observation_chars < 1:
            raise ValueError(f"max_observation_chars={max_observation_chars}: give at least 1")
        self.tags = tags
        self._marks = tags.marks if tokenizer is None else markup(tokenizer, tags.marks.pattern)
        self.stop = (f"</{tags.search}>", f"</{tags.answer}>")
        self.prompt_template = prompt_template
        self.chat = chat
        self.observation_template = observation_template
        self.error_text = error_text
        self.max_observation_chars = max_observation_chars
        self.queries: list[str] = []
        """What the tool was asked, in order."""
        self.answer: str | None = None
        """What the episode was ended with."""
        self.num_truncated = 0
        """Observations cut at max_observation_chars."""

    @abstractmethod
    def call(self, text: str) -> tuple[str, bool]:
        """Runs the tool: `(its answer, whether it failed)`."""

    def reset(self, row: dict[str, Any]) -> str | list[dict[str, Any]]:
        """A ready `prompt` (text or messages) of the row is used as it is, otherwise `question` is put into
        prompt_template. ValueError naming the field where there is neither."""
        self.queries, self.answer, self.num_truncated = [], None, 0
        prompt = row.get("prompt")
        if prompt is not None:
            if not isinstance(prompt, (str, list)) or not prompt:
                raise ValueError(f"prompt is {prompt!r}: give text or a list of messages")
            return prompt
        question = row.get("question")
        if not isinstance(question, str) or not question:
            raise ValueError(f"question is {question!r}: give the row a question or a prompt")
        text = self.prompt_template.format(question=question)
        return [{"role": "user", "content": text}] if self.chat else text

    def step(self, action: str, *, is_last: bool = False) -> StepResult:
        """See Environment.step. Blocks for as long as the tool does."""
        block = first_action(action, self.tags)
        if block is not None and block[0] == "answer":
            self.answer = block[1]
            return StepResult(done=True)
        if is_last:
            return StepResult(done=True)
        if block is None:
            return StepResult(observation=self._observe(self.error_text), num_tool_calls=1, num_tool_errors=1)
        self.queries.append(block[1])
        content, failed = self.call(block[1])
        content = self._clean(content)
        if len(content) > self.max_observation_chars:
            content = content[: self.max_observation_chars]
            self.num_truncated += 1
        return StepResult(observation=self._observe(content), num_tool_calls=1, num_tool_errors=int(failed))

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin.queries = list(self.queries)
        return twin

    def error_observation(self, message: str) -> str:
        return self._observe(self._clean(f"error: {message}"))

    def _clean(self, content: str) -> str:
        # text from outside must not be able to answer for the model, to leave its block or to end its turn
        return without(self._marks, content)

    def _observe(self, content: str) -> str:
        return self.observation_template.format(content=content, information=self.tags.information)
