"""Log-probabilities from a chunk of logits, and the gradient back to them: two fused passes, on the GPU by Triton.

Shape legend: R rows, V vocabulary, P pairs (a row and one of its labels), ordered by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the passes run on ``device`` for products in ``dtype``, else why not, as a sentence."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the fused head takes bfloat16, float16 and float32, not {dtype}"
    from . import triton

    return triton.reason(device)


def score(
    logits: Tensor,
    offsets: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    picked: Tensor,
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Fill ``lse`` [R], ``entropy`` [R] if given, and the log-probs ``picked`` [P] of ``labels`` [P], all float32.

    logits: [R, V] float32, rows dense. offsets: int32 [R + 1], row r's pairs are offsets[r] .. offsets[r + 1] of
    ``labels`` and ``picked``; the first need not be 0. The softmax is over cap tanh(scale x / cap) / temperature.
    A label outside 0 .. V - 1 scores NaN.
    """
    from .triton.head import score_launch

    if logits.shape[0]:
        score_launch(logits, offsets, labels, lse, entropy, picked, scale, cap, temperature).run()


def slope(
    logits: Tensor,
    offsets: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    dpicked: Tensor,
    dentropy: Tensor | None,
    dz: Tensor,
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Fill ``dz`` [R, V] (bf16, fp16 or fp32) with the gradient of sum(dpicked picked) + sum(dentropy entropy).

    The other arguments are those of :func:`score` and what it filled; ``dpicked`` [P] and ``dentropy`` [R] are float32.
    """
    from .triton.head import slope_launch

    if logits.shape[0]:
        slope_launch(logits, offsets, labels, lse, entropy, dpicked, dentropy, dz, scale, cap, temperature).run()
