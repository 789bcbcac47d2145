"""The GRPO family on per-leaf token streams. Knows no tree: every stream has been expanded per leaf (`batch.expand`).

Shapes: L leaf-stream length (sum of leaf lengths), B leaves. Leaf i owns entries leaf_offsets[i]:leaf_offsets[i + 1].

Per trained token, with d = logp - old_logp, ratio r = exp(d) ("token") or exp(mean of d over the leaf's trained
tokens) ("sequence", GSPO, arXiv 2507.18071), advantage A:

    grpo, bnpo, dr_grpo, dapo   -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    cispo                       -stop_gradient(min(r, epsilon_high)) A logp
    beta > 0                    + beta K3,  K3 = exp(e) - e - 1,  e = ref_logp - logp  (times r: use_bias_correction_kl)

Reduction of these, w = weight of `shared_tokens` (1, or 1 / multiplicity), sums over trained tokens:

    loss_type   loss                                     normalizer Z, its default for one batch
    grpo        sum_i (sum_t w x) / n_i / Z              B leaves;  n_i = trained tokens of leaf i, at least 1
    bnpo        (sum w x) / Z                            trained tokens, at least 1
    dapo cispo  (sum w x) / Z                            trained tokens, at least 1
    dr_grpo     (sum w x) / Z                            B * max_completion_length

Names, defaults and formulas are those of TRL 1.16's GRPOTrainer; a test rebuilds them on padded [B, T] matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
SHARED_TOKENS = ("per_leaf", "mean", "once")


class _Spread(torch.autograd.Function):
    """x [B] -> x[leaf of each token] [L]; the adjoint is a segment sum, so backward repeats bit for bit everywhere."""

    @staticmethod
    def forward(ctx, x: Tensor, leaf_of_token: Tensor, leaf_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(leaf_offsets)
        return x[leaf_of_token]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (leaf_offsets,) = ctx.saved_tensors
        return _leaf_sum(grad, leaf_offsets), None, None


def _leaf_sum(x: Tensor, leaf_offsets: Tensor) -> Tensor:
    """Sums of the leaves, [L] -> [B]; empty leaves give 0. Accumulated in fp64: a leaf may have 10^5 tokens."""
    total = torch.segment_reduce(x.double(), "sum", offsets=leaf_offsets, axis=0, unsafe=True, initial=0)
    return total.to(x.dtype)


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64).to(x.dtype)


def _check_offsets(leaf_offsets: Tensor, length: int) -> None:
    if leaf_offsets.dim() != 1 or leaf_offsets.numel() < 1 or leaf_offsets.is_floating_point():
        found = f"{leaf_offsets.dtype} {tuple(leaf_offsets.shape)}"
        raise ValueError(f"leaf_offsets must be integers [leaves + 1], got {found}")
    # Values are read only where that costs no device synchronisation.
    if leaf_offsets.device.type == "cpu":
        first, last = int(leaf_offsets[0]), int(leaf_offsets[-1])
        if first != 0 or last != length:
            raise ValueError(f"leaf_offsets run from {first} to {last}, expected 0 to {length} for streams [{length}]")
        falls = torch.nonzero(leaf_offsets[1:] < leaf_offsets[:-1])
        if falls.numel():
            raise ValueError(f"leaf_offsets[{int(falls[0]) + 1}] is below the one before: they must not decrease")


def _check_streams(length: int, device: torch.device, streams: dict[str, Tensor | None]) -> None:
    for name, stream in streams.items():
        if stream is None:
            continue
        if stream.shape != (length,):
            raise ValueError(f"{name} has shape {tuple(stream.shape)}, expected ({length},): one value per leaf token")
        if stream.device != device:
            raise ValueError(f"{name} is on {stream.device}, logp on {device}: move them to one device")


def _choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(map(repr, valid))}")


def _weights(trained: Tensor, shared_tokens: str, multiplicity: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of every leaf token in the numerators [L]; 0 where the token is not trained."""
    _choice("shared_tokens", shared_tokens, SHARED_TOKENS)
    if shared_tokens == "per_leaf":
        return trained.to(dtype)
    if multiplicity is None:
        raise ValueError(f"shared_tokens={shared_tokens!r} needs multiplicity [L]: trained leaves through each token")
    return torch.where(trained, 1 / multiplicity.to(dtype), 0)


