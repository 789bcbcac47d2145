"""backend="triton": forward and every gradient against the float64 oracle; on the CPU through Triton's interpreter.

Here the launchers themselves; the tolerance is that of attention_checks.py. Tiles are pinned small, so that small
forests meet every tile class.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from attention_checks import DEVICE, NAMES, excess, inputs, same_bits

from treegrpo_kernels import reference
from treegrpo_kernels import triton as backend
from treegrpo_kernels.plan import TreePlan

pytest.importorskip("triton")
import triton
import triton.language as tl

from treegrpo_kernels.triton.backward import delta_launch
from treegrpo_kernels.triton.backward_dkv import dkv_bounds, dkv_launch
from treegrpo_kernels.triton.common import Config, TileConfig, arch_of, config, tma_fits
from treegrpo_kernels.work import first_visible, num_slots, query_lists, work_items

pytestmark = [
    pytest.mark.skipif(
        backend.reason(torch.device(DEVICE)) is not None, reason=f"Triton: {backend.reason(torch.device(DEVICE))}"
    ),
    pytest.mark.usefixtures("one_thread"),
    # the interpreter indexes with one-element arrays
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]


def tiles(fwd, dq, dkv):
    return Config(*(TileConfig(m, n, 4, 1) for m, n in (fwd, dq, dkv)))


SQUARE = tiles((16, 16), (16, 16), (16, 16))
TALL = tiles((32, 16), (32, 16), (32, 16))
WIDE = tiles((16, 32), (16, 32), (16, 32))


def kernels(subtree_end, q, k, v, dout, sinks=None, *, scale=0.3, window=0, softcap=0.0, pinned=SQUARE, mutate=None):
    """(out, lse, dq, dk, dv) of the kernels. ``mutate`` may spoil (subtree_end, tile tensors) first."""
    plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    lists, end = backend.tile_tensors(plan, q, v, window, pinned), plan.subtree_end
    if mutate:
        end, lists = mutate(end, lists)
    rest = lists, scale, softcap
    out, lse = backend.attn_fwd(q, k, v, sinks, end, *rest)
    return out, lse, *backend.attn_bwd(dout, q, k, v, out, lse, end, *rest)


def check(subtree_end, *args, pinned=SQUARE, **options):
    found = kernels(subtree_end, *args, pinned=pinned, **options)
    over = excess(found, subtree_end, *args, **options)
    assert max(over.values()) <= 0, over
    return found


@pytest.mark.parametrize("name", cases.NAMED)
def test_named_forests(name, poisoned_empty):
    subtree_end = cases.named_subtree_end(name)
    check(subtree_end, *inputs(len(subtree_end))[:4])


@pytest.mark.parametrize("pinned", [SQUARE, TALL, WIDE], ids=["16x16", "32x16", "16x32"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 47, 81])
def test_random_forests_of_ragged_length(num_tokens, pinned, poisoned_empty):
    subtree_end = cases.random_subtree_end(num_tokens, num_tokens, branch=0.06)
    check(subtree_end, *inputs(num_tokens)[:4], pinned=pinned)


@pytest.mark.parametrize("pinned", [TALL, WIDE], ids=["32x16", "16x32"])
@pytest.mark.parametrize("residue", range(16))
def test_a_branch_may_start_anywhere_in_a_tile(residue, pinned, poisoned_empty):
    subtree_end = cases.residue_subtree_end(residue, 16)
    check(subtree_end, *inputs(len(subtree_end), hq=1)[:4], pinned=pinned)


FEATURES = {
    "sinks": (TALL, {"sinks": True}),
    "softcap": (WIDE, {"softcap": 1.5}),
    "window_1": (TALL, {"window": 1}),
    "window_9_tall": (TALL, {"window": 9}),
    "window_9_wide": (WIDE, {"window": 9}),
    "window_40": (WIDE, {"window": 40}),
    "all_tall": (TALL, {"window": 21, "softcap": 2.0, "sinks": True}),
    "all_wide": (WIDE, {"window": 21, "softcap": 2.0, "sinks": True}),
    "scale_negative": (TALL, {"scale": -0.4}),
    "scale_zero": (WIDE, {"scale": 0.0}),
    "softcap_negative_scale": (TALL, {"scale": -0.4, "softcap": 2.0}),
    "gqa_4_by_2": (TALL, {"hq": 4, "hkv": 2}),
    "mha": (WIDE, {"hq": 2, "hkv": 2}),
    "d_1": (WIDE, {"d": 1, "dv": 1}),
    "d_20_dv_33": (TALL, {"d": 20, "dv": 33}),
    "d_64_dv_16": (WIDE, {"d": 64}),
    "d_16_dv_96": (TALL, {"dv": 96}),
    "d_256": (WIDE, {"d": 256, "dv": 256, "scale": 0.06}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, poisoned_empty):
    pinned, options = FEATURES[name]
    shape = {key: value for key, value in options.items() if key in ("hq", "hkv", "d", "dv")}
    rest = {key: value for key, value in options.items() if key in ("scale", "window", "softcap")}
    subtree_end = cases.random_subtree_end(70, 11, branch=0.05)
    *args, sinks = inputs(70, **shape)
    check(subtree_end, *args, sinks if "sinks" in options else None, pinned=pinned, **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("window", [50, 100])
def test_windows_that_hold_whole_tiles(window, dtype, poisoned_empty):
    """Some query tiles see a key tile in full, others in part; several heads, branches, a ragged last tile."""
    subtree_end = cases.random_subtree_end(150, 3, branch=0.02)
    plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    offsets = query_lists(plan, WIDE.dkv, window)[1]
    sizes = offsets.diff().view(-1, 2)
    assert (sizes > 0).all(1).any() and subtree_end[1:].tolist() != [150] * 149
    d = 16 if dtype == torch.float32 else 64
    args = inputs(150, hq=4, hkv=2, d=d, dv=d, dtype=dtype)[:4]
    check(subtree_end, *args, pinned=WIDE, window=window)


def test_eight_query_heads_share_a_key_head(poisoned_empty):
    subtree_end = cases.random_subtree_end(35, 1, branch=0.1)
    check(subtree_end, *inputs(35, hq=8)[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_low_precision(dtype, name, poisoned_empty):
    subtree_end = cases.random_subtree_end(60, 4, branch=0.05)
    *args, sinks = inputs(60, hq=2, dtype=dtype)
    if name == "all":
        check(subtree_end, *args, sinks, pinned=WIDE, window=30, softcap=4.0)
    else:
        check(subtree_end, *args, pinned=TALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pinned", [SQUARE, TALL, WIDE], ids=["16x16", "32x16", "16x32"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_loads_through_tensor_descriptors(dtype, pinned, name, poisoned_empty):
    """Head dim 64 in low precision, as TMA takes it; several heads of each kind, a ragged last tile."""
    subtree_end = cases.random_subtree_end(70, 11, branch=0.05)
    *args, sinks = inputs(70, hq=4, hkv=2, d=64, dv=64, dtype=dtype)
    assert tma_fits(0, *args)
    if name == "all":
        check(subtree_end, *args, sinks, pinned=pinned, window=21, softcap=2.0)
    else:
        check(subtree_end, *args, pinned=pinned)


def test_what_tensor_descriptors_cannot_take():
    x = torch.zeros(6, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    assert tma_fits(90, x) and tma_fits(100, x, x[1:, 1:3]) and tma_fits(90, x[:1]) and tma_fits(90, x[:, :1])
    assert not tma_fits(80, x) and not tma_fits(89, x) and not tma_fits(120, x)
    wrong = (
        x.float(),
        x[..., :32],
        x[..., 4:],
        x[:1].expand(6, -1, -1),
        x.transpose(0, 1),
        x[:, ::2],
        x.flip(0)[..., 1:],
    )
    for other in wrong:
        assert not tma_fits(90, x, other), other.stride()


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("pinned", [SQUARE, TALL, WIDE], ids=["16x16", "32x16", "16x32"])
@pytest.mark.parametrize("num_tokens", [130, 208])
def test_long_key_tiles_are_parted(num_tokens, pinned, window, poisoned_empty):
    """Work items cover every (key tile, query tile) once, in order; the gradients are right and repeat bit for bit."""
    subtree_end = cases.random_subtree_end(num_tokens, 3, branch=0.02, root=0.01)
    plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    tile = pinned.dkv
    work = work_items(plan, tile, 1, window)
    items, parted = (x.tolist() for x in work)
    assert parted and len(items) > len(parted)
    lists = plan.tile_lists(tile.block_m, tile.block_n)
    offsets = query_lists(plan, tile, window)[1][::2].tolist()
    seen, slots = {}, {}
    for kv, start, stop, slot in items:
        assert start < stop
        seen.setdefault(kv, []).append((start, stop))
        if slot >= 0:
            slots.setdefault(kv, []).append((start, slot))
    for kv, kv_max in enumerate(lists.kv_max.tolist()):
        ranges = sorted(seen[kv])
        whole = kv * tile.block_n // tile.block_m, -(-kv_max // tile.block_m)
        assert (ranges[0][0], ranges[-1][1]) == (tuple(offsets[kv : kv + 2]) if window else whole)
        assert all(one[1] == two[0] for one, two in zip(ranges, ranges[1:], strict=False))
    taken = [slot for kv, first, count in parted for slot in range(first, first + count)]
    assert taken == list(range(num_slots(num_tokens, tile.block_n, *work)))
    for kv, first, count in parted:
        assert [slot for _, slot in sorted(slots.pop(kv))] == list(range(first, first + count))
    assert not slots
    args = inputs(num_tokens, hq=2, hkv=1)[:4]
    found = check(subtree_end, *args, pinned=pinned, window=window)
    assert all(map(torch.equal, found, kernels(subtree_end, *args, pinned=pinned, window=window)))


@pytest.mark.parametrize("num_tokens", [150, 160])
@pytest.mark.parametrize("window", [1, 9, 40])
def test_query_lists_against_brute_force(window, num_tokens):
    """Under a window every visible (query tile, key tile) is listed once, those seen in full apart."""
    subtree_end = cases.random_subtree_end(num_tokens, 5, branch=0.05)
    plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    tile = TileConfig(8, 8, 4, 1)
    order, offsets, indices = (x.tolist() for x in query_lists(plan, tile, window))
    mask = reference.dense_mask(plan.subtree_end, window).cpu()
    assert len(offsets) == 2 * -(-num_tokens // tile.block_n) + 1
    lengths = [offsets[2 * i_n + 2] - offsets[2 * i_n] for i_n in order]
    assert lengths == sorted(lengths, reverse=True) and sorted(order) == list(range(len(offsets) // 2))
    num_full = 0
    for i_n in range(len(offsets) // 2):
        full, partial = (indices[offsets[i] : offsets[i + 1]] for i in (2 * i_n, 2 * i_n + 1))
        assert full == sorted(set(full)) and partial == sorted(set(partial)) and not set(full) & set(partial)
        columns = mask[:, i_n * tile.block_n : (i_n + 1) * tile.block_n]
        tiles = [columns[m : m + tile.block_m] for m in range(0, num_tokens, tile.block_m)]
        seen = {i_m for i_m, part in enumerate(tiles) if part.any()}
        whole = {i_m for i_m, part in enumerate(tiles) if part.all() and part.numel() == tile.block_m * tile.block_n}
        assert set(full) <= whole and seen <= {*full, *partial}
        num_full += len(full)
    # a window of 40 holds whole tiles of 8
    assert (num_full > 0) == (window == 40)


@pytest.mark.parametrize("d", [16, 20, 64])
def test_query_gradients_by_atomics(d, poisoned_empty):
    """The one pass that adds dQ in float32 in no fixed order; head dim 64 in bf16 through descriptors."""
    dtype = torch.bfloat16 if d == 64 else torch.float32
    subtree_end = cases.random_subtree_end(70, 11, branch=0.05)
    q, k, v, dout, _ = args = inputs(70, hq=4, hkv=2, d=d, dv=d, dtype=dtype)
    args = args[:4]
    out, lse, _, dk, dv = kernels(subtree_end, *args, pinned=WIDE)
    plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    delta, lse2 = torch.empty(2, 4, 80, device=DEVICE).unbind()
    delta_launch(dout, out, lse, delta, lse2).run()
    at = plan.tile_lists(WIDE.dkv.block_m, WIDE.dkv.block_n)
    lists = [
        at.kv_max,
        at.kv_min,
        *query_lists(plan, WIDE.dkv, 0),
        first_visible(plan, 0, 1),
        at.kv_max.new_empty((0, 4)),
    ]
    shared = dict(dout=dout, q=q, k=k, v=v, delta=delta, lse2=lse2, subtree_end=plan.subtree_end)
    shared |= dict(scale=0.3, softcap=0.0, tma=tma_fits(arch_of(q.device), q, k, v, dout))
    dq = torch.zeros(q.shape, device=DEVICE)
    got = torch.empty_like(dk), torch.empty_like(dv)
    dkv_launch(*got, WIDE.dkv, lists, dq=dq, **shared).run()
    results = out, lse, (dq * 0.3).to(dtype), *got
    over = excess(results, subtree_end, *args)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("layout", ["fused_qkv", "heads_first", "last_dim_strided", "expanded_dout"])
def test_strided_inputs(layout):
    subtree_end = cases.random_subtree_end(24, 2, branch=0.1)
    q, k, v, dout, _ = inputs(24, hq=2, hkv=2)
    want = kernels(subtree_end, q, k, v, dout)
    if layout == "fused_qkv":
        q, k, v = torch.cat([q, k, v], 1).split([2, 2, 2], 1)
    elif layout == "heads_first":
        q, k, v, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout))
    elif layout == "last_dim_strided":
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    else:
        dout = dout[:1].expand(24, -1, -1)
        want = kernels(subtree_end, q, k, v, dout.contiguous())
    for name, mine, theirs in zip(NAMES, kernels(subtree_end, q, k, v, dout), want, strict=True):
        assert torch.equal(mine, theirs), name


def test_no_tokens():
    q, k, v, dout, _ = inputs(0)
    out, lse, *grads = kernels(torch.empty(0, dtype=torch.int32), q, k, v, dout)
    assert out.shape == dout.shape and lse.shape == q.shape[:2]
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_the_same_bits_twice_and_whatever_the_neighbours():
    """A tree's results do not depend on what else is in the row, when its tiles fall alike."""
    subtree_end = cases.random_subtree_end(32, 7, branch=0.08)
    q, k, v, dout, _ = inputs(64, hq=1)
    alone = kernels(subtree_end, q[:32], k[:32], v[:32], dout[:32])
    pair = torch.cat([torch.from_numpy(subtree_end), torch.from_numpy(subtree_end) + 32])
    for name, one, two, again in zip(
        NAMES, alone, kernels(pair, q, k, v, dout), kernels(pair, q, k, v, dout), strict=True
    ):
        assert torch.equal(two, again) and torch.equal(one, two[:32]), name


