"""Hidden states -> log-probability and entropy per trained token, chunked over rows, in float32.

Shape legend: T packed tokens, L leaf-stream length, R projected rows, P trained tokens, V vocabulary, E hidden size.

A fork token predicts several next tokens, so labels are not a shifted row: the label of token t is scored by the logits
of row ``prev[t]``. The head is applied once to each distinct such row, ``chunk_rows`` at a time, and recomputed in
backward: memory beyond the hidden rows is O(chunk_rows * V + V * E), whatever T.

The model is entered through ``model(...)``: for that one call its output head hands the hidden rows on, and the
log-probs are computed inside it. So the hooks of DDP and FSDP, PEFT and gradient checkpointing see an ordinary forward
and backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import treegrpo_kernels as tk

if TYPE_CHECKING:
    from treegrpo.packing import TreeBatch

# logits of one chunk in float32: 2**25 elements are 128 MiB; fewer rows would be bound by reading the weight
CHUNK_ELEMENTS = 2**25
CHUNK_MIN_ROWS = 256


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to ``z = head(hidden)``: ``cap * tanh(scale * z / cap)``; the temperature divides after it.

    Example: gemma2 is LogitTransform(1.0, 30.0), cohere LogitTransform(0.0625, 0.0), most are LogitTransform(1.0, 0.0).
    """

    scale: float
    softcap: float  # 0.0 means off


def logit_transform(config: Any) -> LogitTransform:
    """The transform a transformers config asks for. ``hf.check_model`` compares it with the model's own logits."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None) or 0.0)


def token_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(token | its path) at every trained token of a packed batch, one model pass over the unique tokens.

    Args:
        model: transformers causal LM (wrapped by PEFT, DDP, FSDP or not) whose attention is ``treegrpo``; see ``hf``.
        batch: from ``treegrpo.pack``, on the model's device.
        temperature: the logits are divided by it, as in sampling.
        entropy: also return the entropy (natural log) of the distribution each trained token was drawn from.
        chunk_rows: rows of logits alive at once; default: 128 MiB worth, at least 256.
        backend: ``backend`` of ``treegrpo_kernels.tree_attention``.

    Returns:
        logp [T], or (logp [T], entropy [T]); float32 (float64 for float64 models), 0 where ``batch.trained`` is False.
        Both differentiable with respect to all parameters.

    Raises:
        ValueError: temperature not positive, another attention, a head that is no plain linear layer, a trained token
            without predecessor.
    """
    trained = batch.trained.nonzero().squeeze(1)
    return _stream_logprobs(
        model,
        batch.input_ids,
        batch.plan,
        trained,
        batch.prev[trained].long(),
        temperature,
        entropy,
        chunk_rows,
        backend,
    )


