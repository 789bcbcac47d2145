"""Recurrences and convolutions along the paths of a tree: oracle, chunks, pieces, seams, refusals."""

from functools import partial

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import treegrpo_kernels as tk
from treegrpo_kernels import reference
from treegrpo_kernels.conv import seams_of
from treegrpo_kernels.pieces import pieces_of, slots_of
from treegrpo_kernels.recurrence import fla_reason
from treegrpo_kernels.state_chunks import chunked

# tensors this small lose more to threads waiting for each other than they gain
pytestmark = pytest.mark.usefixtures("one_thread")

FORESTS = {name: cases.named_subtree_end(name) for name in cases.NAMED} | {
    f"random_{seed}": cases.random_subtree_end(150, seed, branch=branch)
    for seed, branch in enumerate((0.01, 0.03, 0.1, 0.3))
}
# (decay per key channel, delta rule)
KINDS = {"delta": (False, True), "kimi": (True, True), "mamba": (False, False), "channels": (True, False)}


def inputs(num_tokens, kind, dtype=torch.float64, seed=0, hk=2, hv=4, d=6, dv=5, decay=0.3):
    """q, k [T,2,6], v [T,4,5], g, beta (None without delta rule) and dout, with keys of length 1."""
    per_channel, delta = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(num_tokens, hk, d), F.normalize(draw(num_tokens, hk, d), dim=-1), draw(num_tokens, hv, dv)
    g = -decay * draw(*((num_tokens, hv, d) if per_channel else (num_tokens, hv))).abs()
    beta = 2 * draw(num_tokens, hv).sigmoid() if delta else None
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]
    return tensors, draw(num_tokens, hv, dv).to(dtype)


def with_gradients(function, tensors, dout):
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, [x for x in tensors if x is not None], dout)]


def oracle(subtree_end, tensors, dout):
    end = torch.as_tensor(subtree_end)
    return with_gradients(lambda *x: reference.gated_delta_rule(*x, end), tensors, dout)


def by_chunks(subtree_end, tensors, dout, chunk):
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end))
    return with_gradients(lambda *x: chunked(*x, plan, chunk=chunk), tensors, dout)


def assert_close(got, want, bound=1e-11):
    for x, y in zip(got, want, strict=True):
        x, y = x.detach(), y.detach()
        assert float((x - y).abs().max()) <= bound * max(1.0, float(y.abs().max()))


def leaf_paths(subtree_end):
    mask = cases.ancestor_mask(subtree_end)
    return [mask[t].nonzero()[0] for t in range(len(mask)) if subtree_end[t] == t + 1]


def without_states(q, k, v, g, beta, subtree_end):
    """The same by matrices [H, T, T] over pairs of a token and its ancestors, many times faster than token by token:
    out = M(q) (I + beta M(k) below the diagonal)^-1 (beta v), where M(x)_ij = x_i . exp(c_i - c_j) k_j and c sums g
    along the path."""
    mask = torch.from_numpy(cases.ancestor_mask(np.asarray(subtree_end)))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (q, k))
    v, g = v.transpose(0, 1), (g if g.dim() == 3 else g[..., None]).transpose(0, 1).to(v.dtype)
    along = mask.to(g.dtype) @ g
    decay = (along[:, :, None] - along[:, None]).masked_fill(~mask[..., None], float("-inf")).exp()
    # one decay for all channels, or one for each
    decayed = decay * k[:, None]
    scores = (decayed @ q[..., None])[..., 0]
    if beta is not None:
        rate = beta.T[..., None].to(v.dtype)
        system = rate * (decayed @ k[..., None])[..., 0]
        v = torch.linalg.solve_triangular(system, rate * v, upper=False, unitriangular=True)
    return (scores @ v).transpose(0, 1)


def assert_a_row_equals_each_forest(forests, kind, chunks, seed=0):
    """All forests in one row, so that a chunk size is one pass; held against each forest by itself."""
    sizes = [len(x) for x in forests]
    starts = np.cumsum([0, *sizes[:-1]])
    row = np.concatenate([x + start for x, start in zip(forests, starts, strict=True)])
    tensors, dout = inputs(len(row), kind, seed=seed)
    found = [by_chunks(row, tensors, dout, chunk) for chunk in chunks]
    for subtree_end, start in zip(forests, starts, strict=True):
        own = slice(start, start + len(subtree_end))
        mine = [None if x is None else x[own].detach().requires_grad_() for x in tensors]
        want = with_gradients(partial(without_states, subtree_end=subtree_end), mine, dout[own])
        for got in found:
            assert_close([x[own] for x in got], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORESTS)
