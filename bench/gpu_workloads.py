"""The forests of the GPU bench: long rows of ragged trees, the shapes agents and GRPO make.

    chain_16k, _32k, _64k           one sequence
    star_2k, star_2k_x2, _x3        GRPO: prompt 2k, 8 completions of 1k to 3k tokens; 1, 2, 3 prompts in the row
    star_8k, star_8k_x2, _x3        prompt 8k, 16 completions of 512 to 1536 tokens
    search_2_2_16k, _32k, _64k      Tree-GRPO (M, N, L) = (2, 2, 1), 4 steps of action 80-200 and observation 300-500,
                                    prompt ~1k; as many prompts as fit the row
    search_2_6_16k, _32k, _64k      (2, 6, 1)
    binary_32k                      deep binary tree: 256 leaves, 9 levels of 32 to 96 tokens
    tau_whole_32k, tau_calls_32k    tau-bench airline, groups in the recorded order: whole trajectories, and a sample
                                    per model call
    search_2_6_32k_w1k              under a sliding window of 1,024 path tokens (Gemma 3), of 4,096 (OLMo 3)
    star_8k_w4k

Each also has a tiny sibling, the same shape with 1k = 32 tokens, for checks on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from bench import workloads
from bench.workloads import Forest, Fresh, lay_out, trajectory
from treegrpo import Trajectory, build_forest, split_calls

K, TINY_K = 1024, 32
Rows = list[Trajectory]


def _ragged(rng: np.random.Generator, mean: int) -> int:
    return int(rng.integers(max(1, mean // 2), mean + mean // 2 + 1))


def star(prompt: int, response: int, group_size: int, prompts: int = 1) -> Rows:
    fresh, rng = Fresh(), np.random.default_rng(10)
    rows = []
    for i in range(prompts):
        start = (fresh(prompt), 0)
        rows += [trajectory([start, (fresh(_ragged(rng, response)), 1)], rng, group=str(i)) for _ in range(group_size)]
    return rows


def search(trees: int, expand: int, budget: int, k: int, steps: int = 4) -> Rows:
    """Prompts up to `budget` tokens: `trees` chains each, every chain with `expand` branches from drawn steps."""
    fresh, rng = Fresh(), np.random.default_rng(11)

    def length(low: int, high: int) -> int:
        return max(1, int(rng.integers(low, high + 1)) * k // K)

    def turns(count: int) -> list[list[tuple[np.ndarray, int]]]:
        full = [[(fresh(length(80, 200)), 1), (fresh(length(300, 500)), 0)] for _ in range(count - 1)]
        return [*full, [(fresh(length(80, 200)), 1)]]

    rows: Rows = []
    while True:
        start, group, before = (fresh(length(512, 1536)), 0), f"{len(rows)}", fresh.next
        drawn = []
        for tree in range(trees):
            first = turns(steps)
            drawn.append((tree, first))
            for _ in range(expand):
                kept = int(rng.integers(0, steps))
                drawn.append((tree, first[:kept] + turns(steps - kept)))
        if fresh.next > budget and rows:
            return rows
        rows += [
            trajectory([start, *(part for turn in row for part in turn)], rng, tree=tree, group=group)
            for tree, row in drawn
        ]
        if fresh.next + (fresh.next - before) // 2 > budget:
            return rows


def binary(levels: int, node: int) -> Rows:
    fresh, rng = Fresh(), np.random.default_rng(12)
    paths = [[(fresh(_ragged(rng, node)), 0)]]
    for _ in range(levels - 1):
        paths = [[*path, (fresh(_ragged(rng, node)), 1)] for path in paths for _ in range(2)]
    return [trajectory(path, rng) for path in paths]


def tau(budget: int, k: int, *, calls: bool) -> Rows:
    """Recorded groups until their trees hold `budget` tokens; tiny: a slice of the first group."""
    recorded = list(workloads.tau_bench())
    if k < K:
        rows = workloads.cut(recorded, 3, 1150, 1150 + budget // 3)
        return split_calls(rows) if calls else rows
    groups: dict[str, Rows] = {}
    for row in recorded:
        groups.setdefault(row.group, []).append(row)
    chosen: Rows = []
    total = 0
    for rows in groups.values():
        (tree,) = build_forest(rows)
        if total and total + tree.num_tokens > budget:
            break
        total += tree.num_tokens
        chosen += rows
    return split_calls(chosen) if calls else chosen


BUILDERS: dict[str, Callable[[int], Iterable[Trajectory]]] = {
    # the most important first: a run that is cut short has them
    "star_8k": lambda k: star(8 * k, k, 16),
    "star_2k": lambda k: star(2 * k, 2 * k, 8),
    "search_2_6_32k": lambda k: search(2, 6, 32 * k, k),
    "chain_16k": lambda k: workloads.chain(16 * k),
    "search_2_2_32k": lambda k: search(2, 2, 32 * k, k),
    "chain_32k": lambda k: workloads.chain(32 * k),
    "search_2_6_64k": lambda k: search(2, 6, 64 * k, k),
    "tau_calls_32k": lambda k: tau(32 * k, k, calls=True),
    "star_8k_x3": lambda k: star(8 * k, k, 16, 3),
    "binary_32k": lambda k: binary(9 if k == K else 4, k // 16),
    "chain_64k": lambda k: workloads.chain(64 * k),
    "tau_whole_32k": lambda k: tau(32 * k, k, calls=False),
    "star_2k_x3": lambda k: star(2 * k, 2 * k, 8, 3),
    "search_2_2_64k": lambda k: search(2, 2, 64 * k, k),
    "search_2_6_16k": lambda k: search(2, 6, 16 * k, k),
    "search_2_2_16k": lambda k: search(2, 2, 16 * k, k),
    "star_8k_x2": lambda k: star(8 * k, k, 16, 2),
    "star_2k_x2": lambda k: star(2 * k, 2 * k, 8, 2),
    "search_2_6_32k_w1k": lambda k: search(2, 6, 32 * k, k),
    "star_8k_w4k": lambda k: star(8 * k, k, 16),
}
# sliding windows in units of 1k tokens
WINDOWS = {"search_2_6_32k_w1k": 1, "star_8k_w4k": 4}
NAMES = tuple(BUILDERS)
QUICK_NAMES = NAMES[:6]


@cache
def rows_of(name: str, tiny: bool = False) -> tuple[Trajectory, ...]:
    """The workload's leaves. Raises Unavailable with the reason where its data is missing."""
    return tuple(BUILDERS[name](TINY_K if tiny else K))


@cache
def forest(name: str, tiny: bool = False) -> Forest:
    window = WINDOWS.get(name, 0) * (TINY_K if tiny else K)
    return lay_out(name, tuple(build_forest(rows_of(name, tiny))), window=window)
