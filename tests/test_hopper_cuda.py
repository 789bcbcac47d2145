"""The CUDA kernels for Hopper (csrc/cuda/sm90): what they are given, on the CPU; and on a GPU what the matrix of
test_gpu_attention.py and test_gpu_runs.py does not ask. Their arithmetic and protocol run in csrc/test/test_sm90.cpp.
"""

from pathlib import Path

import cases
import pytest
import torch
from attention_checks import DEVICE, NAMES, differences, excess, inputs, through_op

import treegrpo_kernels as tk
from treegrpo_kernels import hopper_cuda, native, reference

ROOT = Path(__file__).resolve().parent.parent
ROWS, KEYS = 64, 128
REASON = tk.backends()["cuda"]
ON_HOPPER = REASON is None and DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason=REASON or "no GPU of compute capability 9.0")]


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("name", ["chain", "star", "random", "one token", "whole tiles"])
def test_every_visible_tile_is_given_once(name, num_kv_heads):
    subtree_end = {
        "chain": cases.nested_subtree_end((2000, [])),
        "star": cases.nested_subtree_end((700, [(90 + i, []) for i in range(9)])),
        "random": cases.random_subtree_end(1501, 3, branch=0.02),
        "one token": cases.nested_subtree_end((1, [])),
        "whole tiles": cases.nested_subtree_end((128, [(128, []), (128, [])])),
    }[name]
    plan = tk.TreePlan.build(torch.from_numpy(subtree_end))
    tensors = hopper_cuda.tile_tensors(plan, num_kv_heads)
    assert tensors is hopper_cuda.tile_tensors(plan, num_kv_heads)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in tensors)
    *_, least, most, half_least, half_most, items, parted, span = tensors
    num_tokens, end = plan.num_tokens, plan.subtree_end.tolist()
    num_keys = -(-num_tokens // KEYS)
    assert span.tolist() == [e - j for j, e in enumerate(end)] + [0] * (-num_tokens % KEYS)
    for low, high, size in ((least, most, KEYS), (half_least, half_most, KEYS // 2)):
        assert len(low) == len(high) == num_keys * KEYS // size
        for n in range(len(low)):
            mine = end[n * size : (n + 1) * size]
            assert high[n] == max(mine, default=0) and low[n] == (min(mine) if len(mine) == size else 0)

    mask = reference.dense_mask(plan.subtree_end)
    wanted = {
        (r, n)
        for n in range(num_keys)
        for r in range(-(-num_tokens // ROWS))
        if mask[r * ROWS : (r + 1) * ROWS, n * KEYS : (n + 1) * KEYS].any()
    }
    taken, slots, whole = [], {}, []
    for tile, start, stop, slot in items.tolist():
        taken += [(r, tile) for r in range(start, stop)]
        whole += [tile] if slot < 0 else []
        slots.setdefault(tile, []).append((start, slot))
    assert len(taken) == len(set(taken)) and wanted <= set(taken)
    lengths = [stop - start for _, start, stop, _ in items.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(whole) + sorted(t for t, *_ in parted.tolist()) == sorted(set(whole)) + parted[:, 0].tolist()
    for tile, first, count in parted.tolist():
        # partials are added in the order of the pieces
        assert [slot for _, slot in sorted(slots[tile])] == list(range(first, first + count))
    # the scratch memory of the C++ side
    assert len(items) - (num_keys - len(parted)) == sum(parted[:, 2].tolist())


@pytest.mark.skipif(native.cpu_reason() is not None, reason="_C, which holds the schema, is not built")
def test_the_operators_take_what_they_are_given():
    native.load()
    plan = tk.TreePlan.build(torch.arange(1, 301, dtype=torch.int32))
    tensors = hopper_cuda.tile_tensors(plan, 2)
    for op, before, part, after in (("sm90_fwd", 4, hopper_cuda._FWD, 1), ("sm90_bwd", 6, hopper_cuda._BWD, 2)):
        schema = getattr(torch.ops.treegrpo_native, op).default._schema
        names = [x.name for x in schema.arguments]
        assert len(names) == before + len(tensors[part]) + after
        lists = dict(zip(names[before:], tensors[part], strict=False))
        assert lists["span"].shape == (384,) and lists["offsets"].shape == (4,) and lists["least"].shape == (3,)
        if op == "sm90_bwd":
            assert lists["half_least"].shape == (6,) and lists["items"].shape[1] == 4 and lists["parted"].shape[1] == 3


def test_tiles_are_those_of_the_cpp_side():
    source = (ROOT / "csrc" / "cuda" / "sm90" / "params.h").read_text()
    for name, tile in (("Forward", "_FWD_TILE"), ("QueryGrad", "_DQ_TILE"), ("KeyGrad", "_DKV_TILE")):
        tile = getattr(hopper_cuda, tile)
        of_name = source.split(f"struct {name}Tile")[1].split("};")[0]
        assert f"kRows = {tile.block_m}, kKeys = {tile.block_n}," in of_name
    assert f"kPadding = {hopper_cuda._PADDING};" in source


def test_doctor_says_that_they_were_mended(monkeypatch):
    from treegrpo import doctor

    assert hopper_cuda.NOTE not in doctor._usable("cuda") or ON_HOPPER
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert "mended since they last ran on a GPU" in doctor._usable("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_only_who_asks_by_name_gets_them(wanted, monkeypatch):
    """Where ``auto`` comes down to CUDA (for float64), the plain kernels serve; a Hopper GPU is a stand-in here."""
    from treegrpo_kernels import api

    monkeypatch.setattr(api, "_choose", lambda *args: api.Backend.CUDA)
    monkeypatch.setattr(hopper_cuda, "refusal", lambda *args: None)
    plan = tk.TreePlan.build(torch.arange(1, 65, dtype=torch.int32))
    q = torch.zeros(64, 4, 64, dtype=torch.bfloat16)
    call = api._prepare(q, q, q, plan, None, None, None, None, wanted)
    assert bool(call.tiles) == (wanted == "cuda")
    monkeypatch.setattr(hopper_cuda, "refusal", lambda *args: "window")
    assert not api._prepare(q, q, q, plan, None, None, None, None, wanted).tiles


def test_a_short_last_query_tile_has_full_key_tiles():
    """What test_sm90.cpp's lists must say too: half of such a tile may lie past T and see nothing of a full tile."""
    plan = tk.TreePlan.build(torch.full((256 + 40,), 256 + 40, dtype=torch.int32))
    lists = plan.tile_lists(128, 128)
    assert lists.q_full.tolist() == [0, 1, 2] and lists.q_offsets.diff().tolist() == [1, 2, 3]


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize(("d", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_every_output_is_written(self, d, dtype, deterministic):
        for subtree_end in (cases.residues_subtree_end(128), cases.nested_subtree_end((3000, [(400, [])] * 5))):
            # the allocator hands freed memory out again: fill it with NaN first
            junk = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(64)]
            del junk
            args = inputs(len(subtree_end), 8, 2, d, d, dtype)[:4]
            got = through_op("cuda", subtree_end, *args, scale=d**-0.5, deterministic=deterministic)
            over = excess(got, subtree_end, *args, scale=d**-0.5)
            assert max(over.values()) <= 0, over

    @pytest.mark.parametrize(("d", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
    def test_every_length_of_the_last_tile(self, d, dtype):
        """At most 64 tokens in it: a consumer has none, and once waited for ever."""
        for rest in (*range(1, 129, 9), 64, 65, 128):
            subtree_end = cases.nested_subtree_end((50, []), (270, [(60 + rest, [])]))
            args = inputs(len(subtree_end), 4, 2, d, d, dtype)[:4]
            got = through_op("cuda", subtree_end, *args, scale=d**-0.5)
            over = excess(got, subtree_end, *args, scale=d**-0.5)
            assert max(over.values()) <= 0, (rest, over)

    @pytest.mark.parametrize(("d", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
    def test_the_same_bits_ten_thousand_times(self, d, dtype):
        subtree_end = cases.nested_subtree_end(
            (700, [(190, [(33, []), (250, [])]), (301, [])]), (90, [(20, []), (7, [])])
        )
        args = inputs(len(subtree_end), 8, 2, d, d, dtype)[:4]
        plan = tk.TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
        run = lambda: through_op("cuda", None, *args, plan=plan, scale=d**-0.5)  # noqa: E731
        first = run()
        count = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(10_000):
            for x, y in zip(first, run(), strict=True):
                count += differences(x, y)
        assert int(count) == 0

    def test_only_dq_depends_on_the_order(self):
        subtree_end = cases.nested_subtree_end((1500, [(500, []), (700, [])]))
        args = inputs(len(subtree_end), 8, 2, 128, 128, torch.bfloat16)[:4]
        want, got = (through_op("cuda", subtree_end, *args, deterministic=flag) for flag in (True, False))
        for name, x, y in zip(NAMES, want, got, strict=True):
            assert name == "dq" or differences(x, y) == 0, name

    def test_says_which_kernels_it_takes(self, caplog):
        caplog.set_level("INFO", logger="treegrpo_kernels")
        tk.api._announced.clear()
        args = inputs(40, 4, 2, 64, 64, torch.bfloat16)[:4]
        through_op("cuda", cases.nested_subtree_end((40, [])), *args)
        through_op("cuda", cases.nested_subtree_end((40, [])), *args, window=3)
        assert hopper_cuda.NOTE in caplog.text and "plain kernels: window" in caplog.text
