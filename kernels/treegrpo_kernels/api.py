"""The public op: arguments checked, backend chosen, operator called.

Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D query/key head dim, Dv value head dim.
"""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import op, reference
from .plan import TreePlan

_log = logging.getLogger("treegrpo_kernels")
_announced: set[tuple[str, str]] = set()

MAX_HEAD_DIM = 256


class Backend(str, Enum):
    """Who computes. An explicit choice never falls back; AUTO says in the log what it chose and why."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"
    GATHER = "gather"


# torch.compile of torch 2.11 iterates over a tuple, but not over an Enum
_BACKENDS = tuple(Backend)


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | Backend = "auto",
    deterministic: bool = True,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | Backend = "auto",
    deterministic: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | Backend = "auto",
    deterministic: bool = True,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | Backend = "auto",
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every branch of a packed forest in one pass: token i sees exactly the tokens above it on its path.

    Args:
        q: [T, Hq, D]; k: [T, Hkv, D]; v: [T, Hkv, Dv]; one floating dtype, one device, any strides; Hq % Hkv == 0.
        plan: the forest, from ``TreePlan.build(subtree_end)``; its T and device must be those of q.
        scale: factor of q.k; default D ** -0.5.
        window: a query sees itself and the ``window - 1`` tokens above it on its path.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: [Hq] raw logits, one extra term of each head's softmax denominator.
        backend: ``auto | reference | cpu | triton | cuda | gather``.
        deterministic: bitwise repeatable results (the default). False lets backend="gather" add up gradients in any
            order, and backend="cuda" on Hopper dq, with five products a tile in backward, not seven: slower on an H200,
            and meant for GPUs with less arithmetic to their bandwidth. Elsewhere the same.
        return_lse: also return the natural log of the softmax denominator.

    Returns:
        out [T, Hq, Dv] in q's dtype; with ``return_lse`` also lse [T, Hq], float32 (float64 for float64 inputs).
        Differentiable in q, k, v and sinks; lse is not differentiable.

    Raises:
        ValueError: an argument that does not fit the others, or a backend that cannot do it, with the reason.
    """
    if not isinstance(plan, TreePlan):
        raise ValueError(f"plan is a {type(plan).__name__}: give a TreePlan, TreePlan.build(subtree_end)")
    if not isinstance(backend, str):
        raise ValueError(f"backend is a {type(backend).__name__}: give one of {', '.join(b.value for b in _BACKENDS)}")
    plain = op.is_plain(q, k, v, sinks)
    if (not plain or forward_ad._current_level >= 0) and backend not in ("reference", Backend.REFERENCE):
        op.refuse_transforms(q, k, v, sinks)
    scale = None if scale is None else float(scale)
    # all that the checks and choices read of the arguments: what passed once with this plan passes again
    key = (
        None
        if not plain
        else (
            *(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device),
            None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
            # 2 and 2.0 are one key, and one of them is no window
            *(scale, window, type(window), softcap, backend),
        )
    )
    call = plan.calls.get(key) if key else None
    if call is None:
        call = _prepare(q, k, v, plan, scale, window, softcap, sinks, backend)
        if key:
            plan.calls[key] = call
    chosen, scale, window, softcap, tiles, num_pairs = call
    if chosen is Backend.REFERENCE:
        out, lse = reference.tree_attention(
            q, k, v, plan.subtree_end, scale=scale, window=window, softcap=softcap, sinks=sinks, return_lse=True
        )
        return (out, lse.detach()) if return_lse else out
    if chosen is Backend.GATHER:
        from . import gather

        return gather.attend(q, k, v, plan, scale, window, softcap, deterministic, return_lse)
    attend = op.attend if plain else torch.ops.treegrpo.tree_attention
    # fmt: off
    out, lse = attend(
        q, k, v, sinks, plan.subtree_end, plan.position, tiles, scale, window, softcap, num_pairs, chosen.value,
        deterministic,
    )
    # fmt: on
    return (out, lse) if return_lse else out


class _Call(NamedTuple):
    """What a call of ``tree_attention`` comes down to; 0 for no window and no softcap, as in op.py."""

    backend: Backend
    scale: float
    window: int
    softcap: float
    tiles: list[Tensor]
    num_pairs: int


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str | Backend,
) -> _Call:
    """Check the arguments, choose the backend, make its tile lists. Reads shapes, dtypes and devices, no values."""
    _check(q, k, v, plan, scale, window, softcap, sinks)
    # a window as long as the longest path hides nothing, and kernels without windows are faster
    window = 0 if window is None or window >= plan.longest_path else window
    softcap = softcap or 0.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wanted = _parse(backend)
    chosen = _choose(wanted, q, v, softcap, sinks, scale)
    tiles: list[Tensor] = []
    if chosen is Backend.TRITON and q.shape[0]:
        from . import triton

        config = triton.config_for(q, v, softcap, scale)
        tiles = triton.tile_tensors(plan, q, v, window, config)
    elif wanted is Backend.CUDA and q.shape[0]:
        tiles = _hopper_cuda_tiles(q, k, v, plan, window, softcap, scale)
    # only the operator's FLOP formula reads the pairs; under a window they are counted on the device
    num_pairs = 0 if chosen in (Backend.REFERENCE, Backend.GATHER) else plan.count_pairs(window)
    return _Call(chosen, scale, window, softcap, tiles, num_pairs)


