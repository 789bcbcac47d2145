"""The forests every bench runs on: as trajectories, as rollout trees, and as the packed row's `subtree_end`.

Synthetic workloads draw fresh token ids for every node, so that exactly what the shape shares is shared.

    chain          one sequence of 4096 tokens: the degenerate tree, where a tree op may not lose
    grpo_star      GRPO: prompt 512, 8 completions of 128 to 384 tokens
    search_agent   Tree-GRPO (M, N, L) = (2, 2, 1) on 4-step episodes: action 80, observation 300 tokens
    binary         deep binary tree: 128 leaves, 8 levels of 16 tokens
    branching      prompt 512, branching 3, depth 3, 128 tokens a node: 5,504 tokens, 40 nodes
    tau_whole      tau-bench airline, the task with the fewest tokens: 4 recorded conversations
    tau_calls      the same, one sample per model call, as many agent stacks emit them
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from treegrpo import Trajectory, build_forest, pack, split_calls
from treegrpo.tree import RolloutTree
from treegrpo_kernels import TreePlan

TAU_BENCH = Path("tau_bench_airline") / "tokens.jsonl.gz"


@dataclass(frozen=True)
class Forest:
    """A workload laid out for attention: subtree_end int32 [T], leaf_tokens int64 [L], leaf_offsets [leaves + 1]; the
    pairs are those within ``window`` tokens of a path, 0 for no window."""

    name: str
    subtree_end: torch.Tensor
    leaf_tokens: torch.Tensor
    leaf_offsets: torch.Tensor
    num_pairs: int
    num_chain_pairs: int
    window: int = 0

    @property
    def num_tokens(self) -> int:
        return self.subtree_end.numel()

    @property
    def num_chain_tokens(self) -> int:
        return self.leaf_tokens.numel()


class Unavailable(Exception):
    """A workload that cannot be made here, with the reason."""


class Fresh:
    """Runs of token ids never used before."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, count: int) -> np.ndarray:
        self.next += count
        return np.arange(self.next - count, self.next)


def trajectory(parts: list[tuple[np.ndarray, int]], rng: np.random.Generator, **fields) -> Trajectory:
    """Joined (tokens, trained) runs, with a random reward of 0 or 1."""
    mask = np.concatenate([np.full(len(tokens), trained) for tokens, trained in parts])
    return Trajectory(np.concatenate([tokens for tokens, _ in parts]), mask, reward=float(rng.integers(2)), **fields)


