"""Tools as Python functions, called in the model's own tool-call format, and TRL's environment classes, unchanged."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from treegrpo.envs.base import Environment, StepResult, deep_copy, markup, without
from treegrpo.envs.calculator import CalculatorEnv, calculate
from treegrpo.envs.retrievers import Retriever, make_retriever
from treegrpo.envs.search import SearchEnv
from treegrpo.plugin import load_attribute
from treegrpo.threads import in_thread

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_MARK = "the-turn-of-the-assistant"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def parse_calls(action: str) -> list[tuple[str, dict[str, Any]] | str]:
    """The `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` blocks of an action, in order:
    `(name, arguments)`, or what is wrong with one. Blocks inside a finished `<think>` are thoughts, not calls.

    >>> parse_calls('<tool_call> {"name": "add", "arguments": {"a": 1}} </tool_call>')
    [('add', {'a': 1})]
    """
    calls: list[tuple[str, dict[str, Any]] | str] = []
    for match in _CALL.finditer(action.rpartition("</think>")[2]):
        if not match[2]:
            calls.append("the call has no </tool_call>")
            continue
        try:
            call = json.loads(match[1], parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            calls.append(f"the call is not JSON ({error})")
            continue
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            calls.append('write {"name": ..., "arguments": {...}} in a call')
        else:
            calls.append((name, arguments))
    return calls


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def check_arguments(arguments: dict[str, Any], parameters: dict[str, Any]) -> str | None:
    """What is wrong with a call's arguments by the JSON schema `parameters`, in words; None where nothing is."""
    properties = parameters.get("properties", {})
    for name in parameters.get("required", []):
        if name not in arguments:
            return f"argument {name} is missing"
    for name, value in arguments.items():
        if name not in properties:
            return f"there is no argument {name}; there is {', '.join(properties) or 'none'}"
        if not _fits(value, properties[name]):
            return f"argument {name} is {json.dumps(value)[:80]}, and must fit {json.dumps(_shape(properties[name]))}"
    return None


