"""Short depthwise convolutions along the paths of a packed tree, as hybrid models put before their recurrent layers.

Shape legend: T packed tokens, C channels, K taps, M tokens near a seam.

    out[t] = act( bias + sum_j weight[:, K-1-j] x[t's j-th ancestor] ),   zero where the path has no more ancestors

Where the K-1 tokens before t in the row are its ancestors, that is the convolution of the row as it stands. The other
tokens, at most K-1 behind the start of each branch, are computed anew from their ancestors: O(T C) in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import TreePlan
from .reference import compute_dtype

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seams:
    """Tokens whose K-1 ancestors are not the K-1 tokens before them in the row.

    Example: subtree_end = [6 6 5 4 5 6] (leaves 0 1 2 3, 0 1 2 4, 0 1 5) and K = 3 taps: token = [4 5],
    ancestor = [[1 2 4] [0 1 5]]. A path that has no more ancestors continues with index T.
    """

    token: Tensor  # int64 [M]
    ancestor: Tensor  # int64 [M, K]: the oldest first, the token itself last


def tree_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: TreePlan,
    *,
    activation: Activation | None = None,
    row_conv: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Causal depthwise convolution along every path of the packed tree.

    Args:
        x: [T, C], any floating dtype.
        weight: [C, K].
        bias: [C] or None.
        plan: of the row's T tokens, on x's device.
        activation: applied to the result, elementwise.
        row_conv: a faster causal convolution of a whole row, [1, C, T] -> [1, C, T], with the same weight, bias and
            activation; default: torch's.

    Returns:
        [T, C] in x's dtype; differentiable, gradients repeatable.

    Raises:
        ValueError: shapes that do not fit each other or the plan.
    """
    if x.dim() != 2 or x.shape[0] != plan.num_tokens:
        raise ValueError(f"x has shape {tuple(x.shape)}: give [T, C] for the plan's T = {plan.num_tokens} tokens")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give [C, K] for x's C = {x.shape[1]} channels")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: give [C] for x's C = {x.shape[1]} channels")
    if plan.device != x.device:
        raise ValueError(f"plan is on {plan.device}, x on {x.device}: build it with TreePlan.build(..., device=...)")
    if not plan.num_tokens:
        return x * 1
    row = x.T[None]
    if row_conv is None:
        out = F.conv1d(F.pad(row.to(weight.dtype), (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
        out = (out if activation is None else activation(out)).to(x.dtype)
    else:
        out = row_conv(row).to(x.dtype)
    seams = seams_of(plan, weight.shape[1])
    if not seams.token.shape[0]:
        return out[0].T
    # with brackets, not index_select: its gradient adds up what branches share in a fixed order
    rows = x[seams.ancestor.clamp(max=plan.num_tokens - 1)].to(compute_dtype(x.dtype))
    rows = rows.masked_fill((seams.ancestor == plan.num_tokens)[..., None], 0)
    anew = torch.einsum("mkc,ck->mc", rows, weight.to(rows.dtype))
    if bias is not None:
        anew = anew + bias.to(rows.dtype)
    anew = (anew if activation is None else activation(anew)).to(x.dtype)
    return out[0].T.index_copy(0, seams.token, anew)


def seams_of(plan: TreePlan, num_taps: int) -> Seams:
    """The plan's seams for a convolution of ``num_taps`` taps, built once per plan with O(T) integers a tap."""
    return plan.made_once(("seams", num_taps), partial(_build, plan, num_taps))


# kept for calls that save it for their backward, whoever comes first
@torch.inference_mode(False)
@torch.no_grad()
def _build(plan: TreePlan, num_taps: int) -> Seams:
    position, num_tokens = plan.position.long(), plan.num_tokens
    index = torch.arange(num_tokens + 1, device=plan.device)
    none = index[-1:]
    # the parent is the last token before one that lies one level up
    sorted_key, by_key = torch.sort(position * num_tokens + index[:-1])
    before = torch.searchsorted(sorted_key, (position - 1) * num_tokens + index[:-1]) - 1
    parent = torch.cat([torch.where(position > 0, by_key[before.clamp(min=0)], none), none])
    ancestors = [index]
    for _ in range(num_taps - 1):
        ancestors.append(parent[ancestors[-1]])
    ancestor = torch.stack(ancestors[::-1], 1)[:-1]
    # what the row as it stands has there
    in_row = index[:-1, None] - torch.arange(num_taps - 1, -1, -1, device=plan.device)
    token = (ancestor != torch.where(in_row < 0, none, in_row)).any(1).nonzero().squeeze(1)
    return Seams(token, ancestor[token])
