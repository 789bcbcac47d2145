"""Recurrences along the paths of a tree in chunks: batched products within all chunks, then one step a level of chunks.

Shape legend: T packed tokens, N chunks, H value heads, C tokens of a chunk (padded), D key head dim, Dv value head dim.

With c the cumulative g within a chunk, A_ij = beta_i (k_i . k_j) exp(c_i - c_j) below the diagonal, and S the state the
chunk begins with (arXiv 2412.06464, section 3.3):

    U = (I + A)^-1 (beta v),   W = (I + A)^-1 (beta exp(c) k),   V' = U - W S
    out = exp(c) q S + tril(q k^T exp(c_i - c_j)) V',   S' = exp(c_C) S + (exp(c_C - c) k)^T V'

Without a delta rule V' is v itself. g is a number per head or one per key channel; exp then goes into the products over
D. Only S depends on the tree: chunks of one level take the states of the level before, all branches in one product.
Rows beyond a chunk's end are zero and leave S as it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pieces import Pieces, Runs, Slots, pieces_of, runs_of, slots_of
from .plan import TreePlan

CHUNK = 64
"""Most tokens of a chunk, as in the kernels of flash-linear-attention and in transformers."""
BLOCK = 16
"""Rows of a chunk whose per-channel decays go through one product: exp stays at most 1 on both sides of it."""


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    plan: TreePlan,
    *,
    chunk: int = CHUNK,
    kernels: bool | None = None,
) -> Tensor:
    """q (scaled) and k [T,Hk,D], v [T,H,Dv], g [T,H] or [T,H,D], beta [T,H] or None (no delta rule), all of one dtype
    -> [T,H,Dv]. ``kernels``: whether Triton's walk from state to state; by default where it serves."""
    if not plan.num_tokens:
        # keeps the graph, so that backward gives empty gradients and no error
        return v + 0 * sum(x.sum() for x in (q, k, g, beta) if x is not None)
    kernels = _kernels_serve(q) if kernels is None else kernels
    walk = runs_of(plan, chunk) if kernels else pieces_of(plan, chunk)
    cut = partial(_Cut.apply, slots_of(plan, chunk))
    # [N,Hk,C,D], [N,H,C,Dv], and [N,H,C,1] or [N,H,C,D]
    q, k = cut(q), cut(k)
    # below this exp is 0; sums with larger ones would forget the others, and those with -inf be none
    g = g.clamp(min=-746.0 if g.dtype == torch.float64 else -104.0)
    v, within = cut(v), cut(g if g.dim() == 3 else g[..., None]).cumsum(-2)
    since, to_end = within.exp(), (within[..., -1:, :] - within).exp()
    at_end = since[..., -1:, :].transpose(-1, -2)
    if beta is None:
        (scores,) = _scores(k, within, q)
        state, written = _Scan.apply(v, None, _each(k, to_end), at_end, walk)
    else:
        rate = cut(beta[..., None])
        scores, system = _scores(k, within, q, k)
        columns = rate * torch.cat([v, _each(k, since)], -1)
        solved = torch.linalg.solve_triangular(rate * system, columns, upper=False, unitriangular=True)
        u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
        state, written = _Scan.apply(u, w, _each(k, to_end), at_end, walk)
    out = _each(q, since) @ state + scores @ written
    return _Join.apply(slots_of(plan, chunk), out)


class _Cut(torch.autograd.Function):
    """x [T,H,D] -> [N,H,C,D], zero where a chunk has no more tokens. Its gradient is a gather, :class:`_Join`: that of
    index_select would add up all that stands in empty slots."""

    @staticmethod
    def forward(ctx: Any, slots: Slots, x: Tensor) -> Tensor:
        ctx.slots = slots
        out = x.new_zeros(slots.num_pieces, x.shape[1], slots.longest, x.shape[2])
        out.transpose(1, 2)[slots.piece, slots.row] = x
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        return None, _Join.apply(ctx.slots, dout)


class _Join(torch.autograd.Function):
    """x [N,H,C,D] -> [T,H,D]."""

    @staticmethod
    def forward(ctx: Any, slots: Slots, x: Tensor) -> Tensor:
        ctx.slots = slots
        return x.transpose(1, 2)[slots.piece, slots.row]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        return None, _Cut.apply(ctx.slots, dout)


def _each(x: Tensor, factor: Tensor) -> Tensor:
    """x [N,Hk,...] times factor [N,H,...] -> [N,H,...]: what a key head has, for each of its value heads."""
    return (x.unsqueeze(2) * factor.unflatten(1, (x.shape[1], -1))).flatten(1, 2)


