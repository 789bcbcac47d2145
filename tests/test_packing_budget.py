"""Filling rows under a token budget: which tree goes where, at what cost, and what becomes of trees that do not fit."""

import numpy as np
import pytest
from cases import NAMED
from hypothesis import given
from hypothesis import strategies as st
from test_packing import forest_of, random_forest
from test_tree import trajectories

from treegrpo import packing
from treegrpo.packing import cut_tree, pack
from treegrpo.tree import Trajectory, build_forest, build_tree


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_batches_fill_the_budget_and_never_exceed_it(seed, share):
    forest = random_forest(seed, num_groups=40, prompts=1 + seed % 3)
    budget = 4096
    batches = pack(forest, token_budget=budget, share_across_groups=share)
    assert sorted(i for b in batches for i in b.tree_indices) == list(range(len(forest)))
    assert all(b.num_tokens <= budget for b in batches)
    assert all(list(b.tree_indices) == sorted(b.tree_indices) for b in batches)
    assert [b.tree_indices[0] for b in batches] == sorted(b.tree_indices[0] for b in batches)
    total = sum(b.num_tokens for b in batches)
    assert len(batches) <= -(-total // budget) + 1
    sizes = [b.num_tokens for b in batches]
    assert min(sizes) > 0.75 * max(sizes), "batches of similar size"
    again = pack(forest, token_budget=budget, share_across_groups=share)
    assert [b.tree_indices for b in again] == [b.tree_indices for b in batches]


def test_sharing_is_counted_when_filling():
    # two trees of 60 tokens that share 50 fit in 70 together; without sharing they do not
    rows = [Trajectory([*range(50), *([100 + g] * 10)], [0] * 50 + [1] * 10, group=str(g)) for g in range(2)]
    forest = build_forest(rows)
    [batch] = pack(forest, token_budget=70)
    assert batch.num_tokens == 70
    assert [b.num_tokens for b in pack(forest, token_budget=70, share_across_groups=False)] == [60, 60]
    assert [b.num_tokens for b in pack(forest, token_budget=69)] == [60, 60]


def test_trees_go_where_they_share():
    forest = random_forest(5, num_groups=24, prompts=2, min_size=20, max_size=40)
    batches = pack(forest, token_budget=max(t.num_tokens for t in forest) * 7)
    prompts_in = [{i % 2 for i in b.tree_indices} for b in batches]
    assert len(batches) > 1
    assert sum(len(p) for p in prompts_in) == len(batches)


@given(trajectories(), st.integers(0, 20), st.booleans())
def test_any_forest_packs_within_budget(rows, slack, share):
    forest = build_forest(rows)
    budget = max(tree.num_tokens for tree in forest) + slack
    batches = pack(forest, token_budget=budget, share_across_groups=share)
    assert all(b.num_tokens <= budget for b in batches)
    assert sorted(i for b in batches for i in b.tree_indices) == list(range(len(forest)))


def test_batches_opened_too_early_lose_no_tree():
    """[1 ..] and the first [0 ..] would open both batches that suffice, and the last tree fit into neither."""
    leaves = [[1, 10, 10], [0, 11, 11, 11], [0, 12, 12, 12], [0, 13, 13, 13, 13], [1, 14, 14, 14, 14]]
    forest = build_forest([Trajectory(ids, [0] * len(ids), group=f"g{i}") for i, ids in enumerate(leaves)])
    batches = pack(forest, token_budget=10)
    assert len(batches) == 2 and sorted(i for batch in batches for i in batch.tree_indices) == [0, 1, 2, 3, 4]


def best_fit_by_definition(sizes, stems, order, budget, max_batches, num_early):
    """`_best_fit` with a look at every batch for every tree."""
    batches, used, held = [], [], []
    for tree in order:
        fits = []
        for batch, nodes in enumerate(held):
            shared = max((depth for node, depth in stems[tree] if node in nodes), default=0)
            if used[batch] + sizes[tree] - shared <= budget:
                fits.append((shared, used[batch], -batch))
        shared, _, batch = max(fits, default=(0, 0, 0))
        if not fits or (not shared and len(batches) < num_early):
            if len(batches) == max_batches:
                return 0, []
            shared, batch = 0, -len(batches)
            batches, used, held = [*batches, []], [*used, 0], [*held, set()]
        batches[-batch].append(tree)
        used[-batch] += sizes[tree] - shared
        held[-batch].update(node for node, _ in stems[tree])
    return sum(used), batches


@pytest.mark.parametrize("seed", range(3))
def test_trees_go_where_a_look_at_every_batch_would_put_them(seed, monkeypatch):
    """Beginnings that share beginnings, and sizes so few that batches are equally full."""
    rng = np.random.default_rng(seed)
    ids = [[p, p, p, 10 + q, 10 + q, *[100 + i] * n] for i, (p, q, n) in enumerate(rng.integers(1, 6, (80, 3)))]
    forest = build_forest([Trajectory(row, [0] * len(row), group=str(i)) for i, row in enumerate(ids)])
    packed = [[b.tree_indices for b in pack(forest, token_budget=budget)] for budget in range(10, 40, 3)]
    monkeypatch.setattr(packing, "_best_fit", best_fit_by_definition)
    assert packed == [[b.tree_indices for b in pack(forest, token_budget=budget)] for budget in range(10, 40, 3)]


class CountedList(list):
    reads = 0

    def __getitem__(self, index):
        CountedList.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("num_prompts", [1, 3, 1000])
def test_filling_looks_at_few_batches_for_each_tree(num_prompts, monkeypatch):
    num = 3000
    lists = lambda fill: vars(fill).update(used=CountedList(), _order=CountedList())  # noqa: E731
    monkeypatch.setattr(packing._Fill, "__init__", lists)
    sizes = np.random.default_rng(0).integers(30, 80, num).tolist()
    stems = [[(tree % num_prompts, 20)] for tree in range(num)]
    CountedList.reads = 0
    _, batches = packing._best_fit(sizes, stems, list(range(num)), 100, num, 0)
    assert len(batches) > num // 3 and CountedList.reads < 100 * num


@pytest.mark.parametrize("name", NAMED)
def test_a_cut_tree_keeps_every_leaf_once_within_the_budget(name):
    [tree] = forest_of(name)
    longest = max(t.num_tokens for t in tree.trajectories)
    for budget in range(longest, tree.num_tokens + 2):
        parts = cut_tree(tree, budget)
        assert sorted(leaf for part in parts for leaf in part) == list(range(tree.num_leaves))
        sizes = [build_tree([tree.trajectories[leaf] for leaf in part]).num_tokens for part in parts]
        assert max(sizes) <= budget and (len(parts) == 1) == (tree.num_tokens <= budget)


def test_a_tree_is_cut_where_least_is_repeated():
    [tree] = build_forest([Trajectory(ids, [0] * len(ids)) for ids in ([1, 2, 3, 4], [1, 6, 7], [1, 2, 5])])
    assert cut_tree(tree, 5) == [[0, 2], [1]]


def test_a_tree_over_the_budget_is_named():
    forest = build_forest([Trajectory([1] * n, [0] * n, group=f"task {n}") for n in (3, 9)])
    message = r"trees\[1\] \(group 'task 9'\) has 9 unique tokens, over token_budget=8: raise the budget"
    with pytest.raises(ValueError, match=message):
        pack(forest, token_budget=8)
    assert len(pack(forest, token_budget=9)) == 1