def test_the_oracle_is_every_leaf_alone(name, kind):
    subtree_end = FORESTS[name]
    (q, k, v, g, beta), _ = inputs(len(subtree_end), kind)
    with torch.no_grad():
        packed = reference.gated_delta_rule(q, k, v, g, beta, torch.as_tensor(subtree_end))
        decay = g.exp() if g.dim() == 3 else g.exp()[..., None]
        keys, queries = k.repeat_interleave(2, 1), q.repeat_interleave(2, 1)
        paths = sorted(leaf_paths(subtree_end), key=len, reverse=True)
        # all leaves and heads at once: with D = diag(decay), S <- (I - beta k k^T) D S + beta k v^T
        state = torch.zeros(len(paths), 4, q.shape[2], v.shape[2], dtype=torch.float64)
        for i in range(len(paths[0])):
            t = torch.as_tensor([path[i] for path in paths if len(path) > i])
            rate = torch.zeros(len(t), 4) if beta is None else beta[t]
            forget = torch.eye(q.shape[2]) - rate[..., None, None] * keys[t, :, :, None] * keys[t, :, None, :]
            written = v[t] if beta is None else rate[..., None] * v[t]
            state = forget @ (decay[t][..., None] * state[: len(t)]) + keys[t, :, :, None] * written[:, :, None, :]
            assert torch.allclose(packed[t], (queries[t, :, None, :] @ state)[:, :, 0], atol=1e-12)
        assert_close([without_states(q, k, v, g, beta, subtree_end)], [packed])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_oracle(kind):
    assert_a_row_equals_each_forest(list(FORESTS.values()), kind, (1, 4))
    # where runs are long enough to fill them: others would be padding alone
    long = ("two_trees", "ragged_turns", "random_0", "random_1")
    assert_a_row_equals_each_forest([FORESTS[name] for name in long], kind, (20, 64))


@pytest.mark.parametrize("name", FORESTS)
def test_each_forest_alone_equals_the_oracle(name):
    tensors, dout = inputs(len(FORESTS[name]), "kimi")
    assert_close(by_chunks(FORESTS[name], tensors, dout, 4), oracle(FORESTS[name], tensors, dout))


