"""The Hopper kernels' source on the CPU, through gluon_emulator.py, against the float64 oracle.

Finds what a GPU would need luck for: a buffer refilled while it is read, a barrier waited for in the wrong phase,
partitions that wait for each other; and a tile in the wrong class.
"""

from dataclasses import replace

import cases
import gluon_emulator
import pytest
import torch
from attention_checks import excess, inputs, through_op

pytest.importorskip("triton")

from treegrpo_kernels import reference, work
from treegrpo_kernels.plan import TreePlan
from treegrpo_kernels.triton import (
    common,
    hopper,
    hopper_backward_dkv,
    hopper_backward_dq,
    hopper_common,
    hopper_dkv_walk,
    hopper_dkv_wide,
    hopper_forward,
)
from treegrpo_kernels.triton.hopper_common import HopperTile

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernels themselves are tested"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

MODULES = [hopper_common, hopper_forward, hopper_backward_dq, hopper_backward_dkv, hopper_dkv_walk, hopper_dkv_wide]


@pytest.fixture
def emulated(monkeypatch, poisoned_empty):
    gluon_emulator.patch(monkeypatch, MODULES)
    # few, so that a persistent program has many items and long key tiles are parted
    for module in (hopper_common, work):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)


def results(subtree_end, q, k, v, dout, scale, config, seed, window=0, sinks=None):
    gluon_emulator.scheduler.draw.seed(seed)
    plan = TreePlan.build(torch.as_tensor(subtree_end))
    tiles = hopper.tile_tensors(plan, config, k.shape[1], window)
    out, lse = hopper.attn_fwd(q, k, v, sinks, tiles, scale)
    return [out, lse, *hopper.attn_bwd(dout, q, k, v, out, lse, tiles, scale)], tiles


FORESTS = {
    "forks": cases.random_subtree_end(430, 3, branch=0.02, root=0.004),
    "root_of_all": cases.random_subtree_end(517, 5, branch=0.01, root=0.0),
    "chain": cases.random_subtree_end(385, 0, branch=0.0, root=0.0),
    "many_trees": cases.random_subtree_end(300, 7, branch=0.1, root=0.1),
    "one_token": cases.random_subtree_end(1, 0),
}


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("name", FORESTS)
def test_as_launched(name, parted, emulated):
    subtree_end = FORESTS[name]
    config = replace(hopper.config(64), split=parted)
    args = inputs(len(subtree_end), hq=2, hkv=1, d=64, dv=64, dtype=torch.bfloat16)[:4]
    found, tiles = results(subtree_end, *args, 0.125, config, seed=len(subtree_end))
    assert (len(tiles[-1]) > 0) == (parted and name in ("root_of_all", "chain"))
    over = excess(found, subtree_end, *args, scale=0.125)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("residue", range(0, 128, 13))
def test_a_branch_may_start_anywhere_in_a_tile(residue, emulated):
    subtree_end = cases.residue_subtree_end(residue, 128)
    args = inputs(len(subtree_end), hq=1, hkv=1, d=64, dv=64, dtype=torch.bfloat16, seed=residue)[:4]
    found, _ = results(subtree_end, *args, 0.125, replace(hopper.config(64), split=residue % 2 == 1), residue)
    over = excess(found, subtree_end, *args, scale=0.125)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize(("d", "dv"), [(256, 256), (192, 128), (160, 256), (96, 96), (80, 64), (33, 40)])
@pytest.mark.parametrize("window", [0, 300])
def test_head_dims(d, dv, window, emulated, monkeypatch):
    """256 has consumers of its own in dK/dV, and others are padded; both parted and not."""
    monkeypatch.setattr(work, "multiprocessors", lambda device: 12)
    subtree_end = FORESTS["root_of_all"]
    args = inputs(len(subtree_end), hq=2, hkv=1, d=d, dv=dv, dtype=torch.bfloat16)[:4]
    config = hopper.config(d, dv)
    for split in (False, True):
        found, tiles = results(subtree_end, *args, 0.1, replace(config, split=split), d, window)
        assert (len(tiles[-1]) > 0) == split
        assert all(x.is_contiguous() for x in found)
        over = excess(found, subtree_end, *args, scale=0.1, window=window)
        assert max(over.values()) <= 0, over


