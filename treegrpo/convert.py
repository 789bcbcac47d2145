"""Chat-format trajectories to token trajectories, with any chat template.

The tau-bench trajectories this was written against are public: sierra-research/tau-bench,
historical_trajectories/gpt-4o-airline.json.

Turns are differences of the template's output on longer and longer prefixes of the conversation, tokenised one by one,
so conversations that begin with equal messages begin with equal tokens: the tree is found in the ids. What a model
served with this template would have been given (other roles, the generation prompt) gets loss mask 0; what it would
have sampled (content, tool calls and the special token that ends the turn) gets 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from treegrpo.files import check_utf8, read_lines
from treegrpo.tree import Trajectory

_MESSAGE_FIELDS = ("messages", "traj", "conversation")
_GROUP_FIELDS = ("group", "task_id", "prompt_id")


def convert_records(records: list[dict[str, Any]], tokenizer, *, parse_arguments: bool = False) -> list[Trajectory]:
    """One token trajectory per record, in order.

    Args:
        records: dicts with `messages` (tau-bench: `traj`) in the OpenAI format, `group` (tau-bench: `task_id`) and
            optionally `reward`, `trial`, `tree`, `tools`.
        tokenizer: a transformers tokenizer with a chat template.
        parse_arguments: give the template a tool call's `arguments` as an object, not as the OpenAI format's JSON
            string.

    Raises:
        ValueError: naming the record, the field or message, and the cure.
    """
    return [_convert_record(index, record, tokenizer, parse_arguments) for index, record in enumerate(records)]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a `.json` list or of JSON lines, either one gzipped (`.gz`). ValueError names the bad line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    lines = list(read_lines(path))
    if lines and lines[0][1].lstrip().startswith(b"["):
        try:
            records = json.loads(b"".join(line for _, line in lines))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a valid JSON list ({error}); is the file complete?") from error
    else:
        records = []
        for number, line in lines:
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); mend or remove the line") from error
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {index}: a trajectory is a JSON object, not {type(record).__name__}")
    return records


def tokenize_conversation(
    messages: list[dict[str, Any]], tokenizer, *, tools: list | None = None
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of one conversation, tokenised turn by turn: two lists of one length.

    An assistant message that opens the conversation was written, not sampled: it is context, mask 0.

    Raises:
        ValueError: the template refuses the conversation, or is not prefix-stable (it rewrites earlier turns when later
            ones are added), so that what the model was given at a turn is not a prefix of the whole.
    """
    ends = _turn_ends(messages, tokenizer, tools)
    token_ids: list[int] = []
    loss_mask: list[int] = []
    text, count = "", 0
    for end, rendered in ends:
        is_sampled = messages[end - 1].get("role") == "assistant" and end > 1
        header = _render(messages[:count], tokenizer, tools, prompt=True) if is_sampled else rendered
        if not (header.startswith(text) and rendered.startswith(header)):
            raise ValueError(
                f"messages[{end - 1}] does not begin with the template's generation prompt, so a served model was given"
                " other text; use the template the model is served with"
            )
        for piece, sampled in ((header[len(text) :], False), (rendered[len(header) :], True)):
            ids = tokenizer.encode(piece, add_special_tokens=False) if piece else []
            token_ids += ids
            loss_mask += _sampled_mask(ids, tokenizer) if sampled else [0] * len(ids)
        text, count = rendered, end
    return token_ids, loss_mask


def _turn_ends(messages: list[dict], tokenizer, tools: list | None) -> list[tuple[int, str]]:
    """`(end, text of messages[:end])` for every turn, ascending; the text of each turn extends the text of the one
    before.

    Some templates close a run of tool messages only after its last one, or cannot render a lone system message:
    neighbours that no assistant wrote may form one turn.
    """
    ends = [(len(messages), _render(messages, tokenizer, tools))]
    for end in range(len(messages) - 1, 0, -1):
        may_merge = "assistant" not in (messages[end - 1].get("role"), messages[end].get("role"))
        try:
            text = _render(messages[:end], tokenizer, tools)
        except ValueError:
            if may_merge:
                continue
            raise
        if ends[-1][1].startswith(text):
            ends.append((end, text))
        elif not may_merge:
            raise ValueError(
                f"the chat template is not prefix-stable: adding messages[{end}] changes the text of messages[:{end}]"
                " (templates that drop earlier reasoning do this); give --chat-template one that only appends, or"
                " split the record at that message"
            )
    return ends[::-1]


def _render(messages: list[dict], tokenizer, tools: list | None, prompt: bool = False) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template cannot render messages[:{len(messages)}]: {error}") from error


def _sampled_mask(ids: list[int], tokenizer) -> list[int]:
    """1 up to the special token that ends the turn; white space the template adds after it was not sampled."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    end = max((i + 1 for i, token in enumerate(ids) if token in special), default=len(ids))
    if tokenizer.decode(ids[end:]).strip():
        end = len(ids)
    return [1] * end + [0] * (len(ids) - end)


def _convert_record(index: int, record: dict[str, Any], tokenizer, parse_arguments: bool) -> Trajectory:
    messages = _field(record, _MESSAGE_FIELDS, index)
    group = str(_field(record, _GROUP_FIELDS, index))
    where = f"record {index} (group {group})"
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f"{where}: messages must be a non-empty list of objects with a role")
    try:
        messages = [_clean_message(i, message, parse_arguments) for i, message in enumerate(messages)]
        token_ids, loss_mask = tokenize_conversation(messages, tokenizer, tools=record.get("tools"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    reward = record.get("reward")
    return Trajectory(
        token_ids,
        loss_mask,
        reward=None if reward is None else _number(f"{where}: reward", reward, float),
        group=group,
        # Trials are sampled independently: each is its own tree of the group.
        tree=_number(f"{where}: tree or trial", record.get("tree", record.get("trial", 0)), int),
        steps=[i for i in range(1, len(loss_mask)) if loss_mask[i] and not loss_mask[i - 1]] or None,
        info={"trial": record["trial"]} if "trial" in record else None,
    )


def _number(where: str, value: Any, kind: type) -> Any:
    try:
        number = float(value)
        if math.isfinite(number) and kind(number) == number:
            return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where} is {value!r}: give a {'whole' if kind is int else 'finite'} number, or leave it out")


def _field(record: dict[str, Any], names: tuple[str, ...], index: int) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(
        f"record {index} has none of the fields {', '.join(names)}; it has {', '.join(record) or 'nothing'}"
    )


def _clean_message(index: int, message: dict[str, Any], parse_arguments: bool) -> dict[str, Any]:
    """The fields templates know, without nulls: `content: null` is what the OpenAI format has beside a tool call."""
    clean = {key: value for key, value in message.items() if value is not None}
    clean.setdefault("content", "")
    if parse_arguments and clean.get("tool_calls"):
        calls = clean["tool_calls"]
        if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
            raise ValueError(
                f"messages[{index}]: tool_calls is {str(calls)[:80]!r}: give a list of objects, each with a function"
                " object of name and arguments"
            )
        try:
            clean["tool_calls"] = [_parse_call(call) for call in calls]
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"messages[{index}]: a tool call's arguments are not JSON ({error}); leave out --parse-arguments"
            ) from error
    check_utf8(json.dumps(clean, ensure_ascii=False, default=str), f"messages[{index}]")
    return clean


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function", call), dict)


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function} if "function" in call else function
