"""Drawing tokens for a whole batch, and finding where a completion ends. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treegrpo.rollout.engine import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """What `sample` needs of the rows of a batch; `top_p` is None where every row keeps all tokens."""

    temperature: Tensor
    """float32 [B]"""
    top_p: Tensor | None
    """float32 [B]"""
    is_greedy: bool
    """No row needs a random number."""
    has_greedy: bool
    """Some row takes the likeliest token."""

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device) -> Draw:
        temperature = torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device)
        top_p = None
        if any(row.top_p < 1 and row.temperature > 0 for row in rows):
            top_p = torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device)
        greedy = [row.temperature == 0 for row in rows]
        return cls(temperature, top_p, all(greedy), any(greedy))


def sample(logits: Tensor, draw: Draw, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the distribution function at `uniform`.

    Args:
        logits: [B, V], any float dtype; computed with in float32.
        draw: temperature and nucleus of each row.
        uniform: float64 [B] in [0, 1); may be None where `draw.is_greedy`.

    Returns:
        Token ids int64 [B], and their log-probs float32 [B] in the distribution after temperature and top_p; at
        temperature 0 the likeliest token and its log-prob in the softmax of the raw logits.
    """
    logits = logits.float()
    if draw.is_greedy:
        ids = logits.argmax(-1)
        return ids, torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]
    assert uniform is not None
    greedy = draw.temperature == 0
    logprobs = torch.log_softmax(logits / draw.temperature.masked_fill(greedy, 1.0)[:, None], -1)
    if draw.top_p is not None:
        logprobs = _nucleus(logprobs, draw.top_p.masked_fill(greedy, 1.0))
    # float64: a float32 sum over a large vocabulary would misplace rare tokens
    mass = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1]
    # strictly below the total, so that a token of no mass at the end is never reached
    target = torch.minimum(uniform * total, total * (1 - 1e-15))
    ids = torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    if draw.has_greedy:
        ids = torch.where(greedy, logits.argmax(-1), ids)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def _nucleus(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """Log-probs over the smallest set of likeliest tokens with mass `top_p` [B], of equal ones the first; else -inf."""
    probabilities = logprobs.exp()
    ordered = _descending(probabilities)
    before = ordered.cumsum(-1) - ordered
    # the likeliest stays, whatever rounding says
    num_kept = (before < top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    last = ordered.gather(-1, num_kept - 1)
    above, equal = probabilities > last, probabilities == last
    kept = above | (equal & (equal.cumsum(-1) <= num_kept - above.sum(-1, keepdim=True)))
    cut = (top_p < 1)[:, None]
    return torch.where(cut, logprobs.masked_fill(~kept, float("-inf")).log_softmax(-1), logprobs)


def _descending(values: Tensor) -> Tensor:
    """Each row of [B, V] sorted; numpy's sort takes a twentieth of the time of torch's on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), -1)).flip(-1)
    return values.sort(-1, descending=True).values


class StopText:
    """Finds stop texts in what was sampled, decoding only after a token that can complete one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: list[bytes] | None = None
        self._watched: dict[tuple[tuple[str, ...], tuple[int, ...]], Collection[int]] = {}

    def watched(self, sampling: SamplingParams, end_ids: frozenset[int]) -> Collection[int]:
        """Every id that may end a completion: `end_ids`, `stop_token_ids`, and tokens that hold a stop's last byte."""
        key = (sampling.stop, sampling.stop_token_ids)
        if key not in self._watched:
            self._watched[key] = self._find(sampling, end_ids)
        return self._watched[key]

    def _find(self, sampling: SamplingParams, end_ids: frozenset[int]) -> Collection[int]:
        if any(text[-1].isspace() for text in sampling.stop):
            # many decoders write spaces between tokens, which no token holds
            return range(2**63)
        if sampling.stop and self._bytes is None:
            # ids may have gaps, so that the last lies beyond the number of tokens
            num_ids = 1 + max(self._tokenizer.get_vocab().values())
            names = self._tokenizer.convert_ids_to_tokens(list(range(num_ids)))
            self._bytes = [token_bytes(name) for name in names]
        last = {text.encode()[-1] for text in sampling.stop}
        holders = {i for i, held in enumerate(self._bytes or ()) if not last.isdisjoint(held)} if last else set()
        return frozenset(holders | end_ids | set(sampling.stop_token_ids))

    def ends(self, token_ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether the sampled tokens, the last one included, spell a stop text that ends in the last one or so."""
        if not stop:
            return False
        # every token spells a byte at least; some more, for decoders treat the first token apart
        window = max(len(text.encode()) for text in stop) + 8
        tail = self._tokenizer.decode(
            list(token_ids[-window:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(text in tail for text in stop)


def token_bytes(name: str | bytes | None) -> bytes:
    """All bytes that a vocabulary entry may stand for, under any of the usual conventions; rather too many.

    `Ġ` of byte-level vocabularies is a space, `<0xE2>` of byte fallback is one byte, anything also stands for itself.
    """
    if name is None:
        return b""
    if isinstance(name, bytes):
        return name
    held = name.encode()
    if all(letter in BYTE_OF for letter in name):
        held += bytes(BYTE_OF[letter] for letter in name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        held += bytes([int(name[3:5], 16)])
    return held


def _byte_of() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019): printable ones for themselves, the
    others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()
