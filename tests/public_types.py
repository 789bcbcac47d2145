"""What a type checker sees of the public names: `make lint` has mypy read it, nothing here is ever run."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_type

import treegrpo
import treegrpo_kernels as tk
from treegrpo.logprobs import chain_logprobs


def the_op(q: Tensor, k: Tensor, v: Tensor, wants_lse: bool) -> None:
    plan = tk.TreePlan.build(torch.tensor([6, 6, 5, 4, 5, 6]))
    assert_type(plan.num_pairs, int)
    assert_type(tk.tree_attention(q, k, v, plan), Tensor)
    assert_type(tk.tree_attention(q, k, v, plan, window=128, sinks=None, backend="triton"), Tensor)
    assert_type(tk.tree_attention(q, k, v, plan, return_lse=True), tuple[Tensor, Tensor])
    assert_type(tk.tree_attention(q, k, v, plan, return_lse=wants_lse), Tensor | tuple[Tensor, Tensor])
    assert_type(tk.backends(), dict[str, str | None])


def the_loop(model: torch.nn.Module) -> None:
    leaves = [
        treegrpo.Trajectory([1, 2, 3, 4], [0, 0, 1, 1], reward=1.0, group="q", steps=[2], logprobs=[0.0] * 4),
        treegrpo.Trajectory(np.array([1, 2, 6]), np.array([False, False, True]), reward=0.5, group="q"),
    ]
    assert_type(leaves[0].token_ids, np.ndarray)
    assert_type(dataclasses.replace(leaves[0], reward=0.0), treegrpo.Trajectory)
    trees = treegrpo.build_forest(leaves)
    assert_type(trees, list[treegrpo.RolloutTree])
    [batch] = treegrpo.pack(trees)
    assert_type(batch, treegrpo.TreeBatch)
    logp = treegrpo.token_logprobs(model, batch)
    assert_type(logp, Tensor)
    assert_type(treegrpo.token_logprobs(model, batch, entropy=True), tuple[Tensor, Tensor])
    assert_type(chain_logprobs(model, batch, temperature=0.7), Tensor)
    advantages = treegrpo.compute_advantages(trees, "tree_grpo", scale_rewards="none")
    assert_type(advantages, list[list[np.ndarray]])
    old = batch.expand(logp)
    loss, metrics = treegrpo.grpo_loss(
        old, old.detach(), batch.leaf_stream(advantages), batch.leaf_mask, batch.leaf_offsets
    )
    assert_type(loss, Tensor)
    assert_type(metrics, dict[str, Tensor])
    treegrpo.save("rollouts.jsonl.gz", leaves)
    assert_type(treegrpo.load("rollouts.jsonl.gz"), list[treegrpo.Trajectory])
    assert_type(treegrpo.flops.report(model.config, trees), treegrpo.flops.ChainVsTree)
