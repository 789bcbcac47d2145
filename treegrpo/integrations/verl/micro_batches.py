"""Which rows share a micro-batch, and which a data-parallel rank: siblings, as far as sizes allow. Knows no verl."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from treegrpo.packing import cut_tree
from treegrpo.tree import RolloutTree, Trajectory, build_tree


def groups_of(keys: Sequence[Hashable]) -> list[list[int]]:
    """Rows of equal keys, in the order in which the keys first come.

    >>> groups_of(["a", "b", "a"])
    [[0, 2], [1]]
    """
    found: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return list(found.values())


def unique_tokens(rows: Sequence[np.ndarray]) -> int:
    """Tokens of the trie of ``rows``, int arrays of at least one token."""
    return _tree(rows).num_tokens


def _tree(rows: Sequence[np.ndarray]) -> RolloutTree:
    return build_tree([Trajectory(row, np.zeros(len(row), np.int8), reward=0.0) for row in rows])


def by_budget(rows: Sequence[np.ndarray], groups: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Row indices of each micro-batch: whole groups, at most ``budget`` unique tokens each, the largest groups first.

    A group beyond the budget is cut between rows, in the order of their tokens (packing.cut_tree). What different
    groups share is counted twice, so that micro-batches come out less full than they could be, never over the budget.

    Raises:
        ValueError: a single row is longer than the budget.
    """
    for row, ids in enumerate(rows):
        if len(ids) > budget:
            raise ValueError(f"row {row} has {len(ids)} tokens, more than max_token_len_per_gpu={budget}: raise it")
    parts: list[tuple[int, list[int]]] = []
    for group in groups:
        tree = _tree([rows[i] for i in group])
        if tree.num_tokens <= budget:
            parts.append((tree.num_tokens, list(group)))
            continue
        for cut in cut_tree(tree, budget):
            part = [group[leaf] for leaf in cut]
            parts.append((unique_tokens([rows[i] for i in part]), part))
    loads: list[int] = []
    batches: list[list[int]] = []
    for size, part in sorted(parts, key=lambda x: (-x[0], x[1])):
        place = next((i for i, load in enumerate(loads) if load + size <= budget), None)
        if place is None:
            loads.append(size)
            batches.append(list(part))
        else:
            loads[place] += size
            batches[place] += part
    return batches


def by_count(groups: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Micro-batches of ``size`` rows, siblings next to each other; the number of rows is a multiple of it.

    >>> by_count([[0, 2], [1, 3]], 2)
    [[0, 2], [1, 3]]
    """
    order = [row for group in groups for row in group]
    if len(order) % size:
        raise ValueError(f"{len(order)} rows are no multiple of the micro-batch size {size}")
    return [order[at : at + size] for at in range(0, len(order), size)]


def fill_up(batches: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The same rows in ``count`` micro-batches, the largest halved: all processes must enter the model as often.

    Raises ``ValueError`` where there are fewer rows than that.
    """
    found = [list(batch) for batch in batches]
    while len(found) < count:
        largest = max(range(len(found)), key=lambda i: (len(found[i]), -i))
        batch = found[largest]
        if len(batch) < 2:
            raise ValueError(f"{len(found)} rows on this process, but another needs {count} micro-batches")
        found[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return found


def row_costs(
    groups: Sequence[Hashable], sessions: Sequence[Hashable], prompts: Sequence[int], lengths: Sequence[int]
) -> list[int]:
    """Unique tokens that each row adds to its group's tree, guessed from lengths alone: a group's shortest prompt is
    shared by all, and of a session's rows the longest holds the others.

    >>> row_costs(["a", "a", "a"], [0, 1, 1], prompts=[5, 5, 9], lengths=[8, 7, 12])
    [8, 0, 7]
    """
    costs = [0] * len(groups)
    for group in groups_of(groups):
        shared = min(prompts[i] for i in group)
        for session in groups_of([sessions[i] for i in group]):
            longest = max((group[at] for at in session), key=lambda i: lengths[i])
            costs[longest] = lengths[longest] - shared
        costs[group[0]] += shared
    return costs


def by_rank(keys: Sequence[Hashable], costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Rows of each data-parallel rank, equally many on each: the most expensive groups are dealt first, each to the
    rank with the least cost that has room for all of it. A group for which none has room is cut.

    On a rank groups stand in their first row's order, not by cost: a rank's mini-batches are cut from its rows in turn,
    and updates would go from long responses to short ones.

    >>> by_rank(["a", "b", "a", "b"], [3, 1, 3, 1], 2)
    [[0, 2], [1, 3]]
    """
    if len(keys) % num_ranks:
        raise ValueError(f"{len(keys)} rows are no multiple of {num_ranks} ranks")
    room = [len(keys) // num_ranks] * num_ranks
    loads = [0] * num_ranks
    ranks: list[list[Sequence[int]]] = [[] for _ in range(num_ranks)]

    def give(rows: Sequence[int], rank: int) -> None:
        ranks[rank].append(rows)
        room[rank] -= len(rows)
        loads[rank] += sum(costs[i] for i in rows)

    left = []
    for group in sorted(groups_of(keys), key=lambda rows: (-sum(costs[i] for i in rows), rows[0])):
        free = [rank for rank in range(num_ranks) if room[rank] >= len(group)]
        if free:
            give(group, min(free, key=lambda rank: (loads[rank], rank)))
        else:
            left.append(group)
    for group in left:
        rest = list(group)
        while rest:
            rank = max(range(num_ranks), key=lambda r: (room[r], -r))
            part, rest = rest[: room[rank]], rest[room[rank] :]
            give(part, rank)
    return [[row for part in sorted(parts, key=lambda rows: rows[0]) for row in part] for parts in ranks]
