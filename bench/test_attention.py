"""Attention over one packed forest on the CPU: forward, and forward + backward, against what one does without a tree
kernel.

fp32; H = 8, D = 64. GFLOP/s count visible pairs only: 4 H D per pair forward, 10 backward.
The check: outputs and gradients of two heads against the dense oracle in fp64, tree by tree.
"""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

import treegrpo_kernels as tk
from bench import workloads
from bench.baselines import CONTENDERS, PER_LEAF, TREE_BACKENDS, Contender, Request, fast_tree_backend
from treegrpo import build_forest

HEADS, HEAD_DIM = 8, 64
CHECKED_HEADS = [0, HEADS - 1]
# largest error allowed, relative to the largest value of the oracle
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FORWARD_FLOPS, BACKWARD_FLOPS = 4 * HEADS * HEAD_DIM, 10 * HEADS * HEAD_DIM
PASSES = {"forward": FORWARD_FLOPS, "forward_backward": FORWARD_FLOPS + BACKWARD_FLOPS}


@pytest.fixture(autouse=True)
def small_rows_are_for_the_cpu(device):
    if device.type == "cuda":
        pytest.skip("a GPU has longer rows: test_attention_gpu.py")


def dtype_of(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@lru_cache(maxsize=1)
def tree_inputs(forest, device):
    """q, k, v, dout [T, H, D] of a forest, the same for every contender."""
    generator = torch.Generator().manual_seed(forest.num_tokens)
    shape = (forest.num_tokens, HEADS, HEAD_DIM)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype_of(device)) for _ in range(4))


@lru_cache(maxsize=1)
def oracle(forest, device, spans):
    """(out, dq, dk, dv) [T, 2, D] fp64 of the checked heads, on the trees in `spans`."""
    q, k, v, dout = (x[:, CHECKED_HEADS].double().cpu() for x in tree_inputs(forest, device))
    results = tuple(torch.zeros_like(q) for _ in range(4))
    for start, end in spans:
        rows = slice(start, end)
        leaves = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out = tk.reference.tree_attention(*leaves, forest.subtree_end[rows] - start)
        for result, value in zip(results, (out, *torch.autograd.grad(out, leaves, dout[rows])), strict=True):
            result[rows] = value.detach()
    return results


def own_inputs(contender: Contender, forest, device):
    """The contender's q, k, v, dout: packed rows, or gathered to the leaf stream.

    A shared token's dout is split evenly over its leaves, so that leaf gradients summed per token are the tree's.
    """
    inputs = tree_inputs(forest, device)
    if contender.layout == "tree":
        return inputs
    index = forest.leaf_tokens.to(device)
    count = torch.bincount(index, minlength=forest.num_tokens)[index]
    q, k, v, dout = (x[index] for x in inputs)
    return q, k, v, dout / count[:, None, None].to(dout.dtype)


def relative_error(got, expected, rows):
    return float((got[rows] - expected[rows]).abs().max() / expected[rows].abs().max())


def check(contender, forest, device, attend, inputs, backward, spans):
    """Largest relative error of outputs (and gradients) against the oracle; AssertionError over the tolerance."""
    tolerance = TOLERANCE[dtype_of(device)]
    expected = oracle(forest, device, spans)
    rows = torch.cat([torch.arange(start, end) for start, end in spans])
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    out = attend(*leaves)
    results = [out, *torch.autograd.grad(out, leaves, dout)] if backward else [out]
    worst = 0.0
    for name, got, want in zip(("out", "dq", "dk", "dv"), results, expected, strict=False):
        got = got.detach()[:, CHECKED_HEADS].double().cpu()
        if contender.layout == "leaf":
            shared = torch.zeros_like(want).index_add_(0, forest.leaf_tokens, got)
            if name == "out":
                # every leaf's copy must be right, not only their mean
                copies = relative_error(got, want[forest.leaf_tokens], slice(None))
                assert copies <= tolerance, f"{contender.name} on {forest.name}: a leaf's out is off by {copies:.1e}"
                shared /= torch.bincount(forest.leaf_tokens, minlength=forest.num_tokens)[:, None, None]
            got = shared
        error = relative_error(got, want, rows)
        assert error <= tolerance, f"{contender.name} on {forest.name}: {name} is off by {error:.1e} > {tolerance:.0e}"
        worst = max(worst, error)
    return worst


def runner(attend, inputs, backward):
    """A closure that does one pass."""
    q, k, v, dout = inputs
    if not backward:

        def forward():
            with torch.no_grad():
                return attend(q, k, v)

        return forward
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def skip_unsupported(contender, forest, device, backward, quick):
    reason = contender.unsupported(Request(forest, device, backward, quick))
    if reason is not None:
        pytest.skip(reason)


