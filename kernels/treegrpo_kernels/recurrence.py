"""Layers that carry a state along the path, on packed trees: the recurrent layers of hybrid models.

Shape legend: T packed tokens, Hk key heads, Hv value heads (Hk | Hv), D key head dim, Dv value head dim.

    S_t = exp(g_t) S + k_t beta_t (v_t - (exp(g_t) S)^T k_t)^T     gated delta rule (arXiv 2412.06464, eq. 10)
    S_t = exp(g_t) S + k_t v_t^T                                   gated linear attention (Mamba-2: arXiv 2405.21060)
    out_t = scale S_t^T q_t

where S [D, Dv] is the state behind the token before t on its path, zero at a root. Branches fork the state: a piece of
the tree (pieces.py) begins with the one its parent ends with, so no token is computed twice.

Ways: ``fla``, the variable-length kernels of flash-linear-attention (0.6), called once a level of pieces (delta rule);
``torch``, chunks of the whole forest in batched products (state_chunks.py), which any device and dtype takes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference
from .pieces import Pieces, pieces_of
from .plan import TreePlan
from .state_chunks import BLOCK, CHUNK, chunked

_log = logging.getLogger("treegrpo_kernels")

RECOMPUTE_FROM = 2**28
"""Bytes: a layer that would keep more for its backward computes its chunks again there, and keeps its inputs."""
WAYS = ("auto", "fla", "torch", "reference")


def tree_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    normalize: bool = False,
    way: str = "auto",
) -> Tensor:
    """The gated delta rule along every path of the packed tree; one pass over unique tokens.

    Args:
        q, k: [T, Hk, D].
        v: [T, Hv, Dv]; key head h serves value heads h * Hv/Hk up to (h + 1) * Hv/Hk.
        g: log of the decay, at most 0: [T, Hv], or per key channel [T, Hv, D] (Kimi delta attention, arXiv 2510.26692).
        beta: [T, Hv] how much of a value is written.
        plan: of the row's T tokens, on q's device.
        scale: of q; D ** -0.5 by default.
        normalize: q and k are divided by their length first: x * rsqrt(sum x^2 + 1e-6).
        way: ``auto | fla | torch | reference``; auto takes fla where it runs (:func:`fla_reason`), else torch.

    Returns:
        [T, Hv, Dv] in q's dtype, computed in float32 (float64 for float64 inputs; fla: as its kernels do);
        differentiable.

    Raises:
        ValueError: shapes that do not fit each other or the plan; an unknown way, or fla where it cannot run.
    """
    _check(q, k, v, g, plan)
    if beta.shape != v.shape[:2]:
        raise ValueError(f"beta has shape {tuple(beta.shape)}: give [T, Hv] = {tuple(v.shape[:2])}")
    if way not in WAYS:
        raise ValueError(f"way={way!r} is not known: take one of {', '.join(WAYS)}")
    reason = fla_reason(q.device, q.dtype, g.dim() == 3, q.shape[2]) if way in ("auto", "fla") else None
    if way == "fla" and reason is not None:
        raise ValueError(f"way='fla' cannot run here: {reason}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if way == "auto" and not torch.compiler.is_compiling():
        _announce(q.device.type, reason)
    if way == "fla" or (way == "auto" and reason is None):
        return _fla_by_levels(q, k, v, g, beta, plan, scale, normalize)
    return _in_torch(q, k, v, g, beta, plan, scale, normalize, way)


def tree_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: TreePlan, *, scale: float | None = None, way: str = "auto"
) -> Tensor:
    """Gated linear attention along every path of the packed tree, Mamba-2's scan among it (q = C, k = B, v = dt x, g =
    dt A, scale = 1).

    Arguments, result and errors are those of :func:`tree_gated_delta_rule`; ``way``: ``auto | torch | reference``.
    """
    _check(q, k, v, g, plan)
    if way not in WAYS or way == "fla":
        raise ValueError(f"way={way!r} is not known: take one of auto, torch, reference")
    return _in_torch(q, k, v, g, None, plan, q.shape[2] ** -0.5 if scale is None else scale, False, way)


@functools.cache
def _announce(device: str, reason: str | None) -> None:
    """Says what auto takes and why, once; as a warning where a GPU could do better."""
    level = logging.WARNING if device == "cuda" and reason is not None else logging.INFO
    _log.log(level, "tree_gated_delta_rule on %s uses %s", device, f"torch ({reason})" if reason else "fla")


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: TreePlan) -> None:
    num_tokens = plan.num_tokens
    if q.dim() != 3 or q.shape[0] != num_tokens:
        raise ValueError(f"q has shape {tuple(q.shape)}: give [T, Hk, D] for the plan's T = {num_tokens} tokens")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, q {tuple(q.shape)}: they must be alike")
    if v.dim() != 3 or v.shape[0] != num_tokens or v.shape[1] % q.shape[1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}: give [T, Hv, Dv] with T = {num_tokens} and Hv a multiple of q's"
            f" {q.shape[1]} heads"
        )
    if g.shape not in (v.shape[:2], (*v.shape[:2], q.shape[2])):
        raise ValueError(
            f"g has shape {tuple(g.shape)}: give [T, Hv] = {tuple(v.shape[:2])}, or [T, Hv, D] with D = {q.shape[2]}"
        )
    if plan.device != q.device:
        raise ValueError(f"plan is on {plan.device}, q on {q.device}: build it with TreePlan.build(..., device=...)")


def fla_reason(device: torch.device, dtype: torch.dtype, per_channel: bool = False, head_dim: int = 0) -> str | None:
    """None where flash-linear-attention's kernels serve, with decays per head or per channel; else why not."""
    if device.type != "cuda":
        return f"flash-linear-attention's kernels need a GPU, not {device.type!r}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-linear-attention's kernels take bfloat16 and float16, not {dtype}"
    if head_dim > 256:
        return f"flash-linear-attention's kernels take keys of at most 256, not {head_dim}"
    return _missing(per_channel, torch.cuda.get_device_capability(device)[0] == 9)


