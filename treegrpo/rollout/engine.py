"""What a rollout engine is: token ids in, sampled token ids and their log-probs out. One branch is one awaitable.

    hf.py       a transformers model in this process, branches continue from their parent's KV cache
    vllm.py     vLLM in this process
    server.py   any OpenAI-compatible completions server that speaks token ids (vLLM, SGLang)

Ids and log-probs travel from here to the loss as sampled: nothing is ever decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from treegrpo.tree import Trajectory


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one completion is drawn. ValueError where a value makes no sense."""

    max_tokens: int = 256
    """Sampled tokens at most, at least 1."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Nucleus: the smallest set of likeliest tokens with this mass; 1 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; the tokens that spell one are kept, also what the last of them holds beyond it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end it, beside the tokenizer's end of sequence; kept too."""
    seed: int = 0
    """The same seed, prompt and weights give the same tokens, whatever else is sampled at the same time."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: sample at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give a finite number, at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a number above 0, at most 1")
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r} is one text: give a tuple of texts, or each letter would end it")
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every completion: remove it")


@dataclass(frozen=True, slots=True)
class Completion:
    """What one call sampled. `Completion([5, 6, 2], [-0.1, -2.0, -0.3], "stop", 7)`: three tokens, 2 ended it, and the
    engine computed 7 tokens of the prompt (the others were in its cache)."""

    token_ids: list[int]
    """The sampled ids, what ended them included; never empty."""
    logprobs: list[float]
    """Of each in the distribution it was drawn from, that is after temperature and top_p (natural log)."""
    finish_reason: str
    """"stop" (a stop text, a stop token or the end of sequence) or "length" (max_tokens)."""
    num_prefilled: int
    """Prompt tokens computed for this call rather than read from a cache; all of them where the engine cannot tell."""


class EngineError(RuntimeError):
    """The engine cannot answer: unreachable, too slow, or what it sent is not an answer. Says which and the cure."""

    trajectories: Sequence[Trajectory] = ()
    """Of groups that were complete before it failed."""


def checked_prompt(
    prompt_ids: Sequence[int], max_context_length: int, vocab_size: int | None = None
) -> tuple[list[int], int]:
    """The prompt as a list, and how many tokens may follow it. ValueError as `RolloutEngine.generate` says, and for an
    id outside the vocabulary."""
    # whole contexts come here at every turn, so no Python per token
    try:
        ids = np.fromiter(prompt_ids, np.int64)
    except OverflowError:
        index = next(i for i, token in enumerate(prompt_ids) if not -(2**63) <= token < 2**63)
        raise ValueError(f"prompt_ids[{index}] is {prompt_ids[index]}: give token ids") from None
    if not ids.size:
        raise ValueError("prompt_ids is empty: give at least one token, such as the beginning of sequence")
    room = max_context_length - ids.size
    if room < 1:
        raise ValueError(
            f"prompt_ids has {ids.size} tokens, which leaves no room below max_context_length={max_context_length}:"
            " shorten the prompt, or give the model a longer context"
        )
    if vocab_size is not None and (bad := np.flatnonzero((ids < 0) | (ids >= vocab_size))).size:
        raise ValueError(f"prompt_ids[{bad[0]}] is {ids[bad[0]]}, but the model has ids 0 to {vocab_size - 1}")
    return ids.tolist(), room


class RolloutEngine(Protocol):
    """What search.py needs of an engine. Calls overlap: many branches are awaited at once."""

    tokenizer: Any
    """The transformers tokenizer of the model."""
    max_context_length: int
    """Prompt and completion together."""

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: str = "") -> Completion:
        """One completion of `prompt_ids`. `session` names the group: calls of one session share prefixes.

        Raises:
            ValueError: an empty prompt, one that leaves no room for a token below max_context_length, or an id outside
                the vocabulary.
            EngineError: no answer.
        """

    async def release(self, session: str) -> None:
        """Forgets what is cached for a session that is complete."""

    def sync_weights(self, model: torch.nn.Module) -> None:
        """From now on sample from the weights of `model` (unwrapped); caches of the old ones are dropped. Called
        while nothing is being generated."""

    def close(self) -> None:
        """Frees what the engine holds. May be called twice."""
