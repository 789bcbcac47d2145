"""The oracle: attention, convolution and gated delta rule straight from their definitions. Every backend, test and
bench is held against this.

Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D query/key head dim, Dv value head dim, B rows of a
block.

    key j is visible to query i   iff   j <= i < subtree_end[j]   (and position[i] - position[j] < window)
    s_ij = softcap * tanh(scale * q_i . k_j / softcap)            (softcap off: s_ij = scale * q_i . k_j)
    out_i = sum_j exp(s_ij - lse_i) v_j,   lse_i = log( sum_j exp(s_ij) + exp(sink) )

Plain differentiable torch on any device. Attention goes by blocks of queries, each recomputed in backward: memory is
O(T * B). Convolution and delta rule go token by token.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# scores of one block of query rows, all heads: 2**25 values are 256 MB in float64
_BLOCK_SCORES = 2**25


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense prefix-tree attention.

    q [T,Hq,D], k [T,Hkv,D], v [T,Hkv,Dv] of one floating dtype, subtree_end int [T]. Computes in float32, or float64
    for float64 inputs, under autocast too. Returns out [T,Hq,Dv] in q's dtype and, if asked, lse [T,Hq] in the dtype
    of the computation.
    """
    has_autocast = torch.amp.is_autocast_available(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        return _attend(q, k, v, subtree_end, scale, window, softcap, sinks, return_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    compute = compute_dtype(q.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    end = subtree_end.to(device=q.device, dtype=torch.int64)
    position = positions(end)
    group = num_heads // k.shape[1]
    q_h, k_h, v_h = (x.to(compute).transpose(0, 1) for x in (q, k, v))
    sink_h = None if sinks is None else sinks.to(compute)

    def rows(q_b: Tensor, k_b: Tensor, v_b: Tensor, sink_b: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        stop = start + q_b.shape[1]
        # scores [Hkv, G, B, stop]: keys after the block are invisible to all of it
        scores = scale * torch.einsum("hgbd,hnd->hgbn", q_b.unflatten(0, (-1, group)), k_b)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(stop, device=q.device)[None, :]
        visible = (j <= i) & (i < end[None, :stop])
        if window:
            visible &= position[start:stop, None] - position[None, :stop] < window
        scores = scores.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        if sink_b is not None:
            lse = torch.logaddexp(lse, sink_b.view(-1, group, 1))
        out = torch.einsum("hgbn,hnd->hgbd", torch.exp(scores - lse[..., None]), v_b)
        return out.flatten(0, 1), lse.flatten(0, 1)

    # forward mode asks for no gradient, and not every torch has one of a checkpoint
    recomputed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    block = max(1, _BLOCK_SCORES // max(1, num_heads * num_tokens))
    outs, lses = [], []
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        args = (q_h[:, start:stop], k_h[:, :stop], v_h[:, :stop], sink_h, start)
        out, lse = checkpoint(rows, *args, use_reentrant=False) if recomputed else rows(*args)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return no_tokens(q, k, v, return_lse, sinks)
    out = torch.cat(outs, dim=1).transpose(0, 1).contiguous().to(q.dtype)
    if not return_lse:
        return out
    return out, torch.cat(lses, dim=1).transpose(0, 1).contiguous()


def positions(subtree_end: Tensor) -> Tensor:
    """Depth in tokens of every token, int64 [T]: how many keys it sees, less itself."""
    num_tokens = subtree_end.shape[0]
    closing = torch.bincount(subtree_end.long(), minlength=num_tokens + 1)[:num_tokens]
    return (1 - closing).cumsum(0) - 1


def parents(subtree_end: Tensor) -> list[int]:
    """Packed index of the token before each one on its path, -1 for a root; one token after the other."""
    ends = subtree_end.tolist()
    found: list[int] = []
    path: list[int] = []
    for t in range(len(ends)):
        while path and ends[path[-1]] <= t:
            path.pop()
        found.append(path[-1] if path else -1)
        path.append(t)
    return found


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, subtree_end: Tensor) -> Tensor:
    """Depthwise convolution along every path: x [T,C], weight [C,K], bias [C] or None -> [T,C] in x's dtype.

    out[t] = bias + sum_j weight[:, K-1-j] * x[j-th token before t on its path], zero where the path has no more.
    """
    compute = compute_dtype(x.dtype)
    before = [*parents(subtree_end), -1]
    rows, taps = x.to(compute), weight.to(compute)
    outs = []
    for t in range(x.shape[0]):
        at, out = t, torch.zeros_like(rows[0]) if bias is None else bias.to(compute)
        for j in range(taps.shape[1]):
            if at >= 0:
                out = out + taps[:, taps.shape[1] - 1 - j] * rows[at]
            at = before[at]
        outs.append(out)
    return (torch.stack(outs) if outs else rows * 1).to(x.dtype)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, subtree_end: Tensor) -> Tensor:
    """The gated delta rule (arXiv 2412.06464) along every path, one token after the other.

    q, k [T,Hk,D], v [T,Hv,Dv] with Hk | Hv, g (log of the decay) [T,Hv] or [T,Hv,D], beta [T,Hv]; out [T,Hv,Dv] in q's
    dtype. A token takes the state S [D,Dv] of the token before it on its path, zero at a root:

        S_t = exp(g_t) S + k_t beta_t (v_t - (exp(g_t) S)^T k_t)^T,    out_t = S_t^T q_t

    beta None: S_t = exp(g_t) S + k_t v_t^T.
    """
    compute = compute_dtype(q.dtype)
    q_h, k_h = (x.to(compute).repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q, k))
    v_h, decay = v.to(compute), g.to(compute).exp()
    decay = decay[..., None] if g.dim() == 3 else decay[..., None, None]
    states: list[Tensor] = []
    outs = []
    for t, before in enumerate(parents(subtree_end)):
        state = v_h.new_zeros(v.shape[1], q.shape[2], v.shape[2]) if before < 0 else states[before] * decay[t]
        write = v_h[t]
        if beta is not None:
            write = beta.to(compute)[t, :, None] * (write - torch.einsum("hkv,hk->hv", state, k_h[t]))
        states.append(state + torch.einsum("hk,hv->hkv", k_h[t], write))
        outs.append(torch.einsum("hkv,hk->hv", states[-1], q_h[t]))
    return (torch.stack(outs) if outs else v_h * 1).to(q.dtype)


def dense_mask(subtree_end: Tensor, window: int | None = None) -> Tensor:
    """The whole mask as bool [T,T]; for pictures and small tests only, since it is O(T^2)."""
    end = subtree_end.long()
    i = torch.arange(end.shape[0], device=end.device)[:, None]
    j = torch.arange(end.shape[0], device=end.device)[None, :]
    visible = (j <= i) & (i < end[None, :])
    if window:
        position = positions(end)
        visible &= position[:, None] - position[None, :] < window
    return visible


def no_tokens(
    q: Tensor, k: Tensor, v: Tensor, return_lse: bool, sinks: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`tree_attention` returns for inputs with T = 0."""
    # summing the inputs keeps the graph, so that backward gives empty gradients, zeros for the sinks, and no error
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    out = q.new_zeros(0, q.shape[1], v.shape[2]) + 0 * sum(x.sum() for x in inputs)
    return (out, q.new_zeros(0, q.shape[1], dtype=compute_dtype(q.dtype))) if return_lse else out


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of ``dtype`` are summed in, by every backend; the log-sum-exp has it too."""
    return torch.float64 if dtype == torch.float64 else torch.float32
