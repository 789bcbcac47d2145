"""What a completions server answers: read, and checked before anything uses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MAX_POSITIVE_LOGPROB = 1e-3
"""Rounding may leave the log-prob of a certain token this far above 0."""
MIN_LOGPROB = -3e38
"""What float32, in which log-probs are kept, still holds."""
EXCERPT = 200
"""Bytes of an answer that an error shows."""


class BadAnswer(Exception):
    """What is wrong with an answer; becomes an EngineError with an excerpt."""


def check_sampled(ids: Sequence[Any], logprobs: Sequence[Any], reason: Any, max_tokens: int, vocab_size: int) -> None:
    """BadAnswer unless there are 1 to `max_tokens` ids, all below `vocab_size`, as many finite log-probs up to 0, and
    `reason` is one of `Completion.finish_reason`."""
    if not ids:
        raise BadAnswer("no token was sampled")
    if len(ids) != len(logprobs):
        raise BadAnswer(f"{len(ids)} token ids but {len(logprobs)} log-probs")
    if len(ids) > max_tokens:
        raise BadAnswer(f"{len(ids)} tokens where max_tokens is {max_tokens}")
    for index, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadAnswer(f"token {index} is {token!r}, not an id below the vocabulary size {vocab_size}")
        if type(logprob) not in (int, float) or not MIN_LOGPROB <= logprob <= MAX_POSITIVE_LOGPROB:
            raise BadAnswer(f"log-prob {index} is {repr(logprob)[:EXCERPT]}, not a finite number up to 0")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"finish reason {reason!r}, neither 'stop' nor 'length'")


def read_openai(answer: dict[str, Any], prompt: list[int]) -> tuple[list[Any], list[Any], Any, int | None]:
    """Ids, log-probs, finish reason and cached prompt tokens (None: not told) of a vLLM completion of `prompt`.

    BadAnswer where a part is missing or the server completed another prompt; `check_sampled` checks the values.
    """
    choices = field(answer, "choices", list)
    if len(choices) != 1:
        raise BadAnswer(f"{len(choices)} choices where one was asked for")
    choice = as_object(choices[0], "choices[0]")
    logprobs = field(choice, "logprobs", dict)
    ids = choice.get("token_ids")
    if ids is None:
        tokens = field(logprobs, "tokens", list)
        if not all(isinstance(t, str) and t.startswith("token_id:") and t[9:21].isdecimal() for t in tokens):
            raise BadAnswer("no token_ids: the server does not answer with token ids (vLLM does)")
        ids = [int(t[9:21]) for t in tokens]
    if not isinstance(ids, list):
        raise BadAnswer("token_ids is not a list")
    sent = choice.get("prompt_token_ids")
    usage = answer.get("usage") or {}
    _same_prompt(prompt, sent, usage.get("prompt_tokens") if isinstance(usage, dict) else None)
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return ids, field(logprobs, "token_logprobs", list), choice.get("finish_reason"), _count(cached)


def read_sglang(answer: dict[str, Any], prompt: list[int]) -> tuple[list[Any], list[Any], Any, int | None]:
    """As `read_openai`, of what SGLang's /generate answers."""
    info = field(answer, "meta_info", dict)
    entries = field(info, "output_token_logprobs", list)
    if not all(isinstance(e, list) and len(e) >= 2 for e in entries):
        raise BadAnswer("output_token_logprobs is not a list of (log-prob, id, text)")
    ids = [e[1] for e in entries]
    if info.get("completion_tokens") not in (None, len(ids)):
        raise BadAnswer(f"{info['completion_tokens']!r} completion_tokens but {len(ids)} log-probs")
    output_ids = answer.get("output_ids")
    if output_ids is not None and output_ids != ids:
        raise BadAnswer("output_ids and the ids of output_token_logprobs differ")
    _same_prompt(prompt, None, info.get("prompt_tokens"))
    reason = info.get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return ids, [e[0] for e in entries], reason, _count(info.get("cached_tokens"))


def _same_prompt(prompt: list[int], ids: Any, count: Any) -> None:
    if ids is not None and ids != prompt:
        raise BadAnswer("the server changed the prompt's token ids (does it add special tokens?)")
    if count is not None and count != len(prompt):
        raise BadAnswer(f"the server counts {count!r} prompt tokens where {len(prompt)} were sent")


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise BadAnswer(f"cached_tokens is {value!r}, not a count")
    return value


def parse(data: bytes) -> dict[str, Any]:
    try:
        return as_object(json.loads(data), "the answer")
    # a deeply nested text exhausts the stack
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"not JSON ({error})") from None


def as_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadAnswer(f"{what} is not a JSON object")
    return value


def field(value: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(value.get(name), kind):
        raise BadAnswer(f"{name} is missing or no {kind.__name__}")
    return value[name]


def excerpt(data: bytes) -> str:
    text = data[:EXCERPT].decode("utf-8", "replace")
    return repr(text) + (f" (and {len(data) - EXCERPT} bytes)" if len(data) > EXCERPT else "")
