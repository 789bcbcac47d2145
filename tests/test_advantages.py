"""Advantages: golden numbers of Tree-GRPO's formulas, identities, degenerate groups, bad input."""

from types import SimpleNamespace

import numpy as np
import pytest

from treegrpo.advantages import compute_advantages


def make_tree(rewards_by_tree, steps=None, group="q"):
    """One prompt's group from rewards per sampled tree; `steps` = start indices per leaf (None: one step each)."""
    leaves = [(tree_id, reward) for tree_id, rewards in enumerate(rewards_by_tree) for reward in rewards]
    steps = [[0]] * len(leaves) if steps is None else steps
    trajectories = [SimpleNamespace(tree=t, reward=r, steps=s) for (t, r), s in zip(leaves, steps, strict=True)]
    return SimpleNamespace(group=group, trajectories=trajectories)


def per_leaf(rewards_by_tree, estimator="tree_grpo", **options):
    (leaves,) = compute_advantages([make_tree(rewards_by_tree)], estimator, **options)
    return np.array([leaf[0] for leaf in leaves])


GOLDEN_REWARDS = [[1, 0.2, 0.2], [0.2, 0.2, 0.1]]
# n - 1, eps 1e-6; worked by hand from the z-scores.
GOLDEN = {
    "intra": [1.154698, -0.577349, -0.577349, 0.577340, 0.577340, -1.154681],
    "inter": [2.026818, -0.346042, -0.346042, -0.346042, -0.346042, -0.642650],
    "grpo": [2.026818, -0.346042, -0.346042, -0.346042, -0.346042, -0.642650],
    "tree_grpo": [3.181516, -0.923391, -0.923391, 0.231298, 0.231298, -1.797330],
}


@pytest.mark.parametrize("estimator", GOLDEN)
def test_golden_numbers(estimator):
    np.testing.assert_allclose(per_leaf(GOLDEN_REWARDS, estimator), GOLDEN[estimator], rtol=0, atol=6e-7)


def test_default_estimator_is_tree_grpo_with_tree_grpo_eps():
    assert np.array_equal(per_leaf(GOLDEN_REWARDS), per_leaf(GOLDEN_REWARDS, "tree_grpo", eps=1e-6))
    assert not np.array_equal(per_leaf(GOLDEN_REWARDS), per_leaf(GOLDEN_REWARDS, eps=1e-4))


def test_z_score_over_one_tree():
    """root -> {s1, d}, s1 -> {s2, c}, s2 -> {a, b} with leaves a, b, c, d."""
    expected = [0.866024, -0.866024, -0.866024, 0.866024]
    np.testing.assert_allclose(per_leaf([[1, 0, 0, 1]], "intra"), expected, atol=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_sums_vanish_over_the_comparison_set(seed):
    generator = np.random.default_rng(seed)
    rewards = [list(generator.normal(size=generator.integers(2, 7))) for _ in range(4)]
    intra, inter = per_leaf(rewards, "intra"), per_leaf(rewards, "inter")
    bounds = np.cumsum([0] + [len(r) for r in rewards])
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        assert abs(intra[start:stop].sum()) < 1e-12
    assert abs(inter.sum()) < 1e-12
    np.testing.assert_allclose(per_leaf(rewards, "tree_grpo"), intra + inter, rtol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_grpo_is_affine_invariant_up_to_eps(seed):
    rewards = np.random.default_rng(seed).normal(size=8)
    base, moved = per_leaf([list(rewards)], "grpo", eps=0), per_leaf([list(5 * rewards - 3)], "grpo", eps=0)
    np.testing.assert_allclose(base, moved, rtol=1e-12)


def test_without_expansion_tree_grpo_is_grpo():
    """N = 0: every sampled tree is one chain, so the intra term has singletons only."""
    chains = [[1.0], [0.2], [0.2], [0.0]]
    assert np.array_equal(per_leaf(chains, "tree_grpo"), per_leaf(chains, "grpo"))
    assert np.array_equal(per_leaf(chains, "intra"), np.zeros(4))
    assert np.array_equal(per_leaf(chains, "intra", singleton="official"), [1.0, 0.2, 0.2, 0.0])
    offset = per_leaf(chains, "tree_grpo", singleton="official") - per_leaf(chains, "grpo")
    np.testing.assert_allclose(offset, [1.0, 0.2, 0.2, 0.0], atol=1e-15)


@pytest.mark.parametrize("estimator", GOLDEN)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.8, 1 / 3, -7.7, 1e12])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_zero(estimator, reward, scale_rewards):
    advantages = per_leaf([[reward] * 3, [reward] * 7], estimator, scale_rewards=scale_rewards)
    assert np.array_equal(advantages, np.zeros(10))
    assert np.array_equal(per_leaf([[reward] * 6], estimator, min_std=0, eps=0), np.zeros(6))


