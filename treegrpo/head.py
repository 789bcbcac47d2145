"""The output head, chunked over rows: log-prob and entropy of each (row, label) pair, never all logits at once.

Shape legend: R projected rows, P pairs of a row and a label, V vocabulary, E hidden size.

Two ways through a chunk's logits: ``fused``, one Triton kernel a pass (treegrpo_kernels.head), and ``plain``, torch
operations. Both read float32 logits, recompute them in backward, and give the same bits for the same inputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from treegrpo_kernels import head as passes

_log = logging.getLogger("treegrpo")
_announced: set[str] = set()

HEADS = ("auto", "fused", "plain")

# logits of one chunk in float32: 2**25 elements are 128 MiB; fewer rows would be bound by reading the weight
CHUNK_ELEMENTS = 2**25
CHUNK_MIN_ROWS = 256
# 2 GiB, and half of that for their gradient: each chunk adds to the weight's gradient in float32, 0.9 GB at Qwen's size
FUSED_CHUNK_ELEMENTS = 2**29


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
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None) or 0.0)


@dataclass(frozen=True)
class Pairs:
    """Which row scores which label, ordered by row so that a chunk of rows owns a run of pairs.

    Example: row_of = [0 2 0] over three rows has order = [0 2 1], rows = [0 0 2], offsets = [0 2 2 3].
    """

    order: Tensor
    """int64 [P]: the pairs in the order of their rows."""
    rows: Tensor
    """int64 [P], ascending."""
    offsets: Tensor
    """int32 [R + 1]: the pairs of row r are offsets[r] .. offsets[r + 1]."""

    @classmethod
    def of(cls, row_of: Tensor, num_rows: int) -> Pairs:
        order = torch.argsort(row_of, stable=True)
        rows = row_of[order]
        ends = torch.arange(num_rows + 1, device=row_of.device)
        return cls(order, rows, torch.searchsorted(rows, ends).to(torch.int32))


@dataclass(frozen=True)
class HeadOptions:
    """How the head is computed; ``chunk_rows`` None means as many as the way through it is best with."""

    transform: LogitTransform
    temperature: float
    compute: torch.dtype
    """What the products round their inputs to."""
    entropy: bool = False
    fused: bool = False
    chunk_rows: int | None = None

    def starts(self, num_rows: int, vocab: int) -> list[int]:
        """Where the chunks begin, and the end; chunks are of even size."""
        most = self.chunk_rows
        if most is None:
            elements = FUSED_CHUNK_ELEMENTS if self.fused else CHUNK_ELEMENTS
            most = max(CHUNK_MIN_ROWS, elements // vocab)
            if self.fused and num_rows > most:
                even = -(-num_rows // -(-num_rows // most))
                # whole tiles of the products
                most = -(-even // 128) * 128
        return [*range(0, num_rows, most), num_rows]


def use_fused(wanted: str, head: nn.Linear, compute: torch.dtype) -> bool:
    """Whether the fused passes serve this head. Raises ``ValueError`` with the reason where they were asked for and do
    not; "auto" takes them on CUDA where they do, and says once in the log what it took."""
    if wanted not in HEADS:
        raise ValueError(f"head is {wanted!r}: use one of {', '.join(map(repr, HEADS))}")
    device = head.weight.device
    reason = passes.reason(device, compute)
    if reason is None and head.bias is not None:
        reason = "the fused head takes no bias"
    if wanted == "fused":
        if reason is not None:
            raise ValueError(f"head='fused': {reason}; use 'plain' or 'auto'")
        return True
    if wanted == "plain":
        return False
    fused = reason is None and device.type == "cuda"
    said = f"{device.type} {compute} takes the {'fused' if fused else 'plain'} head"
    if said not in _announced:
        _announced.add(said)
        why = "one pass over the logits" if fused else reason or "Triton's interpreter is for tests"
        _log.info("log-probs: %s (%s)", said, why)
    return fused


class ChunkedHead(torch.autograd.Function):
    """(logp [P], entropy [R] or None) under softmax(transform(hidden @ weight.T + bias) / temperature), chunk by chunk.

    ``pairs`` says which row scores which of ``labels`` [P]. Forward keeps only the log-sum-exp; backward computes each
    chunk's logits again and writes its part of every gradient, dW summed in float32. No atomics: the same inputs give
    the same bits. There is no second derivative. A label outside the vocabulary has NaN for its log-prob.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        pairs: Pairs,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor | None]:
        num_rows, wide = hidden.shape[0], _wide(options.compute)
        labels = labels[pairs.order]
        chunks = _Chunks(pairs, labels, options, num_rows, weight.shape[0])
        lse = hidden.new_empty(num_rows, dtype=wide)
        entropy = hidden.new_empty(num_rows, dtype=wide) if options.entropy else None
        picked = hidden.new_empty(labels.shape[0], dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, options.compute)
            for chunk in chunks:
                chunk.score(head.logits(hidden[chunk.rows]), lse, entropy, picked)
        ctx.save_for_backward(hidden, weight, bias, lse, entropy)
        ctx.chunks, ctx.options, ctx.pairs = chunks, options, pairs
        ctx.set_materialize_grads(False)
        return torch.empty_like(picked).index_copy_(0, pairs.order, picked), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = lse.dtype
        order = ctx.pairs.order
        dpicked = torch.zeros_like(order, dtype=wide) if dlogp is None else dlogp[order]
        dhidden = torch.zeros_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, ctx.options.compute)
            for chunk in ctx.chunks:
                x = hidden[chunk.rows]
                dz = chunk.slope(head.logits(x), lse, entropy, dpicked, dentropy, head.compute)
                if dbias is not None:
                    dbias += dz.sum(0)
                if dhidden is not None:
                    dhidden[chunk.rows] = head.into_hidden(dz)
                if dweight is not None:
                    head.into_weight(dz, x, dweight)
        return (dhidden, _like(dweight, weight), _like(dbias, bias), None, None, None)


