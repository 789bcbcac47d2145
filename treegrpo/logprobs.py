"""Hidden states -> log-probability and entropy per trained token, chunked over rows, in float32.

Shape legend: T packed tokens, L leaf-stream length, R projected rows, P trained tokens, V vocabulary, E hidden size.

A fork token predicts several next tokens, so labels are not a shifted row: the label of token t is scored by the logits
of row ``prev[t]``. The head (head.py) is applied once to each distinct such row, a chunk at a time, and recomputed in
backward: memory beyond the hidden rows is O(chunk * V + V * E), whatever T.

The model is entered through ``model(...)``: for that one call its output head hands the hidden rows on, and the
log-probs are computed inside it. So the hooks of DDP and FSDP, PEFT and gradient checkpointing see an ordinary forward
and backward. (A plain ``model(...)`` in another thread would meet that head meanwhile: give each thread a model, or
take turns.)
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

import treegrpo_kernels as tk
from treegrpo.head import ChunkedHead, HeadOptions, LogitTransform, Pairs, logit_transform, use_fused
from treegrpo.rope import check_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treegrpo.packing import TreeBatch

__all__ = ["ChunkedHead", "LogitTransform", "chain_logprobs", "logit_transform", "row_logprobs", "token_logprobs"]


Function = TypeVar("Function", bound=Callable[..., Any])


def _typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """For type checkers alone: what is decorated is called, and answers, as ``function`` does."""
    return lambda decorated: cast(Function, decorated)


@overload
def token_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: Literal[False] = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> Tensor: ...


@overload
def token_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: Literal[True],
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: bool,
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(token | its path) at every trained token of a packed batch, one model pass over the unique tokens.

    Args:
        model: transformers causal LM (wrapped by PEFT, DDP, FSDP or not) whose attention is ``treegrpo``; see ``hf``.
        batch: from ``treegrpo.pack``, on the model's device.
        temperature: the logits are divided by it, as in sampling.
        entropy: also return the entropy (natural log) of the distribution each trained token was drawn from.
        chunk_rows: rows of logits alive at once; default: 128 MiB worth, at least 256; 2 GiB with the fused head.
        backend: ``backend`` of ``treegrpo_kernels.tree_attention``.
        head: "fused" (Triton, one pass over a chunk's logits), "plain" (torch), "auto": fused on CUDA where it can.
        head_dtype: what the head's products round their inputs to; default: autocast's dtype, else the model's.

    Returns:
        logp [T], or (logp [T], entropy [T]); float32 (float64 for float64 models), 0 where ``batch.trained`` is False.
        Both differentiable with respect to all parameters.

    Raises:
        ValueError: temperature not positive, another attention, a head that is no plain linear layer, a trained token
            without predecessor, head="fused" where that cannot serve.
    """
    plan, targets = _tree_parts(batch)
    _check_lengths(model, batch)
    options: dict[str, Any] = dict(
        temperature=temperature, entropy=entropy, chunk_rows=chunk_rows, backend=backend, head=head
    )
    return _stream_logprobs(model, batch.input_ids, plan, targets, head_dtype=head_dtype, **options)


