"""One sample per model call: the split, its advantages, and how much is shared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from treegrpo import Trajectory, build_forest, compute_advantages, load, toy
from treegrpo.samples import call_trees, split_calls

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
