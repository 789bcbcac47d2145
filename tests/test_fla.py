"""way="fla": flash-linear-attention's variable-length rules called level by level, against the oracle.

Three rules stand in it: one written out here after fla's documentation; fla's own kernels in Triton's interpreter,
where fla is installed without a GPU (`make test-fla`); and on a GPU.
"""

import importlib.util
import sys
import types
from functools import partial
from itertools import pairwise

import cases
import pytest
import torch
import torch.nn.functional as F
from test_recurrence import inputs, leaf_paths, oracle, with_gradients

import treegrpo_kernels as tk
from treegrpo_kernels import recurrence, reference

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_FLA = importlib.util.find_spec("fla") is not None
# forks within and at the end of chunks of 64, a second tree, pieces of one token
LEAVES = [[1] * 70 + [2] * 30, [1] * 70 + [3] * 10 + [4] * 40, [1] * 70 + [3] * 10 + [5] * 3, [6] * 64 + [7], [6] * 64]
LEAVES[4] = LEAVES[4] + [8] * 66


def one_by_one(calls):
    """A rule with fla's arguments that runs each sequence by itself."""

    def rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        chunk_indices,
    ):
        assert q.shape[0] == k.shape[0] == v.shape[0] == g.shape[0] == beta.shape[0] == 1
        assert cu_seqlens[-1] == q.shape[1] and chunk_indices.shape == (sum(-(-cu_seqlens.diff() // 64)), 2)
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        calls.append((len(cu_seqlens) - 1, output_final_state))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        outs, states = [], []
        for index, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            first = None if initial_state is None else initial_state[index]
            out, state = from_state(q[0, a:b] * scale, k[0, a:b], v[0, a:b], g[0, a:b], beta[0, a:b], first)
            outs.append(out)
            states.append(state)
        return torch.cat(outs)[None], torch.stack(states) if output_final_state else None

    return rule


def from_state(q, k, v, g, beta, state):
    """One sequence from a state [Hv, D, Dv]: the outputs and the state behind it."""
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    state = v.new_zeros(v.shape[1], q.shape[2], v.shape[2]) if state is None else state
    outs = []
    for t in range(len(q)):
        state = state * (g[t].exp()[..., None] if g.dim() == 3 else g[t].exp()[:, None, None])
        write = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * write[:, None, :]
        outs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outs), state


def chunk_indices(cu_seqlens, chunk_size):
    counts = -(-cu_seqlens.diff() // chunk_size)
    return torch.cat([torch.stack([torch.full((n,), i), torch.arange(n)], 1) for i, n in enumerate(counts.tolist())])


@pytest.fixture
def stand_in(monkeypatch):
    calls = []
    rule = one_by_one(calls)
    names = {
        "fla": {},
        "fla.ops": {},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": rule},
        "fla.ops.kda": {"chunk_kda": rule},
        "fla.ops.utils": {"prepare_chunk_indices": chunk_indices},
    }
    for name, contents in names.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    recurrence._missing.cache_clear()
    yield calls
    recurrence._missing.cache_clear()


def by_levels(subtree_end, tensors, dout, normalize=False, device="cpu"):
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end), device=device)
    return with_gradients(lambda *x: recurrence._fla_by_levels(*x, plan, 0.7, normalize), tensors, dout)


def expected(subtree_end, tensors, dout, normalize=False):
    end = torch.as_tensor(subtree_end)

    def rule(q, k, *rest):
        if normalize:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        return reference.gated_delta_rule(0.7 * q, k, *rest, end)

    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    return with_gradients(rule, wide, dout.double().cpu())


@pytest.mark.parametrize("kind", ["delta", "kimi"])
@pytest.mark.parametrize(
    ("name", "normalize"),
    [(name, False) for name in ("worked_example", "comb_depth_50", "two_trees", "star_64", "chunks")]
    + [("worked_example", True), ("two_trees", True)],
)
def test_levels_from_the_states_of_their_parents(stand_in, name, kind, normalize):
    subtree_end = cases.trie_subtree_end(LEAVES) if name == "chunks" else cases.named_subtree_end(name)
    tensors, dout = inputs(len(subtree_end), kind)
    got, want = (f(subtree_end, tensors, dout, normalize) for f in (by_levels, expected))
    for x, y in zip(got, want, strict=True):
        assert float((x - y).abs().max()) <= 1e-11 * max(1.0, float(y.abs().max()))
    # only the last level's states are not asked for
    assert [asked for _, asked in stand_in] == [True] * (len(stand_in) - 1) + [False]
    branches = {"worked_example": [1, 2, 2], "two_trees": [2, 4, 2], "star_64": [1, 64], "chunks": [2, 4, 2]}
    if name in branches:
        assert [count for count, _ in stand_in] == branches[name]


@pytest.mark.parametrize(
    ("triton", "hopper", "per_channel", "tilelang", "runs"),
    [
        ("3.6.0", True, False, False, False),
        ("3.6.0", True, True, False, True),
        ("3.6.0", True, False, True, True),
        ("3.6.0", False, False, False, True),
        ("3.7.1", True, False, False, True),
        ("3.7.0+git12", True, False, False, False),
        ("3.7.0rc1", True, False, False, False),
        ("3.10.0", True, False, False, True),
        ("3.3.1", True, False, False, True),
    ],
)
def test_where_its_backward_is_wrong_it_is_not_taken(
    stand_in, monkeypatch, triton, hopper, per_channel, tilelang, runs
):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
    monkeypatch.setattr(recurrence.importlib.util, "find_spec", lambda name: tilelang or None)
    reason = recurrence._missing(per_channel, hopper)
    assert (reason is None) == runs and (runs or "Triton 3.7.1 or newer" in reason)


def test_a_missing_package_is_named(monkeypatch):
    recurrence._missing.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.kda", None)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    assert "pip install 'treegrpo[hybrid]'" in recurrence._missing(False, False)
    recurrence._missing.cache_clear()


@pytest.mark.skipif(not HAS_FLA or torch.cuda.is_available(), reason="needs flash-linear-attention and no GPU")
@pytest.mark.parametrize("kind", ["delta", "kimi"])
def test_its_kernels_in_the_interpreter(kind):
    from fla_interpreted import interpret

    interpret()
    subtree_end = cases.trie_subtree_end(LEAVES)
    tensors, dout = inputs(len(subtree_end), kind, dtype=torch.float32, d=16, dv=16)
    got, want = (f(subtree_end, tensors, dout, True) for f in (by_levels, expected))
    for x, y in zip(got, want, strict=True):
        assert float((x - y).norm() / y.norm()) <= 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["delta", "kimi"])