@_typed_as(token_logprobs)
def chain_logprobs(
    model: nn.Module,
    batch: TreeBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The flattened baseline: every leaf its own chain, padding-free in one row, through the same attention and head.

    Arguments as ``token_logprobs``. Returns logp [L] (and entropy [L]) on the leaf stream, 0 where ``batch.leaf_mask``
    is False. Equal to ``batch.expand(token_logprobs(...))`` at the trained places, at the price of L tokens, not T.
    """
    plan, targets = _chain_parts(batch)
    _check_lengths(model, batch)
    options: dict[str, Any] = dict(
        temperature=temperature, entropy=entropy, chunk_rows=chunk_rows, backend=backend, head=head
    )
    ids = batch.input_ids[batch.leaf_tokens]
    return _stream_logprobs(model, ids, plan, targets, head_dtype=head_dtype, **options)


def prepare(batch: TreeBatch, *, chain: bool = False) -> None:
    """Works out what ``token_logprobs`` (or ``chain_logprobs``) reads of the batch, for which a GPU is waited for: now,
    not in the first pass."""
    _ = _chain_parts(batch) if chain else _tree_parts(batch)


def _tree_parts(batch: TreeBatch) -> tuple[tk.TreePlan, _Targets]:
    return batch.plan, _cached(batch, "tree", (batch.trained, batch.prev), lambda: _tree_targets(batch))


def _chain_parts(batch: TreeBatch) -> tuple[tk.TreePlan, _Targets]:
    of = (batch.leaf_mask, batch.leaf_offsets)
    return _cached(batch, "chain", of, lambda: (chain_plan(batch), _chain_targets(batch)))


def _check_lengths(model: nn.Module, batch: TreeBatch) -> None:
    config: Any = getattr(unwrap(model), "config", None)
    if hasattr(config, "get_text_config"):
        check_lengths(config.get_text_config(), (leaf.num_tokens for tree in batch.trees for leaf in tree.trajectories))


def chain_plan(batch: TreeBatch) -> tk.TreePlan:
    """TreePlan of the leaf stream [L]: a forest of unbranched trees, one a leaf."""
    offsets = batch.leaf_offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    return tk.TreePlan.build(offsets[1:].repeat_interleave(lengths, output_size=batch.leaf_tokens.shape[0]))


@dataclass(frozen=True)
class _Targets:
    """What is trained in a row of tokens: pair p is the token at ``trained[p]``, scored by ``rows[row_of[p]]``."""

    trained: Tensor
    """int64 [P]"""
    rows: Tensor
    """int64 [R], ascending: the rows whose logits are needed."""
    row_of: Tensor
    """int64 [P]"""
    pairs: Pairs

    @classmethod
    def of(cls, trained: Tensor, above: Tensor) -> _Targets:
        """``above`` [P] are the rows that predict the ``trained`` tokens."""
        rows, row_of = torch.unique(above, return_inverse=True)
        if above.numel() and int(rows[0]) < 0:
            raise ValueError("a trained token has no predecessor: the first token of a trajectory cannot be trained")
        return cls(trained, rows, row_of, Pairs.of(row_of, rows.shape[0]))


def _tree_targets(batch: TreeBatch) -> _Targets:
    trained = batch.trained.nonzero().squeeze(1)
    return _Targets.of(trained, batch.prev[trained].long())


def _chain_targets(batch: TreeBatch) -> _Targets:
    trained = (batch.leaf_mask != 0).nonzero().squeeze(1)
    return _Targets.of(trained, trained - 1)


_prepared: weakref.WeakKeyDictionary[TreeBatch, dict[str, tuple]] = weakref.WeakKeyDictionary()


def _cached(batch: TreeBatch, layout: str, of: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made once a batch (it waits for the GPU), and again if a tensor of ``of`` was replaced or
    written. Tensors made in inference mode count no writes: for them it is made in every call."""
    # what is kept may serve a training step next, whose graph takes no inference tensors
    with torch.inference_mode(False), torch.no_grad():
        if any(x.is_inference() for x in of):
            return make()
        # the tensors themselves: the id of one that is gone may be another's
        known, versions = _prepared.setdefault(batch, {}), [x._version for x in of]
        if layout in known:
            seen, seen_versions, value = known[layout]
            if versions == seen_versions and all(a is b for a, b in zip(of, seen, strict=True)):
                return value
        value = make()
        known[layout] = (of, versions, value)
        return value


def _stream_logprobs(
    model: nn.Module, ids: Tensor, plan: tk.TreePlan, targets: _Targets, *, entropy: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    labels = ids[targets.trained]
    logp, entropies = _target_logprobs(model, ids, plan, targets, labels, entropy=entropy, **options)
    blank = logp.new_zeros(ids.shape[0])
    logp = blank.index_copy(0, targets.trained, logp)
    return logp if entropies is None else (logp, blank.index_copy(0, targets.trained, entropies))


def row_logprobs(model: nn.Module, ids: Tensor, plan: tk.TreePlan, rows: Tensor, labels: Tensor) -> Tensor:
    """logp [P] of ``labels`` [P] under the logits at ``rows`` [P], which may repeat, of the packed row ``ids`` [T]."""
    return _target_logprobs(model, ids, plan, _Targets.of(rows, rows), labels)[0]


def _target_logprobs(
    model: nn.Module,
    ids: Tensor,
    plan: tk.TreePlan,
    targets: _Targets,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
    head: str = "auto",
    head_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    base = unwrap(model)
    linear = output_head(base)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    attention = getattr(config, "_attn_implementation", None)
    if attention != "treegrpo":
        # other attentions swallow the plan in silence and let siblings see each other
        raise ValueError(
            f"{type(base).__name__} runs attention {attention!r}, which ignores trees: call"
            " treegrpo.hf.use_tree_attention(model) first"
        )
    tree = {"tree_plan": plan, "tree_backend": backend}
    inputs = {
        "input_ids": ids[None],
        "position_ids": plan.position[None].long(),
        "attention_mask": blank_mask(config, ids),
        "use_cache": False,
    }
    # heads without logits_to_keep see all rows, and the swapped head picks its own
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = targets.rows
    transform = logit_transform(config)
    results: list[tuple[Tensor, Tensor | None]] = []

    def score(hidden: Tensor) -> Tensor:
        picked, device = hidden[0] if keeps else hidden[0, targets.rows], hidden.device.type
        compute = head_dtype
        if compute is None and torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        elif compute is None:
            # a float32 head on a model in low precision
            compute = torch.promote_types(picked.dtype, linear.weight.dtype)
        fused = use_fused(head, linear, compute)
        options = HeadOptions(transform, temperature, compute, entropy, fused, chunk_rows)
        logp, entropies = ChunkedHead.apply(picked, linear.weight, linear.bias, labels, targets.pairs, options)
        results.append((logp, entropies))
        # FSDP unshards for backward when the gradient of an output arrives: tied to the output, the head waits for it
        return Tied.apply(hidden, logp)

    with _swapped(linear, score):
        out = model(**inputs, **tree)
    if len(results) != 1:
        raise ValueError(f"{type(base).__name__} called its output head {len(results)} times in one forward, not once")
    [(logp, entropies)] = results
    logits = out.logits if hasattr(out, "logits") else out[0]
    return Tied.apply(logp, logits), None if entropies is None else entropies[targets.row_of]


def blank_mask(config: Any, ids: Tensor) -> Tensor | None:
    """A mask [1, 1, T, T] of one value in memory, which stands for the tree; None for models it might not suit.

    transformers hands a four-dimensional mask on to the layers as it is. Without one it asks the device, once a
    forward, whether the positions are those of packed sequences, and the host waits for the answer.
    """
    if getattr(config, "sliding_window", None) or getattr(config, "output_router_logits", False):
        # windows travel with the mask, and router losses count its tokens
        return None
    return ids.new_empty((1, 1, 1, 1), dtype=torch.bool).expand(1, 1, len(ids), len(ids))


def is_blank(mask: Tensor) -> bool:
    """Whether ``mask`` is a :func:`blank_mask`: it has one value for all."""
    return mask.dim() == 4 and mask.dtype == torch.bool and (mask.numel() == 1 or mask.stride()[-2:] == (0, 0))


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


# one lock a head: a second thread's call would swap the first one's away
_swaps: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def _swapped(head: nn.Module, forward: Any) -> Iterator[None]:
    """Replaces ``head.forward`` on the instance for one call; other threads' calls on the same head wait."""
    with _swaps.setdefault(head, threading.RLock()):
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


def unwrap(model: Any) -> PreTrainedModel:
    """The causal LM inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        # of the class: DeepSpeed's engine passes for what it wraps, and has a config of its own
        own = type(model)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(own, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(own, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def output_head(model: PreTrainedModel) -> nn.Linear:
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