def _scores(k: Tensor, within: Tensor, *rows: Tensor) -> list[Tensor]:
    """For each of ``rows`` [N,Hk,C,D]: [N,H,C,C], row_i . (exp(within_i - within_j) k_j) for j <= i, else 0."""
    size = k.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    if within.shape[-1] == 1:
        # masked before exp: above the diagonal it would overflow
        decay = (within - within.transpose(-1, -2)).masked_fill(above, float("-inf")).exp()
        return [_each(x @ k.transpose(-1, -2), decay) for x in rows]
    parts: list[list[Tensor]] = [[] for _ in rows]
    for begin in range(0, size, BLOCK):
        block = slice(begin, min(begin + BLOCK, size))
        mine = within[..., block, :]
        # what lies before the block decays to its beginning and from there: two factors of at most 1
        border = within[..., begin - 1 : begin, :] if begin else torch.zeros_like(mine[..., :1, :])
        before = _each(k[..., :begin, :], (border - within[..., :begin, :]).exp()).transpose(-1, -2)
        hidden = above[block, block][..., None]
        decay = (mine.unsqueeze(-2) - mine.unsqueeze(-3)).masked_fill(hidden, float("-inf")).exp()
        decayed = _each(k[..., block, :].unsqueeze(-3), decay).unflatten(1, (k.shape[1], -1))
        for x, found in zip(rows, parts, strict=True):
            own = torch.einsum("nhid,nhgijd->nhgij", x[..., block, :], decayed).flatten(1, 2)
            far = _each(x[..., block, :], (mine - border).exp()) @ before
            found.append(torch.nn.functional.pad(torch.cat([far, own], -1), (0, size - block.stop)))
    return [torch.cat(found, -2) for found in parts]


def _kernels_serve(x: Tensor) -> bool:
    """Whether Triton's walk takes queries like ``x`` [T, H, D]."""
    from . import triton

    if x.device.type != "cuda" or x.dtype != torch.float32 or triton.reason(x.device) is not None:
        return False
    from .triton.state_scan import LARGEST_DIM

    return x.shape[2] <= LARGEST_DIM


class _Scan(torch.autograd.Function):
    """The states that chunks begin with, and V' = U - W S (U where W is None): by Triton's kernels where ``walk``
    is the plan's runs, else by levels of chunks, all branches in one product."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, w: Tensor | None, k: Tensor, decay: Tensor, walk: Pieces | Runs
    ) -> tuple[Tensor, Tensor]:
        """u [N,H,C,Dv], w and k [N,H,C,D], decay [N,H,1,1] or [N,H,D,1] -> state [N,H,D,Dv], written [N,H,C,Dv]."""
        if isinstance(walk, Runs):
            from .triton.state_scan import scan

            state, written = scan(u, w, k, decay, walk)
        else:
            state, written = _scan(u, w, k, decay, walk)
        ctx.save_for_backward(w, k, decay, state, written)
        ctx.walk = walk
        return state, written

    @staticmethod
    def backward(ctx: Any, dstate: Tensor, dwritten: Tensor) -> tuple[Tensor | None, ...]:
        """dU = dV', dW = -dV' S^T, dk = V' dS'^T, d(decay) = <S, dS'>, where dS' sums the children's dS."""
        # once_differentiable would leave the part that goes other ways, where gradients of some inputs are asked for
        if torch.is_grad_enabled():
            raise RuntimeError(
                "recurrences on trees have no second derivative (a gradient penalty would need one): take"
                " way='reference'"
            )
        w, k, decay, state, written = ctx.saved_tensors
        if isinstance(ctx.walk, Runs):
            from .triton.state_scan import scan_backward

            dbehind, dwritten = scan_backward(w, k, decay, dstate, dwritten, ctx.walk)
        else:
            dbehind, dwritten = _scan_backward(w, k, decay, dstate, dwritten, ctx.walk)
        dw = None if w is None else -dwritten @ state.transpose(-1, -2)
        dk = written @ dbehind.transpose(-1, -2)
        ddecay = (state * dbehind).sum_to_size(decay.shape)
        return dwritten, dw, dk, ddecay, None


def _scan(u: Tensor, w: Tensor | None, k: Tensor, decay: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    state = u.new_zeros(*u.shape[:2], k.shape[-1], u.shape[-1])
    written = u.clone()
    sizes = pieces.level_pieces
    parts = zip(*(x.split(sizes) for x in (k, decay, state, written, pieces.parent)), strict=True)
    reads = None if w is None else w.split(sizes)
    behind: Tensor | None = None
    for level, (k_l, decay_l, state_l, written_l, parent) in enumerate(parts):
        if behind is not None:
            torch.index_select(behind, 0, parent, out=state_l)
            if reads is not None:
                written_l -= reads[level] @ state_l
        if level + 1 < len(sizes):
            behind = decay_l * state_l + k_l.transpose(-1, -2) @ written_l
    return state, written


def _scan_backward(
    w: Tensor | None, k: Tensor, decay: Tensor, dstate: Tensor, dwritten: Tensor, pieces: Pieces
) -> tuple[Tensor, Tensor]:
    """(dS' of every chunk, all of dV')."""
    sizes = pieces.level_pieces
    dstate, dwritten = dstate.clone(), dwritten.clone()
    dbehind = torch.zeros_like(dstate)
    parts = zip(*(x.split(sizes) for x in (k, decay, dstate, dwritten)), strict=True)
    reads = None if w is None else w.split(sizes)
    parents, dbehinds = pieces.parent.split(sizes), dbehind.split(sizes)
    for level, (k_l, decay_l, dstate_l, dwritten_l) in reversed(list(enumerate(parts))):
        if level + 1 < len(sizes):
            # which holds what the level below put there
            dwritten_l += k_l @ dbehinds[level]
            dstate_l += decay_l * dbehinds[level]
        if level:
            if reads is not None:
                dstate_l -= reads[level].transpose(-1, -2) @ dwritten_l
            # not index_add_: on a GPU it adds in any order
            dbehinds[level - 1].index_put_((parents[level],), dstate_l, accumulate=True)
    return dbehind, dwritten