@pytest.mark.parametrize("kind", KINDS)
def test_branches_at_every_residue_of_a_chunk(kind):
    forests = []
    for prefix in range(1, 20):
        # a trunk, three branches of unlike lengths behind each other, one of which forks again
        trunk = list(range(1, prefix + 1))
        leaves = [trunk + [100] * a for a in (1, prefix, 9)] + [trunk + [200] * 8 + [300 + i] * i for i in (1, 8, 17)]
        leaves[2] = trunk + [150] * 9
        forests.append(cases.trie_subtree_end(leaves))
    assert_a_row_equals_each_forest(forests, kind, (8,), seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_decays_beyond_what_exp_can_hold(kind):
    subtree_end = cases.random_subtree_end(120, 5, branch=0.04)
    tensors, dout = inputs(len(subtree_end), kind, decay=400.0)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        narrow = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
        got = by_chunks(subtree_end, narrow, dout.to(dtype), 64)
        assert_close([x.double() for x in got], oracle(subtree_end, tensors, dout), bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [-1e6, -1e30, float("-inf")])
def test_a_token_that_forgets_all_leaves_the_others_exact(least, kind):
    subtree_end = cases.random_subtree_end(120, 5, branch=0.04)
    tensors, dout = inputs(len(subtree_end), kind, decay=0.05)
    with torch.no_grad():
        tensors[3][[7, 60]] = least
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        narrow = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
        got = by_chunks(subtree_end, narrow, dout.to(dtype), 64)
        assert all(bool(x.isfinite().all()) for x in got)
        assert_close([x.double() for x in got], oracle(subtree_end, tensors, dout), bound)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_exact_as_each_leaf_alone(kind):
    subtree_end = cases.trie_subtree_end([[1] * 150 + [2 + i] * (40 + 9 * i) for i in range(4)])
    tensors, dout = inputs(len(subtree_end), kind, decay=0.05, d=16, dv=16)
    exact = oracle(subtree_end, tensors, dout)
    narrow = [None if x is None else x.detach().float().requires_grad_() for x in tensors]
    tree = by_chunks(subtree_end, narrow, dout.float(), 64)
    # the chain: each leaf alone, a quarter of the trunk's loss in each, gradients added up
    weight = torch.where(torch.arange(len(subtree_end)) < 150, 0.25, 1.0)[:, None, None]
    chain = [torch.zeros_like(x) for x in tree]
    for path in map(torch.as_tensor, leaf_paths(subtree_end)):
        own = [None if x is None else x[path].detach().requires_grad_() for x in narrow]
        out, *gradients = by_chunks(torch.full_like(path, len(path)), own, (dout.float() * weight)[path], 64)
        chain[0][path] = out
        for total, x in zip(chain[1:], gradients, strict=True):
            total[path] += x
    for x, y, z in zip(tree, chain, exact, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm() + 1e-7 * z.norm()


@pytest.mark.parametrize("kind", ["delta", "kimi"])
def test_the_op_normalizes_scales_and_keeps_dtypes(kind):
    subtree_end = FORESTS["random_2"]
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end))
    (q, k, v, g, beta), _ = inputs(len(subtree_end), kind)
    raw = 3 * k.detach()
    out = tk.tree_gated_delta_rule(q, raw, v, g, beta, plan, normalize=True)
    q_1, k_1 = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, raw))
    want = reference.gated_delta_rule(q_1 * 6**-0.5, k_1, v, g, beta, plan.subtree_end)
    assert_close([out], [want])
    assert_close([tk.tree_gated_delta_rule(q, raw, v, g, beta, plan, normalize=True, way="reference")], [want])
    plain = tk.tree_gated_delta_rule(q, k, v, g, beta, plan, scale=1.0)
    assert_close([plain], [reference.gated_delta_rule(q, k, v, g, beta, plan.subtree_end)])

    low = [x.detach().to(torch.bfloat16) for x in (q, k, v, g, beta)]
    exact = reference.gated_delta_rule(*(x.double() for x in low), plan.subtree_end)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = tk.tree_gated_delta_rule(*low, plan, scale=1.0)
        assert got.dtype == torch.bfloat16
        # summed in float32, rounded once
        assert bool(((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all())


def test_linear_attention_is_the_rule_without_delta():
    subtree_end = FORESTS["random_3"]
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end))
    (q, k, v, g, _), _ = inputs(len(subtree_end), "mamba")
    want = reference.gated_delta_rule(q, k, v, g, None, plan.subtree_end)
    for way in ("auto", "torch", "reference"):
        assert_close([tk.tree_gated_linear_attention(q, k, v, g, plan, scale=1.0, way=way)], [want])
    # without decay a token's state is the sum over its path: attention without a softmax
    free = tk.tree_gated_linear_attention(q, k, v, torch.zeros_like(g), plan, scale=1.0)
    scores = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~reference.dense_mask(plan.subtree_end), 0.0)
    assert_close([free], [torch.einsum("hij,jhd->ihd", scores.repeat_interleave(2, 0), v)])


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_bitwise_equal(kind):
    subtree_end = FORESTS["star_64"]
    tensors, dout = inputs(len(subtree_end), kind)
    first, second = (by_chunks(subtree_end, tensors, dout, 4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_second_derivative_is_refused_not_wrong():
    plan = tk.TreePlan.build(torch.as_tensor(FORESTS["random_2"]))
    tensors, dout = inputs(plan.num_tokens, "delta")
    out = tk.tree_gated_delta_rule(*tensors, plan)
    with pytest.raises(RuntimeError, match=r"no second derivative.*take way='reference'"):
        torch.autograd.grad(out, tensors[2], dout, create_graph=True)
    out = tk.tree_gated_delta_rule(*tensors, plan, way="reference")
    assert torch.autograd.grad(out, tensors[2], dout, create_graph=True)[0].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_layer_keeps_its_inputs_alone(kind, monkeypatch):
    from treegrpo_kernels import recurrence

    plan = tk.TreePlan.build(torch.as_tensor(cases.trie_subtree_end([[1] * 90 + [2 + i] * 70 for i in range(3)])))
    tensors, dout = inputs(plan.num_tokens, kind, d=64, dv=64)
    given = [x for x in tensors if x is not None]

    def kept_and_found(limit):
        monkeypatch.setattr(recurrence, "RECOMPUTE_FROM", limit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            rule = tk.tree_gated_linear_attention if tensors[4] is None else tk.tree_gated_delta_rule
            out = rule(*given, plan)
        # what is kept for several operations counts once
        return sum(size for _, size in {(x.data_ptr(), x.nbytes) for x in kept}), [
            out,
            *torch.autograd.grad(out, given, dout),
        ]

    (all_bytes, plain), (few_bytes, again) = kept_and_found(2**40), kept_and_found(0)
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    assert few_bytes <= sum(x.nbytes for x in given) < all_bytes
    # the estimate is of the size of what is kept
    assert 0.5 < recurrence.kept_bytes(tensors[0], *tensors[2:], plan) / all_bytes < 2


def test_pieces_of_the_docstring():
    plan = tk.TreePlan.build(torch.tensor([6, 6, 5, 4, 5, 6]))
    pieces = pieces_of(plan)
    assert pieces.token.tolist() == [0, 1, 2, 5, 3, 4] and pieces.length.tolist() == [2, 1, 1, 1, 1]
    assert pieces.parent.tolist() == [-1, 0, 0, 0, 0]
    assert pieces.level_pieces == (1, 2, 2) and pieces.level_tokens == (2, 2, 2)
    single = pieces_of(plan, 1)
    assert single.token.tolist() == [0, 1, 2, 5, 3, 4] and single.level_pieces == (1, 1, 2, 2)
    assert pieces_of(plan) is pieces and pieces_of(plan, 1) is single
    slots = slots_of(plan, 4)
    assert slots.piece.tolist() == [0, 0, 1, 3, 4, 2] and slots.row.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("longest", [None, 1, 3])
@pytest.mark.parametrize("name", FORESTS)
def test_pieces_are_unbranched_runs_behind_their_parents(name, longest):
    subtree_end = FORESTS[name]
    before = reference.parents(torch.as_tensor(subtree_end))
    pieces = pieces_of(tk.TreePlan.build(torch.as_tensor(subtree_end)), longest)
    assert sorted(pieces.token.tolist()) == list(range(len(subtree_end)))
    assert torch.equal(pieces.token[pieces.place], torch.arange(len(subtree_end)))
    runs = [run.tolist() for run in pieces.token.split(pieces.length.tolist())]
    assert sum(pieces.level_pieces) == len(runs) and sum(pieces.level_tokens) == len(subtree_end)
    above: list[list[int]] = []
    at = 0
    for size, tokens in zip(pieces.level_pieces, pieces.level_tokens, strict=True):
        level, parents = runs[at : at + size], pieces.parent[at : at + size].tolist()
        assert sum(map(len, level)) == tokens
        for run, parent in zip(level, parents, strict=True):
            assert before[run[0]] == (above[parent][-1] if at else -1)
            assert all(before[t] == t - 1 for t in run[1:])
            # a run ends where it branches, or where it is full
            children = before.count(run[-1])
            assert children != 1 or len(run) == longest
            assert longest is None or len(run) <= longest
        above, at = level, at + size


def test_a_level_holds_all_branches():
    # 64 leaves of 3 chunks behind a trunk of 2: five steps, not 194
    leaves = [[1] * 16 + [2 + i] * 24 for i in range(64)]
    pieces = pieces_of(tk.TreePlan.build(torch.as_tensor(cases.trie_subtree_end(leaves))), 8)
    assert pieces.level_pieces == (1, 1, 64, 64, 64)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("name", FORESTS)
def test_convolution_along_every_path(name, taps):
    subtree_end = torch.as_tensor(FORESTS[name])
    plan = tk.TreePlan.build(subtree_end)
    generator = torch.Generator().manual_seed(taps)
    x, weight, bias, dout = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((len(subtree_end), 5), (5, taps), (5,), (len(subtree_end), 5))
    )
    for b in (bias, None):
        tensors = [x, weight] + ([] if b is None else [b])
        plain = reference.causal_conv1d(x, weight, b, subtree_end)
        for activation in (None, F.silu):
            got = tk.tree_conv1d(x, weight, b, plan, activation=activation)
            want = plain if activation is None else activation(plain)
            expected = torch.autograd.grad(want, tensors, dout, retain_graph=True)
            assert_close([got, *torch.autograd.grad(got, tensors, dout)], [want, *expected])
    # each leaf alone
    with torch.no_grad():
        packed = tk.tree_conv1d(x, weight, bias, plan)
        for path in leaf_paths(FORESTS[name]):
            alone = F.conv1d(F.pad(x[path].T[None], (taps - 1, 0)), weight[:, None], bias, groups=5)[0].T
            assert_close([packed[path]], [alone])


def test_seams_of_the_docstring():
    plan = tk.TreePlan.build(torch.tensor([6, 6, 5, 4, 5, 6]))
    seams = seams_of(plan, 3)
    assert seams.token.tolist() == [4, 5] and seams.ancestor.tolist() == [[1, 2, 4], [0, 1, 5]]
    assert seams_of(tk.TreePlan.build(torch.full((9,), 9)), 4).token.numel() == 0
    # a second root sees nothing of the first: index T, a row of zeros
    two = seams_of(tk.TreePlan.build(torch.tensor([2, 2, 4, 4])), 3)
    assert two.token.tolist() == [2, 3] and two.ancestor.tolist() == [[4, 4, 2], [4, 2, 3]]


def test_a_faster_row_convolution_is_taken():
    plan = tk.TreePlan.build(torch.as_tensor(FORESTS["two_trees"]))
    x, weight = torch.randn(plan.num_tokens, 3), torch.randn(3, 4)
    rows = []

    def row_conv(row):
        rows.append(row.shape)
        return F.conv1d(F.pad(row, (3, 0)), weight[:, None], groups=3)

    assert torch.equal(tk.tree_conv1d(x, weight, None, plan, row_conv=row_conv), tk.tree_conv1d(x, weight, None, plan))
    assert rows == [(1, 3, plan.num_tokens)]
    # what autocast makes of it is cast back
    low = tk.tree_conv1d(x, weight, None, plan, row_conv=lambda row: row_conv(row).bfloat16())
    assert low.dtype == torch.float32


def test_what_stands_in_another_tree_does_not_reach_a_root():
    subtree_end = torch.as_tensor(FORESTS["two_trees"])
    plan = tk.TreePlan.build(subtree_end)
    second = int(subtree_end[0])
    for bad in (slice(0, second), slice(second, None)):
        x = torch.randn(plan.num_tokens, 3)
        x[bad] = float("nan")
        fine = ~x.isnan()
        assert torch.equal(tk.tree_conv1d(x, torch.randn(3, 4), None, plan).isfinite(), fine)


def test_no_tokens():
    plan = tk.TreePlan.build(torch.zeros(0, dtype=torch.int32))
    for kind in KINDS:
        tensors, dout = inputs(0, kind)
        out, *gradients = with_gradients(lambda *x: chunked(*x, plan), tensors, dout)
        assert out.shape == (0, 4, 5) and not any(x.numel() for x in gradients)
    assert tk.tree_conv1d(torch.zeros(0, 3), torch.zeros(3, 4), None, plan).shape == (0, 3)


def test_bad_calls_name_the_field():
    plan = tk.TreePlan.build(torch.as_tensor(FORESTS["two_trees"]))
    (q, k, v, g, beta), _ = inputs(plan.num_tokens, "delta")
    rule = tk.tree_gated_delta_rule
    for bad, match in [
        ((q[1:], k, v, g, beta), "q has shape"),
        ((q, k[:, :1], v, g, beta), "k has shape"),
        ((q, k, v[:, :3], g, beta), "v has shape.*multiple of q's 2 heads"),
        ((q, k, v, g[:, :2], beta), "g has shape"),
        ((q, k, v, g, beta[:, :2]), "beta has shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            rule(*bad, plan)
    with pytest.raises(ValueError, match="way='fast' is not known"):
        rule(q, k, v, g, beta, plan, way="fast")
    with pytest.raises(ValueError, match=r"way='fla' cannot run here: .* need a GPU"):
        rule(q, k, v, g, beta, plan, way="fla")
    with pytest.raises(ValueError, match="way='fla' is not known"):
        tk.tree_gated_linear_attention(q, k, v, g, plan, way="fla")
    assert "need a GPU" in fla_reason(q.device, torch.bfloat16)
    assert "not torch.float32" in fla_reason(torch.device("cuda"), torch.float32)
    assert "at most 256" in fla_reason(torch.device("cuda"), torch.bfloat16, head_dim=512)
    for bad, match in [
        ((torch.zeros(3, 2), torch.zeros(2, 4), None), "x has shape"),
        ((torch.zeros(plan.num_tokens, 2), torch.zeros(3, 4), None), "weight has shape"),
        ((torch.zeros(plan.num_tokens, 2), torch.zeros(2, 4), torch.zeros(3)), "bias has shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            tk.tree_conv1d(*bad, plan)


def test_auto_says_once_what_it_takes_and_why(caplog):
    from treegrpo_kernels import recurrence

    plan = tk.TreePlan.build(torch.as_tensor(FORESTS["two_trees"]))
    tensors, _ = inputs(plan.num_tokens, "delta")
    recurrence._announce.cache_clear()
    with caplog.at_level("INFO", logger="treegrpo_kernels"):
        for _ in range(2):
            tk.tree_gated_delta_rule(*tensors, plan)
        recurrence._announce("cuda", "no fla")
    first, second = caplog.records
    assert "tree_gated_delta_rule on cpu uses torch (flash-linear-attention's kernels need a GPU" in first.message
    assert first.levelname == "INFO" and second.levelname == "WARNING"
    recurrence._announce.cache_clear()
