"""The GPU's contenders on the CPU: with a plain kernel every method passes the gate of a tiny race; a wrong one fails.

Here only the kernels differ from the GPU bench: layouts, gathers, block lists and the race are its own.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import treegrpo_kernels as tk
from bench import compile_ahead, gpu_baselines, gpu_workloads, real_step, test_real_step, workloads
from bench.baselines import Contender, Request, heads_first, tree_backend
from bench.gpu_baselines import (
    FLEX_BLOCK,
    call_flex,
    chain_ours,
    chain_varlen,
    compile_flex,
    exact_block_mask,
    gathered,
    leaf_by_leaf,
    one_level,
    padded_causal,
    padded_end,
    prefix_grouped,
    repeat_heads,
)
from bench.race import HEADS, KV_HEADS, PASSES, Problem, block_error, race
from bench.test_attention_gpu import CELLS
from treegrpo_kernels import work

CPU = torch.device("cpu")
# the reference stands in where csrc was not built
OURS = "reference" if tk.backends(CPU)["cpu"] else "cpu"


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window=0):
    """Bottom-right causal within a window, a segment at a time."""
    outs, cu = [], (cu_q.tolist(), cu_k.tolist())
    for q0, q1, k0, k1 in zip(cu[0][:-1], cu[0][1:], cu[1][:-1], cu[1][1:], strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        before = k1 - k0 - (q1 - q0)
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(before)
        mask = mask.triu(before - window + 1) if window else mask
        rows = (q[q0:q1], repeat_heads(k[k0:k1], q.shape[1]), repeat_heads(v[k0:k1], q.shape[1]))
        outs.append(F.scaled_dot_product_attention(*map(heads_first, rows), attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(outs)


def plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def varlen_of(forest):
    return partial(plain_varlen, window=forest.window)


def always(request):
    return None


def plain_causal(forest, device):
    """Wrong on every forest that branches."""
    return lambda q, k, v: plain_varlen(q, k, v, *(2 * [torch.tensor([0, q.shape[0]])]), q.shape[0], q.shape[0])


METHODS = {
    contender.name: contender
    for contender in (
        Contender("tree_ours", "tree", always, tree_backend(OURS).prepare),
        Contender("chain_varlen", "leaf", always, lambda f, d: chain_varlen(f, d, varlen_of(f))),
        Contender("chain_padded", "padded", always, lambda f, d: padded_causal(f, plain_sdpa)),
        Contender("chain_leaves", "leaf", always, lambda f, d: leaf_by_leaf(f, plain_sdpa)),
        Contender("chain_ours", "leaf", always, lambda f, d: chain_ours(f, d, OURS)),
        Contender("gather", "tree", always, lambda f, d: gathered(f, d, varlen_of(f))),
        Contender("prefix", "tree", always, lambda f, d: prefix_grouped(f, d, varlen_of(f))),
        Contender("dense_mask", "tree", always, gpu_baselines._dense_mask),
        Contender("plain_causal", "tree", always, plain_causal),
    )
}


def problem_of(workload):
    return Problem(gpu_workloads.forest(workload, True), 4, 2, 16, CPU, torch.float32)


def test_every_method_passes_the_gate_and_a_wrong_one_does_not():
    outcomes = race(problem_of("star_2k_x2"), METHODS, quick=True)
    for name, outcome in outcomes.items():
        if name == "plain_causal":
            assert outcome.reason.startswith("failed: AssertionError: out is off by"), outcome.reason
        else:
            assert outcome.reason is None and outcome.error < 1e-5, f"{name}: {outcome.reason}"
            assert [len(outcome.times[passes]) for passes in PASSES] == [1, 1, 1]


@pytest.mark.parametrize("workload", ["search_2_6_16k", "binary_32k", "tau_calls_32k"])
def test_methods_on_many_levels(workload):
    names = ("tree_ours", "chain_varlen", "chain_padded", "chain_leaves", "chain_ours", "gather")
    methods = {name: METHODS[name] for name in names}
    try:
        problem = problem_of(workload)
    except workloads.Unavailable as absent:
        pytest.skip(str(absent))
    outcomes = race(problem, methods, quick=True)
    assert all(outcome.reason is None for outcome in outcomes.values()), outcomes


@pytest.mark.parametrize("workload", gpu_workloads.WINDOWS)
def test_methods_under_a_window(workload):
    problem = problem_of(workload)
    forest = problem.forest
    assert 0 < forest.num_pairs < gpu_workloads.forest(workload.rsplit("_", 1)[0], True).num_pairs
    ends = forest.leaf_offsets[1:].repeat_interleave(forest.leaf_offsets.diff())
    assert forest.num_chain_pairs == tk.TreePlan.build(ends).count_pairs(forest.window)
    names = ["tree_ours", "chain_varlen", "chain_ours", "gather", "dense_mask", "plain_causal"]
    names += [] if one_level(forest.subtree_end) else ["prefix"]
    for name, outcome in race(problem, {name: METHODS[name] for name in names}, quick=True).items():
        assert (outcome.reason is None) == (name != "plain_causal"), f"{name}: {outcome.reason}"
    request = Request(forest, torch.device("cuda"), True, False)
    for name in ("chain_cudnn", "chain_cudnn_leaves"):
        assert "no sliding window" in gpu_baselines.CONTENDERS[name].unsupported(request)


def test_prefix_grouping_takes_one_level():
    for name, fits in {"star_8k": True, "star_2k_x3": True, "chain_16k": True, "search_2_2_16k": False}.items():
        reason = one_level(gpu_workloads.forest(name, True).subtree_end)
        assert (reason is None) == fits, f"{name}: {reason}"


@pytest.mark.parametrize("workload", gpu_workloads.WINDOWS)
def test_block_lists_under_a_window_hold_what_is_seen(workload):
    forest = gpu_workloads.forest(workload, True)
    end = padded_end(forest, CPU)
    mask = tk.reference.dense_mask(end, forest.window)
    position = tk.reference.positions(end)
    index = torch.arange(end.numel())
    assert torch.equal(gpu_baselines._near(end, position, forest.window)(None, None, index[:, None], index), mask)
    blocks = mask.view(end.numel() // FLEX_BLOCK, FLEX_BLOCK, -1, FLEX_BLOCK).transpose(1, 2)
    ours = exact_block_mask(end, forest.window)
    for row in range(len(blocks)):
        seen, full = (
            getattr(ours, f"{kind}kv_indices")[0, 0, row, : getattr(ours, f"{kind}kv_num_blocks")[0, 0, row]].tolist()
            for kind in ("", "full_")
        )
        assert not set(seen) & set(full) and all(blocks[row, block].all() for block in full)
        assert not any(blocks[row, block].any() for block in set(range(len(blocks))) - {*seen, *full})


@pytest.mark.parametrize("workload", ["star_2k", "search_2_6_32k", "binary_32k", "chain_16k"])
def test_block_lists_are_those_of_the_whole_mask(workload):
    from torch.nn.attention.flex_attention import create_block_mask

    end = padded_end(gpu_workloads.forest(workload, True), CPU)
    ours = exact_block_mask(end)
    whole = create_block_mask(gpu_baselines._visible(end), None, None, end.numel(), end.numel(), device=CPU)
    assert torch.equal(ours.to_dense(), whole.to_dense())
    for kind in ("", "full_"):
        counts, lists = getattr(ours, f"{kind}kv_num_blocks")[0, 0], getattr(ours, f"{kind}kv_indices")[0, 0]
        expected, wanted = getattr(whole, f"{kind}kv_num_blocks")[0, 0], getattr(whole, f"{kind}kv_indices")[0, 0]
        assert torch.equal(counts, expected)
        for count, row, want in zip(counts.tolist(), lists, wanted, strict=True):
            assert torch.equal(row[:count], want[:count])


@pytest.mark.parametrize("workload", ["search_2_2_16k", *gpu_workloads.WINDOWS])
def test_flex_on_padded_blocks_is_the_reference(workload):
    from torch.nn.attention.flex_attention import flex_attention

    problem = problem_of(workload)
    q, k, v, _ = problem.inputs("blocks")
    assert q.shape[0] % FLEX_BLOCK == 0 and q.shape[0] > problem.forest.num_tokens
    mask = exact_block_mask(padded_end(problem.forest, CPU), problem.forest.window)
    assert problem.gate("blocks", call_flex(flex_attention, mask, q, k, v), ()) < 1e-5


def test_flex_is_traced_once_for_all_forests():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = compile_flex(dynamic=True, backend=counter)
    for workload in ("star_2k", "search_2_6_32k", "star_8k_x2"):
        problem = problem_of(workload)
        q, k, v, _ = problem.inputs("blocks")
        mask = exact_block_mask(padded_end(problem.forest, CPU))
        assert problem.gate("blocks", call_flex(compiled, mask, q, k, v), ()) < 1e-5
    assert counter.frame_count == 1


def test_what_the_races_compile_is_compiled_ahead(monkeypatch):
    """As on an H200: a kernel that is first met in a race costs its stage up to half a minute."""
    hopper = pytest.importorskip("treegrpo_kernels.triton.hopper")
    monkeypatch.setattr(work, "multiprocessors", lambda device: 132)

    def kernels(forest, head_dim):
        """Those of ours with and without parted key tiles are two; FlexAttention has one for all forests."""
        plan = tk.TreePlan.build(forest.subtree_end)
        parted = len(work.work_items(plan, hopper.config(head_dim).dkv, KV_HEADS, forest.window)[1]) > 0
        return {("tree_triton", head_dim, forest.window > 0, parted), ("flex", head_dim, forest.window > 0)}

    ahead, raced = set(), set()
    for job in compile_ahead.JOBS["attention"].values():
        assert (job.num_heads, job.num_kv_heads) == (HEADS, KV_HEADS)
        for forest in compile_ahead.forests(job):
            ahead |= {kernel for kernel in kernels(forest, job.head_dim) if kernel[0] == job.contender}
    for workload, head_dim in CELLS:
        try:
            raced |= kernels(gpu_workloads.forest(workload), head_dim)
        except workloads.Unavailable:
            continue
    assert raced and not raced - ahead


def test_what_steps_compile_is_compiled_ahead(monkeypatch):
    """Of each model's heads both dK/dV kernels: with parted key tiles and without."""
    hopper = pytest.importorskip("treegrpo_kernels.triton.hopper")
    monkeypatch.setattr(work, "multiprocessors", lambda device: 132)
    for name, job in compile_ahead.JOBS["step"].items():
        hidden, _, _, num_heads, num_kv_heads = real_step.MODELS[name]
        assert (job.num_heads, job.num_kv_heads, job.head_dim) == (num_heads, num_kv_heads, hidden // num_heads)
        plans = [tk.TreePlan.build(forest.subtree_end) for forest in compile_ahead.forests(job)]
        dkv = hopper.config(job.head_dim).dkv
        assert {len(work.work_items(plan, dkv, num_kv_heads)[1]) > 0 for plan in plans} == {True, False}
    assert {case.model for case in test_real_step.CASES} == set(compile_ahead.JOBS["step"])


def test_a_kernel_that_errs_on_grouped_heads_is_found_out():
    q, k, v = inputs = gpu_baselines.small_inputs(CPU, (8, 4, 16), (8, 2, 16), (8, 2, 16))

    def run(grouped, wrong=False):
        k_all, v_all = (x.roll(1, 1) if wrong and grouped else x for x in (k, v))
        return plain_varlen(q, k_all, v_all, *(2 * [torch.tensor([0, 8])]), 8, 8)

    assert gpu_baselines.fault(run, inputs) is None
    assert "off by" in gpu_baselines.fault(lambda grouped: run(grouped, wrong=True), inputs)

    def refuse(grouped):
        if grouped:
            raise RuntimeError("heads must agree\nand a stack")
        return run(grouped)

    assert gpu_baselines.fault(refuse, inputs) == "heads must agree"


def test_one_dropped_key_tile_of_a_long_row_fails_the_gate():
    """The rule, not the kernel: 64 of 16k keys left out of late rows, in bf16's tolerance."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, generator=generator) for n in (64, 16384, 16384))
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / 8, -1)
    dropped = weights.clone()
    dropped[..., 4096:4160] = 0
    want, got = (torch.einsum("hqk,khd->qhd", w, v) for w in (weights, dropped))
    assert block_error(got, want) > 2e-2
    assert block_error(want.bfloat16().float(), want) < 1e-2
    want[3] = float("nan")
    assert block_error(want, got) > 1e3
