"""TreePlan against the ancestor walk: validation, positions, pairs, tile classes, lists and orders."""

import copy
import io
import pickle
import time
from collections import namedtuple
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from treegrpo_kernels import TreePlan, reference, work

Tile = namedtuple("Tile", "block_m block_n")
BLOCKS = [(1, 1), (4, 4), (8, 4), (4, 8), (5, 3), (16, 16), (64, 32)]


def forests():
    for name in cases.NAMED:
        yield pytest.param(cases.named_subtree_end(name), id=name)
    for seed in range(6):
        yield pytest.param(cases.random_subtree_end(97 + seed, seed, branch=0.1 * (seed % 4)), id=f"random{seed}")
    for residue in range(8):
        yield pytest.param(cases.residue_subtree_end(residue, 8), id=f"residue{residue}")


def tile_classes(mask: np.ndarray, block_m: int, block_n: int) -> dict[tuple[int, int], str]:
    """(query tile, key tile) -> full | partial, by looking at every element."""
    num_tokens = len(mask)
    classes = {}
    for m0 in range(0, num_tokens, block_m):
        for n0 in range(0, num_tokens, block_n):
            tile = mask[m0 : m0 + block_m, n0 : n0 + block_n]
            if tile.any():
                ragged = n0 + block_n > num_tokens
                classes[m0 // block_m, n0 // block_n] = "full" if tile.all() and not ragged else "partial"
    return classes


@pytest.mark.parametrize("subtree_end", list(forests()))
def test_mask_positions_and_pairs_are_those_of_the_ancestor_walk(subtree_end):
    mask = cases.ancestor_mask(subtree_end)
    plan = TreePlan.build(torch.from_numpy(subtree_end))
    assert np.array_equal(reference.dense_mask(plan.subtree_end).numpy(), mask)
    assert np.array_equal(plan.position.numpy(), mask.sum(1) - 1)
    assert plan.num_pairs == mask.sum() and plan.longest_path == mask.sum(1).max()
    for window in (1, 2, 5, 1000):
        near = mask & (plan.position[:, None] - plan.position[None, :] < window).numpy()
        assert plan.count_pairs(window) == near.sum()


@pytest.mark.parametrize("subtree_end", list(forests()))
def test_a_window_begins_at_the_oldest_token_in_sight(subtree_end):
    mask = cases.ancestor_mask(subtree_end)
    plan = TreePlan.build(torch.from_numpy(subtree_end))
    index = torch.arange(plan.num_tokens)
    for window in (1, 2, 5, plan.num_tokens - 1):
        first = work.first_visible(plan, window, 16)
        assert first.dtype == torch.int32 and len(first) % 16 == 0 and not first[plan.num_tokens :].any()
        seen = torch.from_numpy(mask) & (index >= first[: plan.num_tokens, None])
        assert torch.equal(seen, reference.dense_mask(plan.subtree_end, window))
    assert work.first_visible(plan, 0, 16).shape == (0,)


def test_what_a_window_adds_to_the_lists_does_not_wait_for_the_device():
    """Tensors without values: whatever had to look at one would raise."""
    plan = TreePlan.build(torch.from_numpy(cases.random_subtree_end(300, 1, branch=0.05)))
    lists = plan.tile_lists(16, 32, 50)
    with FakeTensorMode() as mode:
        fake = TreePlan(*map(mode.from_tensor, (plan.subtree_end, plan.position)), plan.num_pairs, plan.longest_path)
        tensors = {name: x for name, x in vars(lists).items() if isinstance(x, torch.Tensor)}
        fake._tile_lists[16, 32, 50] = replace(lists, **{name: mode.from_tensor(x) for name, x in tensors.items()})
        assert work.first_visible(fake, 50, 64).shape == (320,)
        order, offsets, indices = work.query_lists(fake, Tile(16, 32), 50)
        assert order.shape == lists.kv_order.shape and offsets.shape == (21,) and indices.shape == lists.q_indices.shape
        with pytest.raises(DataDependentOutputException):
            fake.position.max().item()


@pytest.mark.parametrize("subtree_end", list(forests()))
def test_the_key_side_of_lists_depends_on_block_n_alone(subtree_end):
    end = torch.as_tensor(subtree_end)
    plan, other = TreePlan.build(end), TreePlan.build(end)
    made = plan.tile_lists(16, 8, 3)
    assert plan.key_lists(4, 8) is made
    wanted = other.tile_lists(4, 8)
    for name in ("kv_max", "kv_min", "kv_order", "kv_pos_min", "kv_pos_max"):
        assert torch.equal(getattr(made, name), getattr(wanted, name)), name
    assert plan.key_lists(4, 16) is plan.tile_lists(4, 16)
    # every query tile in a key tile's range sees it: work.py counts visible tiles so
    ranges = -(-made.kv_max // 4) - torch.arange(len(made.kv_max)) * 8 // 4
    assert int(ranges.sum()) == len(wanted.q_indices)


def test_lists_made_by_another_thread_while_some_are_looked_for():
    plan = TreePlan.build(torch.full((64,), 64))

    class MadeMeanwhile:
        @property
        def block_n(self):
            plan.tile_lists(16, 16)
            return 4

    for block_m in (1, 2):
        plan._tile_lists[block_m, 4, 0] = MadeMeanwhile()
    assert plan.key_lists(8, 8).block_n == 8


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize("window", [None, 1, 4, 40])
def test_tile_lists_cover_exactly_the_visible_tiles(block_m, block_n, window):
    for param in forests():
        subtree_end = param.values[0]
        plan = TreePlan.build(torch.from_numpy(subtree_end))
        position = plan.position.numpy()
        mask = cases.ancestor_mask(subtree_end)
        if window:
            mask &= position[:, None] - position[None, :] < window
        expected = tile_classes(mask, block_m, block_n)
        lists = plan.tile_lists(block_m, block_n, window)
        found = {}
        for tile in range(len(lists.q_full)):
            start, stop = lists.q_offsets[tile].item(), lists.q_offsets[tile + 1].item()
            full = lists.q_full[tile].item()
            for rank, kv_tile in enumerate(lists.q_indices[start:stop].tolist()):
                assert (tile, kv_tile) not in found
                found[tile, kv_tile] = "full" if rank < full else "partial"
        if window:
            # position ranges are per tile, so a window may keep a tile that no pair needs; it must never lose one
            assert expected.keys() <= found.keys()
            assert all(expected.get(key) == "full" for key, kind in found.items() if kind == "full")
        else:
            assert found == expected


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
def test_key_tile_ranges_and_orders(block_m, block_n):
    for param in forests():
        subtree_end = param.values[0]
        num_tokens = len(subtree_end)
        lists = TreePlan.build(torch.from_numpy(subtree_end)).tile_lists(block_m, block_n)
        mask = cases.ancestor_mask(subtree_end)
        for tile, (high, low) in enumerate(zip(lists.kv_max.tolist(), lists.kv_min.tolist(), strict=True)):
            n0, n1 = tile * block_n, min((tile + 1) * block_n, num_tokens)
            rows = np.flatnonzero(mask[:, n0:n1].any(1))
            assert (rows[0], rows[-1] + 1, len(rows)) == (n0, high, high - n0)
            seen_whole = np.flatnonzero(mask[:, n0:n1].all(1))
            if n1 - n0 == block_n:
                assert len(seen_whole) == max(0, low - (n1 - 1))
                assert len(seen_whole) == 0 or seen_whole[0] == n1 - 1
        lengths = (lists.q_offsets[1:] - lists.q_offsets[:-1])[lists.q_order.long()]
        assert (lengths[1:] <= lengths[:-1]).all()
        spans = (lists.kv_max - torch.arange(len(lists.kv_max)) * block_n)[lists.kv_order.long()]
        assert (spans[1:] <= spans[:-1]).all()
        assert sorted(lists.q_order.tolist()) == list(range(len(lists.q_order)))


def is_forest(end: list[int]) -> int:
    """First index that is not part of a depth-first forest, by the definition; -1 if none."""
    for t in range(len(end)):
        if not t < end[t] <= len(end):
            return t
        if any(j < t < end[j] < end[t] for j in range(t)):
            return t
    return -1


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.integers(0, n + 1), min_size=n, max_size=n)))
def test_validation_is_the_definition(end):
    first_bad = is_forest(end)
    if first_bad < 0:
        assert TreePlan.build(torch.tensor(end)).num_tokens == len(end)
    else:
        with pytest.raises(ValueError, match=r"subtree_end\[\d+\] = .*treegrpo.pack"):
            TreePlan.build(torch.tensor(end))