def test_on_a_gpu_as_exact_as_each_leaf_alone(kind):
    """bfloat16 through ``tree_gated_delta_rule``: fla where it runs, else torch; at most twice the chains' error."""
    subtree_end = cases.trie_subtree_end([[1] * 700 + [2 + i] * (200 + 97 * i) for i in range(4)])
    tensors, dout = inputs(len(subtree_end), kind, decay=0.05, d=64, dv=64)
    low = [F.normalize(x.detach(), dim=-1) if i < 2 else x.detach() for i, x in enumerate(tensors)]
    low = [x.to("cuda", torch.bfloat16).requires_grad_() for x in low]
    low[3] = low[3].detach().float().requires_grad_()
    exact = oracle(subtree_end, [x.detach().double().cpu().requires_grad_() for x in low], dout)
    reason = recurrence.fla_reason(low[0].device, low[0].dtype, kind == "kimi")
    for way in ("torch",) if reason else ("torch", "fla"):

        def run(end, tensors, dout, way=way):
            plan = tk.TreePlan.build(torch.as_tensor(end), device="cuda")
            rule = partial(tk.tree_gated_delta_rule, plan=plan, scale=1.0, way=way)
            return [x.double().cpu() for x in with_gradients(rule, tensors, dout.to("cuda", torch.bfloat16))]

        tree, again = run(subtree_end, low, dout), run(subtree_end, low, dout)
        assert all(torch.equal(x, y) for x, y in zip(tree, again, strict=True))
        weight = torch.where(torch.arange(len(subtree_end)) < 700, 0.25, 1.0)[:, None, None]
        chain = [torch.zeros_like(x) for x in tree]
        for path in map(torch.as_tensor, leaf_paths(subtree_end)):
            own = [x[path.cuda()].detach().requires_grad_() for x in low]
            out, *gradients = run(torch.full_like(path, len(path)), own, (dout * weight)[path])
            chain[0][path] = out
            for total, x in zip(chain[1:], gradients, strict=True):
                total[path] += x
        for x, y, z in zip(tree, chain, exact, strict=True):
            assert (x - z).norm() <= 2 * (y - z).norm() + 1e-6 * z.norm()