def test_rounding_noise_in_rewards_is_not_blown_up():
    noisy = [0.1 + 0.2, 0.3, 0.3, float(np.float32(0.3)), float(np.nextafter(np.float32(0.3), np.float32(1)))]
    assert np.array_equal(per_leaf([noisy], "grpo"), np.zeros(5))
    assert np.abs(per_leaf([noisy], "grpo", min_std=0)).max() > 1e-3
    large = [1e6, float(np.nextafter(np.float32(1e6), np.float32(2e6)))]
    assert np.array_equal(per_leaf([large], "grpo"), np.zeros(2))
    assert np.abs(per_leaf([[0.0, 1e-3]], "grpo")).min() > 0.7


def test_scale_rewards_has_trl_meaning():
    trees = [make_tree([[1.0, 0.0, 0.5]], group="a"), make_tree([[4.0, 0.0]], group="b")]
    everything = np.array([1.0, 0.0, 0.5, 4.0, 0.0])

    def flat(mode):
        return np.concatenate(
            [leaf for leaves in compute_advantages(trees, "grpo", scale_rewards=mode) for leaf in leaves]
        )

    centred = np.array([0.5, -0.5, 0.0, 2.0, -2.0])
    np.testing.assert_allclose(flat("none"), centred, atol=1e-15)
    np.testing.assert_allclose(flat("batch"), centred / (everything.std(ddof=1) + 1e-6), rtol=1e-12, atol=1e-15)
    group_std = np.array([np.std([1, 0, 0.5], ddof=1)] * 3 + [np.std([4, 0], ddof=1)] * 2)
    np.testing.assert_allclose(flat("group"), centred / (group_std + 1e-6), rtol=1e-12, atol=1e-15)
    assert np.array_equal(flat(True), flat("group")) and np.array_equal(flat(False), flat("none"))


def test_trees_with_the_same_name_are_not_compared():
    trees = [make_tree([[1.0, 0.0]], group=""), make_tree([[5.0, 4.0]], group="")]
    first, second = compute_advantages(trees, "inter")
    assert first[0] == second[0] > 0 and first[1] == second[1] < 0


def test_order_steps_and_dtype():
    tree = make_tree([[1.0, 0.0], [0.0]], steps=[[3, 9, 20], [3], None])
    (leaves,) = compute_advantages([tree], "inter")
    assert [leaf.shape for leaf in leaves] == [(3,), (1,), (1,)]
    assert all(leaf.dtype == np.float64 for leaf in leaves)
    assert np.all(leaves[0] == leaves[0][0]) and leaves[0][0] > 0 > leaves[1][0] == leaves[2][0]
    assert compute_advantages([], "grpo") == []