def chain(length: int = 4096) -> list[Trajectory]:
    fresh, rng = Fresh(), np.random.default_rng(0)
    return [trajectory([(fresh(length // 4), 0), (fresh(length - length // 4), 1)], rng)]


def grpo_star(prompt: int = 512, group_size: int = 8, shortest: int = 128, longest: int = 384) -> list[Trajectory]:
    fresh, rng = Fresh(), np.random.default_rng(1)
    start = fresh(prompt)
    lengths = rng.integers(shortest, longest + 1, group_size)
    return [trajectory([(start, 0), (fresh(int(length)), 1)], rng) for length in lengths]


def search_agent(
    prompt: int = 200, action: int = 80, observation: int = 300, steps: int = 4, trees: int = 2, expand: int = 2
) -> list[Trajectory]:
    """Initialise, then expand once: `trees` chains, each with `expand` branches from uniformly drawn non-leaf nodes."""
    fresh, rng = Fresh(), np.random.default_rng(2)
    start = (fresh(prompt), 0)

    def turns(count: int) -> list[list[tuple[np.ndarray, int]]]:
        full = [[(fresh(action), 1), (fresh(observation), 0)] for _ in range(count - 1)]
        return [*full, [(fresh(action), 1)]]

    rows = []
    for tree in range(trees):
        first = turns(steps)
        rows.append((tree, first))
        for _ in range(expand):
            kept = int(rng.integers(0, steps))
            rows.append((tree, first[:kept] + turns(steps - kept)))
    return [trajectory([start, *(part for turn in row for part in turn)], rng, tree=tree) for tree, row in rows]


def balanced(prompt: int, branching: int, depth: int, node: int, group: str = "") -> list[Trajectory]:
    """A prompt, then `depth` levels of trained `node`-token nodes, `branching` under each."""
    fresh, rng = Fresh(), np.random.default_rng(3)
    paths = [[(fresh(prompt), 0)]]
    for _ in range(depth):
        paths = [[*path, (fresh(node), 1)] for path in paths for _ in range(branching)]
    return [trajectory(path, rng, group=group) for path in paths]


def growing_forest(num_trees: int, quick: bool = False) -> list[Trajectory]:
    """`num_trees` groups of 4,096 tokens each (quick: 256): pairs grow in proportion to tokens."""
    prompt, node = (28, 19) if quick else (400, 308)
    return [t for i in range(num_trees) for t in balanced(prompt, 3, 2, node, group=str(i))]


def data_folder() -> Path:
    """Recorded data: TREEGRPO_DATA, else ../shared/data beside the repository."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("TREEGRPO_DATA", default))


@cache
def tau_bench() -> tuple[Trajectory, ...]:
    """All 200 recorded conversations, token ids renumbered densely so that a small vocabulary holds them."""
    path = data_folder() / TAU_BENCH
    if not path.is_file():
        raise Unavailable(f"{TAU_BENCH} is not below {data_folder()}: set TREEGRPO_DATA to the folder that holds it")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    _, dense = np.unique(np.concatenate([row["token_ids"] for row in rows]), return_inverse=True)
    cuts = np.cumsum([len(row["token_ids"]) for row in rows])[:-1]
    return tuple(
        Trajectory(ids, row["loss_mask"], reward=float(row["reward"]), group=row["group"])
        for row, ids in zip(rows, np.split(dense, cuts), strict=True)
    )


def tau_whole() -> list[Trajectory]:
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in tau_bench():
        groups.setdefault(trajectory.group, []).append(trajectory)
    return min(groups.values(), key=lambda rows: sum(row.num_tokens for row in rows))


def tau_calls() -> list[Trajectory]:
    return split_calls(tau_whole())


FULL: dict[str, Callable[[], list[Trajectory]]] = {
    "chain": chain,
    "grpo_star": grpo_star,
    "search_agent": search_agent,
    "binary": lambda: balanced(16, 2, 7, 16),
    "branching": lambda: balanced(512, 3, 3, 128),
    "tau_whole": tau_whole,
    "tau_calls": tau_calls,
}


def cut(rows: list[Trajectory], count: int, start: int, stop: int) -> list[Trajectory]:
    """Tokens start to stop of `count` rows: recorded data cut down for the smoke run."""
    return [
        dataclasses.replace(row, token_ids=row.token_ids[start:stop], loss_mask=row.loss_mask[start:stop])
        for row in rows[:count]
    ]


QUICK: dict[str, Callable[[], list[Trajectory]]] = {
    "chain": lambda: chain(192),
    "grpo_star": lambda: grpo_star(64, 4, 16, 48),
    "search_agent": lambda: search_agent(25, 15, 50, 3),
    "binary": lambda: balanced(4, 2, 4, 4),
    "branching": lambda: balanced(64, 3, 2, 16),
    "tau_whole": lambda: cut(tau_whole(), 2, 1150, 1400),
    "tau_calls": lambda: split_calls(cut(tau_whole(), 1, 1150, 1550)),
}
NAMES = tuple(FULL)


@cache
def trajectories(name: str, quick: bool = False) -> tuple[Trajectory, ...]:
    """The workload's leaves. Raises Unavailable with the reason where its data is missing."""
    return tuple((QUICK if quick else FULL)[name]())


@cache
def trees(name: str, quick: bool = False) -> tuple[RolloutTree, ...]:
    return tuple(build_forest(trajectories(name, quick)))


@cache
def forest(name: str, quick: bool = False) -> Forest:
    return lay_out(name, trees(name, quick))


def lay_out(name: str, grown: tuple[RolloutTree, ...], *, share_across_groups: bool = True, window: int = 0) -> Forest:
    (batch,) = pack(grown, share_across_groups=share_across_groups)
    num_pairs, num_chain_pairs = batch.num_pairs, batch.num_chain_pairs
    if window:
        num_pairs = TreePlan.build(batch.subtree_end).count_pairs(window)
        lengths = batch.leaf_offsets.diff()
        inside = lengths.clamp(max=window)
        num_chain_pairs = int((inside * (inside + 1) // 2 + (lengths - inside) * window).sum())
    return Forest(
        name=name,
        subtree_end=batch.subtree_end,
        leaf_tokens=batch.leaf_tokens,
        leaf_offsets=batch.leaf_offsets,
        num_pairs=num_pairs,
        num_chain_pairs=num_chain_pairs,
        window=window,
    )


def roots(subtree_end: torch.Tensor) -> Iterator[tuple[int, int]]:
    """[start, end) of each tree of a packed row."""
    start = 0
    while start < subtree_end.numel():
        end = int(subtree_end[start])
        yield start, end
        start = end
