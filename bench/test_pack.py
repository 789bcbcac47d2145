"""Trie and packing: trajectories -> trees -> one batch, up to the whole of tau-bench call by call (millions of tokens).

The host's work, hence timed by the wall everywhere. The check: every trajectory comes back bit for bit, and every
leaf's packed path is its tokens in visible order.
"""

from functools import cache

import numpy as np
import pytest
import torch

from bench import workloads
from treegrpo import Trajectory, build_forest, pack, split_calls
from treegrpo.config import TrainConfig
from treegrpo.step import pack_step


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


@cache
def agents(turns):
    """Two groups of four agents: a prompt of 1,000 tokens, turns of 60 and answers of tools of 100."""
    rng = np.random.default_rng(turns)
    mask = np.concatenate([np.zeros(1000), np.tile(np.repeat([1, 0], [60, 100]), turns)])
    rows = []
    for group in range(2):
        start = rng.integers(0, 150_000, 1000)
        for leaf in range(4):
            ids = np.concatenate([start, rng.integers(0, 150_000, 160 * turns)])
            rows.append(Trajectory(ids, mask.astype(bool), reward=float(leaf % 2), group=str(group)))
    return build_forest(rows)


def step_on_calls(contender, turns):
    attention = "tree" if contender == "in_place" else "chain"
    config = TrainConfig(rollouts="replay:-", model="-", samples="call", attention=attention)
    (row,) = pack_step([agents(turns)], config, 0, 1, torch.device("cpu")).rows
    return row


def check_calls(row, split):
    assert torch.equal(row.batch.input_ids, split.batch.input_ids), "not the tokens of the samples written out"
    assert row.lengths.tolist() == split.lengths.tolist(), "not the samples written out"
    return 0.0


@pytest.mark.parametrize("contender", ["in_place", "split"])
@pytest.mark.parametrize("turns", [10, 30, 100])
def test_calls(turns, contender, meter, quick):
    """A step's rows and streams of one sample per model call: as parts of the trajectories' streams, as training on
    trees has them, or written out, as chains must."""
    turns = 3 if quick else turns
    row = step_on_calls(contender, turns)
    meter.benchmark.group = "pack: a step on model calls"
    meter.measure(
        lambda: step_on_calls(contender, turns),
        check=lambda: check_calls(step_on_calls("in_place", turns), step_on_calls("split", turns)),
        baseline=(lambda: step_on_calls("split", turns)) if contender == "in_place" else None,
        baseline_name="split" if contender == "in_place" else None,
        clock="wall",
        suite="pack",
        contender=contender,
        workload=f"{turns} calls",
        tokens=row.batch.num_tokens,
        chain_tokens=int(row.lengths.sum()),
    )
