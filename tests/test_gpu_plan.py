"""The plan's kernels against its torch operations; on a GPU also time, host time of a call and CUDA graphs."""

import time
import warnings
from collections.abc import Callable

import cases
import numpy as np
import pytest
import torch

from treegrpo_kernels import TreePlan, backends, plan, tree_attention

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
    assert (found.num_pairs, found.num_tokens, found.longest_path) == (expected.num_pairs, 120, expected.longest_path)
    for name, value in vars(expected.tile_lists(16, 8, 7)).items():
        other = getattr(found.tile_lists(16, 8, 7), name)
        assert torch.equal(value, other.cpu()) if isinstance(value, torch.Tensor) else value == other
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 4 crosses"):
        TreePlan.build(torch.tensor([5, 3, 4, 4, 5], device=DEVICE))
    with pytest.raises(ValueError, match=r"subtree_end\[2\] = 2 must lie in \(2, 4\]"):
        TreePlan.build(torch.tensor([4, 3, 2, 9], device=DEVICE))
    assert TreePlan.build(torch.zeros(0, dtype=torch.int32, device=DEVICE)).num_pairs == 0


def long_forest(num_tokens: int) -> np.ndarray:
    """Trees of 16 leaves side by side, cut to ``num_tokens``."""
    tree = cases.balanced_subtree_end(2048, 4, 2, 512)
    copies = -(-num_tokens // len(tree))
    return np.concatenate([tree + i * len(tree) for i in range(copies)])[:num_tokens].clip(max=num_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [5003, 131_071])
def test_compiled_kernels_are_the_torch_operations(num_tokens):
    # fmt: off
    forests = [
        long_forest(num_tokens), np.full(num_tokens, num_tokens), np.arange(1, num_tokens + 1),
        cases.random_subtree_end(num_tokens, 0, branch=0.01, root=0.001), cases.random_subtree_end(num_tokens, 1),
    ]
    # fmt: on
    for i, subtree_end in enumerate(forests):
        same_plan(subtree_end, [torch.int64, torch.int32][i % 2])
        for block_m, block_n in ((128, 64), (48, 80)):
            for window in (0, 700):
                same_lists(subtree_end, block_m, block_n, window)


@pytest.mark.gpu
@pytest.mark.parametrize("residue", range(128))
def test_compiled_kernels_at_every_residue(residue):
    subtree_end = cases.residue_subtree_end(residue, 128)
    same_plan(subtree_end)
    for block_m, block_n in ((128, 128), (128, 64), (64, 128)):
        same_lists(subtree_end, block_m, block_n)


def waits(run: Callable[[], object]) -> int:
    """How often ``run`` waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def median_seconds(run: Callable[[], object], calls: int, wait: bool) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        if wait:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[calls // 2]


@pytest.mark.gpu
def test_a_plan_waits_once_and_its_lists_once():
    end = torch.from_numpy(long_forest(20_000)).cuda()
    TreePlan.build(end).tile_lists(128, 64)
    assert waits(lambda: TreePlan.build(end)) == 1
    built = TreePlan.build(end)
    assert waits(lambda: built.tile_lists(128, 64)) == 1
    assert waits(lambda: built.tile_lists(128, 64, 300)) == 1


@pytest.mark.gpu
def test_the_lists_of_all_hopper_kernels_wait_three_times():
    """For two lengths and, where key tiles may be worth parting, their ranges; under a window for three lengths."""
    from treegrpo_kernels.triton import hopper

    end = torch.from_numpy(long_forest(20_000)).cuda()
    hopper.tile_tensors(TreePlan.build(end), hopper.config(128), 2)
    built = TreePlan.build(end)
    assert waits(lambda: hopper.tile_tensors(built, hopper.config(128), 2)) <= 3
    # under a window the query tiles of key tiles are lists as well
    built.count_pairs(300)
    assert waits(lambda: hopper.tile_tensors(built, hopper.config(128), 2, 300)) <= 4


@pytest.mark.gpu
def test_128k_tokens_within_a_millisecond():
    end = torch.from_numpy(long_forest(131072)).cuda()

    def build() -> None:
        TreePlan.build(end).tile_lists(128, 64)

    for _ in range(10):
        build()
    assert median_seconds(build, 50, wait=True) < 1e-3


OPTIONS = {
    "plain": dict(),
    "window": dict(window=300),
    "sinks": dict(sinks=True),
    "capped": dict(softcap=20.0, sinks=True),
    "capped_window": dict(softcap=20.0, window=300),
    "fp32": dict(dtype=torch.float32, head_dim=64),
    "odd_head": dict(head_dim=96),
    "cuda": dict(backend="cuda"),
}


class Small:
    """A call of the op at about 2k tokens; ``run`` gives the output and the gradients."""

    def __init__(
        self,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 128,
        backend: str = "triton",
    ) -> None:
        reason = backends()[backend]
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        end = torch.from_numpy(cases.balanced_subtree_end(512, 3, 2, 128)).cuda()
        self.plan = TreePlan.build(end)
        self.options = dict(window=window, softcap=softcap, sinks=None, backend=backend)
        self.inputs = [
            torch.randn(len(end), heads, head_dim, device="cuda", dtype=dtype, requires_grad=True)
            for heads in (32, 8, 8)
        ]
        self.dout = torch.randn_like(self.inputs[0])
        if sinks:
            self.options["sinks"] = torch.randn(32, device="cuda", requires_grad=True)

    def forward(self) -> torch.Tensor:
        return tree_attention(*self.inputs, self.plan, **self.options)

    def run(self) -> list[torch.Tensor]:
        wanted = [x for x in (*self.inputs, self.options["sinks"]) if x is not None]
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, wanted, self.dout)]

    def draw(self) -> None:
        with torch.no_grad():
            for x in (*self.inputs, self.dout):
                x.normal_()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "window", "sinks", "capped", "cuda"])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_takes_less_than_60_us_of_the_host(grad, name):
    small = Small(**OPTIONS[name])
    with torch.set_grad_enabled(grad):
        for _ in range(20):
            small.forward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert median_seconds(small.forward, 200, wait=False) < 60e-6
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_cuda_graph_replays_the_same_bits(name, backward):
    small = Small(**OPTIONS[name])

    def step() -> list[torch.Tensor]:
        if backward:
            return small.run()
        with torch.no_grad():
            return [small.forward()]

    # compiles the kernels and makes the lists, which a capture cannot
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        small.draw()
        expected = step()
        for x in captured:
            x.fill_(float("nan"))
        allocated = torch.cuda.memory_allocated()
        graph.replay()
        assert torch.cuda.memory_allocated() == allocated
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_lists_refuse_to_be_built_in_a_capture():
    built = TreePlan.build(torch.from_numpy(long_forest(1000)).cuda())
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="before the capture"), torch.cuda.graph(graph):
        built.tile_lists(128, 64)
