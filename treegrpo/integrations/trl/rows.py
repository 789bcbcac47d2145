"""Rows of prompt and completion, padded anywhere -> packed rows of unique tokens, and what is read back from them.

Shape legend: B rows, S columns of prompt and completion, C completion columns, L tokens of all rows, T unique tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from treegrpo.logprobs import unwrap
from treegrpo.packing import TreeBatch, cut_tree, pack
from treegrpo.tree import Trajectory, build_tree

EXPERTS = ("num_experts", "num_experts_per_tok")


def packed(input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> TreeBatch:
    """Rows [B, S], padded anywhere, as one packed tree on their device; trained is what of the last ``logits_to_keep``
    columns is no padding. Leaves keep the rows' order, and their stream is the rows' tokens in order."""
    ((_, batch),) = pack_rows(input_ids, attention_mask, logits_to_keep)
    return batch


def pack_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    group_size: int | None = None,
    token_budget: int | None = None,
) -> list[tuple[Tensor, TreeBatch]]:
    """``packed`` in as many packed rows as ``token_budget`` unique tokens each ask for (None: one).

    Groups of ``group_size`` rows that follow each other stay whole where they fit; one that does not is cut between
    leaves that share least.

    Returns:
        For each packed row the numbers of the rows in it, int64 on the CPU, and the batch, its leaves in that order.

    Raises:
        ValueError: a row alone is longer than ``token_budget``.
    """
    device, mask = input_ids.device, attention_mask.bool()
    trained = mask.clone()
    trained[:, :-logits_to_keep] = False
    # one copy to the host; the trie is built there
    ids, mask, trained = torch.stack([input_ids.long(), mask.long(), trained.long()]).cpu().numpy()
    leaves = [
        Trajectory(row[kept], targets[kept], reward=0.0)
        for row, kept, targets in zip(ids, mask.astype(bool), trained, strict=True)
    ]
    number = len(leaves)
    size = group_size if group_size and number % group_size == 0 else number
    parts = [list(range(start, start + size)) for start in range(0, number, size)]
    if token_budget is not None:
        for row, leaf in enumerate(leaves):
            if leaf.num_tokens > token_budget:
                raise ValueError(
                    f"token_budget={token_budget}, but row {row} of the micro-batch alone has {leaf.num_tokens} tokens:"
                    " raise it to at least the longest prompt and max_completion_length together"
                )
        parts = [
            [rows[leaf] for leaf in part]
            for rows in parts
            for part in cut_tree(build_tree([leaves[row] for row in rows]), token_budget)
        ]
    trees = [build_tree([leaves[row] for row in part]) for part in parts]
    return [
        (torch.tensor([row for tree in batch.tree_indices for row in parts[tree]]), batch)
        for batch in pack(trees, token_budget=token_budget, device=device)
    ]


@contextmanager
def recorded_router_logits(model: torch.nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """While open, every forward of the mixture of experts ``model`` adds its router logits [T, experts] a layer."""
    base = unwrap(model)
    config, found = base.config.get_text_config(), []

    def keep(module: torch.nn.Module, args: Any, out: Any) -> None:
        found.append(tuple(x for x in out.router_logits if x is not None))

    # on the decoder: adapters call the forward of the whole model past its hooks
    handle = base.base_model.register_forward_hook(keep)
    before, config.output_router_logits = config.output_router_logits, True
    try:
        yield found
    finally:
        config.output_router_logits = before
        handle.remove()


def check_router_loss(model: torch.nn.Module) -> None:
    """ValueError unless ``router_loss`` can be computed for the model."""
    base = unwrap(model)
    missing = [name for name in EXPERTS if _number(base, name) is None]
    if missing:
        raise ValueError(
            f"router_aux_loss_coef: {type(base).__name__} has no {missing[0]}, from which its load-balancing loss could"
            " be computed on a packed row: set it to 0"
        )


def _number(base: Any, name: str) -> int | None:
    """Of the model, or where it computes no router loss itself, of its configuration, as TRL takes it."""
    return getattr(base, name, None) or getattr(base.config.get_text_config(), name, None)


def router_loss(model: torch.nn.Module, router_logits: list[tuple[Tensor, ...]], batches: list[TreeBatch]) -> Tensor:
    """The load-balancing loss of the flattened rows from the router logits of their packed rows: 0-d.

    The model's own function (without one Mixtral's, as in TRL) takes a mask that weighs tokens; here a token weighs as
    many as the rows that hold it.
    """
    base = unwrap(model)
    loss = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", load_balancing_loss_func)
    layers = tuple(torch.cat(layer) for layer in zip(*router_logits, strict=True))
    counts = torch.cat([batch.token_offsets.diff() for batch in batches])
    numbers = [_number(base, name) for name in EXPERTS]
    return loss(layers, *numbers, counts[None].to(layers[0].device, torch.float32))