def test_validation_is_the_definition_for_every_array_of_five():
    values = np.array(np.meshgrid(*[np.arange(t + 1, 6) for t in range(5)], indexing="ij")).reshape(5, -1).T
    for end in values.tolist():
        if is_forest(end) < 0:
            TreePlan.build(torch.tensor(end))
        else:
            with pytest.raises(ValueError, match="crosses the subtree"):
                TreePlan.build(torch.tensor(end))


def test_the_first_bad_index_is_named():
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 2 must lie in \(2, 4\]"):
        TreePlan.build(torch.tensor([4, 3, 2, 9]))
    # what is out of range changes where others seem to be
    with pytest.raises(ValueError, match=r"subtree_end\[4\] = 1 must lie in \(4, 5\]"):
        TreePlan.build(torch.tensor([4, 2, 4, 4, 1]))
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 4 crosses"):
        TreePlan.build(torch.tensor([5, 3, 4, 4, 5]))
    with pytest.raises(TypeError, match="integer"):
        TreePlan.build(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="one-dimensional"):
        TreePlan.build(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="must be positive"):
        TreePlan.build(torch.tensor([1])).tile_lists(0, 1)


def test_the_index_that_is_named_is_the_first_bad_one():
    """For every array of four: the first token that ends nowhere or beyond the innermost interval open there."""
    for end in np.ndindex(*(6,) * 4):
        first, open_ends = None, []
        for t, stop in enumerate(end):
            while open_ends and open_ends[-1] <= t:
                open_ends.pop()
            if not t < stop <= 4 or (open_ends and stop > open_ends[-1]):
                first = t
                break
            open_ends.append(stop)
        if first is not None:
            with pytest.raises(ValueError, match=rf"subtree_end\[{first}\] = {end[first]} "):
                TreePlan.build(torch.tensor(end))


