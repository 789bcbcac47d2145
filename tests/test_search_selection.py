"""Which steps of a tree a search expands: uniformly, by entropy, by a callable; the random numbers of each draw."""

from __future__ import annotations

import collections
import math
import random

import numpy as np
import pytest
from scripted import Engine, Notebook, Quiet, run, three_calls

from treegrpo.rollout.nodes import Node, select_nodes


def chain(nlls, tree=0):
    """Root, one step for each value that is no leaf, and an answer."""
    nodes = [Node([0], [0], [math.nan], Notebook(), tree)]
    for depth, nll in enumerate([*nlls, 9.0], 1):
        end = "done" if depth > len(nlls) else None
        nodes.append(Node([0], [1], [-nll], nodes[-1].environment, tree, nodes[-1], depth, end, nll))
    return nodes


def test_uniform_draws_every_step_that_is_no_leaf_equally_often():
    nodes = chain([1.0, 1.0, 1.0])
    rng = random.Random(0)
    drawn = collections.Counter(node.depth for _ in range(1000) for node in select_nodes(nodes, 4, rng))
    assert set(drawn) == {0, 1, 2, 3} and all(abs(count - 1000) < 120 for count in drawn.values())
    assert [node.num_expansions for node in nodes] == [drawn[depth] for depth in range(5)]
    repeats = [len(set(map(id, select_nodes(nodes, 4, rng)))) for _ in range(50)]
    assert min(repeats) < 4
    without = collections.Counter(node.depth for node in select_nodes(nodes, 300, rng, root_eligible=False))
    assert set(without) == {1, 2, 3}


def test_without_replacement_each_candidate_comes_once_before_any_twice():
    nodes = chain([1.0, 1.0, 1.0])
    orders = set()
    for seed in range(40):
        depths = [node.depth for node in select_nodes(nodes, 10, random.Random(seed), with_replacement=False)]
        assert sorted(depths[:4]) == sorted(depths[4:8]) == [0, 1, 2, 3] and depths[8] != depths[9]
        orders.add(tuple(depths[:4]))
    assert len(orders) > 10


@pytest.mark.parametrize("selection", ["uniform", "entropy"])
def test_the_root_stands_in_where_nothing_else_can_be_drawn(selection):
    options = dict(root_eligible=False, selection=selection)
    assert [n.depth for n in select_nodes(chain([]), 3, random.Random(0), **options)] == [0, 0, 0]
    groups = run(Engine(lambda text, rng: f"answer {rng.randrange(10**6)}"), num_expansions=3, **options)
    assert len(groups[0].trajectories) == 8 and len({tuple(t.token_ids) for t in groups[0].trajectories}) == 8


def test_entropy_continues_the_parent_of_uncertain_steps():
    nodes = chain([0.5, 2.0, 1.0])
    rng = random.Random(0)
    assert [n.depth for n in select_nodes(nodes, 2, rng, selection="entropy")] == [1, 2]
    # The answer is the most uncertain of all, but a leaf; fewer steps than draws start again from the top.
    assert [n.depth for n in select_nodes(chain([0.5, 2.0]), 5, rng, selection="entropy")] == [1, 0, 1, 0, 1]
    assert [n.depth for n in select_nodes(nodes, 3, rng, selection="entropy", root_eligible=False)] == [1, 2, 1]


def test_entropy_takes_a_twentieth_off_for_each_sibling():
    nodes = chain([1.0, 1.08])
    rng = random.Random(0)
    drawn = [select_nodes(nodes, 1, rng, selection="entropy")[0].depth for _ in range(5)]
    # 1.08 - .05 k against 1 - .05 k': the second step twice, then they take turns.
    assert drawn == [1, 1, 0, 1, 0]


def test_entropy_where_only_answers_are_below_draws_uniformly():
    nodes = chain([1.0])
    drawn = select_nodes(nodes, 4, random.Random(0), selection="entropy", root_eligible=False)
    assert [node.depth for node in drawn] == [1, 1, 1, 1]


def test_entropy_in_a_search():
    engine = Engine(three_calls)
    (group,) = run(engine, num_trees=1, num_expansions=1, selection="entropy")
    first, second = group.trajectories
    nll = [-first.logprobs[begin : begin + 3].mean() for begin in first.steps[:3]]
    begin = first.steps[int(np.argmax(nll))]
    assert first.token_ids[:begin].tolist() == second.token_ids[:begin].tolist()
    assert first.token_ids[begin + 1] != second.token_ids[begin + 1]


def test_a_callable_selects():
    seen = []

    def deepest(candidates, rng):
        seen.append([(node.depth, node.num_expansions) for node in candidates])
        rng.random()
        return candidates[-1]

    (group,) = run(Engine(three_calls), Quiet, num_trees=1, num_expansions=2, selection=deepest)
    assert seen == [[(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 0), (1, 0), (2, 0), (3, 1)]]
    assert group.stats.steps == 4 + 2
    with pytest.raises(ValueError, match=r"selection returned None, which is none of the 4 candidates"):
        run(Engine(three_calls), selection=lambda candidates, rng: None)


def test_every_draw_has_random_numbers_of_its_own():
    numbers = []

    def record(candidates, rng):
        numbers.append(rng.random())
        return candidates[0]

    options = dict(num_rows=3, num_trees=3, num_expansions=2, num_rounds=2, selection=record)
    run(Engine(), **options)
    assert len(set(numbers)) == len(numbers) == 3 * 3 * 2 * 2
    first = sorted(numbers)
    numbers.clear()
    run(Engine(jitter=1), **options)
    assert sorted(numbers) == first
