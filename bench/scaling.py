"""How far whole-tree packing scales: `python -m bench.scaling [--out docs/scaling.md]`.

Simulates optimiser steps of N groups on R processes. A group's cost is drawn from what tau-bench airline's 50 groups
cost Qwen2.5-3B (exact training FLOPs, from the recorded data where it is there, else from the log-normal of the same
spread); groups are dealt by treegrpo.balance, and by taking every R-th. A step takes as long as its busiest process,
plus what of the gradients' all-reduce is not hidden behind the backward.

    busy          mean over processes / the busiest: what whole trees leave of the machine
    communicated  ring all-reduce of bf16 gradients, 2 (R-1)/R of their bytes a process, over one link each
    bound         the largest group / what a process gets on average: above 1 no dealing of whole trees is even
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import workloads
from bench.report import markdown
from treegrpo import balance

# of the recorded groups' costs: mean in FLOPs, standard deviation of the logarithm
MEAN_FLOPS, LOG_SPREAD = 243e12, 0.61
PARAMETERS = 3.09e9
# an H200 at the utilisation our steps reach, and a 400 Gb/s adapter for each GPU
FLOPS_PER_SECOND = 0.36 * 989e12
LINK_BYTES_PER_SECOND = 50e9
# the all-reduce overlaps the backward, two thirds of a step, but for the last bucket
HIDDEN_SHARE, BUCKET_BYTES = 2 / 3, 25 * 2**20

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS_PER_RANK = (1, 2, 4, 8, 16)
STEPS = 50


PREFACE = (
    "# How far whole-tree packing scales",
    "Written by `python -m bench.scaling --out docs/scaling.md`: simulated, not measured. Costs of groups: {source}.",
    "Qwen2.5-3B, one GPU a process at 36% of 989 TFLOP/s, gradients in bf16 over 50 GB/s a GPU, hidden behind the"
    " backward (two thirds of a step) as far as it lasts. *Busy* is the mean process's work over the busiest one's;"
    " *bound* is the largest group over a process's share: where it passes 1, no dealing of whole trees is even, and"
    " trees would have to be cut. *Efficiency* counts both losses.",
)
AFTERWORD = (
    "On paper: with n groups a process, of mean cost c and largest cost m, the busiest process has at least m to do, so"
    " at most n c / m of the machine is busy; dealing longest first comes within 4/3 of the best (Graham 1969), and"
    " close to even once n c is well above m. The costs here are drawn from recorded groups, so m is bounded: four"
    " groups a process suffice for that spread on any number of processes. Where costs have a long tail, m grows with"
    " the groups of a step and balance falls with the number of processes (the made-up costs that stand in without"
    " recordings show it): run this on your own rollouts."
    " The all-reduce of P parameters takes 4 P / B seconds whatever R, and is hidden while two thirds of a step's"
    " compute last longer: here from one group a process on.",
    "What this leaves out: stragglers for other reasons, rollouts, sharding (FSDP gathers weights twice a row, hidden"
    " in the same way), and that groups on two processes cannot share a common beginning.",
)


@dataclass(frozen=True)
class Cell:
    """Means over simulated steps."""

    ranks: int
    groups: int
    busy: float
    busy_round_robin: float
    bound: float
    compute_s: float
    exposed_s: float

    @property
    def efficiency(self) -> float:
        """Of R processes that compute all the time."""
        return self.busy * self.compute_s / (self.compute_s + self.exposed_s)


def recorded_costs() -> np.ndarray | None:
    """Training FLOPs of tau-bench's groups as trees; None without the data."""
    from bench.real_step import config_of
    from treegrpo import build_forest

    try:
        trees = build_forest(list(workloads.tau_bench()))
    except workloads.Unavailable:
        return None
    return np.array(balance.costs(trees, config_of("3b"), "tree"))


def draw(costs: np.ndarray | None, number: int, rng: np.random.Generator) -> np.ndarray:
    if costs is not None:
        return rng.choice(costs, number)
    return (MEAN_FLOPS * rng.lognormal(-(LOG_SPREAD**2) / 2, LOG_SPREAD, number)).astype(np.int64)


def all_reduce_seconds(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * 2 * PARAMETERS / LINK_BYTES_PER_SECOND


def simulate(costs: np.ndarray | None, ranks: int, per_rank: int, steps: int) -> Cell:
    rng = np.random.default_rng(0)
    busy, plain, bound, longest = [], [], [], []
    for _ in range(steps):
        drawn = draw(costs, ranks * per_rank, rng)
        loads = [sum(int(drawn[i]) for i in part) for part in balance.assign(drawn.tolist(), ranks)]
        every = [int(drawn[rank::ranks].sum()) for rank in range(ranks)]
        mean = drawn.sum() / ranks
        busy.append(mean / max(loads))
        plain.append(mean / max(every))
        bound.append(drawn.max() / mean)
        longest.append(max(loads) / FLOPS_PER_SECOND)
    compute, reduce = float(np.mean(longest)), all_reduce_seconds(ranks)
    last = BUCKET_BYTES / (2 * PARAMETERS) * reduce
    exposed = max(reduce - HIDDEN_SHARE * compute, last)
    return Cell(ranks, ranks * per_rank, *(float(np.mean(x)) for x in (busy, plain, bound)), compute, exposed)


def page(cells: list[Cell], source: str) -> str:
    header = ["processes", "groups a step", "busy, dealt by cost", "every R-th", "bound", "compute", "all-reduce shown"]
    body = [
        [
            f"{cell.ranks:,}",
            f"{cell.groups:,}",
            f"{cell.busy:.0%}",
            f"{cell.busy_round_robin:.0%}",
            f"{cell.bound:.2f}",
            f"{cell.compute_s:.2f} s",
            f"{cell.exposed_s * 1e3:.0f} ms",
            f"{cell.efficiency:.0%}",
        ]
        for cell in cells
    ]
    parts = [*PREFACE, markdown([*header, "efficiency"], body), *AFTERWORD]
    return "\n\n".join(parts).replace("{source}", source)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="Markdown file for the page")
    parser.add_argument("--steps", type=int, default=STEPS, help="simulated steps a line")
    args = parser.parse_args()
    costs = recorded_costs()
    if costs is None:
        source = f"log-normal, mean {MEAN_FLOPS / 1e12:.0f} TFLOP, spread of the logarithm {LOG_SPREAD}"
    else:
        source = f"drawn from tau-bench airline's {len(costs)} groups, mean {costs.mean() / 1e12:.0f} TFLOP"
    cells = [simulate(costs, ranks, n, args.steps) for ranks in RANKS for n in GROUPS_PER_RANK]
    text = page(cells, source)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
