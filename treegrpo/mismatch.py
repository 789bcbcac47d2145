"""How far the policy that sampled is from the trainer's own old policy, and the weight that corrects for it.

Engines compute log-probs in other kernels and precisions, and rollouts sampled one step ahead come from older weights.
With d = old_logp - sampling_logp on trained tokens, TRL 1.16 multiplies the policy loss of each token by

    token_truncate      clamp(exp(d), clip_min, clip_max)
    token_mask          exp(d), 0 outside [clip_min, clip_max]
    sequence_truncate   the same with the sum of d over the leaf instead of d, one weight for the whole leaf
    sequence_mask       likewise (TRL's default, clip_max 3)

Names, defaults and formulas are TRL's (`vllm_importance_sampling_*`); they hold for any engine here.
L leaf-stream length, B leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@torch.no_grad()
def importance_sampling_ratio(
    old_logp: Tensor,
    sampling_logp: Tensor,
    mask: Tensor,
    leaf_offsets: Tensor,
    *,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
    any_known: bool | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """`(weights [L], metrics)`; weights are 1 outside the mask, and where the sampling log-prob is unknown (NaN).

    Args:
        old_logp, sampling_logp, mask: [L]; the trainer's log-probs before the first update, those recorded at
            sampling, nonzero on trained tokens.
        leaf_offsets: int64 [B + 1].
        any_known: whether some trained token's log-prob is known; None asks the tensors, for which a GPU is waited for.

    Metrics, each with the number of tokens or leaves it is of, both 0-d, so that rows can be put together:
    sampling/sampling_logp_difference/{mean,max} and sampling/importance_sampling_ratio/{min,mean,max}, over trained
    tokens with a known log-prob, the ratio of the sequence modes over leaves with such tokens. Empty where there are
    none.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"vllm_importance_sampling_mode is {mode!r}: use one of {', '.join(MODES)}")
    trained = mask != 0
    known = trained & sampling_logp.isfinite()
    ones = torch.ones_like(old_logp)
    if not (bool(known.any()) if any_known is None else any_known):
        return ones, {}
    difference = torch.where(known, old_logp - sampling_logp, 0)
    if mode.startswith("sequence"):
        sums = torch.segment_reduce(difference.double(), "sum", offsets=leaf_offsets, axis=0, unsafe=True, initial=0)
        weights = _clipped(sums.exp().to(old_logp.dtype), mode, clip_min, clip_max)
        ratio = torch.repeat_interleave(weights, leaf_offsets.diff(), output_size=old_logp.numel())
        some = torch.segment_reduce(known.double(), "sum", offsets=leaf_offsets, axis=0, unsafe=True, initial=0)
        counted = some > 0
    else:
        ratio = weights = _clipped(difference.exp(), mode, clip_min, clip_max)
        counted = known
    # sums and bounds, not boolean indexing, whose length only the device knows
    distance, num_known, num_counted = difference.abs(), known.sum(), counted.sum()
    metrics = {
        "sampling/sampling_logp_difference/mean": (distance.sum() / num_known, num_known),
        "sampling/sampling_logp_difference/max": (distance.max(), num_known),
        "sampling/importance_sampling_ratio/min": (torch.where(counted, weights, math.inf).min(), num_counted),
        "sampling/importance_sampling_ratio/mean": (torch.where(counted, weights, 0).sum() / num_counted, num_counted),
        "sampling/importance_sampling_ratio/max": (torch.where(counted, weights, -math.inf).max(), num_counted),
    }
    return torch.where(trained, ratio, ones), metrics


def _clipped(ratio: Tensor, mode: str, clip_min: float | None, clip_max: float | None) -> Tensor:
    if mode.endswith("truncate"):
        return ratio if clip_min is None and clip_max is None else ratio.clamp(min=clip_min, max=clip_max)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        outside |= ratio < clip_min
    if clip_max is not None:
        outside |= ratio > clip_max
    return ratio.masked_fill(outside, 0.0)
