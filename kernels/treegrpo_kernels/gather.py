"""backend="gather": what existing kernels can do with a tree. Each unbranched run of tokens (a segment) attends,
bottom-right causal, to K and V gathered along its whole path; all segments go through one variable-length call of
flash-attn, else torch's.

Shape legend: T packed tokens, S segments, P gathered rows (sum of the segments' path lengths), Hq/Hkv query and
key/value heads, D query/key head dim, Dv value head dim.

It costs what a tree kernel saves: K and V are copied once per segment that sees them, and their gradients summed back.
The layout is that of huggingface/trl's tree packing (1.16). Everything here is differentiable torch around the call.
"""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .plan import TreePlan

# (q [T,Hq,D], k [P,Hkv,D], v [P,Hkv,D], layout, scale, window, softcap, deterministic) -> (out [T,Hq,D], lse [T,Hq])
Varlen = Callable[[Tensor, Tensor, Tensor, "Layout", float, int, float, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Segments of one plan and their paths.

    Example: subtree_end = [6 6 5 4 5 6] has the segments [0 1] [2] [3] [4] [5], cu_q = [0 2 3 4 5 6],
    path = [0 1 | 0 1 2 | 0 1 2 3 | 0 1 2 4 | 0 1 5], cu_k = [0 2 5 9 13 16].
    """

    cu_q: Tensor  # int32 [S+1] offsets of the segments in the packed row
    cu_k: Tensor  # int32 [S+1] offsets of the segments' paths in ``path``
    max_q: int  # longest segment
    max_k: int  # longest path
    path: Tensor  # int64 [P] packed index of every token of every segment's path, root first


def layout_of(plan: TreePlan) -> Layout:
    """The plan's layout, built once per plan in O(P)."""
    return plan.made_once("gather", lambda: _build_layout(plan.subtree_end))


# kept for calls that save it for their backward, whoever comes first
@torch.inference_mode(False)
@torch.no_grad()
def _build_layout(subtree_end: Tensor) -> Layout:
    end = subtree_end.long()
    num_tokens, device = end.shape[0], end.device
    # token t is the only child of t-1 iff their subtrees end together: segments are runs of equal subtree_end
    opens = torch.ones(num_tokens, dtype=torch.bool, device=device)
    opens[1:] = end[1:] != end[:-1]
    start = torch.nonzero(opens).squeeze(1)
    bounds = torch.cat([start, end.new_tensor([num_tokens])])
    length = bounds.diff()
    # segment a lies on the paths of the contiguous segments [a, below[a])
    below = torch.searchsorted(start, end[start])
    index = torch.arange(start.shape[0], device=device)
    ancestor = torch.repeat_interleave(index, below - index)
    first = (below - index).cumsum(0) - (below - index)
    segment = torch.arange(ancestor.shape[0], device=device) - first[ancestor] + ancestor
    # a stable sort keeps the ancestors of each segment in order, root first
    segment, order = torch.sort(segment, stable=True)
    ancestor = ancestor[order]
    rows = length[ancestor]
    row_first = rows.cumsum(0) - rows
    pair = torch.repeat_interleave(torch.arange(ancestor.shape[0], device=device), rows)
    path = start[ancestor[pair]] + torch.arange(pair.shape[0], device=device) - row_first[pair]
    path_length = torch.zeros_like(length).index_add_(0, segment, rows)
    cu_k = F.pad(path_length.cumsum(0), (1, 0)).to(torch.int32)
    max_q, max_k = torch.stack([length.max(), path_length.max()]).tolist()
    return Layout(cu_q=bounds.to(torch.int32), cu_k=cu_k, max_q=max_q, max_k=max_k, path=path)


def reason(device: torch.device) -> str | None:
    """None where a varlen kernel runs on ``device``, else why not, as a sentence."""
    if device.type != "cuda":
        return f"gather needs a GPU, not {device.type!r}: flash-attn and torch's varlen attention have no other kernels"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"flash attention needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    flash_error = _missing("flash_attn", "flash_attn_varlen_func")
    torch_error = _missing("torch.nn.attention.varlen", "varlen_attn")
    if flash_error and torch_error:
        return f"neither flash-attn ({flash_error}) nor torch's varlen attention ({torch_error}) imports"
    return None


def refusal(dtype: torch.dtype, softcap: float, sinks: Tensor | None) -> str | None:
    """None where gather takes inputs of this dtype with these options, else what it does not, as a sentence."""
    if sinks is not None:
        return "gather has no sinks: the varlen kernels do not take them"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"gather takes bfloat16 and float16, not {dtype}: the flash kernels have no other"
    if softcap:
        error = _missing("flash_attn", "flash_attn_varlen_func")
        if error:
            return f"gather has softcap only through flash-attn, which does not import: {error}"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    scale: float,
    window: int,
    softcap: float,
    deterministic: bool,
    return_lse: bool,
    varlen: Varlen | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [T,Hq,D], k [T,Hkv,D], v [T,Hkv,Dv] -> out [T,Hq,Dv] in q's dtype, and lse [T,Hq] fp32 if asked.

    ``varlen`` replaces the kernel (the tests pass plain torch). Differentiable in q, k and v; lse is not.
    """
    if q.shape[0] == 0:
        return reference.no_tokens(q, k, v, return_lse)
    layout = layout_of(plan)
    if layout.path.shape[0] == q.shape[0]:
        # chains: every path is its own segment, in place
        take = _keep
    else:
        take = _Take.apply if deterministic else _take
    # the flash kernels take one head dim, a multiple of 8; zeros change no score and no output column that is kept
    width = -(-max(q.shape[2], v.shape[2]) // 8) * 8
    q_p, k_p, v_p = (F.pad(x, (0, width - x.shape[2])) for x in (q, take(k, layout.path), take(v, layout.path)))
    out, lse = (varlen or _kernel())(q_p, k_p, v_p, layout, scale, window, softcap, deterministic)
    out = out[..., : v.shape[2]]
    return (out, lse.detach()) if return_lse else out


def _keep(x: Tensor, path: Tensor) -> Tensor:
    return x


def _take(x: Tensor, path: Tensor) -> Tensor:
    return x.index_select(0, path)


class _Take(torch.autograd.Function):
    """index_select whose adjoint adds in the order of the paths: index_put_ sorts, index_add_ races."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor) -> Tensor:
        ctx.save_for_backward(path)
        ctx.shape = x.shape
        return x.index_select(0, path)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (path,) = ctx.saved_tensors
        return dy.new_zeros(ctx.shape).index_put_((path,), dy, accumulate=True), None


def _missing(module: str, name: str) -> str | None:
    """Why the function does not import; None if it does."""
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def _kernel() -> Varlen:
    return _torch_varlen if _missing("flash_attn", "flash_attn_varlen_func") else _flash_varlen


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=True,
    )
    return out, lse.transpose(0, 1)


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    if softcap:
        raise ValueError("torch's varlen attention has no softcap: install flash-attn")
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # torch 2.11 takes grouped heads without being told, later ones want the flag
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    out, lse = varlen_attn(
        q,
        k,
        v,
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=_window_size(window),
        **grouped,
    )
    if deterministic:
        fix_order(out)
    return out, lse.transpose(0, 1)


def fix_order(out: Tensor) -> None:
    """Has the autograd node that made ``out`` run under torch's deterministic switch: torch's varlen attention offers
    no other way to ask for a fixed order of addition."""
    if out.grad_fn is None:
        return
    switches: list[weakref.ref[_DeterministicSwitch]] = []

    def switch_on(grads: tuple[Tensor | None, ...]) -> None:
        switch = _DeterministicSwitch()
        switches.append(weakref.ref(switch))
        # nothing but this backward holds on to the switch: it goes with it, also where the kernel raises
        torch.autograd.Variable._execution_engine.queue_callback(switch.back)

    def switch_back(grads_in: tuple[Tensor | None, ...], grads_out: tuple[Tensor | None, ...]) -> None:
        switch = switches.pop()()
        # who is gone already has switched back
        if switch is not None:
            switch.back()

    out.grad_fn.register_prehook(switch_on)
    out.grad_fn.register_hook(switch_back)


class _DeterministicSwitch:
    """torch's deterministic switch, on from now until :meth:`back`, or until nobody holds this object."""

    def __init__(self) -> None:
        self._is_on = True
        self._asked = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)

    def back(self) -> None:
        if self._is_on:
            self._is_on = False
            torch.use_deterministic_algorithms(self._asked, warn_only=self._warn_only)

    __del__ = back


def _window_size(window: int) -> tuple[int, int]:
    """flash attention's (left, right): a window of W counts the query itself."""
    return (window - 1, 0) if window else (-1, 0)
