"""One sample per model call: the split, its advantages, and how much is shared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from treegrpo import Trajectory, build_forest, call_offsets, compute_advantages, grpo_loss, load, pack, toy
from treegrpo.config import TrainConfig
from treegrpo.loss import LOSS_TYPES
from treegrpo.samples import call_ends, call_trees, split_calls, up_to_last_call
from treegrpo.step import StepData, count_flops, normalizers, pack_step

DATA = Path(os.environ.get("TREEGRPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TOKENS = DATA / "tau_bench_airline" / "tokens.jsonl.gz"


def ratios(trajectories):
    forest = build_forest(trajectories)
    tokens = sum(t.num_chain_tokens for t in forest) / sum(t.num_tokens for t in forest)
    return tokens, sum(t.num_chain_pairs for t in forest) / sum(t.num_pairs for t in forest)


def test_each_turn_becomes_one_sample():
    logp = [np.nan, np.nan, -1.0, -2.0, np.nan, -3.0, np.nan]
    whole = Trajectory(
        [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 0], reward=1.0, logprobs=logp, group="g", tree=3, info={"trial": 1}
    )
    first, second = split_calls([whole])
    assert first.token_ids.tolist() == [1, 2, 3, 4] and first.loss_mask.astype(int).tolist() == [0, 0, 1, 1]
    assert second.token_ids.tolist() == [1, 2, 3, 4, 5, 6] and second.loss_mask.astype(int).tolist() == [
        0,
        0,
        0,
        0,
        0,
        1,
    ]
    assert second.logprobs[5] == -3.0 and (second.reward, second.group, second.tree) == (1.0, "g", 3)
    assert [s.info for s in (first, second)] == [
        {"trial": 1, "trajectory": 0, "step": 0},
        {"trial": 1, "trajectory": 0, "step": 1},
    ]


def test_steps_cut_turns_that_touch():
    whole = Trajectory([1, 2, 3, 4], [0, 1, 1, 1], group="g", steps=[1, 3])
    assert [s.loss_mask.astype(int).tolist() for s in split_calls([whole])] == [[0, 1, 1], [0, 0, 0, 1]]


def test_turn_without_trained_tokens_is_no_call():
    whole = Trajectory([1, 2, 3, 4], [0, 1, 0, 0], group="g", steps=[1, 2, 3])
    assert [s.info["step"] for s in split_calls([whole])] == [0]


def test_every_trained_token_is_in_exactly_one_call():
    trajectories = toy.sample_groups(3)
    calls = split_calls(trajectories)
    assert sum(int(c.loss_mask.sum()) for c in calls) == sum(int(t.loss_mask.sum()) for t in trajectories)
    assert all(c.loss_mask[-1] for c in calls)


def test_calls_take_the_advantage_of_their_turn():
    trees = build_forest(toy.sample_groups(2))
    per_step = [[np.arange(t.num_steps, dtype=float) for t in tree.trajectories] for tree in trees]
    split, advantages = call_trees(trees, per_step)
    for tree, values in zip(split, advantages, strict=True):
        assert [float(v[0]) for v in values] == [float(t.info["step"]) for t in tree.trajectories]
    constant = compute_advantages(trees, "grpo")
    _, advantages = call_trees(trees, constant)
    for tree, values, whole in zip(split, advantages, constant, strict=True):
        assert [v.shape for v in values] == [(1,)] * tree.num_leaves
        assert [v[0] for v in values] == [whole[t.info["trajectory"]][0] for t in tree.trajectories]


def test_toy_groups_are_trees_and_repeat():
    trajectories = toy.sample_groups(6, num_trees=2, num_expansions=3)
    assert trajectories == toy.sample_groups(6, num_trees=2, num_expansions=3)
    for tree in build_forest(trajectories):
        assert tree.num_leaves == 8 and {t.tree for t in tree.trajectories} == {0, 1}
        assert tree.num_tokens < 0.6 * tree.num_chain_tokens
    rewards = [t.reward for t in trajectories]
    assert 0.2 < np.mean(rewards) < 0.8
    assert max(t.token_ids.max() for t in trajectories) < toy.VOCAB_SIZE


def agent_groups(seed):
    """Groups whose leaves fork, repeat and end in each other, with turns that train little or nothing, behind which
    some end, and with a leaf and a group that train nothing at all."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(4):
        for _ in range(rng.integers(1, 7)):
            ids, mask, steps = [1, 2, 3], [0, 0, 0], []
            for _ in range(rng.integers(1, 6)):
                steps.append(len(ids))
                turn = rng.integers(0, 2, rng.integers(1, 4))
                ids += [int(rng.integers(4, 6)) for _ in turn] + [7]
                mask += [*turn.tolist(), 0]
            if group == 3 or rng.random() < 0.1:
                mask = [0] * len(ids)
            logp = np.where(mask, -rng.random(len(ids)), np.nan)
            with_steps = steps if rng.random() < 0.5 else None
            rows.append(Trajectory(ids, mask, rng.random(), logp, f"g{group}", 0, with_steps))
    return build_forest(rows)


