"""Shared measuring: options, the gate (no speed without a passed check), interleaved ratios, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench import workloads

MIN_ROUNDS, MAX_ROUNDS = 3, 9
SECONDS_PER_BENCH = 1.0
SLOW_SECONDS, SLOW_ROUNDS = 2.0, 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small workloads, one round: checks that every bench works")


def is_quick(config: pytest.Config) -> bool:
    return config.getoption("--quick") or config.getoption("benchmark_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    if is_quick(config):
        # nothing is timed, and small tensors lose more to threads waiting for each other than they gain
        torch.set_num_threads(1)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What a reader needs to place the numbers; the commit stands beside it in pytest-benchmark's JSON."""
    installed = {}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    machine_info.clear()
    machine_info.update(
        cpu=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        python=platform.python_version(),
        system=platform.platform(),
        **installed,
    )


class Meter:
    """Measures one callable, after its check has passed; knows the device and whether this is a smoke run."""

    def __init__(self, benchmark, device: torch.device, quick: bool) -> None:
        self.benchmark, self.device, self.quick = benchmark, device, quick

    def measure(
        self,
        run: Callable[[], object],
        *,
        check: Callable[[], float],
        flops: int | None = None,
        baseline: Callable[[], object] | None = None,
        baseline_flops: int | None = None,
        rounds: int | None = None,
        **info: object,
    ) -> None:
        """Record `run`'s time, if `check` does not raise; it returns the largest error against the oracle.

        A baseline is timed between the rounds, one call each, so that both meet the same machine: its median and the
        ratio (baseline / run) are stored with the row. `flops` gives GFLOP/s on visible pairs. Rounds fill
        SECONDS_PER_BENCH, unless given; `check` is taken to have warmed `run` up.
        """
        error = check()
        self.benchmark.extra_info.update(info, device=str(self.device), oracle_error=error, oracle="passed")
        if baseline is not None:
            self._timed(baseline)
        if self.quick:
            rounds = 1
        elif rounds is None:
            once = self._timed(run)
            fewest = MIN_ROUNDS if once < SLOW_SECONDS else SLOW_ROUNDS
            rounds = int(min(max(SECONDS_PER_BENCH / once, fewest), MAX_ROUNDS))
        baseline_times: list[float] = []
        setup = None if baseline is None else lambda: baseline_times.append(self._timed(baseline))
        self.benchmark.pedantic(self._synchronised, args=(run,), setup=setup, rounds=rounds, iterations=1)
        if self.benchmark.disabled:
            return
        median = self.benchmark.stats.stats.median
        if flops is not None:
            self.benchmark.extra_info.update(flops=flops, gflops_per_s=flops / median / 1e9)
        if baseline_times:
            base = statistics.median(baseline_times)
            self.benchmark.extra_info.update(baseline_s=base, time_ratio=base / median)
            if baseline_flops is not None and flops is not None:
                rate = baseline_flops / base / 1e9
                ratio = flops / median / 1e9 / rate
                self.benchmark.extra_info.update(baseline_gflops_per_s=rate, gflops_ratio=ratio)

    def _synchronised(self, run: Callable[[], object]) -> None:
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _timed(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        self._synchronised(run)
        return time.perf_counter() - start


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return is_quick(request.config)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def meter(benchmark, device: torch.device, quick: bool) -> Meter:
    return Meter(benchmark, device, quick)


@pytest.fixture(autouse=True)
def missing_data_skips(request: pytest.FixtureRequest, quick: bool) -> None:
    """A workload whose recorded data is not here is skipped with the reason."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("workload")
    if name in workloads.FULL:
        try:
            workloads.trajectories(name, quick)
        except workloads.Unavailable as reason:
            pytest.skip(str(reason))