def usable_tree_backend(forest, device, quick):
    contender = fast_tree_backend(Request(forest, device, True, quick))
    if isinstance(contender, str):
        pytest.skip(contender)
    return contender


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", workloads.NAMES)
def test_attention(workload, contender, passes, meter, device, quick):
    contender, backward = CONTENDERS[contender], passes == "forward_backward"
    forest = workloads.forest(workload, quick)
    skip_unsupported(contender, forest, device, backward, quick)
    meter.benchmark.group = f"attention {passes} {workload}"
    attend, inputs = contender.prepare(forest, device), own_inputs(contender, forest, device)
    is_tree = contender.layout == "tree"
    baseline, ratio_of = None, {}
    if contender in TREE_BACKENDS:
        baseline = runner(PER_LEAF.prepare(forest, device), own_inputs(PER_LEAF, forest, device), backward)
        ratio_of = {"baseline": PER_LEAF.name, "baseline_flops": PASSES[passes] * forest.num_chain_pairs}
    spans = tuple(workloads.roots(forest.subtree_end))
    meter.measure(
        runner(attend, inputs, backward),
        check=lambda: check(contender, forest, device, attend, inputs, backward, spans),
        flops=PASSES[passes] * (forest.num_pairs if is_tree else forest.num_chain_pairs),
        baseline_flops=ratio_of.pop("baseline_flops", None),
        baseline=baseline,
        baseline_name=ratio_of.get("baseline"),
        suite="attention",
        workload=workload,
        contender=contender.name,
        passes=passes,
        tokens=forest.num_tokens if is_tree else forest.num_chain_tokens,
        pairs=forest.num_pairs if is_tree else forest.num_chain_pairs,
    )


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", ["chain", "branching"])
def test_rate_against_causal_sdpa(workload, passes, meter, device, quick):
    """GFLOP/s on visible pairs of our op over those of causal SDPA on a chain of equally many tokens."""
    backward = passes == "forward_backward"
    forest = workloads.forest(workload, quick)
    contender = usable_tree_backend(forest, device, quick)
    meter.benchmark.group = f"rate against causal SDPA, {passes}"
    attend, inputs = contender.prepare(forest, device), tree_inputs(forest, device)
    num_tokens = forest.num_tokens

    def causal(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    meter.measure(
        runner(attend, inputs, backward),
        check=lambda: check(
            contender, forest, device, attend, inputs, backward, tuple(workloads.roots(forest.subtree_end))
        ),
        flops=PASSES[passes] * forest.num_pairs,
        baseline=runner(causal, inputs, backward),
        baseline_flops=PASSES[passes] * (num_tokens * (num_tokens + 1) // 2),
        baseline_name="sdpa_causal",
        suite="rate",
        workload=workload,
        contender=contender.name,
        passes=passes,
        tokens=num_tokens,
        pairs=forest.num_pairs,
    )


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("num_trees", [1, 2, 4, 8, 16])
def test_growth(num_trees, passes, meter, device, quick):
    """4k to 64k tokens in trees of 4,096: pairs grow like tokens, so time must too, and GFLOP/s stay flat."""
    if quick and num_trees > 2:
        pytest.skip("quick runs stop at two trees")
    backward = passes == "forward_backward"
    grown = tuple(build_forest(workloads.growing_forest(num_trees, quick)))
    forest = workloads.lay_out(f"growth_{num_trees}", grown, share_across_groups=False)
    assert forest.num_tokens == num_trees * grown[0].num_tokens and forest.num_pairs == num_trees * grown[0].num_pairs
    contender = usable_tree_backend(forest, device, quick)
    meter.benchmark.group = f"growth {passes}"
    attend, inputs = contender.prepare(forest, device), tree_inputs(forest, device)
    # the dense oracle is quadratic, and the trees are independent: the first and the last stand for all
    spans = list(workloads.roots(forest.subtree_end))
    spans = tuple(dict.fromkeys((spans[0], spans[-1])))
    meter.measure(
        runner(attend, inputs, backward),
        check=lambda: check(contender, forest, device, attend, inputs, backward, spans),
        flops=PASSES[passes] * forest.num_pairs,
        rounds=3,
        suite="growth",
        workload=f"{num_trees} x 4096",
        contender=contender.name,
        passes=passes,
        tokens=forest.num_tokens,
        pairs=forest.num_pairs,
    )
