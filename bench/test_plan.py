"""TreePlan: validation, positions, pair count and tile lists, up to a million tokens; on a GPU rows of 128k.

Timed by the wall, for building a plan ends in one device synchronisation. On a GPU `tile_tensors` is what a training
step builds once per row: the plan and the lists of all three kernels.

The check: pairs and positions by walking each workload's leaves; tile lists by the rule, tile against tile.
"""

from functools import cache

import numpy as np
import pytest
import torch
from cases import balanced_subtree_end

import treegrpo_kernels as tk
from bench import gpu_workloads, workloads
from bench.race import HEADS, KV_HEADS
from treegrpo import build_forest

BLOCK_M, BLOCK_N = 128, 64
MILLION = 1_000_000


def million_tokens(quick):
    """Trees of 5,504 tokens side by side, 1,000,000 tokens in all; or one small one."""
    if quick:
        return torch.from_numpy(balanced_subtree_end(20, 3, 2, 7))
    tree = balanced_subtree_end(512, 3, 3, 128)
    copies = MILLION // tree.size
    forest = np.concatenate([tree + i * tree.size for i in range(copies)])
    rest = MILLION - forest.size
    return torch.from_numpy(np.concatenate([forest, np.full(rest, MILLION)]).astype(np.int32))


LONG = {
    "chain_128k": lambda: workloads.chain(128 * gpu_workloads.K),
    "star_8k_128k": lambda: gpu_workloads.star(8 * gpu_workloads.K, gpu_workloads.K, 16, 5),
    "search_2_6_128k": lambda: gpu_workloads.search(2, 6, 128 * gpu_workloads.K, gpu_workloads.K),
}


@cache
def subtree_end(workload, quick):
    if workload == "million":
        return million_tokens(quick)
    if workload in LONG:
        return workloads.lay_out(workload, tuple(build_forest(LONG[workload]()))).subtree_end
    return workloads.forest(workload, quick).subtree_end


def check_plan(end, plan):
    """Positions and pairs from a stack walk over the intervals."""
    open_ends, positions = [], np.empty(len(end), dtype=np.int64)
    for t, stop in enumerate(end.tolist()):
        while open_ends and open_ends[-1] <= t:
            open_ends.pop()
        positions[t] = len(open_ends)
        open_ends.append(stop)
    np.testing.assert_array_equal(plan.position.cpu().numpy(), positions)
    assert plan.num_pairs == int((positions + 1).sum())
    return 0.0


def check_tiles(end, lists):
    """Tile classes from the first, last, smallest and largest visibility of every (query tile, key tile)."""
    end = end.numpy().astype(np.int64)
    num_tokens = len(end)
    offsets, indices, full = (x.cpu().numpy() for x in (lists.q_offsets, lists.q_indices, lists.q_full))
    key_starts = np.arange(0, num_tokens, BLOCK_N)
    highest, lowest = np.maximum.reduceat(end, key_starts), np.minimum.reduceat(end, key_starts)
    for tile, start in enumerate(range(0, num_tokens, BLOCK_M)):
        stop = min(start + BLOCK_M, num_tokens)
        seen = indices[offsets[tile] : offsets[tile + 1]]
        meets = np.flatnonzero((key_starts < stop) & (highest > start))
        assert sorted(seen.tolist()) == meets.tolist(), f"query tile {tile} lists other key tiles than it sees"
        whole = seen[: full[tile]]
        ends = np.minimum(key_starts[whole] + BLOCK_N, num_tokens)
        assert ((start >= ends - 1) & (stop <= lowest[whole])).all(), f"query tile {tile} calls a partial tile full"
    return 0.0


WORKLOADS = (*LONG, "million") if torch.cuda.is_available() else (*workloads.NAMES, "million")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_build(workload, meter, device, quick):
    end = subtree_end(workload, quick)
    on_device = end.to(device)
    meter.benchmark.group = "plan build"
    meter.measure(
        lambda: tk.TreePlan.build(on_device),
        check=lambda: check_plan(end, tk.TreePlan.build(on_device)),
        clock="wall",
        suite="plan",
        contender="TreePlan.build",
        workload=workload,
        tokens=end.numel(),
        pairs=tk.TreePlan.build(end).num_pairs,
    )


@pytest.mark.parametrize("workload", WORKLOADS)
def test_tile_lists(workload, meter, device, quick):
    end = subtree_end(workload, quick)
    on_device = end.to(device)
    meter.benchmark.group = f"plan build and tile lists {BLOCK_M} x {BLOCK_N}"

    def run():
        # lists are cached on their plan, so each round needs a new one
        return tk.TreePlan.build(on_device).tile_lists(BLOCK_M, BLOCK_N)

    meter.measure(
        run,
        check=lambda: check_tiles(end, run()),
        clock="wall",
        suite="plan",
        contender="tile_lists",
        workload=workload,
        tokens=end.numel(),
        pairs=tk.TreePlan.build(end).num_pairs,
    )


@pytest.mark.parametrize("workload", LONG)
def test_tile_tensors(workload, meter, device, quick):
    if device.type != "cuda":
        pytest.skip("the Triton kernels' lists are built on a GPU")
    from treegrpo_kernels import triton

    end = subtree_end(workload, quick)
    on_device = end.to(device)
    q, v = (torch.empty(end.numel(), n, 128, dtype=torch.bfloat16, device=device) for n in (HEADS, KV_HEADS))
    meter.benchmark.group = "plan and lists of all kernels"

    # the kernels the op would choose
    config = triton.config_for(q, v, 0.0, 128**-0.5)

    def run():
        return triton.tile_tensors(tk.TreePlan.build(on_device), q, v, 0, config)

    def check():
        run()
        return check_plan(end, tk.TreePlan.build(on_device))

    meter.measure(
        run,
        check=check,
        clock="wall",
        suite="plan",
        contender="tile_tensors",
        workload=workload,
        tokens=end.numel(),
        pairs=tk.TreePlan.build(end).num_pairs,
    )
