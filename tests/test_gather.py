"""backend="gather": its layout, and its numbers with a plain varlen attention in the place of the GPU's kernel."""

import sys
import types
import typing
import weakref
from functools import partial
from itertools import pairwise

import cases
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from treegrpo_kernels import gather, reference
from treegrpo_kernels.plan import TreePlan

# tensors this small lose more to threads waiting for each other than they gain
pytestmark = pytest.mark.usefixtures("one_thread")

FORESTS = {name: cases.named_subtree_end(name) for name in cases.NAMED} | {
    f"random_{seed}": cases.random_subtree_end(90, seed, branch=0.1) for seed in range(4)
}


def varlen(q, k, v, layout, scale, window, softcap, deterministic):
    """Bottom-right causal attention of each segment to its path, one by one."""
    outs, lses = [], []
    bounds_q, bounds_k = layout.cu_q.tolist(), layout.cu_k.tolist()
    assert max(b - a for a, b in pairwise(bounds_q)) == layout.max_q
    assert max(b - a for a, b in pairwise(bounds_k)) == layout.max_k
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1].repeat_interleave(group, 1))
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)[None, :]
        seen = (behind >= 0) & (behind < (window or k1 - k0))
        scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k0:k1].repeat_interleave(group, 1)))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("name", FORESTS)
def test_layout_is_every_segment_and_its_path(name):
    subtree_end = FORESTS[name]
    layout = gather.layout_of(TreePlan.build(torch.from_numpy(subtree_end)))
    mask = cases.ancestor_mask(subtree_end)
    starts = layout.cu_q.tolist()
    assert starts[0] == 0 and starts[-1] == len(subtree_end)
    for s in range(len(starts) - 1):
        own = layout.path[layout.cu_k[s] : layout.cu_k[s + 1]].tolist()
        assert own == mask[starts[s + 1] - 1].nonzero()[0].tolist()
        # unbranched: each token of the segment is the parent of the next
        for t in range(starts[s], starts[s + 1] - 1):
            assert mask[t + 1].sum() == mask[t].sum() + 1 and mask[t + 1, t]
    assert layout.cu_q.dtype == layout.cu_k.dtype == torch.int32


def test_worked_example_of_the_docstring():
    layout = gather.layout_of(TreePlan.build(torch.tensor([6, 6, 5, 4, 5, 6])))
    assert layout.cu_q.tolist() == [0, 2, 3, 4, 5, 6] and layout.cu_k.tolist() == [0, 2, 5, 9, 13, 16]
    assert layout.path.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5]


def test_layout_is_built_once_per_plan():
    plan = TreePlan.build(torch.tensor([3, 3, 3]))
    assert gather.layout_of(plan) is gather.layout_of(plan)
    assert gather.layout_of(TreePlan.build(torch.tensor([3, 3, 3]))) is not gather.layout_of(plan)


@pytest.mark.parametrize("name", ["worked_example", "ragged_turns", "comb_depth_50", "two_trees", "random_0"])
@pytest.mark.parametrize(
    ("heads", "dims", "window", "softcap"),
    [((4, 2), (8, 8), 0, 0.0), ((4, 1), (6, 10), 0, 0.0), ((2, 2), (12, 5), 3, 0.0), ((4, 4), (8, 8), 2, 1.5)],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_equals_the_oracle(name, heads, dims, window, softcap, deterministic):
    subtree_end = torch.from_numpy(FORESTS[name])
    plan = TreePlan.build(subtree_end)
    gen = torch.Generator().manual_seed(0)
    shapes = (heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])
    *inputs, dout = [torch.randn(plan.num_tokens, *s, generator=gen, dtype=torch.float64) for s in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    got, lse = gather.attend(*inputs, plan, 0.4, window, softcap, deterministic, True, varlen=varlen)
    want, want_lse = reference.tree_attention(
        *inputs, subtree_end, scale=0.4, window=window or None, softcap=softcap or None, return_lse=True
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, want_lse.detach(), rtol=1e-11, atol=1e-11)
    assert not lse.requires_grad
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def library_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap=0.0):
    """(out, lse [H, T]) as flash-attn and torch compute them: `left` keys before the query are seen, -1 for all, and
    `right` after it, which torch takes causality from."""
    left, right = window_size
    assert right == 0
    layout = gather.Layout(cu_q, cu_k, max_q, max_k, torch.empty(0))
    out, lse = varlen(q, k, v, layout, scale, left + 1, softcap, True)
    return out, lse.transpose(0, 1)


def as_torch(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux, scale, window_size=(-1, -1), enable_gqa=False):
    assert return_aux.lse and enable_gqa
    return library_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)


