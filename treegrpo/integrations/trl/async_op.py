"""AsyncGRPOTrainer packs trees itself: its rows through our op, in place of its gathered keys and values.

    trainer = AsyncGRPOTrainer(...)
    treegrpo.integrations.trl.use_tree_op()

No kernel from a hub, no copies of keys and values, any GPU from sm_80 and the CPU. Shape legend: T unique tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

import treegrpo_kernels as tk
from treegrpo.hf import attend
from treegrpo.recurrent import kinds_of


def use_tree_op() -> None:
    """From now on models of attention ``tree_fa3``, TRL's name in AsyncGRPOTrainer, run through our op.

    Call it after the trainer is built: its constructor registers TRL's own function under that name.
    """
    from trl.experimental.async_grpo.packing import TREE_ATTENTION

    AttentionInterface.register(TREE_ATTENTION, async_tree_attention)


def async_tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    tree_max_seqlen_q: int,
    tree_max_seqlen_k: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """TRL's ``tree_attention`` of a packed row: query [1, Hq, T, D] -> (out [1, T, Hq, Dv], None).

    The keywords are those of ``TreeRow.pack``; of them the boundaries alone are read, once a row.
    """
    plan = getattr(tree_cu_seqlens_q, "treegrpo_plan", None)
    if plan is None:
        _check_layers(module)
        # kept on the tensor, which every layer of a forward and its recomputation is given
        plan = plan_of_row(tree_cu_seqlens_q, tree_cu_seqlens_k)
        tree_cu_seqlens_q.treegrpo_plan = plan  # type: ignore[attr-defined]
    return attend(query, key, value, plan, scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux), None


def _check_layers(module: torch.nn.Module) -> None:
    """Refuses models whose other layers would read the row as one sequence, as AsyncGRPOTrainer's constructor does."""
    if kinds := kinds_of(getattr(module, "config", None)):
        raise ValueError(
            f"{type(module).__name__}'s model has layers of type {', '.join(sorted(kinds))}, which are not told of the"
            " row's samples and would mix them: train it with TreeGRPOTrainer, or take a model whose layers are all"
            " attention"
        )


def plan_of_row(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tk.TreePlan:
    """The plan of a TreeRow from its segments' boundaries in the row and in their paths, int32 [S + 1] each.

    Segments lie in depth-first order, and a path is what lies above its segment, and the segment: so the tokens above
    tell where the subtree of each segment before it ends.
    """
    starts, paths = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    above = [b - a - own for a, b, own in zip(paths, paths[1:], lengths, strict=False)]
    ends = [starts[-1]] * len(lengths)
    opened: list[int] = []
    for segment, depth in enumerate(above):
        while opened and depth < above[opened[-1]] + lengths[opened[-1]]:
            ends[opened.pop()] = starts[segment]
        opened.append(segment)
    subtree_end = torch.repeat_interleave(torch.tensor(ends), torch.tensor(lengths))
    return tk.TreePlan.build(subtree_end, device=cu_seqlens_q.device)