def chain_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The flattened baseline: every leaf its own chain, padding-free in one row, through the same attention and head.

    Arguments as ``token_logprobs``. Returns logp [L] (and entropy [L]) on the leaf stream, 0 where ``batch.leaf_mask``
    is False. Equal to ``batch.expand(token_logprobs(...))`` at the trained places, at the price of L tokens, not T.
    """
    plan = chain_plan(batch)
    ids = batch.input_ids[batch.leaf_tokens]
    trained = (batch.leaf_mask != 0).nonzero().squeeze(1)
    return _stream_logprobs(model, ids, plan, trained, trained - 1, temperature, entropy, chunk_rows, backend)


def chain_plan(batch: TreeBatch) -> tk.TreePlan:
    """TreePlan of the leaf stream [L]: a forest of unbranched trees, one a leaf."""
    offsets = batch.leaf_offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    return tk.TreePlan.build(offsets[1:].repeat_interleave(lengths, output_size=batch.leaf_tokens.shape[0]))


def _stream_logprobs(
    model: nn.Module,
    ids: Tensor,
    plan: tk.TreePlan,
    trained: Tensor,
    rows: Tensor,
    temperature: float,
    entropy: bool,
    chunk_rows: int | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    options = {"temperature": temperature, "entropy": entropy, "chunk_rows": chunk_rows, "backend": backend}
    logp, entropies = row_logprobs(model, ids, plan, rows, ids[trained], **options)
    blank = logp.new_zeros(ids.shape[0])
    logp = blank.index_copy(0, trained, logp)
    return (logp, blank.index_copy(0, trained, entropies)) if entropy else logp


def row_logprobs(
    model: nn.Module,
    ids: Tensor,
    plan: tk.TreePlan,
    rows: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(logp [P], entropy [P] or None) of ``labels`` [P] under the logits at ``rows`` [P] of the packed row ``ids`` [T].

    Rows may repeat: each is projected once. The other arguments are those of ``token_logprobs``.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    base = unwrap(model)
    head = output_head(base)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    attention = getattr(config, "_attn_implementation", None)
    if attention != "treegrpo":
        # other attentions swallow the plan in silence and let siblings see each other
        raise ValueError(
            f"{type(base).__name__} runs attention {attention!r}, which ignores trees: call"
            " treegrpo.hf.use_tree_attention(model) first"
        )
    unique_rows, row_of = torch.unique(rows, return_inverse=True)
    if rows.numel() and int(unique_rows[0]) < 0:
        raise ValueError("a trained token has no predecessor: the first token of a trajectory cannot be trained")
    tree = {"tree_plan": plan, "tree_backend": backend}
    inputs = {
        "input_ids": ids[None],
        "position_ids": plan.position[None].long(),
        "attention_mask": None,
        "use_cache": False,
    }
    # heads without logits_to_keep see all rows, and the swapped head picks its own
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = unique_rows
    if chunk_rows is None:
        chunk_rows = max(CHUNK_MIN_ROWS, CHUNK_ELEMENTS // head.weight.shape[0])
    transform = logit_transform(config)
    results: list[Tensor | None] = []

    def score(hidden: Tensor) -> Tensor:
        picked, device = hidden[0] if keeps else hidden[0, unique_rows], hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else picked.dtype
        options = (row_of, labels, transform, temperature, chunk_rows, compute, entropy)
        logp, entropies = ChunkedHead.apply(picked, head.weight, head.bias, *options)
        results.extend((logp, entropies))
        # FSDP unshards for backward when the gradient of an output arrives: tied to the output, the head waits for it
        return Tied.apply(hidden, logp)

    with _swapped(head, score):
        out = model(**inputs, **tree)
    if len(results) != 2:
        raise ValueError(
            f"{type(base).__name__} called its output head {len(results) // 2} times in one forward, not once"
        )
    logp, entropies = results
    logits = out.logits if hasattr(out, "logits") else out[0]
    return Tied.apply(logp, logits), entropies[row_of] if entropy else None


class Tied(torch.autograd.Function):
    """``x`` itself, in whose backward ``other`` takes part with gradient zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.like = (other.shape, other.dtype, other.device)
        # not a view: FSDP loses its hook on a view changed in place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


