"""What an environment is: it writes the prompt, answers each agent step, and can be forked where a tree branches."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came back for one agent step. `StepResult(observation="<information> ... </information>", num_tool_calls=1)`
    goes on; `StepResult(done=True)` ends the branch."""

    observation: str | None = None
    """Text put behind the step, markup included, not trained. May be None only where done."""
    done: bool = False
    """The step was the last: an answer, or nothing can follow."""
    num_tool_calls: int = 0
    """Tools asked for in this step."""
    num_tool_errors: int = 0
    """Of these, the ones that failed; an unreadable call counts as one of each."""


class Environment(ABC):
    """One episode. A search calls `reset` once, then `fork` for every branch and `step` on the fork, so siblings never
    see each other's changes; a fork is kept for as long as its node may be expanded.

    What forks may share (an index, a tokenizer, a connection) should be kept out of `fork`'s copy: give that object a
    `__deepcopy__` that returns itself, or override `fork`.
    """

    stop: tuple[str, ...] = ()
    """Texts that end one agent step."""

    @abstractmethod
    def reset(self, row: dict[str, Any]) -> str | list[dict[str, Any]]:
        """Begins the episode of a dataset row; returns the prompt as text, or as chat messages."""

    @abstractmethod
    def step(self, action: str, *, is_last: bool = False) -> StepResult | Awaitable[StepResult]:
        """Runs one agent step: `action` is its decoded text, stop text included. May also be `async def`.

        With `is_last` no tool may run and nothing may follow: the step counts as an answer or as none.
        """

    def fork(self) -> Self:
        """An independent copy of the state."""
        return deep_copy(self)

    def error_observation(self, message: str) -> str:
        """What follows a step that raised or timed out; called on a fork of the state before that step."""
        return f"error: {message}"

    def tools(self) -> list[Any]:
        """Functions the chat template should describe to the model; none by default."""
        return []


def markup(tokenizer: Any, *more: str) -> re.Pattern[str]:
    """Matches what only the model and the chat template may write: special tokens, added ones that look like markup,
    and the patterns `more`. Words added to a vocabulary are none."""
    added = tokenizer.added_tokens_decoder.values()
    names = {*tokenizer.all_special_tokens, *(str(token) for token in added if re.search(r"[<[|]", str(token)))}
    return re.compile("|".join([*more, *map(re.escape, sorted(names, key=len, reverse=True))]))


def without(marks: re.Pattern[str], text: str) -> str:
    """`text` with no match of `marks` left; one that removing others brings together becomes a space.

    >>> without(re.compile("<eos>"), "a<eos> <e<eos>os>b")
    'a  b'
    """
    text = marks.sub("", text)
    # with nothing in their place each nesting would take a pass of its own
    while marks.search(text):
        text = marks.sub(" ", text)
    return text


def deep_copy(thing: Any) -> Any:
    """`copy.deepcopy`. ValueError, with the cure, where something in it cannot be copied."""
    try:
        return copy.deepcopy(thing)
    except TypeError as error:
        raise ValueError(
            f"{type(thing).__name__} cannot be copied ({error}), so its tree cannot branch: give it, or "
            "what it holds, a __deepcopy__"
        ) from error
