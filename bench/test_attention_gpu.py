"""Attention of long ragged forests on a GPU: ours against every kernel one would use instead, in one interleaved race.

bf16, 32 query heads on 8 key/value heads of 128 (some of 64, 96 and 256). TFLOP/s over visible pairs: forward 4 D Hq a
pair, backward 2.5 times that. Forward and backward are timed apart by CUDA events, each from a cold L2;
forward_backward is their sum. The check is race.py's. On a CPU the races run on tiny forests, to see that they work.
"""

from functools import cache

import pytest
import torch

import treegrpo_kernels as tk
from bench import gpu_workloads, workloads
from bench.gpu_baselines import CONTENDERS, OURS
from bench.race import HEADS, KV_HEADS, PASSES, Problem, race
from bench.timing import Stopwatch, host_seconds, spread

WIDE, NARROW = 128, 64
# Phi-3 has heads of 96, Gemma of 256
OTHER_CELLS = [("star_2k", 256), ("search_2_6_32k", 256), ("search_2_6_32k", 96)]
NARROW_WORKLOADS = ("chain_32k", "star_2k", "search_2_6_32k")
QUICK_CELLS = [*((name, WIDE) for name in gpu_workloads.QUICK_NAMES), ("star_2k", NARROW)]
# what quick runs measure comes first: a run that is cut short has it
CELLS = list(
    dict.fromkeys(
        [
            *QUICK_CELLS,
            *OTHER_CELLS,
            *((name, WIDE) for name in gpu_workloads.NAMES),
            *((name, NARROW) for name in NARROW_WORKLOADS),
        ]
    )
)
SMOKE_CELLS = [(name, WIDE) for name in ("star_2k", "search_2_6_32k", "tau_calls_32k", "star_8k_w4k")]
TINY_HEADS, TINY_KV_HEADS, TINY_DIM = 4, 2, 16
# prompt 512, 6 completions of 128 to 384: about 2k tokens, where the host is the limit
SMALL = "small_2k"


def problem_of(forest, head_dim, device):
    if device.type == "cuda":
        return Problem(forest, HEADS, KV_HEADS, head_dim, device, torch.bfloat16)
    return Problem(forest, TINY_HEADS, TINY_KV_HEADS, TINY_DIM, device, torch.float32)


@cache
def outcomes(workload, head_dim, device, quick):
    """All contenders of one cell; the inputs die with the race."""
    forest = gpu_workloads.forest(workload, device.type != "cuda")
    found = race(problem_of(forest, head_dim, device), CONTENDERS, quick=quick)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def ours_on(device):
    return OURS if device.type == "cuda" else "tree_cpu"


def selected(workload, head_dim, device, quick):
    """Why this cell is not run here, or None."""
    cell = (workload, head_dim)
    if device.type != "cuda":
        if not quick:
            return "the GPU's workloads are too long for a CPU: test_attention.py has its own"
        return None if cell in SMOKE_CELLS else "tiny forests on the CPU: a few are enough"
    return None if not quick or cell in QUICK_CELLS else "left out of quick runs"


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("workload", "head_dim"), CELLS)
def test_race(workload, head_dim, contender, meter, device, quick, compiled_ahead, in_time_for_more):
    reason = selected(workload, head_dim, device, quick)
    if reason is not None:
        pytest.skip(reason)
    try:
        forest = gpu_workloads.forest(workload, device.type != "cuda")
    except workloads.Unavailable as missing:
        pytest.skip(str(missing))
    all_outcomes = outcomes(workload, head_dim, device, quick)
    outcome = all_outcomes[contender]
    if outcome.reason is not None:
        if contender == ours_on(device) and outcome.reason.startswith("failed"):
            pytest.fail(outcome.reason)
        pytest.skip(outcome.reason)
    problem = problem_of(forest, head_dim, device)
    is_tree = CONTENDERS[contender].layout in ("tree", "blocks")
    pairs = forest.num_pairs if is_tree else forest.num_chain_pairs
    ours = all_outcomes[ours_on(device)]
    meter.benchmark.group = f"attention race {workload} D{head_dim}"
    meter.benchmark.extra_info.update(
        suite="race",
        workload=workload,
        contender=contender,
        head_dim=problem.head_dim,
        heads=f"{problem.num_heads}:{problem.num_kv_heads}",
        dtype=str(problem.dtype).removeprefix("torch."),
        device=str(device),
        oracle="passed",
        oracle_error=outcome.error,
        peak_bytes=outcome.peak_bytes,
        note=outcome.note,
        layout=CONTENDERS[contender].layout,
        tokens=forest.num_tokens if is_tree else forest.num_chain_tokens,
        pairs=pairs,
        tree_tokens=forest.num_tokens,
        chain_tokens=forest.num_chain_tokens,
        tree_pairs=forest.num_pairs,
        chain_pairs=forest.num_chain_pairs,
        num_leaves=forest.leaf_offsets.numel() - 1,
    )
    meter.replay(outcome.times["forward_backward"])
    timed = {name: spread(outcome.times[name]) for name in PASSES}
    for name, row in timed.items():
        row["tflops_per_s"] = problem.flops(name, pairs) / row["median_s"] / 1e12
        if ours.reason is None and contender != ours_on(device):
            row["time_over_ours"] = row["median_s"] / spread(ours.times[name])["median_s"]
    meter.benchmark.extra_info["passes"] = timed
    if contender == ours_on(device):
        absent = {name: other.reason for name, other in all_outcomes.items() if other.reason is not None}
        meter.benchmark.extra_info["absent"] = absent


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
def test_host_time(passes, meter, device, quick, compiled_ahead):
    """A 2k-token tree, one layer, its plan reused: what a call costs the host, and as a CUDA graph the device."""
    name = ours_on(device)
    forest = workloads.lay_out(
        SMALL, tuple(gpu_workloads.build_forest(workloads.grpo_star(512 if device.type == "cuda" else 32, 6)))
    )
    problem = problem_of(forest, WIDE, device)
    reason = tk.backends(device)[name.removeprefix("tree_")]
    if reason is not None:
        pytest.skip(reason)
    q, k, v, dout = problem.inputs("tree")
    attend = CONTENDERS[name].prepare(forest, device)
    leaves = [x.requires_grad_(passes != "forward") for x in (q, k, v)]

    def run():
        out = attend(*leaves)
        return out if passes == "forward" else (out, *torch.autograd.grad(out, leaves, dout))

    def check():
        results = run()
        return (
            problem.gate("tree", results, ()) if passes == "forward" else problem.gate("tree", results[0], results[1:])
        )

    meter.benchmark.group = "host time of a small call"
    meter.measure(
        run, check=check, suite="host", contender=name, workload=SMALL, passes=passes, tokens=forest.num_tokens
    )
    info = meter.benchmark.extra_info
    info["host_us"] = host_seconds(run, device, 2 if quick and device.type != "cuda" else 50) * 1e6
    if device.type == "cuda":
        info["graph_us"], info["graph"] = graph_seconds(run, device)


def graph_seconds(run, device):
    """(microseconds of one replay, "captured"), or (None, why the calls cannot be captured)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        return None, str(error).splitlines()[0]
    watch = Stopwatch(device)
    times = [watch.once(graph.replay)[0] for _ in range(10)]
    return spread(times)["median_s"] * 1e6, "captured"
