"""Prompts as token ids, and those of a run measured before it begins: a long one would end it in its middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from treegrpo.envs.base import Environment
from treegrpo.envs.search import SearchEnv
from treegrpo.envs.tags import TagEnv
from treegrpo.envs.tools import ToolEnv

# What these do to begin an episode nobody notices; a class of the user's may start a browser.
_PLAIN_RESETS = (TagEnv.reset, SearchEnv.reset, ToolEnv.reset)


def encode_prompt(tokenizer: Any, environment: Environment, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of what `environment.reset` returned: text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    from transformers.utils import get_json_schema

    # transformers 4 turns functions into schemas itself, but not methods.
    tools = [get_json_schema(tool) if callable(tool) else tool for tool in environment.tools()] or None
    return list(
        tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def check_prompts(
    datasets: Mapping[str, tuple[Sequence[dict[str, Any]], Sequence[int]]],
    make_env: Callable[[], Environment],
    tokenizer: Any,
    max_length: int,
    show: bool = False,
) -> None:
    """ValueError naming the rows whose prompt is empty or leaves no room below `max_length` tokens. `datasets` has, by
    name, `(rows, which of them)`; `show` draws a bar. An environment with a `reset` of its own is left alone: its
    prompts are measured as they are sampled.
    """
    environment = make_env()
    if type(environment).reset not in _PLAIN_RESETS:
        return
    from rich.progress import track

    for name, (rows, indices) in datasets.items():
        wrong = []
        for index in track(indices, f"prompts of {name}", transient=True, disable=not show):
            length = len(encode_prompt(tokenizer, environment, environment.reset(rows[index])))
            if not 0 < length < max_length:
                wrong.append(f"row {index} has {length:,}")
        if wrong:
            more = f", {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"{name}: a prompt needs 1 to {max_length - 1:,} tokens to leave room below"
                f" max_context_length={max_length}: {', '.join(wrong[:5])}{more}; take them out, or raise"
                " max_context_length if the model allows it"
            )