def test_a_copy_begins_anew():
    """What backends made of a plan may be addresses, and may not suit another device."""
    plan = TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    plan.tile_lists(16, 16)
    plan.made_once("mine", lambda: [plan.position])
    plan.calls["call"] = ()
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert not (other.calls or other.derived or other._tile_lists) and plan.calls and plan.derived
        assert torch.equal(other.subtree_end, plan.subtree_end) and torch.equal(other.position, plan.position)
        assert (other.num_pairs, other.longest_path, other.num_tokens) == (17, 4, 6)
    saved = io.BytesIO()
    torch.save(plan, saved)
    saved.seek(0)
    assert torch.load(saved, map_location="meta", weights_only=False).device.type == "meta"


def test_empty_plan():
    plan = TreePlan.build(torch.zeros(0, dtype=torch.int32))
    assert (plan.num_tokens, plan.num_pairs, plan.longest_path) == (0, 0, 0)
    assert plan.tile_lists(16, 16).q_indices.shape == (0,)


@pytest.mark.usefixtures("one_thread")
def test_a_million_tokens_in_half_a_second():
    """CPU seconds of one thread, so that what else the machine does shows less."""
    tree = cases.balanced_subtree_end(512, 3, 3, 128)
    row = torch.from_numpy(np.concatenate([tree + i * len(tree) for i in range(182)]))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        plan = TreePlan.build(row)
        plan.tile_lists(128, 64)
        seconds.append(time.process_time() - start)
    assert plan.num_tokens > 1_000_000
    assert min(seconds) < 0.5


@pytest.mark.gpu
def test_plan_on_the_gpu_is_the_plan_on_the_cpu():
    subtree_end = torch.from_numpy(cases.random_subtree_end(5000, 0))
    here, there = TreePlan.build(subtree_end), TreePlan.build(subtree_end.cuda())
    assert there.device.type == "cuda"
    assert here.num_pairs == there.num_pairs
    for name, value in vars(here.tile_lists(128, 64)).items():
        other = getattr(there.tile_lists(128, 64), name)
        assert torch.equal(value, other.cpu()) if isinstance(value, torch.Tensor) else value == other
