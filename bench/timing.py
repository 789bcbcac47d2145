"""Clocks: CUDA events from a cold L2, or the wall; medians and spreads; durations replayed into pytest-benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# an H200's L2 holds 50 MB, a B200's 126
FLUSH_BYTES = 256 * 2**20
# the stream waits this long (about 1 ms) before each timed part, so that the host is ahead and no launch is measured
LEAD_CYCLES = 2_000_000

Part = Callable[[], object]


class Stopwatch:
    """Seconds of calls on one device: by CUDA events on a GPU, by the wall elsewhere or where `wall` is asked for."""

    def __init__(self, device: torch.device, *, wall: bool = False) -> None:
        self.device = device
        self.wall = wall or device.type != "cuda"
        self._flush: torch.Tensor | None = None

    def once(self, *parts: Part) -> list[float]:
        """Seconds of each part, called once in this order. By events each part starts with a cold L2."""
        return [self._by_wall(part) for part in parts] if self.wall else self._by_events(parts)

    def _by_wall(self, part: Part) -> float:
        self.synchronise()
        start = time.perf_counter()
        part()
        self.synchronise()
        return time.perf_counter() - start

    def _by_events(self, parts: Sequence[Part]) -> list[float]:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        spans = []
        for part in parts:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
            part()
            stop.record()
            spans.append((start, stop))
        self.synchronise()
        return [start.elapsed_time(stop) / 1000 for start, stop in spans]

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def host_seconds(run: Part, device: torch.device, calls: int = 50) -> float:
    """Seconds the host spends in one call of `run`, the device never waited for inside the loop."""
    run()
    watch = Stopwatch(device, wall=True)
    watch.synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    watch.synchronise()
    return spent / calls


def spread(rounds: Sequence[float]) -> dict[str, object]:
    """{median_s, iqr_s, rounds_s}: the interquartile range is 0 for a single round."""
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [*rounds] * 3
    return {"median_s": middle, "iqr_s": high - low, "rounds_s": list(rounds)}


def rounds_for(once: float, seconds: float, fewest: int, most: int) -> int:
    """How many rounds of `once` seconds fill `seconds`, within [fewest, most]."""
    return int(min(max(seconds / max(once, 1e-9), fewest), most))


class Replay:
    """A timer for pytest-benchmark that shows durations measured elsewhere: its own timer knows no CUDA events."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def into(self, benchmark, durations: Sequence[float]) -> None:
        """Record `durations` as the rounds of `benchmark`, whose timer must be this one."""
        left = iter(durations)
        self.now = 0.0

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, rounds=len(durations), iterations=1)


REPLAY = Replay()
