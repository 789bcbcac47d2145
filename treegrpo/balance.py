"""Which process trains which group: longest first by cost, so that none waits long for the others."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from treegrpo import flops
from treegrpo.tree import RolloutTree


def costs(trees: Sequence[RolloutTree], model_config: Any, attention: str) -> list[int]:
    """What training each group costs on its own: exact FLOPs of its tree, or with attention="chain" of its chains;
    tokens for a family whose formulas are not known."""
    is_chain = attention == "chain"
    try:
        counted = [flops.report(model_config, [tree]) for tree in trees]
    except ValueError:
        return [tree.num_chain_tokens if is_chain else tree.num_tokens for tree in trees]
    return [(one.chain if is_chain else one.tree).training for one in counted]


def assign(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank, ascending: the most expensive first, each to the rank with the least so far.

    No rank then has more than 4/3 of what the best assignment would give its busiest one (Graham 1969). Ranks stay
    empty where there are fewer groups than ranks. The same costs give the same assignment on every process.

    >>> assign([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}: give at least 1")
    loads = [(0, rank) for rank in range(num_ranks)]
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        parts[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(part) for part in parts]
