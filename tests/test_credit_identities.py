"""Credit on step trees: identities of the estimators, and properties on random trees."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_trees import BACKUPS, EVERY, credits, leaf, paths, random_tree, value_by_definition

from treegrpo import build_tree, compute_advantages


@pytest.mark.parametrize("estimator", ["grpo", "tree_grpo", "inter", "arpo_hard", "arpo_soft", "lambda_grpo"])
def test_without_expansion_leaf_estimators_are_grpo(estimator):
    """N = 0, so each sampled tree is one chain; also z over one prompt's tree of chains that share nothing."""
    tree = build_tree([leaf(r, [10 + i], [20], tree=i) for i, r in enumerate([1, 0.2, 0.2, 0])])
    for got, expected in zip(credits(tree, estimator), credits(tree, "grpo"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_without_expansion_step_estimators_are_centred_rewards():
    """On chains every difference lies at the first step: R - mean, which GRPO divides by the std."""
    rewards = np.array([1, 0.2, 0.2, 0])
    tree = build_tree([leaf(r, [10 + i], [20], tree=i) for i, r in enumerate(rewards)])
    centred = rewards - rewards.mean()
    for estimator in ("spo", "siblings"):
        got = np.array(credits(tree, estimator))
        np.testing.assert_allclose(got, np.stack([centred, 0 * centred], 1), atol=1e-15)
    grpo = np.array([x[0] for x in credits(tree, "grpo")])
    for estimator, options in (("at2po", {}), ("grid", dict(baseline="root"))):
        got = np.array(credits(tree, estimator, norm="std", **options))
        np.testing.assert_allclose(got, np.stack([grpo, grpo], 1), atol=1e-15)


@pytest.mark.parametrize("root", ["prompt", "tree"])
@pytest.mark.parametrize("value", BACKUPS)
@pytest.mark.parametrize("seed", range(4))
def test_parent_differences_telescope(seed, value, root):
    tree = random_tree(seed, unique=True)
    leaves = credits(tree, "grid", baseline="parent", value=value, norm="none", root=root)
    for t, path, got in zip(tree.trajectories, paths(tree, root), leaves, strict=True):
        assert got.sum() == pytest.approx(t.reward - value_by_definition(tree, path[0], value, root), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_z_scores_sum_to_zero(seed):
    tree = random_tree(seed)
    assert abs(sum(x[0] for x in credits(tree, "inter"))) < 1e-10
    for number in {t.tree for t in tree.trajectories}:
        leaves = zip(tree.trajectories, credits(tree, "intra"), strict=True)
        assert abs(sum(x[0] for t, x in leaves if t.tree == number)) < 1e-10


@pytest.mark.parametrize("root", ["prompt", "tree"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_count_times_the_mean(seed, root):
    tree = random_tree(seed)
    rows = credits(tree, "grpo", multiplicity="row", root=root)
    hard = credits(tree, "arpo_hard", root=root)
    backed_up = credits(tree, "grid", baseline="prompt", value="leaf_mean", norm="std", root=root)
    total, count, mean, once = {}, {}, {}, {}
    shares = credits(tree, "lambda_grpo", root=root)
    for i, path in enumerate(paths(tree, root)):
        for step, node in enumerate(path[1:]):
            total[node] = total.get(node, 0) + rows[i][step]
            count[node] = count.get(node, 0) + 1
            once[node] = once.get(node, 0) + shares[i][step]
            mean[node] = hard[i][step]
    for node in total:
        assert total[node] == pytest.approx(count[node] * mean[node], abs=1e-12)
        assert once[node] == pytest.approx(mean[node], abs=1e-12)
    # The mean of the leaves' z-scores is their value by leaf means.
    for left, right in zip(hard, backed_up, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_child_mean_minus_parent_is_centred_on_the_siblings(seed):
    tree = random_tree(seed)
    left = credits(tree, "grid", baseline="parent", value="child_mean", norm="none")
    right = credits(tree, "siblings", multiplicity="row")
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.8, 1 / 3, -7.7, 1e12])
@pytest.mark.parametrize(("estimator", "options"), EVERY)
def test_equal_rewards_are_exactly_zero(estimator, options, reward):
    trees = [random_tree(seed, reward=reward) for seed in range(2)]
    for leaves in compute_advantages(trees, estimator, **options):
        for values in leaves:
            assert np.array_equal(values, np.zeros(values.size))


@pytest.mark.parametrize("norm", ["std", "std_population", "std_batch", "std_siblings", "whiten"])
def test_rounding_noise_is_not_blown_up(norm):
    rewards = [0.3, float(np.float32(0.3)), 0.1 + 0.2, 0.3]
    tree = build_tree([leaf(r, [10 + i // 2], [20 + i]) for i, r in enumerate(rewards)])
    for values in credits(tree, "grid", baseline="parent", norm=norm):
        assert np.array_equal(values, np.zeros(2))
    loose = credits(tree, "grid", baseline="parent", norm=norm, min_std=0, eps=1e-12)
    assert max(np.abs(x).max() for x in loose) > 0.1


@pytest.mark.parametrize(("estimator", "options"), EVERY)
def test_affine_rewards(estimator, options):
    """R -> 5 R - 3 leaves what is divided by a std alone, and multiplies the others by 5."""

    def moved(scale, shift):
        rows = [dataclasses.replace(t, reward=scale * t.reward + shift) for t in random_tree(5).trajectories]
        return np.concatenate(credits(build_tree(rows), estimator, eps=0, **options))

    divided = options.get("norm", "none" if estimator in ("treerl", "spo", "siblings") else "std") not in (
        "none",
        "rloo",
    )
    np.testing.assert_allclose(moved(5, -3), moved(1, 0) * (1 if divided else 5), atol=1e-11)


TABLE = {0.1: (0.9, 0.09, 0.3), 0.25: (0.75, 0.1875, 0.433013), 0.5: (0.5, 0.25, 0.5), 0.8: (0.2, 0.16, 0.4)}


@pytest.mark.parametrize("p", TABLE)
@pytest.mark.parametrize("norm", ["none", "std_population"])
def test_credit_at_a_branching_step_is_step_level_dpo(p, norm):
    """Tree-GRPO section 3.3, at a node with one winning and one losing continuation of probability p and q.

    With A = V - V(parent): grad E[A log pi] = grad E[R] = p grad J_DPO = p q (grad log p - grad log q). With the std
    the weight is sqrt(p q). Leaves are drawn in proportion p : q, so that leaf means are exact.
    """
    torch = pytest.importorskip("torch")
    theta = torch.tensor([float(np.log(p / (1 - p))), 0.0], dtype=torch.float64, requires_grad=True)
    log_win, log_lose = torch.log_softmax(theta, 0)

    def gradient(scalar):
        return torch.autograd.grad(scalar, theta, retain_graph=True)[0].numpy()

    wins = round(20 * p)
    rows = [leaf(1.0, [10], [20])] * wins + [leaf(0.0, [10], [21])] * (20 - wins)
    leaves = credits(build_tree(rows), "grid", baseline="parent", norm=norm, eps=0)
    win, lose = leaves[0][1], leaves[-1][1]
    assert leaves[0][0] == leaves[-1][0] == pytest.approx(0, abs=1e-12)
    p, q = log_win.exp().item(), log_lose.exp().item()
    surrogate = gradient(p * win * log_win + q * lose * log_lose)
    direction = gradient(log_win - log_lose)
    dpo = gradient(torch.nn.functional.logsigmoid(log_win - log_lose))
    weight_dpo, weight, weight_std = TABLE[round(p, 2)]
    np.testing.assert_allclose(dpo, weight_dpo * direction, atol=1e-6)
    if norm == "none":
        np.testing.assert_allclose(surrogate, weight * direction, atol=1e-6)
        np.testing.assert_allclose(surrogate, gradient(log_win.exp()), atol=1e-6)
        np.testing.assert_allclose(surrogate, p * dpo, atol=1e-6)
    else:
        np.testing.assert_allclose(surrogate, weight_std * direction, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), case=st.sampled_from(EVERY))
def test_shapes_and_finiteness_and_permutation(seed, case):
    estimator, options = case
    tree = random_tree(seed)
    leaves = credits(tree, estimator, **options)
    assert [x.shape for x in leaves] == [(t.num_steps,) for t in tree.trajectories]
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for x in leaves)
    order = np.random.default_rng(seed).permutation(tree.num_leaves)
    shuffled = credits(build_tree([tree.trajectories[i] for i in order]), estimator, **options)
    for index, values in zip(order, shuffled, strict=True):
        np.testing.assert_allclose(values, leaves[index], atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=2, max_size=3), case=st.sampled_from(EVERY))
def test_groups_do_not_meet(seeds, case):
    """Apart from norms that span the call, a group's credit does not depend on its company."""
    estimator, options = case
    if estimator == "treepo" or options.get("norm") in ("whiten", "std_batch"):
        return
    trees = [random_tree(seed) for seed in seeds]
    for tree, together in zip(trees, compute_advantages(trees, estimator, **options), strict=True):
        for left, right in zip(together, credits(tree, estimator, **options), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-12)
