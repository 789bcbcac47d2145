"""The plan's kernels against its torch operations; on a GPU also time, host time of a call and CUDA graphs."""

import cases
import numpy as np
import pytest
import torch

from treegrpo_kernels import TreePlan, plan

pytest.importorskip("triton")

from treegrpo_kernels.triton import plan as kernels

# without a GPU the kernels run in Triton's interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = [(8, 4), (5, 3), (16, 32)]
pytestmark = pytest.mark.usefixtures("one_thread")


def same_plan(subtree_end: np.ndarray, dtype: torch.dtype = torch.int32) -> None:
    end = torch.from_numpy(subtree_end).to(dtype)
    expected, found = plan._positions(end), kernels.positions(end.to(DEVICE))
    for a, b in zip(expected[:2], found[:2], strict=True):
        assert torch.equal(a, b.cpu()) and a.dtype == b.dtype
    assert expected[2:] == found[2:]


def same_lists(subtree_end: np.ndarray, block_m: int, block_n: int, window: int = 0) -> None:
    end, position, *_ = plan._positions(torch.from_numpy(subtree_end))
    expected = plan._build_tile_lists(end, position, block_m, block_n, window)
    found = kernels.tile_lists(end.to(DEVICE), position.to(DEVICE), block_m, block_n, window)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name].cpu()), name
        assert found[name].dtype == torch.int32 and found[name].is_contiguous()


@pytest.mark.parametrize("name", cases.NAMED)
def test_named_forests(name):
    subtree_end = cases.named_subtree_end(name)
    same_plan(subtree_end)
    for block_m, block_n in BLOCKS:
        for window in (0, 4):
            same_lists(subtree_end, block_m, block_n, window)


@pytest.mark.parametrize("seed", range(8))
def test_random_forests(seed):
    subtree_end = cases.random_subtree_end(90 + 7 * seed, seed, branch=[0.02, 0.1, 0.3, 0.6][seed % 4])
    same_plan(subtree_end, [torch.int64, torch.int32, torch.int16, torch.uint8][seed % 4])
    for block_m, block_n in BLOCKS:
        same_lists(subtree_end, block_m, block_n, [0, 3, 17, 1000][seed % 4])


@pytest.mark.parametrize("residue", range(16))
def test_branches_at_every_residue(residue):
    subtree_end = cases.residue_subtree_end(residue, 16)
    same_plan(subtree_end)
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        for window in (0, 9):
            same_lists(subtree_end, block_m, block_n, window)


def test_more_tokens_and_tiles_than_one_program_holds(monkeypatch):
    """Runs of equal ends, orders and lists that go on in the next program or the next round of its loop."""
    monkeypatch.setattr(kernels, "_TOKENS", 16)
    monkeypatch.setattr(kernels, "_TILES", 8)
    monkeypatch.setattr(kernels, "_RANKED", 8)
    for seed in range(4):
        subtree_end = cases.random_subtree_end(203, seed, branch=[0.01, 0.3][seed % 2])
        same_plan(subtree_end)
        same_lists(subtree_end, 8, 4, [0, 0, 20][seed % 3])
    same_plan(np.full(67, 67, dtype=np.int32))
    same_lists(np.full(67, 67, dtype=np.int32), 4, 4)
    same_lists(np.arange(1, 68, dtype=np.int32), 4, 4)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_smallest_rows(num_tokens):
    for end in (np.full(num_tokens, num_tokens), np.arange(1, num_tokens + 1)):
        same_plan(end)
        same_lists(end, 16, 16)


def test_violations_are_found():
    values = np.array(np.meshgrid(*[np.arange(t + 1, 5) for t in range(4)], indexing="ij")).reshape(4, -1).T
    hostile = [[4, 3, 2, 9], [-7, 4, 4, 4], [4, 4, 4, 2**31 + 4], [0, 0, 0, 0], [4, 4, 4, 2**40]]
    for end in [*values.tolist(), *hostile]:
        end = torch.tensor(end)
        expected, found = plan._positions(end)[2], kernels.positions(end.to(DEVICE))[2]
        assert (expected > 0) == (found > 0), end


def test_strided_and_unaligned_rows():
    row = torch.from_numpy(cases.random_subtree_end(50, 1)).to(DEVICE)
    expected = kernels.positions(row)
    apart = torch.stack([row, row], 1)[:, 1]
    late = torch.cat([row[:1], row])[1:]
    for view in (apart, late):
        for a, b in zip(expected[:2], kernels.positions(view)[:2], strict=True):
            assert torch.equal(a, b)


def test_plan_takes_the_kernels_on_a_gpu_and_torch_elsewhere(monkeypatch):
    assert plan._kernels(torch.device("cpu")) is None
    subtree_end = torch.from_numpy(cases.random_subtree_end(120, 2))
    expected = TreePlan.build(subtree_end)
    monkeypatch.setattr(plan, "_kernels", lambda device: kernels)
    found = TreePlan.build(subtree_end.to(DEVICE))
    assert (found.num_pairs, found.num_tokens) == (expected.num_pairs, 120)
    for name, value in vars(expected.tile_lists(16, 8, 7)).items():
        other = getattr(found.tile_lists(16, 8, 7), name)
        assert torch.equal(value, other.cpu()) if isinstance(value, torch.Tensor) else value == other
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 4 crosses"):
        TreePlan.build(torch.tensor([5, 3, 4, 4, 5], device=DEVICE))
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 2 must lie in \(2, 4\]"):
        TreePlan.build(torch.tensor([4, 3, 2, 9], device=DEVICE))
    assert TreePlan.build(torch.zeros(0, dtype=torch.int32, device=DEVICE)).num_pairs == 0