def _plain_causal(end, lists):
    plan = TreePlan.build(torch.full_like(end, len(end)))
    q = torch.empty(len(end), 2, 16, device=DEVICE)
    return plan.subtree_end, backend.tile_tensors(plan, q, q, 0, SQUARE)


def _partial_as_full(end, lists):
    lists = list(lists)
    for part in (backend._FWD, backend._DQ):
        lists[part.start + 3] = lists[part.start + 1].diff()
    kv_max = backend._DKV.start + 1
    lists[kv_max + 1] = lists[kv_max]
    return end, lists


def _last_tile_dropped(end, lists):
    lists = list(lists)
    for part in (backend._FWD, backend._DQ):
        # keep the first tile of every list alone
        lists[part.start + 3] = lists[part.start + 3].clamp(max=1)
        lists[part.start + 1] = lists[part.start + 1].clone()
        lists[part.start + 1][-1] -= 1
    kv_max = backend._DKV.start + 1
    lists[kv_max] = (lists[kv_max] - 16).clamp(min=1)
    return end, lists


@pytest.mark.parametrize("mutate", [_plain_causal, _partial_as_full, _last_tile_dropped])
def test_a_wrong_mask_is_noticed(mutate):
    subtree_end = cases.residue_subtree_end(5, 16)
    args = inputs(len(subtree_end))[:4]
    over = excess(kernels(subtree_end, *args, mutate=mutate), subtree_end, *args)
    assert min(over[name] for name in ("out", "dq", "dk", "dv")) > 1e-3, over


