"""shared_tokens "mean" and "once" under TRL's own loss.

A token that c completions of a group share is trained c times, with the advantage of each. Under "mean" each copy
weighs w = 1 / c, under "once" the denominators count unique tokens as well. Each loss of TRL is a fixed linear sum R of
per-token terms, and its policy term is positively homogeneous in the advantage, ratios, clipping and sign tests being
none of its concern: so w goes into the advantages, exactly. The divergence and the entropy bonus know no advantage:
what w changes of them is added behind TRL's loss, by the same R.

The reference is `treegrpo.grpo_loss(shared_tokens=...)`. TRL's metrics stay means over the completions' tokens.

Shape legend: B rows, C completion columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How TRL sums per-token terms to a loss, for one micro-batch."""

    loss_type: str
    mask: Tensor
    """[B, C]: trained tokens."""
    accumulation: float
    """Micro-batches of an optimiser step (1 in evaluation)."""
    num_items: Tensor
    """0-d: what dapo, cispo and vespo divide by."""
    max_completion_length: int

    def __call__(self, per_token: Tensor) -> Tensor:
        """The loss of per-token terms [B, C]."""
        x = per_token * self.mask
        if self.loss_type in ("grpo", "sapo"):
            return (x.sum(-1) / self.mask.sum(-1).clamp(min=1.0)).mean() / self.accumulation
        if self.loss_type == "bnpo":
            return x.sum() / self.mask.sum().clamp(min=1.0) / self.accumulation
        if self.loss_type == "dr_grpo":
            return x.sum() / (len(x) * self.max_completion_length) / self.accumulation
        if self.loss_type == "luspo":
            return x.sum(-1).mean() / self.accumulation
        return x.sum() / self.num_items


def token_weights(shares: Tensor, mask: Tensor, shared_tokens: str, loss_type: str) -> Tensor:
    """[B, C] weights that make R the loss of ``shared_tokens``, from shares 1 / c [B, C].

    Under "once" the denominators that R takes from the mask, trained tokens of a row or of the micro-batch, are
    replaced by the shares' sums; the one of dapo, cispo and vespo is given to R instead.
    """
    if shared_tokens == "once" and loss_type in ("grpo", "sapo"):
        return shares * over(mask.sum(-1, keepdim=True), shares.sum(-1, keepdim=True))
    if shared_tokens == "once" and loss_type == "bnpo":
        return shares * over(mask.sum(), shares.sum())
    return shares


def over(tokens: Tensor, shares: Tensor) -> Tensor:
    """tokens / shares, 1 where nothing is trained."""
    return torch.where(shares > 0, tokens / torch.where(shares > 0, shares, 1), 1.0)


def divergence(
    logps: Tensor, ref_logps: Tensor, old_logps: Tensor, mask: Tensor, *, level: str, bias_correction: bool
) -> Tensor:
    """TRL's per-token divergence from the reference, [B, C]: K3, times the importance ratio of ``level``."""
    difference = ref_logps - logps
    kl = torch.exp(difference) - difference - 1
    if bias_correction:
        log_ratio = logps - old_logps
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        kl = kl * torch.exp(log_ratio)
    return kl


def entropy_change(entropies: Tensor, shares: Tensor, mask: Tensor, shared_tokens: str) -> Tensor:
    """By how much the mean entropy of ``shared_tokens`` differs from the mean over trained tokens: 0-d."""
    total = shares.sum() if shared_tokens == "once" else mask.sum()
    plain = (entropies * mask).sum() / mask.sum().clamp(min=1.0)
    return (entropies * shares).sum() / torch.where(total > 0, total, 1) - plain