@contextmanager
def _swapped(head: nn.Module, forward: Any) -> Iterator[None]:
    """Replaces ``head.forward`` on the instance for one call."""
    had_own = "forward" in vars(head)
    own = head.forward
    head.forward = forward
    try:
        yield
    finally:
        if had_own:
            head.forward = own
        else:
            del head.forward


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM inside DDP, FSDP, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def output_head(model: nn.Module) -> nn.Linear:
    """The model's output head, which must be a plain linear layer (with or without bias, tied or not).

    Raises ``ValueError`` for a model without one, and for a head under LoRA or quantisation.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: load it as AutoModelForCausalLM")
    if hasattr(head, "modules_to_save"):
        # PEFT's modules_to_save: the trained copy, or the original while adapters are off
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head is a {type(head).__name__}, not a plain linear layer: leave it out of target_modules"
            " (or train it whole with modules_to_save) and out of quantisation"
        )
    return head


class ChunkedHead(torch.autograd.Function):
    """(logp [P], entropy [R] or None) under softmax(transform(hidden @ weight.T + bias) / temperature), chunk by chunk.

    ``row_of`` [P] says which row scores which of ``labels`` [P]. Forward keeps only the log-sum-exp; backward computes
    each chunk's logits again and writes its part of every gradient, dW summed in float32. No atomics: the same inputs
    give the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_of: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        temperature: float,
        chunk_rows: int,
        compute: torch.dtype,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        num_rows, wide = hidden.shape[0], _wide(compute)
        # pairs in the order of their rows, so that a chunk of rows owns a run of them
        order = torch.argsort(row_of, stable=True)
        pair_row, pair_label = row_of[order], labels[order]
        starts = [*range(0, num_rows, chunk_rows), num_rows]
        cuts = torch.searchsorted(pair_row, torch.tensor(starts, device=row_of.device)).tolist()
        lse = hidden.new_empty(num_rows, dtype=wide)
        entropy = hidden.new_empty(num_rows, dtype=wide) if with_entropy else None
        picked = hidden.new_empty(labels.shape[0], dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, compute)
            for chunk, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
                z = _transformed(head.logits(hidden[start:stop]), transform)[0]
                z.div_(temperature)
                pairs = slice(cuts[chunk], cuts[chunk + 1])
                lse[start:stop] = chunk_lse = torch.logsumexp(z, -1)
                row = pair_row[pairs]
                picked[pairs] = z[row - start, pair_label[pairs]] - chunk_lse[row - start]
                if entropy is not None:
                    p = torch.exp(z - chunk_lse[:, None])
                    entropy[start:stop] = chunk_lse - torch.linalg.vecdot(p, z)
        ctx.save_for_backward(hidden, weight, bias, order, pair_row, pair_label, lse, entropy)
        ctx.options = (transform, temperature, compute, starts, cuts)
        ctx.set_materialize_grads(False)
        return torch.empty_like(picked).index_copy_(0, order, picked), entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, order, pair_row, pair_label, lse, entropy = ctx.saved_tensors
        transform, temperature, compute, starts, cuts = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = lse.dtype
        dpair = torch.zeros_like(order, dtype=wide) if dlogp is None else dlogp[order]
        dhidden = torch.zeros_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, compute)
            for chunk, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
                x = hidden[start:stop]
                z, slope = _transformed(head.logits(x), transform)
                log_p = z.div_(temperature).sub_(lse[start:stop, None])
                pairs = slice(cuts[chunk], cuts[chunk + 1])
                row, label = pair_row[pairs] - start, pair_label[pairs]
                # accumulating index_put is deterministic where index_add is not
                row_sum = z.new_zeros(stop - start).index_put_((row,), dpair[pairs], accumulate=True)
                if dentropy is None:
                    dz = log_p.exp_().mul_(-row_sum[:, None])
                else:
                    slant = dentropy[start:stop, None] * (log_p + entropy[start:stop, None])
                    dz = log_p.exp() * (-row_sum[:, None] - slant)
                dz.index_put_((row, label), dpair[pairs], accumulate=True).mul_(slope / temperature)
                if dbias is not None:
                    dbias += dz.sum(0)
                if dhidden is not None:
                    dhidden[start:stop] = head.into_hidden(dz)
                if dweight is not None:
                    head.into_weight(dz, x, dweight)
        grads = (dhidden, _like(dweight, weight), _like(dbias, bias))
        return (*grads, None, None, None, None, None, None, None)


class _Head:
    """The three products of a linear head, inputs rounded to ``compute``, results in float32 (float64 for float64).

    CUDA multiplies low precision into float32 itself; elsewhere the weight is widened once per pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
        self.wide = _wide(compute)
        self.compute = compute if weight.is_cuda else self.wide
        # rounded to the compute dtype first: an autocast forward multiplies rounded weights
        self.rounded = compute
        self.weight = weight.to(compute).to(self.compute)
        self.bias = None if bias is None else bias.to(compute).to(self.wide)

    def logits(self, x: Tensor) -> Tensor:
        z = self._mm(self._narrow(x), self.weight.t())
        return z if self.bias is None else z + self.bias

    def into_hidden(self, dz: Tensor) -> Tensor:
        return self._mm(dz.to(self.compute), self.weight)

    def into_weight(self, dz: Tensor, x: Tensor, total: Tensor) -> None:
        total += self._mm(dz.to(self.compute).t(), self._narrow(x))

    def _narrow(self, x: Tensor) -> Tensor:
        return x.to(self.rounded).to(self.compute)

    def _mm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b) if self.compute == self.wide else torch.mm(a, b, out_dtype=self.wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)


def _transformed(z: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """(transform(z), its derivative)."""
    slope: Tensor | float = transform.scale
    if transform.scale != 1.0:
        z = z * transform.scale
    if transform.softcap:
        t = torch.tanh(z / transform.softcap)
        z, slope = transform.softcap * t, (1.0 - t * t) * slope
    return z, slope
