"""What the tests of attention kernels share: inputs, the float64 oracle, the same in plain torch, and the rule between.

Tolerance (FlashAttention's): a kernel may err twice as much as the same computation in plain torch of the same dtype,
plus a rounding band, in its largest error and in its root mean square.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import torch
from torch import Tensor

import treegrpo_kernels as tk
from treegrpo_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "lse", "dq", "dk", "dv")
# relative to the largest value: half a unit in the last place; in fp32 16 units, for plain torch may be exact by luck
BAND = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-19, torch.float64: 2**-45}


def inputs(
    num_tokens: int,
    hq: int = 2,
    hkv: int = 1,
    d: int = 16,
    dv: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """q, k, v, dout and sinks."""
    gen = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (hq, d), (hkv, d), (hkv, dv), (hq, dv)
    q, k, v, dout = (torch.randn(num_tokens, *s, generator=gen, device=DEVICE).to(dtype) for s in shapes)
    return q, k, v, dout, torch.linspace(-1, 2, hq, device=DEVICE)


def through_op(
    backend: str,
    subtree_end: np.ndarray | Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = 0.3,
    window: int = 0,
    softcap: float = 0.0,
    deterministic: bool = True,
    plan: tk.TreePlan | None = None,
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of the public op, and dsinks where there are sinks."""
    plan = plan or tk.TreePlan.build(torch.as_tensor(subtree_end, device=q.device))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    out, lse = tk.tree_attention(
        *leaves[:3],
        plan,
        scale=scale,
        window=window or None,
        softcap=softcap or None,
        sinks=leaves[3] if sinks is not None else None,
        backend=backend,
        deterministic=deterministic,
        return_lse=True,
    )
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def oracle(subtree_end, q, k, v, dout, sinks=None, *, scale=0.3, window=0, softcap=0.0) -> tuple[Tensor, ...]:
    def attend(end: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = dict(scale=scale, window=window or None, softcap=softcap or None, sinks=sinks, return_lse=True)
        return reference.tree_attention(q, k, v, end, **options)

    return _tree_by_tree(attend, subtree_end, *(None if x is None else x.double() for x in (q, k, v, dout, sinks)))


def eager(subtree_end, q, k, v, dout, sinks=None, *, scale=0.3, window=0, softcap=0.0) -> tuple[Tensor, ...]:
    """The same in plain torch of the inputs' dtype, log-sum-exp in fp32: what sets the tolerance."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]

    def attend(end: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1))
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~reference.dense_mask(end, window or None), float("-inf"))
        if sinks is not None:
            column = sinks.to(q.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : k.shape[0]]
        out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
        return out, scores.detach().to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1).T

    return _tree_by_tree(attend, subtree_end, q, k, v, dout, sinks)


def _tree_by_tree(
    attend: Callable[..., tuple[Tensor, Tensor]], subtree_end, q, k, v, dout, sinks=None
) -> tuple[Tensor, ...]:
    """Results and gradients of ``attend(end, q, k, v, sinks)`` in stretches of whole trees: a long row of small trees
    needs no dense mask of the row."""
    end = torch.as_tensor(subtree_end, device=q.device)
    parts = []
    for start, stop in cases.stretches(end.cpu().numpy()):
        leaves = [x[start:stop].detach().requires_grad_() for x in (q, k, v)]
        leaves += [] if sinks is None else [sinks.detach().requires_grad_()]
        out, lse = attend(end[start:stop] - start, *leaves)
        parts.append((out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout[start:stop])))
    *rows, dsinks = zip(*parts, strict=True) if sinks is not None else (*zip(*parts, strict=True), None)
    return *(torch.cat(x) for x in rows), *(() if dsinks is None else (torch.stack(dsinks).sum(0),))


def excess(got, subtree_end, q, k, v, dout, sinks=None, **options) -> dict[str, float]:
    """For each result how far its worst error lies above what is allowed; negative passes. ``got`` may lack dsinks."""
    args = subtree_end, q, k, v, dout, sinks
    over = {}
    # not strict: the launchers know no gradient of the sinks
    for name, mine, low, want in zip(
        (*NAMES, "dsinks"), got, eager(*args, **options), oracle(*args, **options), strict=False
    ):
        assert mine.shape == want.shape and mine.dtype == low.dtype, name
        band = BAND[q.dtype if name == "dsinks" else mine.dtype]
        error, allowed = (mine.double() - want).abs(), (low.double() - want).abs()
        worst = error.amax() - 2 * allowed.amax() - band * want.abs().amax().clamp(min=1)
        typical = _rms(error) - 2 * _rms(allowed) - band * _rms(want).clamp(min=1 / 8)
        over[name] = float("inf") if torch.isnan(error).any() else float(torch.maximum(worst, typical))
    return over


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_op(backend: str, subtree_end, q, k, v, dout, sinks=None, **options) -> None:
    """The public op keeps the rule, and a second run gives the same bits."""
    args = subtree_end, q, k, v, dout, sinks
    got = through_op(backend, *args, **options)
    for name, one, two in zip((*NAMES, "dsinks"), got, through_op(backend, *args, **options), strict=False):
        assert same_bits(one, two), f"{name} differs between two runs"
    over = excess(got, *args, **options)
    assert len(over) == (5 if sinks is None else 6)
    assert max(over.values()) <= 0, over


def same_bits(x: Tensor, y: Tensor) -> bool:
    return not bool(differences(x, y))


def differences(x: Tensor, y: Tensor) -> Tensor:
    """How many elements differ in their bits, as a tensor: the device need not be waited for."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.contiguous().view(kind) != y.contiguous().view(kind)).sum()