def _hopper_cuda_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    window: int,
    softcap: float,
    scale: float,
) -> list[Tensor]:
    """Tile lists of the CUDA kernels for Hopper where they serve; empty for the plain CUDA kernels, which need none."""
    from . import hopper_cuda

    refusal = hopper_cuda.refusal(q, v, window, softcap, scale)
    if not torch.compiler.is_compiling():
        _announce(Backend.CUDA, q, hopper_cuda.NOTE if refusal is None else f"plain kernels: {refusal}")
    return hopper_cuda.tile_tensors(plan, k.shape[1]) if refusal is None else []


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend -> None when usable on ``device``, else the reason.

    ``device`` defaults to the CUDA device if there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {b.value: _reason(b, device) for b in Backend if b is not Backend.AUTO}


def _parse(backend: str | Backend) -> Backend:
    # compared one by one: torch.compile traces this, and an Enum call on an arbitrary string it does not
    for known in _BACKENDS:
        if backend == known.value or backend is known:
            return known
    raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(b.value for b in _BACKENDS)}")


def _reason(backend: Backend, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``; None if it can. A fact of the process: torch.compile asks once."""
    match backend:
        case Backend.REFERENCE:
            return None
        case Backend.CPU:
            from . import native

            return native.cpu_reason() if device.type == "cpu" else f"runs on CPU tensors, not on {device.type}"
        case Backend.CUDA:
            from . import native

            return native.cuda_reason() if device.type == "cuda" else f"runs on CUDA tensors, not on {device.type}"
        case Backend.TRITON:
            from . import triton

            return triton.reason(device)
        case Backend.GATHER:
            from . import gather

            return gather.reason(device)
    raise ValueError(f"backend {backend.value!r} is a choice, not a kernel")


# all that torch.compiler.assume_constant_result does, which would import the compiler for those who compile nothing
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(backend: Backend, q: Tensor, softcap: float, sinks: Tensor | None) -> str | None:
    """Why ``backend`` cannot take these arguments, which fit each other, here; None if it can."""
    reason = _reason(backend, q.device)
    if reason is not None:
        return reason
    match backend:
        case Backend.CPU:
            return (
                None
                if q.dtype in (torch.float32, torch.bfloat16, torch.float64)
                else f"takes float32, bfloat16 and float64, not {q.dtype}"
            )
        case Backend.CUDA:
            if q.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                return None
            return f"takes float32, bfloat16, float16 and float64, not {q.dtype}"
        case Backend.TRITON:
            from . import triton

            return triton.refusal(q.dtype)
        case Backend.GATHER:
            from . import gather

            return gather.refusal(q.dtype, softcap, sinks)
        case _:
            return None


def _choose(wanted: Backend, q: Tensor, v: Tensor, softcap: float, sinks: Tensor | None, scale: float) -> Backend:
    if wanted is not Backend.AUTO:
        refusal = _refusal(wanted, q, softcap, sinks)
        if refusal is not None:
            raise ValueError(f"backend {wanted.value!r}: {refusal}")
        return wanted
    refusals = []
    for candidate in (Backend.TRITON, Backend.CUDA) if q.device.type == "cuda" else (Backend.CPU,):
        refusal = _refusal(candidate, q, softcap, sinks)
        if refusal is None:
            break
        refusals.append(f"{candidate.value}: {refusal}")
    else:
        candidate = Backend.REFERENCE
    if not torch.compiler.is_compiling():
        why = "; ".join(refusals) or f"the fastest for {q.device.type} tensors"
        if candidate is Backend.TRITON:
            from . import triton

            why += f"; {triton.kernels_for(q, v, softcap, scale)}"
        _announce(candidate, q, why)
    return candidate


def _announce(chosen: Backend, q: Tensor, why: str) -> None:
    key = (chosen.value, f"{q.device.type} {q.dtype}: {why}")
    if key not in _announced:
        _announced.add(key)
        level = logging.WARNING if chosen is Backend.REFERENCE else logging.INFO
        _log.log(level, "tree_attention on %s %s uses backend %s (%s)", q.device.type, q.dtype, chosen.value, why)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must be [T, heads, head_dim], got shape {tuple(x.shape)}: drop the batch dimension"
            )
        if x.shape[0] != plan.num_tokens:
            raise ValueError(
                f"{name} has {x.shape[0]} tokens but the plan is for {plan.num_tokens}: build the plan from this row"
            )
        if x.device != plan.device:
            raise ValueError(
                f"{name} is on {x.device} but the plan on {plan.device}: TreePlan.build(..., device={str(x.device)!r})"
            )
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {x.dtype}; q, k and v need one floating dtype (q has {q.dtype})")
    if k.shape[1] != v.shape[1] or 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"q has {q.shape[1]} heads, k {k.shape[1]}, v {v.shape[1]}: k and v must agree and divide q's number"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has head dim {q.shape[2]} but k {k.shape[2]}: their products need one")
    for name, dim in (("q", q.shape[2]), ("v", v.shape[2])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {dim}; supported are 1 to {MAX_HEAD_DIM}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}: use None for 1 / sqrt(D)")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window must be at least 1 (a token sees itself) and whole, got {window}: use None for no window"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}: use None for none")
    if sinks is not None and not sinks.is_floating_point():
        raise ValueError(f"sinks has dtype {sinks.dtype}: give floating-point logits")
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.device != q.device):
        raise ValueError(
            f"sinks must be [{q.shape[1]}] on {q.device}, a logit per query head: got {[*sinks.shape]}, {sinks.device}"
        )