@pytest.mark.parametrize("name", FORESTS)
def test_wide_heads(name, emulated):
    subtree_end = FORESTS[name]
    args = inputs(len(subtree_end), hq=3, hkv=1, d=256, dv=256, dtype=torch.float16)[:4]
    found, _ = results(subtree_end, *args, 0.0625, hopper.config(256), 5)
    over = excess(found, subtree_end, *args, scale=0.0625)
    assert max(over.values()) <= 0, over
    again, _ = results(subtree_end, *args, 0.0625, hopper.config(256), 6)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("residue", range(0, 64, 9))
def test_a_branch_may_start_anywhere_in_a_narrow_tile(residue, emulated):
    subtree_end = cases.residue_subtree_end(residue, 64)
    args = inputs(len(subtree_end), hq=1, hkv=1, d=256, dv=256, dtype=torch.bfloat16, seed=residue)[:4]
    found, _ = results(subtree_end, *args, 0.1, hopper.config(256), residue)
    over = excess(found, subtree_end, *args, scale=0.1)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("window", [1, 2, 63, 128, 129, 300])
@pytest.mark.parametrize("name", [name for name in FORESTS if name != "one_token"])
def test_windows(name, window, emulated):
    subtree_end = FORESTS[name]
    args = inputs(len(subtree_end), hq=2, hkv=1, d=64, dv=64, dtype=torch.bfloat16)[:4]
    config = replace(hopper.config(64), split=window % 2 == 0)
    found, tiles = results(subtree_end, *args, 0.125, config, len(subtree_end), window)
    assert len(tiles[-1]) == 0 or config.split
    assert len(tiles[-1]) > 0 or (name, window) not in (("root_of_all", 300), ("chain", 300), ("root_of_all", 2))
    over = excess(found, subtree_end, *args, scale=0.125, window=window)
    if window == 1:
        # who sees itself alone has scores without a gradient: roundings are all there is
        over = {name: value for name, value in over.items() if name not in ("dq", "dk")}
        assert max(x.abs().max() for x in found[2:4]) < 1e-2
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks(window, dtype, emulated):
    """One that outweighs every score by far, one that weighs nothing, and such as they are."""
    subtree_end = FORESTS["root_of_all"]
    args = inputs(len(subtree_end), hq=4, hkv=2, d=64, dv=64, dtype=torch.bfloat16)[:4]
    sinks = torch.tensor([0.5, 200.0, float("-inf"), -2.0], dtype=dtype)
    found, _ = results(subtree_end, *args, 0.125, hopper.config(64), 3, window, sinks)
    exact = reference.tree_attention(
        *(x.double() for x in args[:3]),
        torch.as_tensor(subtree_end),
        scale=0.125,
        window=window or None,
        sinks=sinks.double(),
        return_lse=True,
    )[1]
    assert (found[1] - exact).abs().max() < 1e-4
    assert found[0][:, 1].abs().max() < 1e-30
    # the chain in bf16 knows no -inf and takes the largest row for its measure: the others apart
    plain = torch.tensor([0.5, 1.5, -1.0, -2.0], dtype=dtype)
    found, _ = results(subtree_end, *args, 0.125, hopper.config(64), 4, window, plain)
    over = excess(found, subtree_end, *args, plain, scale=0.125, window=window)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("sinks", [False, True])
