"""The torch operator behind ``tree_attention``: one schema, autograd rule, fake and FLOP formula for every kernel.

Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D query/key head dim, Dv value head dim.

``window == 0`` and ``softcap == 0.0`` mean off. ``tiles`` is whatever flat tensor list the backend made of the plan and
the window; the Triton kernels and those for Hopper read the window there alone.
The gradient of the sinks needs no kernel: a sink adds exp(sink) to the denominator and nothing to the numerator, so
d sink_h = - sum_i exp(sink_h - lse_ih) * (dout_ih . out_ih).

Where nothing but autograd watches (:func:`is_plain`), the public op calls :func:`attend`, the same rule as a plain
``autograd.Function``: torch.library's bookkeeping costs more host time than all the rest of a call (NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import flops
from .reference import compute_dtype

# rows of out and dout that the gradient of the sinks widens at a time
SINK_ROWS = 8192

_library = torch.library.Library("treegrpo", "DEF")
_library.define(
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor subtree_end, Tensor position, Tensor[] tiles,"
    " float scale, int window, float softcap, SymInt num_pairs, str backend, bool deterministic)"
    " -> (Tensor out, Tensor lse)"
)
_library.define(
    "tree_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sinks,"
    " Tensor subtree_end, Tensor position, Tensor[] tiles, float scale, int window, float softcap, SymInt num_pairs,"
    " str backend, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    position: Tensor,
    tiles: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
    num_pairs: int,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    if q.shape[0] == 0:
        return _empty_out(q, v)
    match backend:
        case "cuda" if tiles:
            from . import hopper_cuda

            return hopper_cuda.attn_fwd(q, k, v, sinks, tiles, scale)
        case "cpu" | "cuda":
            from . import native

            native.load()
            fwd = torch.ops.treegrpo_native.attn_fwd
            return fwd(q, k, v, sinks, subtree_end, position, scale, window, softcap)
        case "triton":
            from . import triton

            return triton.attn_fwd(q, k, v, sinks, subtree_end, tiles, scale, softcap)
    raise ValueError(f"backend {backend!r} has no tree_attention kernel")


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    subtree_end: Tensor,
    position: Tensor,
    tiles: list[Tensor],
    scale: float,
    window: int,
    softcap: float,
    num_pairs: int,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[0] == 0:
        return _empty_grads(q, k, v)
    match backend:
        case "cuda" if tiles:
            from . import hopper_cuda

            return hopper_cuda.attn_bwd(dout, q, k, v, out, lse, tiles, scale, deterministic)
        case "cpu" | "cuda":
            from . import native

            native.load()
            bwd = torch.ops.treegrpo_native.attn_bwd
            return bwd(dout, q, k, v, out, lse, subtree_end, position, scale, window, softcap)
        case "triton":
            from . import triton

            return triton.attn_bwd(dout, q, k, v, out, lse, subtree_end, tiles, scale, softcap)
    raise ValueError(f"backend {backend!r} has no tree_attention kernel")


def _empty_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[:2], dtype=compute_dtype(q.dtype))


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


_library.impl("tree_attention", _forward, "CompositeExplicitAutograd")
_library.impl("tree_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("treegrpo::tree_attention", lib=_library)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v)


@torch.library.register_fake("treegrpo::tree_attention_backward", lib=_library)
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(q, k, v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, *rest = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, sinks)
    # the plan's own tensors: nobody differentiates or offloads them
    ctx.rest = rest


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    grads = (None,) * 4 if dout is None else _gradients(ctx, dout, torch.ops.treegrpo.tree_attention_backward)
    of_tiles = [None] * len(ctx.rest[2])
    return (*grads, None, None, of_tiles, *(None,) * 6)


def _gradients(ctx: Any, dout: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dsinks); ``backward`` is the operator, or what it runs."""
    q, k, v, out, lse, sinks = ctx.saved_tensors
    dout = dout.contiguous()
    grads = backward(dout, q, k, v, out, lse, sinks, *ctx.rest)
    return (*grads, _sinks_grad(dout, out, lse, sinks) if ctx.needs_input_grad[3] else None)


def _sinks_grad(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    with torch.no_grad():
        # a block of rows at a time, for the products are wider than dout; not for a compiler, which fuses them
        step = SINK_ROWS if type(dout.shape[0]) is int else dout.shape[0]
        grad = torch.zeros_like(sinks, dtype=lse.dtype)
        for dout_b, out_b, lse_b in zip(*(x.split(step) for x in (dout, out, lse)), strict=True):
            delta = (dout_b.to(lse.dtype) * out_b.to(lse.dtype)).sum(-1)
            grad -= (torch.exp(sinks.to(lse.dtype) - lse_b) * delta).sum(0)
        grad = grad.to(sinks.dtype)
    return _Once.apply(grad, dout, sinks) if torch.is_grad_enabled() else grad


def _differentiate_again(ctx: Any, *grads: Tensor | None) -> tuple:
    raise RuntimeError(
        "tree_attention has no second derivative (a gradient penalty would need one): take backend='reference'"
    )


class _Once(torch.autograd.Function):
    """A gradient that depends on ``inputs`` in a way that is not differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.clone()

    backward = staticmethod(_differentiate_again)


torch.library.register_autograd("treegrpo::tree_attention", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("treegrpo::tree_attention_backward", _differentiate_again, lib=_library)
flops.register(torch.ops.treegrpo.tree_attention, torch.ops.treegrpo.tree_attention_backward)


class _TreeAttention(torch.autograd.Function):
    """The operator's autograd rule, without the operator; ``rest`` are its arguments from ``subtree_end`` on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rest: tuple) -> tuple[Tensor, Tensor]:
        output = _forward(q, k, v, sinks, *rest)
        _setup_context(ctx, (q, k, v, sinks, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple:
        if dout is None:
            return (None,) * 5
        # under create_graph the operator says that it has no second derivative
        watched = torch.is_grad_enabled() or not is_plain(dout)
        return *_gradients(ctx, dout, torch.ops.treegrpo.tree_attention_backward if watched else _backward), None


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """What ``torch.ops.treegrpo.tree_attention`` does, for tensors of which :func:`is_plain` is true."""
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _TreeAttention.apply(q, k, v, sinks, rest)
    return _forward(q, k, v, sinks, *rest)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether only autograd would see an operator: no compiler, mode, transform, profiler or tensor subclass would."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and _functions_are_watched())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    return all(x is None or type(x) is Tensor or type(x) is Parameter for x in tensors)


def _functions_are_watched() -> bool:
    """A default device is a mode too, one that means nothing to calls on tensors."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise ``RuntimeError`` under a transform of torch.func, whose wrapped tensors would stay in the plan, and for
    dual tensors: an operator without a rule for their tangents would drop them in silence."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "tree_attention runs under no transform of torch.func (grad, vmap, jvp): take torch.autograd"
        )
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("tree_attention has no forward-mode derivative: take backend='reference'")
