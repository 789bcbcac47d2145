"""Ways to compute a forest's attention: ours on each backend, and what one does without it. Each says what it cannot.

Shape legend: T packed tokens, L leaf-stream length (sum of leaf lengths), B leaves, H heads, D head dim, N longest
leaf.

A contender lays its rows out as the packed tree [T] or as the flattened leaves [L], and maps q, k, v of that length to
an output of that length.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import treegrpo_kernels as tk
from bench.workloads import Forest

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_DENSE_MASK_TOKENS = 16384
FLEX_WORKLOADS = ("grpo_star", "branching")


@dataclass(frozen=True)
class Request:
    """What a bench is about to ask: a contender answers with a reason when it cannot."""

    forest: Forest
    device: torch.device
    backward: bool
    quick: bool


@dataclass(frozen=True)
class Contender:
    name: str
    layout: str
    """"tree": rows are the T packed tokens; "leaf": the L tokens of the flattened leaves. On a GPU also "blocks" and
    "padded" (race.py)."""
    unsupported: Callable[[Request], str | None]
    prepare: Callable[[Forest, torch.device], Attend]
    """Builds plan, mask or index lists once, as a training step would for all its layers."""


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def tree_backend(backend: str) -> Contender:
    def unsupported(request: Request) -> str | None:
        if backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "0":
            return "TRITON_INTERPRET is set: interpreted kernels have no speed worth noting"
        return tk.backends(request.device)[backend]

    def prepare(forest: Forest, device: torch.device) -> Attend:
        plan = tk.TreePlan.build(forest.subtree_end, device=device)
        return lambda q, k, v: tk.tree_attention(q, k, v, plan, window=forest.window or None, backend=backend)

    return Contender(f"tree_{backend}", "tree", unsupported, prepare)


def dense_mask_unsupported(request: Request) -> str | None:
    num_tokens = request.forest.num_tokens
    if num_tokens > MAX_DENSE_MASK_TOKENS:
        return f"a dense mask of {num_tokens}^2 entries: more than {MAX_DENSE_MASK_TOKENS} tokens are left out"
    return None


def _dense_mask(forest: Forest, device: torch.device) -> Attend:
    mask = tk.reference.dense_mask(forest.subtree_end.to(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), attn_mask=mask)
        return out[0].transpose(0, 1)

    return attend


def _flex_unsupported(request: Request) -> str | None:
    if request.device.type == "cpu" and request.backward:
        return "FlexAttention has no backward on the CPU"
    if request.quick:
        return "FlexAttention compiles for half a minute: left out of quick runs"
    if request.device.type == "cpu" and request.forest.name not in FLEX_WORKLOADS:
        return f"FlexAttention compiles anew for each length: run on {' and '.join(FLEX_WORKLOADS)} only"
    return None


def _flex(forest: Forest, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end, num_tokens = forest.subtree_end.to(device), forest.num_tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    block_mask = create_block_mask(visible, None, None, num_tokens, num_tokens, device=device)
    # one compilation per length: the dynamic-shape kernel that a second length would bring fails on the CPU
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*map(heads_first, (q, k, v)), block_mask=block_mask)
        return out[0].transpose(0, 1)

    return attend


def _per_leaf(forest: Forest, device: torch.device) -> Attend:
    lengths = forest.leaf_offsets.diff().tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaves = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        outs = [F.scaled_dot_product_attention(*map(heads_first, leaf), is_causal=True) for leaf in leaves]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return attend


def _padded_unsupported(request: Request) -> str | None:
    lengths = request.forest.leaf_offsets.diff()
    padded = int(lengths.max()) * lengths.numel()
    if request.device.type == "cpu" and padded > 2 * MAX_DENSE_MASK_TOKENS:
        return f"{padded} padded tokens: too long for one round here"
    return None


def _padded(forest: Forest, device: torch.device) -> Attend:
    lengths = forest.leaf_offsets.diff()
    columns = torch.arange(int(lengths.max()))[None]
    # [B, N]: place of each padded slot in the leaf stream; pads repeat the leaf's last token
    slots = (forest.leaf_offsets[:-1, None] + columns.minimum(lengths[:, None] - 1)).to(device)
    filled = (columns < lengths[:, None]).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x[slots].transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return out.transpose(1, 2)[filled]

    return attend


def fast_tree_backend(request: Request) -> Contender | str:
    """The first of our backends that runs here, or why none does (the dense reference does not count)."""
    reasons = {contender.name: contender.unsupported(request) for contender in TREE_BACKENDS}
    for contender in TREE_BACKENDS:
        if reasons[contender.name] is None:
            return contender
    return "no fast tree backend runs here: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _always(request: Request) -> None:
    return None


TREE_BACKENDS = tuple(tree_backend(name) for name in ("cpu", "triton", "cuda", "gather"))
PER_LEAF = Contender("chain_sdpa", "leaf", _always, _per_leaf)
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *TREE_BACKENDS,
        Contender("sdpa_dense_mask", "tree", dense_mask_unsupported, _dense_mask),
        Contender("flex", "tree", _flex_unsupported, _flex),
        PER_LEAF,
        Contender("chain_sdpa_padded", "leaf", _padded_unsupported, _padded),
    )
}