def test_sampled_trees_are_told_apart_wherever_their_leaves_stand():
    tree = make_tree([[1.0, 0.2, 0.2], [0.2, 0.2, 0.1]])
    tree.trajectories = [tree.trajectories[i] for i in (3, 0, 4, 1, 5, 2)]
    (leaves,) = compute_advantages([tree], "intra")
    np.testing.assert_allclose([leaf[0] for leaf in leaves], np.array(GOLDEN["intra"])[[3, 0, 4, 1, 5, 2]], atol=6e-7)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, None], r"reward is missing at trees\[1\] \(group 'broken'\), leaf 1"),
        ([float("nan"), 1.0], r"reward is nan at trees\[1\] \(group 'broken'\), leaf 0"),
        ([1.0, 0.0, float("inf")], r"reward is inf at trees\[1\] \(group 'broken'\), leaf 2"),
        ([1.0, -1e200], r"reward is -1e\+200 at trees\[1\] \(group 'broken'\), leaf 1: beyond 1e\+100"),
        ([], r"trees\[1\] \(group 'broken'\) has no trajectories"),
    ],
)
def test_bad_groups_are_named(rewards, message):
    trees = [make_tree([[1.0, 0.0]]), make_tree([rewards], group="broken")]
    with pytest.raises(ValueError, match=message):
        compute_advantages(trees)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"estimator": "gae"}, "estimator is 'gae'.*'grpo', 'tree_grpo', 'intra', 'inter'"),
        ({"singleton": "raw"}, "singleton is 'raw'.*'zero', 'official'"),
        ({"scale_rewards": "std"}, "scale_rewards is 'std'.*'group', 'batch', 'none'"),
        ({"baseline": "parent"}, "unknown option 'baseline'.*min_std.*scale_rewards"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"min_std": float("nan")}, "min_std is nan"),
    ],
)
def test_bad_options_list_the_valid_ones(keywords, message):
    with pytest.raises(ValueError, match=message):
        compute_advantages([make_tree([[1.0, 0.0]])], **keywords)


def binary_outcome_gradients(theta_value):
    """Gradients over the logits of a softmax between a winning and a losing continuation (R = 1, 0)."""
    torch = pytest.importorskip("torch")
    theta = torch.tensor([theta_value, 0.0], dtype=torch.float64, requires_grad=True)
    log_win, log_lose = torch.log_softmax(theta, 0)

    def gradient(scalar):
        return torch.autograd.grad(scalar, theta, retain_graph=True)[0].numpy()

    p, q = log_win.exp().item(), log_lose.exp().item()
    expected_reward = gradient(log_win.exp())
    dpo = gradient(torch.nn.functional.logsigmoid(log_win - log_lose))
    return p, q, gradient(log_win), gradient(log_lose), expected_reward, dpo


@pytest.mark.parametrize("p_win", [0.1, 0.25, 0.5, 0.8])
def test_intra_advantage_is_the_policy_gradient_of_two_outcomes(p_win):
    """Section 3.3 of the paper: with A = R - p the gradient is p q (grad log p - grad log q) = grad E[R] = p grad DPO.

    A group of 1000 leaves drawn in the exact proportion p : q makes the group mean equal p.
    """
    p, q, win, lose, expected_reward, dpo = binary_outcome_gradients(float(np.log(p_win / (1 - p_win))))
    wins = round(1000 * p_win)
    rewards = [[1.0] * wins + [0.0] * (1000 - wins)]
    centred = per_leaf(rewards, "intra", scale_rewards="none")
    gradient = p * centred[0] * win + q * centred[-1] * lose
    np.testing.assert_allclose(gradient, p * q * (win - lose), atol=1e-6)
    np.testing.assert_allclose(gradient, expected_reward, atol=1e-6)
    np.testing.assert_allclose(gradient, p * dpo, atol=1e-6)
    # With the unbiased std the weight is sqrt(p q), up to the factor sqrt(n / (n - 1)) and eps.
    scaled = per_leaf(rewards, "intra") * np.sqrt(1000 / 999)
    gradient = p * scaled[0] * win + q * scaled[-1] * lose
    np.testing.assert_allclose(gradient, np.sqrt(p * q) * (win - lose), atol=3e-6)