@functools.cache
def _missing(per_channel: bool, is_hopper: bool) -> str | None:
    for name in ("fla.ops.gated_delta_rule", "fla.ops.kda"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"flash-linear-attention does not import ({error}): pip install 'treegrpo[hybrid]'"
    if per_channel or not is_hopper or importlib.util.find_spec("tilelang") is not None:
        return None
    # the package has other names where torch brings it, and versions like 3.7.0rc1
    version = importlib.import_module("triton").__version__
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if (3, 4, 0) <= numbers < (3, 7, 1):
        # fla raises in backward; its issue 640
        return (
            f"flash-linear-attention's gated backward is wrong on Hopper with Triton {version}: pip install tilelang,"
            " or Triton 3.7.1 or newer"
        )
    return None


def _in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    plan: TreePlan,
    scale: float,
    normalize: bool,
    way: str,
) -> Tensor:
    def compute(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            dtype, wide = q.dtype, reference.compute_dtype(q.dtype)
            q, k, v, g = (x.to(wide) for x in (q, k, v, g))
            beta = None if beta is None else beta.to(wide)
            if normalize:
                q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
            q = q * scale
            if way == "reference":
                return reference.gated_delta_rule(q, k, v, g, beta, plan.subtree_end).to(dtype)
            return chunked(q, k, v, g, beta, plan).to(dtype)

    in_chunks = way != "reference" and torch.is_grad_enabled()
    if in_chunks and kept_bytes(q, v, g, beta, plan) > RECOMPUTE_FROM:
        return checkpoint(compute, q, k, v, g, beta, use_reentrant=False, preserve_rng_state=False)
    return compute(q, k, v, g, beta)


def kept_bytes(q: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, plan: TreePlan) -> int:
    """What a backward through chunks would have kept, roughly."""
    dim, value_dim = q.shape[2], v.shape[2]
    a_chunk = CHUNK * (8 * dim + 5 * value_dim + 5 * CHUNK) + dim * value_dim
    a_chunk = a_chunk // 2 if beta is None else a_chunk
    if g.dim() == 3:
        a_chunk += 2 * CHUNK * BLOCK * dim
    return pieces_of(plan, CHUNK).num_pieces * v.shape[1] * a_chunk * (8 if q.dtype == torch.float64 else 4)


def _fla_by_levels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, plan: TreePlan, scale: float, normalize: bool
) -> Tensor:
    """One variable-length call a level, each piece from the state its parent ends with."""
    if g.dim() == 3:
        from fla.ops.kda import chunk_kda as rule
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule
    pieces = pieces_of(plan)
    offsets = plan.made_once("fla", lambda: _offsets(pieces))
    parents = pieces.parent.split(pieces.level_pieces)
    # each row once, so that the gradient of the gather adds nothing up
    rows = [x.index_select(0, pieces.token).split(pieces.level_tokens) for x in (q, k, v, g, beta)]
    outs = []
    state: Tensor | None = None
    for level, (q_l, k_l, v_l, g_l, beta_l) in enumerate(zip(*rows, strict=True)):
        out, state = rule(
            q_l[None],
            k_l[None],
            v_l[None],
            g=g_l[None],
            beta=beta_l[None],
            scale=scale,
            # with brackets, not index_select: its gradient adds up what siblings share in a fixed order
            initial_state=None if state is None else state[parents[level]],
            output_final_state=level + 1 < len(parents),
            use_qk_l2norm_in_kernel=normalize,
            **offsets[level],
        )
        outs.append(out[0])
    return torch.cat(outs).index_select(0, pieces.place)


# kept for calls that save it for their backward, whoever comes first
@torch.inference_mode(False)
@torch.no_grad()
def _offsets(pieces: Pieces) -> list[dict[str, Tensor]]:
    """Where the pieces of each level begin, and fla's list of their chunks, which it would wait for in every call.

    chunk_kda takes no such list (0.6): it waits for its own, where there are more levels than the four of its cache.
    """
    from fla.ops.utils import prepare_chunk_indices

    made = []
    for length in pieces.length.split(pieces.level_pieces):
        offsets = F.pad(length.cumsum(0), (1, 0))
        made.append({"cu_seqlens": offsets, "chunk_indices": prepare_chunk_indices(offsets, CHUNK)})
    return made
