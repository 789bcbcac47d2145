"""Shared measuring: options, the gate (no speed without a passed check), interleaved ratios, the machine."""

from __future__ import annotations

import faulthandler
import importlib.metadata
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench import workloads
from bench.timing import REPLAY, Stopwatch, rounds_for, spread

MIN_ROUNDS, MAX_ROUNDS = 3, 9
SECONDS_PER_BENCH = 1.0
SLOW_SECONDS, SLOW_ROUNDS = 2.0, 2
DEVICE_SECONDS_PER_BENCH, QUICK_DEVICE_ROUNDS = 0.4, 3

# what a bench may take beyond --bench-seconds, less than bench/device.sh gives the process
GRACE_SECONDS = 6
CUT_OFF = 9

_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="checks that every bench works: small workloads and one round; on a GPU fewer workloads and three rounds",
    )
    parser.addoption(
        "--bench-seconds",
        type=float,
        default=None,
        help="start no further bench after this many seconds; one that goes on is soon cut off, with a traceback,"
        " and the results so far are written",
    )


def is_quick(config: pytest.Config) -> bool:
    return config.getoption("--quick") or config.getoption("benchmark_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    if is_quick(config) and not torch.cuda.is_available():
        # nothing is timed, and small tensors lose more to threads waiting for each other than they gain
        torch.set_num_threads(1)
    seconds = config.getoption("--bench-seconds")
    if seconds is not None:
        # a kernel that never ends hears no signal; nothing is captured yet, and this descriptor stays so
        watchdog = threading.Timer(seconds + GRACE_SECONDS, _give_up, (config, os.dup(2)))
        watchdog.daemon = True
        watchdog.start()
        config.add_cleanup(watchdog.cancel)


def _give_up(config: pytest.Config, stderr: int) -> None:
    try:
        os.write(stderr, b"\n--bench-seconds are over: what runs is cut off here\n")
        faulthandler.dump_traceback(stderr)
        session = config._benchmarksession
        # what is being timed is no result, and without a round could not be written
        running = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        session.benchmarks = [bench for bench in session.benchmarks if bench.fullname != running]
        session.handle_saving()
    finally:
        os._exit(CUT_OFF)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # rounds on a GPU are measured by Meter and replayed
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """COMMIT names the commit on a machine that has a copy of the tree and no git."""
    if os.environ.get("COMMIT"):
        commit_info.pop("error", None)
        # a copy cannot tell whether it was changed; bench/device.sh records a hash of the sources
        commit_info.update(id=os.environ["COMMIT"], dirty=os.environ["COMMIT"].endswith("-dirty"))


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
        system=f"{platform.system()} {platform.machine()}",
        **installed,
    )