@dataclass(frozen=True)
class _Chunk:
    """A run of rows and its pairs; the two passes over its logits."""

    rows: slice
    pairs: slice
    """Where its pairs lie; the fused passes read the offsets instead."""
    offsets: Tensor
    pair_rows: Tensor
    labels: Tensor
    options: HeadOptions

    def score(self, logits: Tensor, lse: Tensor, entropy: Tensor | None, picked: Tensor) -> None:
        """Fill the chunk's part of lse [R], entropy [R] and picked [P]."""
        if self.options.fused:
            own = None if entropy is None else entropy[self.rows]
            passes.score(logits, self.offsets, self.labels, lse[self.rows], own, picked, **self._transform)
            return
        z = _transformed(logits, self.options.transform)[0]
        z.div_(self.options.temperature)
        lse[self.rows] = chunk_lse = torch.logsumexp(z, -1)
        row = self.pair_rows[self.pairs] - self.rows.start
        label, known = self._known_labels(z.shape[1])
        picked[self.pairs] = torch.where(known, z[row, label] - chunk_lse[row], float("nan"))
        if entropy is not None:
            p = torch.exp(z - chunk_lse[:, None])
            entropy[self.rows] = chunk_lse - torch.linalg.vecdot(p, z)

    def slope(
        self,
        logits: Tensor,
        lse: Tensor,
        entropy: Tensor | None,
        dpicked: Tensor,
        dentropy: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The gradient of the chunk's logits; fused it is rounded to ``dtype``, as the products do next."""
        rows, lse = self.rows, lse[self.rows]
        if dentropy is not None and entropy is not None:
            dentropy, entropy = dentropy[rows], entropy[rows]
        if self.options.fused:
            dz = torch.empty(logits.shape, dtype=dtype, device=logits.device)
            # a sliced gradient may have any stride
            dentropy = None if dentropy is None else dentropy.contiguous()
            passes.slope(logits, self.offsets, self.labels, lse, entropy, dpicked, dentropy, dz, **self._transform)
            return dz
        z, slope = _transformed(logits, self.options.transform)
        log_p = z.div_(self.options.temperature).sub_(lse[:, None])
        row, own = self.pair_rows[self.pairs] - rows.start, dpicked[self.pairs]
        # accumulating index_put is deterministic where index_add is not
        row_sum = z.new_zeros(len(z)).index_put_((row,), own, accumulate=True)
        if dentropy is None or entropy is None:
            dz = log_p.exp_().mul_(-row_sum[:, None])
        else:
            slant = dentropy[:, None] * (log_p + entropy[:, None])
            dz = log_p.exp() * (-row_sum[:, None] - slant)
        label, known = self._known_labels(z.shape[1])
        dz.index_put_((row, label), torch.where(known, own, 0), accumulate=True)
        return dz.mul_(slope / self.options.temperature)

    def _known_labels(self, vocab: int) -> tuple[Tensor, Tensor]:
        """The pairs' labels, and which of them are in the vocabulary: no others have a log-prob, here or fused."""
        labels = self.labels[self.pairs]
        known = (labels >= 0) & (labels < vocab)
        return torch.where(known, labels, 0), known

    @property
    def _transform(self) -> dict[str, float]:
        transform = self.options.transform
        return dict(scale=transform.scale, cap=transform.softcap, temperature=self.options.temperature)


class _Chunks(list):
    """The chunks of R rows. Only the plain passes need their pairs' places on the host, which a GPU is waited for."""

    def __init__(self, pairs: Pairs, labels: Tensor, options: HeadOptions, num_rows: int, vocab: int) -> None:
        starts = options.starts(num_rows, vocab)
        places = [0] * len(starts) if options.fused else pairs.offsets[starts].tolist()
        for i, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            offsets = pairs.offsets[start : stop + 1]
            own = slice(places[i], places[i + 1])
            self.append(_Chunk(slice(start, stop), own, offsets, pairs.rows, labels, options))


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
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _transformed(z: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """(transform(z), its derivative)."""
    slope: Tensor | float = transform.scale
    if transform.scale != 1.0:
        z = z * transform.scale
    if transform.softcap:
        t = torch.tanh(z / transform.softcap)
        z, slope = transform.softcap * t, (1.0 - t * t) * slope
    return z, slope