def loss_normalizer(
    loss_type: str,
    mask: Tensor,
    leaf_offsets: Tensor,
    *,
    shared_tokens: str = "per_leaf",
    multiplicity: Tensor | None = None,
    max_completion_length: int | None = 512,
) -> Tensor:
    """What one batch adds to the loss's normalizer Z: a 0-d float64 tensor on the mask's device.

    Sum it over the batches of an optimiser step (and over the processes), give the sum to `grpo_loss(normalizer=...)`
    for each of them, and the summed losses and gradients equal those of one big batch. Where gradients are averaged
    over W processes (DDP, FSDP), pass the global sum / W. For `entropy_normalizer` sum `loss_normalizer("dapo", ...)`.

    A step without a single trained token has Z = 0: clamp the sum to at least 1, as `grpo_loss` does for one batch.
    """
    _choice("loss_type", loss_type, LOSS_TYPES)
    _check_streams(mask.numel(), mask.device, {"mask": mask, "multiplicity": multiplicity})
    _check_offsets(leaf_offsets, mask.numel())
    # only shares of a token need a stream: whole ones are counted
    weights = None if shared_tokens == "per_leaf" else _weights(mask != 0, shared_tokens, multiplicity, torch.float64)
    if loss_type in ("grpo", "dr_grpo"):
        size = leaf_offsets.numel() - 1
        if loss_type == "dr_grpo":
            if not max_completion_length or max_completion_length < 0:
                raise ValueError(
                    f"max_completion_length is {max_completion_length!r}: 'dr_grpo' divides by it, give one above 0"
                )
            size *= max_completion_length
        # filled on the device: a number copied there would be waited for
        return torch.full((), size, dtype=torch.float64, device=mask.device)
    return torch.count_nonzero(mask).double() if weights is None or shared_tokens != "once" else weights.sum()


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    leaf_offsets: Tensor,
    *,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    shared_tokens: str = "per_leaf",
    multiplicity: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_normalizer: float | Tensor | None = None,
    max_completion_length: int | None = 512,
    importance_sampling_ratio: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (0-d, dtype of logp) and metrics (0-d tensors, detached: reading them is the only synchronisation).

    Values outside the mask are never read: they may be NaN. Non-finite values inside it are the caller's to check.
    A leaf without trained tokens adds 0 (and counts as a leaf, as in TRL).

    Args:
        logp, old_logp, advantages, mask: [L]; logp carries the gradient, old_logp is the policy that sampled (pass
            `logp.detach()` for the first update after sampling), mask is nonzero on trained tokens.
        leaf_offsets: int64 [B + 1], the first entry 0, the last L.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo" (MiniMax-M1, arXiv 2506.13585).
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; epsilon_high defaults to
            epsilon. For cispo epsilon_high is the bound of the ratio itself, as in TRL (5.0 is usual).
        delta: upper bound of the unclipped ratio (two-sided clipping; the dual clip c of Tree-GRPO's code, 3.0).
        beta, ref_logp: weight and reference [L] of the K3 divergence.
        use_bias_correction_kl: multiply K3 by the ratio (DeepSeek-V3.2, arXiv 2512.02556; TRL's default). False is the
            plain K3 of GRPO.
        importance_sampling_level: "token" or "sequence".
        shared_tokens: what a token shared by c leaves (its multiplicity) counts:
            "per_leaf"  once per leaf, c times in all: the loss of the flattened rows, and the default.
            "mean"      1/c per leaf, denominators unchanged: at ratio 1 the token's advantage is the mean over its
                        leaves (lambda-GRPO's frequency weight, arXiv 2509.21154).
            "once"      1/c per leaf, and denominators count unique tokens as well: for bnpo, dapo and cispo Z is the
                        number of unique trained tokens, for grpo n_i is leaf i's share of them, sum of 1/c (dr_grpo has
                        no token count: there it equals "mean"). The loss is then a mean over unique tokens.
        multiplicity: [L], leaves of the group that train this very token (`batch.multiplicity`); >= 1 where trained.
        normalizer: Z of the table above, summed over the whole optimiser step; see `loss_normalizer`.
        entropy, entropy_coef: [L] entropies; the loss gets `- entropy_coef * mean entropy of trained tokens`, a token
            mean whatever the loss type, as in TRL. entropy_normalizer is its Z over the whole step.
        max_completion_length: for dr_grpo; TRL's default.
        importance_sampling_ratio: [L] weights of the policy term (not of the KL), from treegrpo.mismatch.

    Metrics (TRL's names): clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean} (cispo: cispo_clip_ratio), kl
    with beta, entropy when given; also ratio/{mean,min,max} of the importance ratio. Means run over the trained tokens
    of all leaves (over leaves for clip ratios of the "sequence" level).

    Raises:
        ValueError: unknown loss_type, importance_sampling_level or shared_tokens; streams of another length or device;
            leaf_offsets that do not fit; ref_logp, entropy or multiplicity missing where needed; a normalizer <= 0.
    """
    _choice("loss_type", loss_type, LOSS_TYPES)
    _choice("importance_sampling_level", importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
    if logp.dim() != 1 or not logp.is_floating_point():
        raise ValueError(f"logp must be floating point [L], got {logp.dtype} {tuple(logp.shape)}")
    if beta != 0.0 and ref_logp is None:
        raise ValueError(f"ref_logp is missing: beta={beta} needs the reference model's log-probs [L]")
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"entropy is missing: entropy_coef={entropy_coef} needs the entropies [L]")
    for name, value in (("normalizer", normalizer), ("entropy_normalizer", entropy_normalizer)):
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it must be positive (clamp the sum over the step to at least 1)")
    streams = {"old_logp": old_logp, "advantages": advantages, "mask": mask, "ref_logp": ref_logp}
    streams |= {"multiplicity": multiplicity, "entropy": entropy}
    streams |= {"importance_sampling_ratio": importance_sampling_ratio}
    _check_streams(logp.numel(), logp.device, streams)
    _check_offsets(leaf_offsets, logp.numel())
    epsilon_high = epsilon if epsilon_high is None else epsilon_high

    trained = mask != 0
    weights = _weights(trained, shared_tokens, multiplicity, logp.dtype)
    leaf_offsets = leaf_offsets.to(logp.device, torch.int64)
    # where(), not a product: unknown log-probs are NaN outside the mask, and NaN * 0 is NaN, also in backward
    logp, old_logp, advantages = (torch.where(trained, x.to(logp.dtype), 0) for x in (logp, old_logp, advantages))
    leaf_tokens = _leaf_sum(trained.to(logp.dtype), leaf_offsets)

    log_ratio = logp - old_logp
    if importance_sampling_level == "sequence":
        log_ratio = _sequence_means(log_ratio, leaf_offsets, leaf_tokens)
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        per_token = -ratio.clamp(max=epsilon_high).detach() * advantages * logp
        clipped = {"cispo_clip_ratio": (ratio > epsilon_high) & (advantages > 0)}
    else:
        per_token, clipped = _clipped_terms(ratio, advantages, epsilon, epsilon_high, delta)
    if importance_sampling_ratio is not None:
        per_token = per_token * torch.where(trained, importance_sampling_ratio.to(logp.dtype), 0)
    per_token_kl = None
    if beta != 0.0 and ref_logp is not None:
        difference = torch.where(trained, ref_logp.to(logp.dtype), 0) - logp
        per_token_kl = torch.exp(difference) - difference - 1
        if use_bias_correction_kl:
            per_token_kl = per_token_kl * ratio
        per_token = per_token + beta * per_token_kl

    per_token = per_token * weights
    denominators = weights if shared_tokens == "once" else trained.to(logp.dtype)
    if loss_type == "grpo":
        leaf_size = _leaf_sum(denominators, leaf_offsets)
        # A share of unique tokens may lie below 1, so only empty leaves are guarded.
        leaf_means = _leaf_sum(per_token, leaf_offsets) / torch.where(leaf_tokens > 0, leaf_size, 1)
        loss = _total(leaf_means)
    else:
        loss = _total(per_token)
    if normalizer is None:
        normalizer = loss_normalizer(
            loss_type,
            mask,
            leaf_offsets,
            shared_tokens=shared_tokens,
            multiplicity=multiplicity,
            max_completion_length=max_completion_length,
        ).clamp(min=1)
    loss = (loss / normalizer).to(logp.dtype)

    metrics = _metrics(clipped, ratio, trained, leaf_offsets, leaf_tokens, importance_sampling_level)
    num_tokens = _total(leaf_tokens).clamp(min=1)
    if per_token_kl is not None:
        metrics["kl"] = _total(per_token_kl.detach() * trained) / num_tokens
    if entropy is not None:
        entropy = torch.where(trained, entropy.to(logp.dtype), 0)
        metrics["entropy"] = _total(entropy.detach()) / num_tokens
        if entropy_coef != 0.0:
            if entropy_normalizer is None:
                entropy_normalizer = _total(denominators).clamp(min=1)
            loss = loss - entropy_coef * (_total(entropy * weights) / entropy_normalizer).to(logp.dtype)
    return loss, metrics


def _sequence_means(x: Tensor, leaf_offsets: Tensor, leaf_tokens: Tensor) -> Tensor:
    """Each leaf's sum of x over its trained tokens' number, on all its tokens: [L] -> [L]."""
    leaves = torch.arange(leaf_tokens.numel(), device=x.device)
    leaf_of_token = torch.repeat_interleave(leaves, leaf_offsets.diff(), output_size=x.numel())
    return _Spread.apply(_leaf_sum(x, leaf_offsets) / leaf_tokens.clamp(min=1), leaf_of_token, leaf_offsets)


def _clipped_terms(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float, delta: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy term [L], and by metric which tokens were clipped, bool [L]."""
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    per_token = -torch.min(bounded * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    low = (bounded < 1 - epsilon) & (advantages < 0)
    high = (bounded > 1 + epsilon_high) & (advantages > 0)
    return per_token, {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}


@torch.no_grad()
def _metrics(
    clipped: dict[str, Tensor],
    ratio: Tensor,
    trained: Tensor,
    leaf_offsets: Tensor,
    leaf_tokens: Tensor,
    level: str,
) -> dict[str, Tensor]:
    """Clip and ratio statistics; `clipped` maps a metric's name to a bool [L]."""
    has_tokens = leaf_tokens > 0
    num_tokens = _total(leaf_tokens).clamp(min=1)
    metrics = {}
    for name, is_clipped in clipped.items():
        is_clipped = (is_clipped & trained).to(ratio.dtype)
        per_leaf = _leaf_sum(is_clipped, leaf_offsets) / leaf_tokens.clamp(min=1)
        mean_over_leaves = _total(per_leaf) / max(per_leaf.numel(), 1)
        metrics[name] = mean_over_leaves if level == "sequence" else _total(is_clipped) / num_tokens
        if per_leaf.numel() and name == "clip_ratio/low_mean":
            # Without any trained token the minimum over nothing must stay finite.
            low = torch.where(has_tokens, per_leaf, math.inf).min()
            metrics["clip_ratio/low_min"] = torch.where(has_tokens.any(), low, 0)
        if per_leaf.numel() and name == "clip_ratio/high_mean":
            metrics["clip_ratio/high_max"] = torch.where(has_tokens, per_leaf, 0).max()
    metrics["ratio/mean"] = _total(torch.where(trained, ratio, 0)) / num_tokens
    if ratio.numel():
        some = trained.any()
        metrics["ratio/min"] = torch.where(some, torch.where(trained, ratio, math.inf).min(), 1)
        metrics["ratio/max"] = torch.where(some, torch.where(trained, ratio, -math.inf).max(), 1)
    return metrics
