"""TreeBatch and pack: streams against the trajectories, the exact adjoint, and the measured data."""

import doctest
import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from cases import NAMED, shared_data
from hypothesis import given
from hypothesis import strategies as st
from test_tree import trajectories
from torch.autograd import gradcheck, gradgradcheck

import treegrpo
from treegrpo import packing
from treegrpo.packing import pack
from treegrpo.tree import Trajectory, build_forest, build_tree, load
from treegrpo_kernels.plan import TreePlan

NAN = float("nan")


def forest_of(name, group="g"):
    return build_forest([Trajectory(ids, [0] + [1] * (len(ids) - 1), group=group) for ids in NAMED[name]])


def random_forest(seed, num_groups, prompts=1, min_size=20, max_size=400):
    """Groups of 2 to 4 leaves behind one of `prompts` common beginnings of 100 tokens each."""
    rng = np.random.default_rng(seed)
    system = [1000 * (p + 1) + np.arange(100) for p in range(prompts)]
    rows = []
    for g in range(num_groups):
        question = rng.integers(0, 500, int(rng.integers(5, 30)))
        for _ in range(int(rng.integers(2, 5))):
            ids = [*system[g % prompts], *question, *rng.integers(0, 500, int(rng.integers(min_size, max_size)))]
            rows.append(Trajectory(ids, [0] * 110 + [1] * (len(ids) - 110), group=f"g{g}"))
    return build_forest(rows)


def leaves_of(batch):
    cuts = batch.leaf_offsets.tolist()
    return list(zip(cuts, cuts[1:], strict=False))


def test_docstring_examples():
    assert doctest.testmod(packing).failed == 0


@given(trajectories(), st.booleans())
def test_streams_are_the_trajectories(rows, share):
    forest = build_forest(rows)
    [batch] = pack(forest, share_across_groups=share)
    leaves = [t for tree in forest for t in tree.trajectories]
    assert batch.trees == tuple(forest)
    assert batch.tree_indices == tuple(range(len(forest)))
    assert batch.num_leaves == len(leaves)
    assert batch.num_chain_tokens == sum(t.num_tokens for t in leaves)
    assert batch.num_chain_pairs == sum(tree.num_chain_pairs for tree in forest)
    ids = batch.expand(batch.input_ids)
    trained = np.zeros(batch.num_tokens, bool)
    for leaf, (a, b) in zip(leaves, leaves_of(batch), strict=True):
        assert ids[a:b].tolist() == leaf.token_ids.tolist()
        assert batch.leaf_mask[a:b].tolist() == leaf.loss_mask.tolist()
        recorded = np.full(leaf.num_tokens, np.nan, np.float32) if leaf.logprobs is None else leaf.logprobs
        assert batch.leaf_logp[a:b].numpy().tobytes() == recorded.tobytes()
        path = batch.leaf_tokens[a:b]
        assert batch.prev[path].tolist() == [-1, *path[:-1].tolist()]
        assert batch.position_ids[path].tolist() == list(range(b - a))
        trained[path[batch.leaf_mask[a:b]]] = True
    assert batch.trained.tolist() == trained.tolist()
    assert batch.token_ratio == batch.num_chain_tokens / batch.num_tokens
    assert batch.pair_ratio == batch.num_chain_pairs / batch.num_pairs
    alone = sum(tree.num_tokens for tree in forest)
    assert batch.num_tokens <= alone if share else batch.num_tokens == alone


@given(trajectories())
def test_pair_counts_and_plan(rows):
    [batch] = pack(build_forest(rows))
    assert batch.plan is batch.plan
    assert isinstance(batch.plan, TreePlan)
    assert batch.plan.num_pairs == batch.num_pairs == int((batch.position_ids + 1).sum())
    assert batch.plan.position.tolist() == batch.position_ids.tolist()


def test_dtypes_and_model_inputs():
    [batch] = pack(forest_of("worked_example"))
    dtypes = {
        torch.int64: ("input_ids", "position_ids", "leaf_tokens", "leaf_offsets", "leaf_order", "token_offsets"),
        torch.int32: ("subtree_end", "prev"),
        torch.bool: ("leaf_mask", "trained"),
        torch.float32: ("leaf_logp", "multiplicity"),
    }
    for dtype, names in dtypes.items():
        assert {getattr(batch, name).dtype for name in names} == {dtype}
    inputs = batch.model_inputs()
    assert sorted(inputs) == ["attention_mask", "input_ids", "position_ids", "tree_plan", "use_cache"]
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3, 2]]
    assert (inputs["attention_mask"], inputs["use_cache"]) == (None, False)
    assert inputs["tree_plan"] is batch.plan
    assert batch.to("cpu") is batch


