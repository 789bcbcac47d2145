"""`treegrpo eval`: what a model thinks of logged rollouts (log-probs of the trained tokens, and whether rewarded leaves
are likelier), or what it earns with those it samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import torch

from treegrpo import models
from treegrpo.config import TrainConfig
from treegrpo.logprobs import chain_logprobs, token_logprobs
from treegrpo.packing import TreeBatch, pack
from treegrpo.rollout.replay import check_vocabulary
from treegrpo.samples import split_calls
from treegrpo.tree import Trajectory, build_forest

_DEFAULT_BUDGET = 16384


@torch.no_grad()
def evaluate(
    model_path: str,
    trajectories: list[Trajectory],
    *,
    samples: Literal["trajectory", "call"] = "trajectory",
    attention: Literal["tree", "chain", "both"] = "tree",
    temperature: float = 1.0,
    row_token_budget: int | None = None,
    backend: str = "auto",
    seed: int = 42,
) -> dict[str, float]:
    """Statistics over the trained tokens of all leaves, TRL's prefix `eval_`.

    `eval_logp/mean` (and its perplexity) is a mean over tokens; `eval_logp/rewarded` and `.../unrewarded` are means
    over leaves with a reward above, or not above, the mean of their group, and only there when rewards differ. With
    attention="both" the chains are run too and `eval_tree_vs_chain/max` is the largest difference of one token's
    log-prob.

    Raises:
        ValueError: no trajectories, a token outside the vocabulary, a tree over `row_token_budget`, an unusable
            backend, a temperature that is not above 0.
    """
    if row_token_budget is not None and row_token_budget < 1:
        raise ValueError(f"row_token_budget={row_token_budget}: give at least 1, or leave it out")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: give a finite number above 0")
    if samples == "call":
        trajectories = split_calls(trajectories)
    trees = build_forest(trajectories)
    check_vocabulary(trajectories, models.vocabulary_size(models.read_model_config(model_path)), str(model_path))
    budget = row_token_budget
    if budget is None:
        budget = max(_DEFAULT_BUDGET, max(tree.num_tokens for tree in trees))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = pack(trees, token_budget=budget)
    model = models.build_model(model_path, seed).to(device).eval()
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    sums = _Sums()
    for batch in batches:
        batch = batch.to(device)
        if attention == "chain":
            logp, entropy = chain_logprobs(model, batch, entropy=True, **options)
        else:
            logp, entropy = (batch.expand(x) for x in token_logprobs(model, batch, entropy=True, **options))
        if attention == "both":
            chain = chain_logprobs(model, batch, **options)
            difference = (logp - chain)[batch.leaf_mask].abs()
            # a row in which nothing is trained has none
            sums.difference = max(sums.difference, float(difference.max()) if difference.numel() else 0.0)
        sums.add(batch, logp, entropy)
    return sums.result(trees, attention)


def evaluate_sampled(config: TrainConfig) -> dict[str, float]:
    """Rewards of one chain a prompt of `config.eval_dataset`, sampled as `config` says by `config.model`.

    Raises:
        ValueError: a file or setting is missing or wrong.
        EngineError: the engine gave up.
    """
    from treegrpo.envs.data import read_rows
    from treegrpo.rollout import build, online

    file = config.eval_dataset
    if file is None:
        raise ValueError("eval_dataset is missing: give --dataset FILE, a file of prompts")
    config = dataclasses.replace(config, dataset=file, overlap_rollouts=False)
    config.check_paths()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build_model(config.model, config.seed).to(device).eval()
    sampler = build.make_sampler(config, model, build.load_tokenizer(config))
    try:
        rows = read_rows(file)[: config.eval_rows]
        options = build.search_options(config)
        result = online.evaluate(sampler, rows, options, temperature=config.eval_temperature, seed=config.seed)
    finally:
        sampler.engine.close()
    result.pop("eval_rewards")
    return {"eval_num_prompts": len(rows), **result}


class _Sums:
    def __init__(self) -> None:
        self.logp = self.entropy = self.difference = 0.0
        self.num_tokens = self.num_unique = 0
        self.recorded: list[np.ndarray] = []
        self.by_outcome: dict[str, list[float]] = {"rewarded": [], "unrewarded": []}

    def add(self, batch: TreeBatch, logp: torch.Tensor, entropy: torch.Tensor) -> None:
        mask = batch.leaf_mask
        if not torch.isfinite(logp[mask]).all():
            raise ValueError(
                f"log-probs of groups {', '.join(tree.group for tree in batch.trees)} are not finite: the weights are"
                " damaged"
            )
        self.logp += float(logp[mask].double().sum())
        self.entropy += float(entropy[mask].double().sum())
        self.num_tokens += int(mask.sum())
        self.num_unique += batch.num_tokens
        known = mask & batch.leaf_logp.isfinite()
        self.recorded.append((logp - batch.leaf_logp)[known].abs().cpu().numpy())
        offsets = batch.leaf_offsets.tolist()
        means = [
            float(logp[a:b][mask[a:b]].mean()) if mask[a:b].any() else math.nan
            for a, b in zip(offsets, offsets[1:], strict=False)
        ]
        place = 0
        for tree in batch.trees:
            own, place = means[place : place + tree.num_leaves], place + tree.num_leaves
            rewards = [leaf.reward for leaf in tree.trajectories if leaf.reward is not None]
            if len(rewards) < tree.num_leaves or min(rewards) == max(rewards):
                continue
            middle = float(np.mean(rewards))
            for reward, mean in zip(rewards, own, strict=True):
                if not math.isnan(mean):
                    self.by_outcome["rewarded" if reward > middle else "unrewarded"].append(mean)

    def result(self, trees: list, attention: str) -> dict[str, float]:
        rewards = [t.reward for tree in trees for t in tree.trajectories if t.reward is not None]
        if not self.num_tokens:
            raise ValueError("rollouts: loss_mask is 0 everywhere, there is no token to evaluate")
        mean = self.logp / self.num_tokens
        result = {
            "eval_num_groups": len(trees),
            "eval_num_leaves": sum(tree.num_leaves for tree in trees),
            "eval_num_trained_tokens": self.num_tokens,
            "eval_num_chain_tokens": sum(tree.num_chain_tokens for tree in trees),
            "eval_num_unique_tokens": self.num_unique,
            "eval_logp/mean": mean,
            "eval_perplexity": math.exp(min(-mean, 700.0)),
            "eval_entropy": self.entropy / self.num_tokens,
        }
        if rewards:
            result["eval_reward"] = float(np.mean(rewards))
        for outcome, values in self.by_outcome.items():
            if values:
                result[f"eval_logp/{outcome}"] = float(np.mean(values))
        recorded = np.concatenate(self.recorded)
        if recorded.size:
            result["eval_sampling_logp_difference/mean"] = float(recorded.mean())
            result["eval_sampling_logp_difference/max"] = float(recorded.max())
        if attention == "both":
            result["eval_tree_vs_chain/max"] = self.difference
        return result
