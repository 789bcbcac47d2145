"""The clocks: medians and spreads, replayed rounds, and the Meter's GPU path with the wall as its clock."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import conftest, test_pack, test_plan, test_rollout
from bench.timing import REPLAY, Stopwatch, host_seconds, rounds_for, spread


def test_spread_of_rounds():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median_s": 3.0, "iqr_s": 2.0, "rounds_s": [3.0, 1.0, 2.0, 5.0, 4.0]}
    assert spread([2.0]) == {"median_s": 2.0, "iqr_s": 0.0, "rounds_s": [2.0]}


def test_rounds_fill_the_time_within_bounds():
    assert [rounds_for(once, 0.4, 3, 9) for once in (0.08, 1.0, 1e-6)] == [5, 3, 9]


def test_parts_are_called_once_in_order():
    called = []
    times = Stopwatch(torch.device("cpu")).once(lambda: called.append("forward"), lambda: called.append("backward"))
    assert called == ["forward", "backward"] and len(times) == 2 and min(times) >= 0
    assert host_seconds(lambda: called.append("host"), torch.device("cpu"), calls=3) >= 0
    assert called.count("host") == 4


def test_events_enclose_each_part_after_a_flush_and_a_lead(monkeypatch):
    """The order of what a stream is given, with a stream that writes down."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream.append("event")

        def elapsed_time(self, stop):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append("lead"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: stream.append("synchronise"))
    watch = Stopwatch(torch.device("cuda"))
    watch._flush = torch.ones(1)
    times = watch.once(lambda: stream.append("forward"), lambda: stream.append("backward"))
    assert times == [0.002, 0.002] and float(watch._flush) == 0
    expected = ["lead", "event", "forward", "event", "lead", "event", "backward", "event", "synchronise"]
    assert stream == expected


@pytest.mark.benchmark(timer=REPLAY)
def test_recorded_rounds_become_the_rounds_of_the_bench(benchmark):
    REPLAY.into(benchmark, [0.5, 0.25, 0.75])
    if not benchmark.disabled:
        assert benchmark.stats.stats.data == [0.5, 0.25, 0.75]


@pytest.mark.benchmark(timer=REPLAY)
def test_rounds_on_a_device_take_turns_with_the_baseline(benchmark, monkeypatch):
    meter = conftest.Meter(benchmark, torch.device("cpu"), quick=False)
    monkeypatch.setattr(meter, "_on_host", meter._on_device)
    called = []
    runs = [lambda: called.append("a"), lambda: called.append("b")]
    meter.measure(runs, check=lambda: 0.0, baseline=lambda: called.append("base"), rounds=2, flops=10, suite="timing")
    # warm-up of all, one call to choose the rounds, then two rounds over the two inputs
    assert called == ["a", "b", "base", "a", "base", "a", "base", "b"]
    if not benchmark.disabled:
        info = benchmark.extra_info
        assert info["rounds_s"] == benchmark.stats.stats.data and len(info["baseline_rounds_s"]) == 2
        assert {"median_s", "iqr_s", "time_ratio", "gflops_per_s"} <= set(info)
    # a bench of the clock itself is no row of a report
    benchmark.extra_info["oracle"] = "none"


def test_what_the_host_does_or_waits_for_is_timed_by_the_wall():
    """CUDA events would miss the millisecond in which the stream waits for the host: all of a small pack."""
    asked, device = [], torch.device("cpu")
    meter = SimpleNamespace(benchmark=SimpleNamespace(), measure=lambda run, clock, **_: asked.append(clock))
    test_pack.test_pack("chain", "pack", meter, True)
    test_plan.test_build("chain", meter, device, True)
    test_rollout.test_rollout(64, "engine", meter, device, True)
    assert asked == ["wall"] * 3


def test_what_was_compiled_is_said_where_all_goes_well(request, capfd):
    conftest.say(request.config, ["flex-128: compiled (3 s), in a test of how that is said"])
    assert capfd.readouterr().out == ""


HANGS = """
import time

def test_quick(benchmark):
    benchmark.pedantic(lambda: None, rounds=2)

def test_never_ends(benchmark):
    # a round that never ends leaves a bench that cannot be written
    benchmark.pedantic(time.sleep, (600,))
"""


def test_what_never_ends_is_cut_off_and_loses_nothing_else(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "impatient.py").write_text("from bench import conftest\n\nconftest.GRACE_SECONDS = 0\n")
    root = Path(conftest.__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", tmp_path)))}
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "impatient", "test_hangs.py"]
    command += ["--bench-seconds=4", "--benchmark-json=found.json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == conftest.CUT_OFF and "test_never_ends" in done.stderr, done.stdout + done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "found.json").read_text())["benchmarks"]] == ["test_quick"]