def test_the_op_takes_them(sinks, emulated, monkeypatch):
    """As gpt-oss asks for it: a window in every other layer, sinks everywhere; one plan for all."""
    monkeypatch.setattr(common, "arch_of", lambda device: 90)
    subtree_end = FORESTS["root_of_all"]
    *args, sink = inputs(len(subtree_end), hq=4, hkv=1, d=64, dv=64, dtype=torch.bfloat16)
    args += [sink.bfloat16()] if sinks else []
    plan = TreePlan.build(torch.as_tensor(subtree_end))
    for window in (70, 0, 70, 0):
        found = through_op("triton", None, *args, scale=0.125, window=window, plan=plan)
        over = excess(found, subtree_end, *args, scale=0.125, window=window)
        assert max(over.values()) <= 0, over
    of_hopper = hopper._DKV.stop
    assert [(call.window, len(call.tiles)) for call in plan.calls.values()] == [(70, of_hopper), (0, of_hopper)]


def test_whole_and_parted_key_tiles_are_compared(emulated, monkeypatch):
    """bench.tune_split, a stage of bench/device.sh; here it says how long the emulator takes."""
    from bench import tune_split

    monkeypatch.setattr(tune_split, "forest_of", lambda name: torch.as_tensor(FORESTS[name]))
    row = tune_split.measure("root_of_all", (2, 1, 64), torch.device("cpu"), rounds=1)
    assert row["parted"] > 0 and row["difference"] < 1e-2
    assert "root_of_all" in tune_split.table([row])


@pytest.mark.parametrize("seed", range(3))
def test_other_rings_and_orders(seed, emulated):
    """Shallow rings, small tiles, whoever goes first."""
    config = hopper.HopperConfig(
        fwd=HopperTile(128, 64, 2 + seed % 2, persistent=seed > 0),
        dq=HopperTile(128, 32, 2, persistent=seed > 0),
        dkv=HopperTile(32, 128, 2),
        split=seed == 2,
    )
    subtree_end = FORESTS["forks"]
    args = inputs(len(subtree_end), hq=3, hkv=1, d=64, dv=64, dtype=torch.float16, seed=seed)[:4]
    found, _ = results(subtree_end, *args, 0.2, config, seed)
    over = excess(found, subtree_end, *args, scale=0.2)
    assert max(over.values()) <= 0, over
    again, _ = results(subtree_end, *args, 0.2, config, seed + 100)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


FAULTS = ("the producer waits for nobody", "consumers wait for nothing", "no buffer is released", "nothing is fenced")
# the modules that speak a kernel's protocol, and a head dim that takes them
PROTOCOLS = {
    "fwd": ([hopper_forward], 64),
    "dq": ([hopper_backward_dq], 64),
    "dkv": ([hopper_backward_dkv, hopper_dkv_walk], 64),
    "fwd_wide": ([hopper_forward], 256),
    "dkv_wide": ([hopper_dkv_wide, hopper_dkv_walk], 256),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_faults_are_found(fault, protocol, emulated, monkeypatch):
    """The emulator is worth nothing if it forgives: faults in each kernel's protocol, each found."""
    modules, d = PROTOCOLS[protocol]

    class Faulty(gluon_emulator.mbarrier):
        @staticmethod
        def wait(bar, parity):
            is_producer = gluon_emulator.scheduler.local.number == 2
            if fault in FAULTS[2:] or is_producer != (fault == FAULTS[0]):
                gluon_emulator.mbarrier.wait(bar, parity)

        @staticmethod
        def arrive(bar, count, pred=True):
            if fault != FAULTS[2] or gluon_emulator.scheduler.local.number == 2:
                gluon_emulator.mbarrier.arrive(bar, count, pred)

    for module in modules:
        monkeypatch.setattr(module, "mbarrier", Faulty)
        if fault == FAULTS[3] and hasattr(module, "fence_async_shared"):
            monkeypatch.setattr(module, "fence_async_shared", lambda: None)
    subtree_end = FORESTS["chain"]
    args = inputs(len(subtree_end), hq=2, hkv=1, d=d, dv=d, dtype=torch.bfloat16)[:4]

    def passes():
        found, _ = results(subtree_end, *args, 0.125, hopper.config(d), 1)
        assert max(excess(found, subtree_end, *args, scale=0.125).values()) <= 0

    with pytest.raises((AssertionError, RuntimeError)):
        passes()