class Meter:
    """Measures one callable, after its check has passed; knows the device and whether this is a smoke run.

    On a CPU pytest-benchmark's rounds are the wall's. On a GPU they are CUDA events, or the wall's for
    ``clock="wall"``, measured here and replayed into pytest-benchmark; `extra_info` has them raw.
    """

    def __init__(self, benchmark, device: torch.device, quick: bool) -> None:
        self.benchmark, self.device, self.quick = benchmark, device, quick

    def measure(
        self,
        run: Callable[[], object] | Sequence[Callable[[], object]],
        *,
        check: Callable[[], float],
        flops: int | None = None,
        baseline: Callable[[], object] | Sequence[Callable[[], object]] | None = None,
        baseline_flops: int | None = None,
        rounds: int | None = None,
        clock: str = "device",
        **info: object,
    ) -> None:
        """Record `run`'s time, if `check` does not raise; it returns the largest error against the oracle.

        A baseline is timed between the rounds, one call each, so that both meet the same machine: its median and the
        ratio (baseline / run) are stored with the row. `flops` gives GFLOP/s on visible pairs. Rounds fill
        SECONDS_PER_BENCH (on a GPU DEVICE_SECONDS_PER_BENCH), unless given; `check` is taken to have warmed `run` up.
        Several `run`s, or baselines, are one computation on several inputs, taken in turn. ``clock="wall"`` measures
        host and device together, for what synchronises anyway.
        """
        runs, baselines = _several(run), _several(baseline) if baseline is not None else []
        error = check()
        self.benchmark.extra_info.update(info, device=str(self.device), oracle_error=error, oracle="passed")
        measured = self._on_device if self.device.type == "cuda" else self._on_host
        times, baseline_times = measured(runs, baselines, rounds, clock)
        if self.benchmark.disabled:
            return
        median = self.benchmark.stats.stats.median
        self.benchmark.extra_info.update(spread(times))
        if flops is not None:
            self.benchmark.extra_info.update(flops=flops, gflops_per_s=flops / median / 1e9)
        if baseline_times:
            base = statistics.median(baseline_times)
            found = {f"baseline_{name}": value for name, value in spread(baseline_times).items()}
            self.benchmark.extra_info.update(found, baseline_s=base, time_ratio=base / median)
            if baseline_flops is not None and flops is not None:
                rate = baseline_flops / base / 1e9
                ratio = flops / median / 1e9 / rate
                self.benchmark.extra_info.update(baseline_gflops_per_s=rate, gflops_ratio=ratio)

    def replay(self, times: Sequence[float]) -> None:
        """Rounds measured elsewhere become this bench's; on a CPU a clock that is not pytest-benchmark's is lost."""
        REPLAY.into(self.benchmark, times)

    def _on_host(self, runs, baselines, rounds, clock) -> tuple[list[float], list[float]]:
        watch = Stopwatch(self.device, wall=True)
        turn = {"run": 0, "baseline": 0}
        baseline_times: list[float] = []

        def next_of(name, several):
            turn[name] += 1
            return several[turn[name] % len(several)]

        def time_baseline() -> None:
            baseline_times.extend(watch.once(next_of("baseline", baselines)))

        if baselines:
            watch.once(baselines[0])
        if self.quick:
            rounds = 1
        elif rounds is None:
            (once,) = watch.once(runs[0])
            fewest = MIN_ROUNDS if once < SLOW_SECONDS else SLOW_ROUNDS
            rounds = rounds_for(once, SECONDS_PER_BENCH, fewest, MAX_ROUNDS)
        setup = time_baseline if baselines else None
        self.benchmark.pedantic(lambda: next_of("run", runs)(), setup=setup, rounds=rounds, iterations=1)
        return [] if self.benchmark.disabled else list(self.benchmark.stats.stats.data), baseline_times

    def _on_device(self, runs, baselines, rounds, clock) -> tuple[list[float], list[float]]:
        watch = Stopwatch(self.device, wall=clock == "wall")
        for one in (*runs, *baselines):
            (once,) = watch.once(one)
        (once,) = watch.once(runs[0])
        if self.quick:
            rounds = min(rounds or QUICK_DEVICE_ROUNDS, QUICK_DEVICE_ROUNDS)
        rounds = rounds or rounds_for(once, DEVICE_SECONDS_PER_BENCH, MIN_ROUNDS, MAX_ROUNDS)
        times: list[float] = []
        baseline_times: list[float] = []
        for i in range(rounds):
            if baselines:
                baseline_times += watch.once(baselines[i % len(baselines)])
            times += watch.once(runs[i % len(runs)])
        self.replay(times)
        return times, baseline_times


def _several(run: Callable[[], object] | Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    return [run] if callable(run) else list(run)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return is_quick(request.config)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiled_ahead(request: pytest.FixtureRequest, device: torch.device) -> None:
    """On a GPU: the race's kernels are compiled in parallel before the first of them is timed."""
    _compile_ahead("attention", request.config, device, 0.6)


@pytest.fixture(scope="session")
def steps_compiled_ahead(request: pytest.FixtureRequest, device: torch.device) -> None:
    """The same for the attention of whole steps."""
    _compile_ahead("step", request.config, device, 0.4)


def _compile_ahead(suite: str, config: pytest.Config, device: torch.device, share: float) -> None:
    """In at most ``share`` of --bench-seconds."""
    if device.type == "cuda":
        from bench.compile_ahead import LIMIT_SECONDS, run_all

        limit = config.getoption("--bench-seconds")
        say(config, run_all(suite, LIMIT_SECONDS if limit is None else min(LIMIT_SECONDS, share * limit)))


def say(config: pytest.Config, lines: Sequence[str]) -> None:
    """To the terminal at once: pytest shows what is printed only where a test fails."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n", flush=True)


@pytest.fixture
def meter(benchmark, device: torch.device, quick: bool) -> Meter:
    return Meter(benchmark, device, quick)


def skip_after(config: pytest.Config, part: float) -> None:
    limit, spent = config.getoption("--bench-seconds"), time.monotonic() - _started
    if limit is not None and spent > part * limit:
        pytest.skip(f"out of time: {spent:.0f} of --bench-seconds {limit:.0f} are spent")


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    """After --bench-seconds no bench starts."""
    skip_after(request.config, 1)


@pytest.fixture
def in_time_for_more(request: pytest.FixtureRequest) -> None:
    """Like in_time, for what may be left out so that the rest of the file is measured."""
    skip_after(request.config, 0.85)


@pytest.fixture(autouse=True)
def missing_data_skips(request: pytest.FixtureRequest, quick: bool) -> None:
    """A workload whose recorded data is not here is skipped with the reason."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("workload")
    if name in workloads.FULL:
        try:
            workloads.trajectories(name, quick)
        except workloads.Unavailable as reason:
            pytest.skip(str(reason))