def as_flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert causal and deterministic and return_attn_probs and not dropout_p
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *library_kernel(q, k, v, *bounds, softmax_scale, window_size, softcap), None


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (3, 0.0), (3, 1.5)])
@pytest.mark.parametrize("library", ["torch", "flash_attn"])
def test_what_the_librarys_kernel_is_asked_for(monkeypatch, library, window, softcap):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_torch)
    flash = types.SimpleNamespace(flash_attn_varlen_func=as_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", flash if library == "flash_attn" else None)
    subtree_end = torch.from_numpy(FORESTS["ragged_turns"])
    q, k, v = (torch.randn(len(subtree_end), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    args = q, k, v, TreePlan.build(subtree_end), 0.4, window, softcap, True, True
    if softcap and library == "torch":
        with pytest.raises(ValueError, match="no softcap"):
            gather.attend(*args)
        return
    got, lse = gather.attend(*args)
    options = dict(scale=0.4, window=window or None, softcap=softcap or None, return_lse=True)
    want, want_lse = reference.tree_attention(q, k, v, subtree_end, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, want_lse, rtol=1e-11, atol=1e-11)


def test_no_tokens():
    plan = TreePlan.build(torch.empty(0, dtype=torch.int32))
    q, k, v = (torch.randn(0, h, d, requires_grad=True) for h, d in ((4, 8), (2, 8), (2, 6)))
    out, lse = gather.attend(q, k, v, plan, 1.0, 0, 0.0, True, True, varlen=varlen)
    assert out.shape == (0, 4, 6) and lse.shape == (0, 4)
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape and v.grad.shape == v.shape


class Probe(torch.autograd.Function):
    """A varlen kernel of sorts: says how its backward was run, and what it keeps for it."""

    ran: typing.ClassVar[list[bool]] = []
    kept: typing.ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, q, k, v):
        kept = q * 1.0
        Probe.kept.append(weakref.ref(kept))
        ctx.save_for_backward(kept, k, v)
        return q * k + v

    @staticmethod
    def backward(ctx, dy):
        Probe.ran.append(torch.are_deterministic_algorithms_enabled())
        q, k, _ = ctx.saved_tensors
        return dy * k, dy * q, dy


def in_fixed_order(q, k, v):
    out = Probe.apply(q, k, v)
    gather.fix_order(out)
    return out


@pytest.fixture
def probed():
    Probe.ran.clear()
    Probe.kept.clear()
    return [torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("already", [False, True])
def test_a_fixed_order_switches_determinism_on_for_one_backward_alone(already, probed):
    q, k, v = probed
    torch.use_deterministic_algorithms(already, warn_only=already)
    try:
        out = in_fixed_order(q, k, v)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert torch.are_deterministic_algorithms_enabled() == already
        assert torch.is_deterministic_algorithms_warn_only_enabled() == already
        for mine, theirs in zip(grads, (dout * k, dout * q, dout), strict=True):
            torch.testing.assert_close(mine, theirs)
        torch.autograd.grad(out, (q, k, v), dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert Probe.ran == [True, True]


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise torch.OutOfMemoryError("none left")


def test_a_backward_that_raises_leaves_determinism_as_it_was(probed):
    def fails(x, *others):
        out = Raises.apply(in_fixed_order(x, *others))
        gather.fix_order(out)
        return out

    try:
        for run in (fails, partial(checkpoint, fails, use_reentrant=True)):
            with pytest.raises(torch.OutOfMemoryError):
                run(*probed).sum().backward()
            assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_fixed_order_leaves_a_checkpoint_its_memory(use_reentrant, probed):
    def alive():
        return sum(ref() is not None for ref in Probe.kept)

    out = checkpoint(in_fixed_order, *probed, use_reentrant=use_reentrant)
    assert len(Probe.kept) == 1 and alive() == 0
    loss = out.sum()
    loss.backward()
    del loss, out
    assert len(Probe.kept) == 2 and alive() == 0 and Probe.ran == [True]
    loss = in_fixed_order(*probed).sum()
    assert alive() == 1
    loss.backward()
    # the graph, which the loss holds on to, has let go
    assert alive() == 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_scored_in_inference_mode_first_a_plan_still_trains(deterministic):
    plan = TreePlan.build(torch.from_numpy(FORESTS["ragged_turns"]))
    q, k, v = (torch.randn(plan.num_tokens, 2, 8, requires_grad=True) for _ in range(3))

    def attend():
        return gather.attend(q, k, v, plan, 0.3, 0, 0.0, deterministic, False, varlen=varlen)

    with torch.inference_mode():
        scored = attend()
    out = attend()
    out.sum().backward()
    assert torch.equal(out, scored) and q.grad is not None


def test_says_what_it_cannot_do():
    assert "GPU" in gather.reason(torch.device("cpu"))
    assert "sinks" in gather.refusal(torch.bfloat16, 0.0, torch.zeros(2))
    for dtype in (torch.float32, torch.float64):
        assert str(dtype) in gather.refusal(dtype, 0.0, None)
    assert gather.refusal(torch.bfloat16, 0.0, None) is None
    if gather._missing("flash_attn", "flash_attn_varlen_func"):
        assert "flash-attn" in gather.refusal(torch.bfloat16, 30.0, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernels need a GPU")
@pytest.mark.parametrize(
    ("heads", "dims", "window"), [((8, 8), (64, 64), 0), ((8, 2), (128, 128), 0), ((4, 2), (40, 64), 9)]
)
def test_kernel_equals_the_oracle(heads, dims, window):
    """bf16 through the installed kernel: within twice the error of the same gather in plain bf16 torch; same bits."""
    subtree_end = torch.from_numpy(cases.random_subtree_end(700, 5, branch=0.02)).cuda()
    plan = TreePlan.build(subtree_end)
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = (heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])
    *inputs, dout = [
        torch.randn(700, *s, generator=gen, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes
    ]

    def run(x, dy, kernel):
        out = gather.attend(*x, plan, 0.2, window, 0.0, True, False, varlen=kernel)
        return out, *torch.autograd.grad(out, x, dy)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference.tree_attention(*exact, subtree_end, scale=0.2, window=window or None)
    want = want, *torch.autograd.grad(want, exact, dout.double())
    with torch.device("cuda"):
        eager = run(inputs, dout, varlen)
    got, again = run(inputs, dout, None), run(inputs, dout, None)
    for name, x, y, low, ref in zip(("out", "dq", "dk", "dv"), got, again, eager, want, strict=True):
        assert torch.equal(x, y), name
        error, allowed = (x.double() - ref).abs().max(), (low.double() - ref).abs().max()
        assert error <= 2 * allowed + 1e-3, (name, float(error), float(allowed))