@triton.jit
def _bounds_kernel(kv_max, kv_min, out, num_tokens, BM: tl.constexpr, BN: tl.constexpr):
    i_n = tl.program_id(0)
    lo, a, b, hi = dkv_bounds(i_n * BN, tl.load(kv_max + i_n), tl.load(kv_min + i_n), num_tokens, BM, BN)
    tl.store(out + i_n * 4, lo)
    tl.store(out + i_n * 4 + 1, a)
    tl.store(out + i_n * 4 + 2, b)
    tl.store(out + i_n * 4 + 3, hi)


@pytest.mark.parametrize(("block_m", "block_n"), [(4, 4), (8, 4), (4, 8), (16, 2), (2, 16)])
@pytest.mark.parametrize("num_tokens", [1, 37, 64])
def test_counted_ranges_against_brute_force(block_m, block_n, num_tokens):
    """[lo, hi) is exactly the visible query tiles; [a, b) exactly those wholly visible and not ragged."""
    for seed in range(6):
        subtree_end = cases.random_subtree_end(num_tokens, seed, branch=[0.02, 0.1, 0.5][seed % 3])
        lists = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE)).tile_lists(block_m, block_n)
        num_kv = len(lists.kv_max)
        out = torch.empty(num_kv, 4, dtype=torch.int32, device=DEVICE)
        _bounds_kernel[(num_kv,)](lists.kv_max, lists.kv_min, out, num_tokens, BM=block_m, BN=block_n)
        mask = cases.ancestor_mask(subtree_end)
        for i_n, (lo, a, b, hi) in enumerate(out.tolist()):
            columns = mask[:, i_n * block_n : (i_n + 1) * block_n]
            assert lo <= a <= b <= hi
            for i_m in range(-(-num_tokens // block_m)):
                tile = columns[i_m * block_m : (i_m + 1) * block_m]
                assert tile.any() == (lo <= i_m < hi)
                assert (tile.all() and tile.size == block_m * block_n) == (a <= i_m < b)


def test_config_is_a_pure_function_within_limits():
    for arch in (0, 80, 86, 89, 90, 100, 120):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for d in (1, 16, 64, 80, 128, 192, 256):
                chosen = config(d, d, dtype, arch)
                assert chosen == config(d, d, dtype, arch)
                for tile in (chosen.fwd, chosen.dq, chosen.dkv):
                    assert min(tile.block_m, tile.block_n) >= 16 and tile.num_warps in (4, 8)


def test_says_what_it_cannot_do():
    assert backend.refusal(torch.float32) is None
    assert "float64" in backend.refusal(torch.float64)


COMPILED = """
import torch
from treegrpo_kernels.triton import aot, common, reason
assert "GPU" in reason(torch.device("cpu"))
tiles = common.config(64, 64, torch.bfloat16, 90)
keys = set()
for n, w in ((1, 16), (2, 1), (16, 16), (17, 7), (250, 100), (4096, 4096)):
    launches = aot.launches(64, 64, torch.bfloat16, tiles, num_tokens=n, window=w)
    keys.add(tuple(aot.specialization_key(x, 90) for x in launches.values()))
assert len(keys) == 1, f"{len(keys)} compilations for six lengths"
ok = aot.compile_case(aot.Case("fwd", 90, 64, "bf16", "plain"))
assert ok.error is None and ok.wgmma, ok
aot.SHARED_LIMIT[90] = 1024
wide = common.TileConfig(128, 128, 4, 3)
bad = aot.compile_case(aot.Case("fwd", 90, 128, "bf16", "plain"), common.Config(wide, wide, wide))
assert "spills" in bad.error and "shared" in bad.error, bad
"""


def test_compiles_without_a_gpu_once_for_all_lengths(tmp_path):
    root = Path(__file__).resolve().parent.parent
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(root / "kernels"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are not interpreted here")
def test_ahead_of_time_compilation_refuses_the_interpreter(capsys):
    from treegrpo_kernels.triton import aot

    assert aot.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


class TestOnGpu:
    """Tiles of real sizes. The plain kernels, in bf16 and without options too, where the op would take others."""

    pytestmark = gpu

    @pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.float16)])
    @pytest.mark.parametrize("arch", [80, 90])
    def test_every_tile(self, d, dtype, arch, poisoned_empty):
        """A branch at every residue of a tile, and trees long enough that their key tiles are parted."""
        pinned = config(d, d, dtype, arch)
        forests = cases.residues_subtree_end(128), cases.random_subtree_end(2777, 3, branch=0.004, root=0)
        for subtree_end in forests:
            args = inputs(len(subtree_end), hq=4, hkv=2, d=d, dv=d, dtype=dtype)[:4]
            check(subtree_end, *args, pinned=pinned, scale=d**-0.5)
        got, again = (kernels(subtree_end, *args, pinned=pinned) for _ in range(2))
        assert all(map(same_bits, got, again))

    @pytest.mark.parametrize("persistent", [True, False])
    @pytest.mark.parametrize("d", [64, 128])
    def test_other_tiles_of_the_hopper_kernels(self, d, persistent, poisoned_empty):
        """What the tuner may find the faster."""
        if not 90 <= arch_of(torch.device(DEVICE)) < 100:
            pytest.skip("needs compute capability 9.0")
        from treegrpo_kernels.triton import hopper
        from treegrpo_kernels.triton.hopper_common import HopperTile

        pinned = hopper.HopperConfig(
            fwd=HopperTile(128, 64, 3, persistent=persistent),
            dq=HopperTile(128, 32 if persistent else 64, 2, persistent=persistent),
            dkv=HopperTile(32, 128, 3) if persistent else HopperTile(64, 128, 2),
        )
        subtree_end = cases.random_subtree_end(2777, 3, branch=0.004)
        args = inputs(2777, hq=4, hkv=1, d=d, dv=d, dtype=torch.bfloat16)[:4]
        check(subtree_end, *args, pinned=pinned, scale=d**-0.5)

    @pytest.mark.parametrize(("hkv", "window"), [(1, 0), (2, 0), (1, 1500)])
    @pytest.mark.parametrize("d", [64, 128, 256])
    def test_parted_key_tiles_of_the_hopper_kernels(self, d, hkv, window, poisoned_empty):
        """Roots seen by thousands of queries, few heads: pieces, their partials, whole tiles beside them."""
        if not 90 <= arch_of(torch.device(DEVICE)) < 100:
            pytest.skip("needs compute capability 9.0")
        from treegrpo_kernels.triton import hopper

        pinned = replace(hopper.config(d), split=True)
        for num_tokens, branch in ((6007, 0.002), (4096, 0.0)):
            subtree_end = cases.random_subtree_end(num_tokens, 3, branch=branch, root=0.0)
            args = inputs(num_tokens, hq=4, hkv=hkv, d=d, dv=d, dtype=torch.bfloat16)[:4]
            plan = TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
            *_, items, parted = backend.tile_tensors(plan, args[0], args[2], window, pinned)
            assert 0 < len(parted) < len(items)
            check(subtree_end, *args, pinned=pinned, scale=d**-0.5, window=window)
            runs = [kernels(subtree_end, *args, pinned=pinned, window=window) for _ in range(3)]
            assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))

    def test_offsets_beyond_32_bits(self):
        """q of more than 2^31 elements: a row of many small trees, the last of which must be right."""
        num_tokens, tree, hq, d = 2**17 + 64, 96, 136, 128
        last = (num_tokens - 1) // tree * tree
        end = ((torch.arange(num_tokens) // tree + 1) * tree).clamp(max=num_tokens)
        args = inputs(num_tokens, hq=hq, hkv=1, d=d, dv=d, dtype=torch.bfloat16)[:4]
        assert args[0].numel() > 2**31
        pins = [config(d, d, torch.bfloat16, 90)]
        if 90 <= arch_of(torch.device(DEVICE)) < 100:
            from treegrpo_kernels.triton import hopper

            pins.append(hopper.config(d))
        rest = [x[last:] for x in args]
        for pinned in pins:
            got = [x[last:].clone() for x in kernels(end, *args, pinned=pinned, scale=d**-0.5)]
            over = excess(got, end[last:] - last, *rest, scale=d**-0.5)
            assert max(over.values()) <= 0, over
