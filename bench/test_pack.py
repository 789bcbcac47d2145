"""Trie and packing: trajectories -> trees -> one batch, up to the whole of tau-bench call by call (millions of tokens).

The host's work, hence timed by the wall everywhere. The check: every trajectory comes back bit for bit, and every
leaf's packed path is its tokens in visible order.
"""

from functools import cache

import numpy as np
import pytest

from bench import workloads
from treegrpo import Trajectory, build_forest, pack, split_calls


def million_tokens(quick):
    """200 groups, prompt 1,000, eight completions of 500: 1,000,000 unique tokens; or three small groups."""
    groups, prompt, completion = (3, 10, 5) if quick else (200, 1000, 500)
    rng = np.random.default_rng(0)
    rows = []
    for group in range(groups):
        start = rng.integers(0, 150_000, prompt)
        for _ in range(8):
            ids = np.concatenate([start, rng.integers(0, 150_000, completion)])
            rows.append(Trajectory(ids, np.repeat([0, 1], [prompt, completion]), reward=0.0, group=str(group)))
    return rows


@cache
def rows_of(workload, quick):
    if workload == "million":
        return tuple(million_tokens(quick))
    if workload.startswith("tau_all"):
        try:
            rows = workloads.tau_bench()
        except workloads.Unavailable as reason:
            pytest.skip(str(reason))
        rows = rows[:4] if quick else rows
        return tuple(split_calls(list(rows))) if workload == "tau_all_calls" else rows
    return workloads.trajectories(workload, quick)


def check(rows, trees, batch):
    by_group = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    assert [tree.to_trajectories() for tree in trees] == list(by_group.values()), "a trajectory did not come back"
    ids, end = batch.input_ids.numpy(), batch.subtree_end.numpy()
    cuts, path = batch.leaf_offsets.tolist(), batch.leaf_tokens.numpy()
    ordered = [row for members in by_group.values() for row in members]
    for row, start, stop in zip(ordered, cuts[:-1], cuts[1:], strict=True):
        leaf = path[start:stop]
        np.testing.assert_array_equal(ids[leaf], row.token_ids)
        assert (np.diff(leaf) > 0).all() and (leaf[-1] < end[leaf]).all(), "a leaf does not see its own path"
    assert batch.num_pairs == int((batch.position_ids.numpy() + 1).sum())
    return 0.0


@pytest.mark.parametrize("step", ["build_forest", "pack"])
@pytest.mark.parametrize("workload", [*workloads.NAMES, "million", "tau_all_whole", "tau_all_calls"])
def test_pack(workload, step, meter, quick):
    rows = rows_of(workload, quick)
    trees = build_forest(rows)
    (batch,) = pack(trees)
    runs = {"build_forest": lambda: build_forest(rows), "pack": lambda: pack(trees)}
    meter.benchmark.group = f"pack: {step}"
    meter.measure(
        runs[step],
        check=lambda: check(rows, trees, batch),
        clock="wall",
        suite="pack",
        contender=step,
        workload=workload,
        tokens=batch.num_tokens,
        chain_tokens=batch.num_chain_tokens,
        pairs=batch.num_pairs,
        chain_pairs=batch.num_chain_pairs,
    )