def test_to_moves_every_tensor_and_drops_the_plan():
    [batch] = pack(forest_of("worked_example"))
    assert batch.plan.device == batch.device
    moved = batch.to("meta")
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert moved._plan is None
    assert moved.trees == batch.trees


# expand and its adjoint


@pytest.mark.parametrize("name", ["worked_example", "prefixes_of_one_another", "duplicates", "binary_depth_4"])
def test_expand_gradients(name):
    [batch] = pack(forest_of(name))
    x = torch.randn(batch.num_tokens, dtype=torch.float64, requires_grad=True)
    y = torch.randn(batch.num_chain_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(batch.expand(x), x[batch.leaf_tokens])
    assert gradcheck(batch.expand, x)
    assert gradgradcheck(batch.expand, x)
    assert gradcheck(batch.collapse, y)


@given(trajectories(), st.integers(0, 2**31))
def test_collapse_is_the_exact_adjoint(rows, seed):
    [batch] = pack(build_forest(rows))
    generator = torch.Generator().manual_seed(seed)
    # small integers: every sum is exact, so the two sides must agree to the bit
    x = torch.randint(-9, 10, (batch.num_tokens,), generator=generator).float().requires_grad_()
    y = torch.randint(-9, 10, (batch.num_chain_tokens,), generator=generator).float()
    assert torch.dot(batch.expand(x), y) == torch.dot(x, batch.collapse(y))
    (batch.expand(x) * y).sum().backward()
    expected = torch.zeros(batch.num_tokens).index_add(0, batch.leaf_tokens, y)
    assert torch.equal(x.grad, expected)


def test_adjoint_is_summed_wide_and_repeatable():
    [batch] = pack(forest_of("star_64"))
    y = torch.full((batch.num_chain_tokens,), 1.0 + 2**-7, dtype=torch.bfloat16)
    total = batch.collapse(y)
    # 64 (1 + 2^-7) is a bfloat16; adding 64 times in bfloat16 would stall long before it
    assert total.dtype == torch.bfloat16
    assert total[:3].tolist() == [64.5] * 3
    noise = torch.randn(batch.num_chain_tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch.collapse(noise), batch.collapse(noise))
    double = batch.collapse(noise.double())
    assert torch.allclose(batch.collapse(noise).double(), double, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_adjoint_on_a_gpu_is_repeatable_and_right():
    [batch] = pack(random_forest(0, num_groups=200))
    moved = batch.to("cuda")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = torch.randn(batch.num_chain_tokens, generator=torch.Generator().manual_seed(0)).to(dtype)
        first = moved.collapse(y.cuda())
        assert all(torch.equal(moved.collapse(y.cuda()), first) for _ in range(5))
        torch.testing.assert_close(first.cpu(), batch.collapse(y))


def test_expand_refuses_what_is_not_of_this_batch():
    [batch] = pack(forest_of("worked_example"))
    for bad in (torch.zeros(5), torch.zeros(1, 6), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"x has shape .* takes 6 rows .* without a batch dimension"):
            batch.expand(bad)
    with pytest.raises(ValueError, match="takes 11 rows"):
        batch.collapse(torch.zeros(6))
    with pytest.raises(ValueError, match=r"y is torch.bool: .* pass y.float\(\)"):
        batch.collapse(batch.leaf_mask)
    with pytest.raises(ValueError, match=r"x is on meta, the batch on cpu"):
        batch.expand(torch.zeros(6, device="meta"))


# advantages on tokens


def test_leaf_stream_lays_steps_on_tokens():
    rows = [
        Trajectory([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], group="a", steps=[2, 4]),
        Trajectory([1, 2, 6], [0, 0, 1], group="a"),
        Trajectory([7], [0], group="b", steps=[]),
        Trajectory([7, 8], [0, 1], group="b", steps=[0, 1]),
        Trajectory([7, 9], [0, 1], group="b", steps=[1]),
    ]
    advantages = [
        [np.array([0.5, -1.5]), np.array([2.0])],
        [np.array([]), np.array([3.0, 4.0]), np.array([0.1])],
    ]
    [batch] = pack(build_forest(rows))
    stream = batch.leaf_stream(advantages)
    assert stream.dtype == torch.float32
    expected = [0, 0, 0.5, 0.5, -1.5, 2, 2, 2, 0, 3, 4, 0, np.float32(0.1)]
    assert stream.tolist() == [float(value) for value in expected]


@given(trajectories(), st.integers(1, 30))
def test_leaf_stream_picks_the_trees_of_the_batch(rows, budget):
    forest = build_forest(rows)
    budget = max(budget, *(tree.num_tokens for tree in forest), 1)
    rng = np.random.default_rng(0)
    advantages = [[rng.normal(size=t.num_steps) for t in tree.trajectories] for tree in forest]
    seen = []
    for batch in pack(forest, token_budget=budget):
        seen += batch.tree_indices
        stream = batch.leaf_stream(advantages)
        leaves = [t for i in batch.tree_indices for t in forest[i].trajectories]
        mine = [per_step for i in batch.tree_indices for per_step in advantages[i]]
        for t, per_step, (a, _) in zip(leaves, mine, leaves_of(batch), strict=True):
            starts = [0] if t.steps is None else t.steps.tolist()
            for token in range(t.num_tokens):
                step = sum(start <= token for start in starts) - 1
                assert stream[a + token] == (np.float32(per_step[step]) if step >= 0 else 0)
    assert sorted(seen) == list(range(len(forest)))


def test_leaf_stream_fits_compute_advantages():
    rows = [Trajectory([1, 2, i], [0, 0, 1], reward=float(i == 3), group="g") for i in (3, 4, 5)]
    forest = build_forest(rows)
    [batch] = pack(forest)
    advantages = treegrpo.compute_advantages(forest, "grpo")
    stream = batch.leaf_stream(advantages)
    assert stream[batch.leaf_mask].tolist() == pytest.approx([2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5], abs=1e-5)


def test_leaf_stream_refuses_what_does_not_fit():
    forest = build_forest([Trajectory([1, 2, 3], [0, 1, 1], group=g, steps=[1, 2]) for g in "ab"])
    [batch] = pack(forest)
    good = [np.array([1.0, 2.0])]
    for bad, message in (
        ([good], "advantages are for 1 trees, but 2 were packed"),
        ([good, good + good], r"advantages\[1\] \(group 'b'\) are for 2 leaves, the tree has 1"),
        ([[np.array([1.0])], good], r"advantages\[0\] \(group 'a'\), leaf 0: shape \(1,\), but the leaf has 2 steps"),
        ([good, [np.array([NAN, 1.0])]], r"advantages\[1\] \(group 'b'\), leaf 0: .* is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.leaf_stream(bad)


def test_multiplicity_counts_the_leaves_of_the_tree_that_train_the_token():
    rows = [
        Trajectory([1, 2, 3], [0, 1, 1], group="a"),
        Trajectory([1, 2, 3, 4], [0, 0, 1, 1], group="a"),
        Trajectory([1, 2, 3], [0, 1, 1], group="b"),
    ]
    [batch] = pack(build_forest(rows))
    assert batch.num_tokens == 4
    assert batch.multiplicity.tolist() == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1]
    apart = pack(build_forest(rows), token_budget=4, share_across_groups=False)
    assert torch.cat([b.multiplicity for b in apart]).tolist() == batch.multiplicity.tolist()


# sharing across groups, bad input, size


def test_trees_share_only_their_beginnings():
    forest = build_forest([Trajectory([1, 2, x, y], [0, 0, 1, 1], group=str(x)) for x in (3, 4) for y in (5, 6)])
    [together] = pack(forest)
    [apart] = pack(forest, share_across_groups=False)
    assert together.input_ids.tolist() == [1, 2, 3, 5, 6, 4, 5, 6]
    assert together.subtree_end.tolist() == [8, 8, 5, 4, 5, 8, 7, 8]
    assert apart.input_ids.tolist() == [1, 2, 3, 5, 6, 1, 2, 4, 5, 6]
    assert apart.subtree_end.tolist() == [5, 5, 5, 4, 5, 10, 10, 10, 9, 10]
    assert apart.prev.tolist() == [-1, 0, 1, 2, 2, -1, 5, 6, 7, 7]


def test_bad_arguments_are_refused():
    forest = forest_of("worked_example")
    with pytest.raises(ValueError, match="no trees to pack"):
        pack([])
    with pytest.raises(ValueError, match=r"trees\[0\] is a Trajectory, not a RolloutTree: use build_forest"):
        pack(forest[0].trajectories)
    for bad in (0, -5, 1.5, True):
        with pytest.raises(ValueError, match=r"token_budget is .*: give a positive integer"):
            pack(forest, token_budget=bad)


def count_nodes(forest):
    """Nodes of the trie of all leaves, one token at a time."""
    children = {}
    for tree in forest:
        for t in tree.trajectories:
            node = -1
            for token in t.token_ids.tolist():
                node = children.setdefault((node, token), len(children))
    return len(children)


def million_tokens(shape):
    rng = np.random.default_rng(0)
    if shape == "many short, deep sharing":
        rows = [("g", ids) for ids in rng.integers(0, 3, (40_000, 25))]
    elif shape == "few long":
        rows = [("g", ids) for ids in rng.integers(0, 150_000, (10, 100_000))]
    elif shape == "each a prefix of the next":
        ids = rng.integers(0, 150_000, 1413)
        rows = [("g", ids[:n]) for n in range(1, 1414)]
    else:
        system = rng.integers(0, 150_000, 1000)
        rows = [(str(i // 4), np.append(system, rng.integers(0, 150_000, 250))) for i in range(800)]
    return [Trajectory(ids, np.zeros(len(ids), bool), group=group) for group, ids in rows]


@pytest.mark.parametrize(
    "shape", ["many short, deep sharing", "few long", "each a prefix of the next", "groups behind a system prompt"]
)
def test_a_million_tokens_take_under_two_seconds_and_linear_memory(shape):
    rows = million_tokens(shape)
    num_tokens = sum(t.num_tokens for t in rows)
    assert num_tokens >= 990_000
    begin = time.process_time()
    forest = build_forest(rows)
    budget = max(65536, *(tree.num_tokens for tree in forest), 0)
    pack(forest)
    # processor time of this process, so that neighbours on the machine do not fail the test
    assert time.process_time() - begin < 2.0
    assert all(batch.num_tokens <= budget for batch in pack(forest, token_budget=budget))
    for work, allowed in ((lambda: pack(forest), 150), (lambda: build_forest(rows), 90)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < allowed * num_tokens


@pytest.fixture(scope="module")
def tau_bench():
    folder = shared_data("tau_bench_airline")
    if folder is None:
        pytest.skip("no tau_bench_airline data (set TREEGRPO_DATA to the folder that holds it)")
    return build_forest(load(folder / "tokens.jsonl.gz")), json.loads((folder / "stats.json").read_text())["overall"]


def test_tau_bench_packs_the_system_prompt_once(tau_bench):
    forest, stats = tau_bench
    [apart] = pack(forest, share_across_groups=False)
    assert (apart.num_tokens, apart.num_pairs) == (stats["tree_tokens"], stats["tree_pairs"])
    assert (apart.num_chain_tokens, apart.num_chain_pairs) == (stats["chain_tokens"], stats["chain_pairs"])
    assert apart.token_ratio == pytest.approx(stats["token_ratio"], abs=1e-6)
    assert apart.pair_ratio == pytest.approx(stats["pair_ratio"], abs=1e-6)
    assert int(apart.trained.sum()) == stats["tree_loss_tokens"]
    assert int(apart.leaf_mask.sum()) == stats["chain_loss_tokens"]

    [batch] = pack(forest)
    copies = batch.token_offsets.diff()
    # the system message of 1,270 tokens, and the three that open the customer's turn: once for all 200 conversations
    assert int((copies == 200).sum()) == 1273
    assert copies[:1273].tolist() == [200] * 1273
    assert batch.num_tokens <= stats["tree_tokens"] - 49 * 1270
    assert batch.num_tokens == count_nodes(forest)


def test_tau_bench_under_a_budget(tau_bench):
    forest, stats = tau_bench
    batches = pack(forest, token_budget=32768)
    assert all(b.num_tokens <= 32768 for b in batches)
    assert all(int((b.token_offsets.diff() == b.num_leaves).sum()) >= 1270 for b in batches)
    total = sum(b.num_tokens for b in batches)
    assert total <= stats["tree_tokens"] - (49 - (len(batches) - 1)) * 1270
    assert len(batches) <= -(-total // 32768) + 1


def test_one_tree_alone_equals_its_trie():
    rows = [Trajectory(ids, [0] * len(ids)) for ids in NAMED["ragged_turns"]]
    tree = build_tree(rows)
    [batch] = pack([tree])
    for name, array in (
        ("input_ids", tree.trie.tokens),
        ("prev", tree.trie.prev),
        ("leaf_tokens", tree.trie.leaf_tokens),
    ):
        assert getattr(batch, name).tolist() == array.tolist()