def _shape(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    return {key: _shape(value) for key, value in schema.items() if key != "description"}


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        # True is an int to Python, not to JSON
        if isinstance(value, _TYPES.get(kind, object)) and isinstance(value, bool) <= (kind == "boolean"):
            break
    else:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(_fits(entry, schema["items"]) for entry in value)
    if isinstance(value, dict):
        named, other = schema.get("properties", {}), schema.get("additionalProperties")
        if any(key not in value for key in schema.get("required", [])):
            return False
        inner = {key: named.get(key, other) for key in value}
        return all(_fits(value[key], part) for key, part in inner.items() if isinstance(part, dict))
    return True


class ToolEnv(Environment):
    """Python functions with type hints and a Google docstring, called as Hermes and Qwen models do: any number of
    `<tool_call>` blocks in one turn. A turn without one ends the episode.

    A step's observation is what the tokenizer's chat template puts between the end of the assistant's turn (which the
    model has sampled) and its next: the tool turns and the generation prompt. Arguments are checked against the
    function's schema; a call that cannot be read, does not fit or raises gets its error as answer, counted.

    Functions may be `async def`; the others run in a thread, one at a time. Forks share the functions: state that must
    branch belongs into a class for `FactoryEnv`.
    """

    def __init__(
        self,
        tools: Sequence[Callable],
        *,
        tokenizer: Any,
        system_prompt: str | None = None,
        max_observation_chars: int = 8000,
    ) -> None:
        """`max_observation_chars` bounds each call's answer; what is cut is counted in `num_truncated`. ValueError
        naming the function that has no schema, or saying what the chat template lacks."""
        if max_observation_chars < 1:
            raise ValueError(f"max_observation_chars={max_observation_chars}: give at least 1")
        self._functions = {function.__name__: function for function in tools}
        if not self._functions or len(self._functions) < len(tools):
            raise ValueError(f"tools are {[f.__name__ for f in tools]}: give at least one, each name once")
        self._parameters = {name: _schema(function) for name, function in self._functions.items()}
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_observation_chars = max_observation_chars
        self._marks = markup(tokenizer, "</?tool_response>")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Calls that ran, in order."""
        self.num_truncated = 0
        """Answers cut at max_observation_chars."""
        if "probe" not in self._render([("tool", "probe")]):
            raise ValueError("the chat template leaves the answers of tools out: use a tokenizer made for tool calls")

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's `prompt` (messages, or text as the user's message) or `question`, behind the system prompt."""
        self.calls, self.num_truncated = [], 0
        prompt = row.get("prompt")
        if prompt is None:
            prompt = row.get("question")
        if isinstance(prompt, str) and prompt:
            messages = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt:
            messages = list(prompt)
        else:
            raise ValueError(f"prompt is {prompt!r}: give the row a prompt (text or messages) or a question")
        if self.system_prompt is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def tools(self) -> list[Any]:
        return list(self._functions.values())

    async def step(self, action: str, *, is_last: bool = False) -> StepResult:
        calls = [] if is_last else parse_calls(action)
        if not calls:
            return StepResult(done=True)
        answers, num_errors = [], 0
        for call in calls:
            # some templates show the name as it is: only one of ours may stand there
            name = "error" if isinstance(call, str) or call[0] not in self._functions else call[0]
            text, failed = (f"error: {call}", True) if isinstance(call, str) else await self._run(*call)
            answers.append((name, self._clean(text)))
            num_errors += failed
        return StepResult(observation=self._render(answers), num_tool_calls=len(calls), num_tool_errors=num_errors)

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin.calls = list(self.calls)
        return twin

    def error_observation(self, message: str) -> str:
        return self._render([("error", self._clean(f"error: {message}"))])

    async def _run(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        function = self._functions.get(name)
        if function is None:
            return f"error: there is no tool {name}; there is {', '.join(self._functions)}", True
        if wrong := check_arguments(arguments, self._parameters[name]):
            return f"error: {name}: {wrong}", True
        self.calls.append((name, arguments))
        # the copy is the function's to change
        arguments = copy.deepcopy(arguments)
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(**arguments)
            else:
                result = await in_thread(function, **arguments)
        except Exception as error:  # whatever a tool raises is its answer
            logger.debug("tool %s raised", name, exc_info=error)
            return f"error: {str(error) or type(error).__name__}", True
        return str(result), False

    def _clean(self, text: str) -> str:
        # text from outside must not be able to end its turn or open another
        text = without(self._marks, text)
        if len(text) > self.max_observation_chars:
            text = text[: self.max_observation_chars]
            self.num_truncated += 1
        return text

    def _render(self, answers: list[tuple[str, str]]) -> str:
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
        messages += [{"role": "tool", "name": name, "content": text} for name, text in answers]
        try:
            whole = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise ValueError(f"the chat template cannot show tool messages ({error}): use another tokenizer") from error
        tail = whole.partition(_MARK)[2]
        # the model has sampled the end of its turn itself
        end = re.compile(rf"\s*(?:{self._marks.pattern})").match(tail)
        return tail[end.end() :] if end else tail


def _schema(function: Callable) -> dict[str, Any]:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        return get_json_schema(function)["function"]["parameters"]
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(
            f"tool {function.__name__}: {error}; give each argument a type hint and a line under Args: in the docstring"
        ) from error


class FactoryEnv(ToolEnv):
    """A class written for TRL's `GRPOTrainer(environment_factory=...)` (TRL 1.16), unchanged: its public methods are
    the tools, `reset(**row)` begins an episode and may return text for the end of the last message, `get_reward()` may
    score it. Methods may be `async def`.

    `reset` gets the row's columns that it names, or all if it takes `**kwargs`. A fork holds a deep copy of the
    instance: what copies should share needs a `__deepcopy__` that returns itself.
    """

    def __init__(self, factory: Callable[[], Any], *, tokenizer: Any, **options: Any) -> None:
        self.wrapped = factory()
        """The instance of the user's class; what reward functions get as their environment."""
        names = [name for name, _ in inspect.getmembers(type(self.wrapped), inspect.isfunction)]
        if "reset" not in names or inspect.iscoroutinefunction(self.wrapped.reset):
            raise ValueError(f"{type(self.wrapped).__name__} has no plain method reset: give it one, not async")
        self._names = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
        super().__init__([getattr(self.wrapped, name) for name in self._names], tokenizer=tokenizer, **options)

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        parameters = inspect.signature(self.wrapped.reset).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = {parameter.name for parameter in parameters}
        text = self.wrapped.reset(**{key: value for key, value in row.items() if takes_all or key in named})
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{type(self.wrapped).__name__}.reset returned {type(text).__name__}: return text or None")
        if row.get("prompt") is None and row.get("question") is None and text:
            return super().reset({"prompt": text})
        messages = super().reset(row)
        if not text:
            return messages
        last = messages[-1]
        if not isinstance(last.get("content"), str):
            raise ValueError("the last message of prompt has no text for the environment's own to be added to")
        return [*messages[:-1], {**last, "content": last["content"] + text}]

    def fork(self) -> Self:
        twin = super().fork()
        twin.wrapped = deep_copy(self.wrapped)
        twin._functions = {name: getattr(twin.wrapped, name) for name in self._names}
        return twin


def make_env_factory(
    name: str, *, tokenizer: Any = None, retriever: Retriever | str | None = None, options: dict[str, Any] | None = None
) -> Callable[[], Environment]:
    """A function that makes environments, of its name:

    search          `SearchEnv`; `retriever` is one, or what `make_retriever` takes. Chat messages if the tokenizer has
                    a chat template, unless options say otherwise
    calculator      `CalculatorEnv`, likewise; with the option `format="tools"` the function `calculate` in a `ToolEnv`
    module:name     an Environment subclass of the user's (given tokenizer and retriever if it takes them), a class for
                    TRL's environment_factory, a function or list of functions as tools

    `options` go to the constructor. The first environment is made here, so that what is wrong shows at once.
    ValueError for an unknown name, a missing retriever, options that the environment does not take.
    """
    options = dict(options or {})
    if isinstance(retriever, str):
        retriever = make_retriever(retriever)
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name == "search":
        if retriever is None:
            raise ValueError("the search environment needs a retriever: give bm25:PATH or http://host:port/retrieve")
        options = {"chat": has_chat, "tokenizer": tokenizer, **options}
        return _tried(name, SearchEnv, (retriever,), options)
    if name == "calculator":
        kind = options.pop("format", "tags")
        if kind not in ("tags", "tools"):
            raise ValueError(f"format {kind!r} of the calculator: give tags or tools")
        if kind == "tools":
            return _tried(name, ToolEnv, ([calculate],), {"tokenizer": tokenizer, **options})
        return _tried(name, CalculatorEnv, (), {"chat": has_chat, "tokenizer": tokenizer, **options})
    if ":" not in name:
        raise ValueError(f"environment {name!r}: give search, calculator or module:name")
    found = load_attribute(name, "env")
    if isinstance(found, type) and issubclass(found, Environment):
        taken = inspect.signature(found).parameters
        given = {"tokenizer": tokenizer, "retriever": retriever}
        options = {key: value for key, value in given.items() if key in taken and value is not None} | options
        return _tried(name, found, (), options)
    if isinstance(found, type):
        _check_options(name, found, (), options)
        return _tried(name, FactoryEnv, (lambda: found(**options),), {"tokenizer": tokenizer})
    tools = found if isinstance(found, (list, tuple)) else [found]
    if not all(map(callable, tools)):
        raise ValueError(
            f"env={name!r} is of type {type(found).__name__}: give a class, a function or a list of functions"
        )
    return _tried(name, ToolEnv, (tools,), {"tokenizer": tokenizer, **options})


def _tried(
    name: str, kind: Callable[..., Environment], args: tuple, options: dict[str, Any]
) -> Callable[[], Environment]:
    """What makes an environment of these arguments, after it has made one."""
    _check_options(name, kind, args, options)
    kind(*args, **options)
    return lambda: kind(*args, **options)


def _check_options(name: str, kind: Callable[..., Any], args: tuple, options: dict[str, Any]) -> None:
    try:
        inspect.signature(kind).bind(*args, **options)
    except TypeError as error:
        own = [option for option in options if option not in ("chat", "tokenizer", "retriever")]
        cure = f"leave out {', '.join(own)}" if own else "give its arguments defaults"
        raise ValueError(f"env={name!r} cannot be made: {error}; {cure}") from error