def logprobs_of(batch):
    """float64 [T] that gives each token the value of its path, whatever else is in the batch."""
    values = torch.zeros(batch.num_tokens, dtype=torch.float64)
    for t, (above, token) in enumerate(zip(batch.prev.tolist(), batch.input_ids.tolist(), strict=True)):
        path = values[above] if above >= 0 else 0.37
        values[t] = -((path * 7.1 + token * 0.61) % 1.0)
    return values


@pytest.mark.parametrize("seed", range(6))
def test_calls_end_where_the_split_ends_them(seed):
    for tree in agent_groups(seed):
        for trajectory in tree.trajectories:
            assert call_ends(trajectory).tolist() == [call.num_tokens for call in split_calls([trajectory])]


@pytest.mark.parametrize("shared_tokens", ["per_leaf", "mean", "once"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_of_calls_in_place_is_that_of_the_split_samples(loss_type, level, shared_tokens):
    for seed in range(4):
        trees = agent_groups(seed)
        advantages = [[np.arange(1.0, t.num_steps + 1) - 1.5 for t in tree.trajectories] for tree in trees]
        losses, gradients = [], []
        split, of_split = call_trees(trees, advantages)
        for forest, values, offsets_of in ((trees, advantages, call_offsets), (split, of_split, None)):
            [batch] = pack(forest)
            old = logprobs_of(batch)
            policy = (old * 1.4).requires_grad_()
            loss, metrics = grpo_loss(
                batch.expand(policy),
                batch.expand(old),
                batch.leaf_stream(values),
                batch.leaf_mask,
                batch.leaf_offsets if offsets_of is None else offsets_of(batch),
                loss_type=loss_type,
                beta=0.1,
                ref_logp=batch.expand(old * 0.9),
                importance_sampling_level=level,
                shared_tokens=shared_tokens,
                multiplicity=batch.multiplicity,
                entropy=batch.expand(-old),
                entropy_coef=0.01,
            )
            (gradient,) = torch.autograd.grad(loss, policy)
            losses.append(torch.stack([loss.detach(), *metrics.values()]))
            # by the token's path, for the split has no tokens behind the last call
            gradients.append({float(x): float(g) for x, g in zip(old, gradient, strict=True) if g})
        assert torch.allclose(losses[0], losses[1], rtol=1e-12, atol=1e-14)
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("seed", range(6))
def test_a_step_on_calls_packs_the_rows_of_the_split_without_its_streams(seed, budget):
    trees = agent_groups(seed)
    config = dict(rollouts="replay:x", model="x", samples="call", row_token_budget=budget, advantage_estimator="grpo")
    model = dict(model_type="qwen2", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    steps: list[StepData] = []
    for attention in ("tree", "chain"):
        settings = TrainConfig(**config, attention=attention, loss_type="grpo")
        data = pack_step([trees], settings, 0, 1, torch.device("cpu"))
        count_flops(data, model)
        steps.append(data)
    settings = TrainConfig(**config, loss_type="grpo")
    here, split = (step.rows for step in steps)
    totals = [normalizers(rows, settings, torch.device("cpu")).tolist() for rows in (here, split)]
    assert totals[0] == totals[1]
    chains = [np.sort(np.concatenate([row.lengths for row in rows])).tolist() for rows in (here, split)]
    assert chains[0] == chains[1]
    assert sum(row.cost.chain.training for row in here) == sum(row.cost.chain.training for row in split) > 0
    # cut between trajectories, not between calls: no more is repeated than the split repeats
    assert sum(row.batch.num_tokens for row in here) <= sum(row.batch.num_tokens for row in split)
    assert sum(row.batch.num_chain_tokens for row in here) < sum(row.batch.num_chain_tokens for row in split)
    if budget is None:
        assert torch.equal(here[0].batch.input_ids, split[0].batch.input_ids)
        assert torch.equal(here[0].batch.subtree_end, split[0].batch.subtree_end)
        assert here[0].cost.tree == split[0].cost.tree


def test_what_follows_the_last_call_is_left_out_with_its_steps():
    whole = Trajectory([1, 2, 3, 4, 5], [0, 1, 0, 0, 0], 1.0, [np.nan, -1.0, *[np.nan] * 3], "a", steps=[1, 2, 4])
    ends_trained = Trajectory([1, 2, 9], [0, 1, 1], reward=0.0, group="b", steps=[1, 2])
    untrained = Trajectory([1, 2, 8], [0, 0, 0], reward=0.0, group="b", steps=[1])
    forest = build_forest([whole, ends_trained, untrained])
    trees, advantages = up_to_last_call(forest, [[np.array([1.0, 2.0, 3.0])], [np.array([4.0, 5.0]), np.array([6.0])]])
    (a,), (b,) = (tree.trajectories for tree in trees)
    assert (a.token_ids.tolist(), a.steps.tolist(), a.reward) == ([1, 2], [1], 1.0) and a.logprobs[1] == -1.0
    assert b is ends_trained and trees[1].num_tokens == 3
    assert [[v.tolist() for v in values] for values in advantages] == [[[1.0]], [[4.0, 5.0]]]
    same, _ = up_to_last_call(trees, advantages)
    assert same[0] is trees[0]


def test_a_batch_without_calls_says_so():
    [batch] = pack(build_forest([Trajectory([1, 2], [0, 0])]))
    with pytest.raises(ValueError, match="no call"):
        call_offsets(batch)


@pytest.mark.skipif(not TOKENS.is_file(), reason=f"no tau-bench data at {TOKENS}")
def test_tau_bench_calls_share_and_whole_trajectories_hardly():
    trajectories = load(TOKENS)
    tokens, pairs = ratios(trajectories)
    assert (round(tokens, 1), round(pairs, 2)) == (1.3, 1.07)
    tokens, pairs = ratios(split_calls(trajectories))
    # 12.48 and 8.20 over the tree of whole trajectories: the calls' own tree lacks what follows the last turn.
    assert (round(tokens, 2), round(pairs, 2)) == (12.56, 8.28)


def test_a_trajectory_in_which_nothing_is_trained_has_no_calls():
    empty = Trajectory([1, 2, 3], [0, 0, 0], reward=0.0, group="a")
    assert split_calls([empty]) == []
    forest = build_forest([empty, Trajectory([1, 2, 3], [0, 1, 1], reward=1.0, group="b")])
    split, advantages = call_trees(forest, compute_advantages(forest, "grpo"))
    assert [tree.group for tree in split] == ["b"] and len(advantages) == 1
