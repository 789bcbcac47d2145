"""Whether two LaTeX formulas are equal, by math-verify, in a process of its own that can be stopped.

The library's own time-out is an alarm signal: it cannot be set outside the main thread, nor does it interrupt a large
power. `python -m treegrpo.formula` is that process: it reads a JSON line `[result, gold]`, writes `true` or `false`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
MEMORY_BYTES = 4 << 30


def is_installed() -> bool:
    """Whether math-verify is."""
    return importlib.util.find_spec("math_verify") is not None


class FormulaChecker:
    """Compares formulas one at a time, from any thread. `FormulaChecker(timeout=2.0).equal("x+x", "2x")` is True."""

    def __init__(self, timeout: float = 3.0) -> None:
        """`timeout` in seconds, for one comparison."""
        self.timeout = timeout
        self.num_timeouts = 0
        """Comparisons given up so far."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._replies: queue.Queue[str] = queue.Queue()

    def equal(self, result: str, gold: str) -> bool:
        """False also where one is no formula, or where it takes too long or too much memory; the process is then
        stopped, and started anew for the next. ImportError without math-verify, RuntimeError if it does not start."""
        with self._lock:
            # a forked child must not speak through its parent's pipes
            process = self._process
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process = self._start()
            try:
                print(json.dumps([result, gold]), file=process.stdin, flush=True)
                reply = self._replies.get(timeout=self.timeout)
            except (queue.Empty, BrokenPipeError):
                reply = ""
            except BaseException:
                # a Ctrl-C: the reply that is still to come would be taken for the next one's
                self._stop()
                raise
            if not reply:
                self.num_timeouts += 1
                logger.debug("comparing %r and %r was given up", result[:80], gold[:80])
                self._stop()
            return reply == "true"

    def close(self) -> None:
        """Stops the process; the next comparison starts another. May be called twice."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen:
        if not is_installed():
            raise ImportError("comparing formulas needs math-verify: pip install math-verify")
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "treegrpo.formula"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._owner = os.getpid()
        self._replies = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, self._replies), daemon=True).start()
        try:
            ready = self._replies.get(timeout=START_SECONDS)
        except queue.Empty:
            ready = ""
        if ready != "ready":
            self._stop()
            raise RuntimeError("the process that compares formulas did not start: see python -m treegrpo.formula")
        return process

    def _stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        self._process = None


def _forward(stream, replies: queue.Queue[str]) -> None:
    with stream:
        for line in stream:
            replies.put(line.strip())
    replies.put("")


@functools.lru_cache(maxsize=1)
def _checker() -> FormulaChecker:
    checker = FormulaChecker()
    atexit.register(checker.close)
    return checker


@functools.lru_cache(maxsize=65536)
def same_formula(result: str, gold: str) -> bool:
    """`FormulaChecker.equal` of one shared process; answers are remembered."""
    return _checker().equal(result, gold)


def main() -> None:
    """The process: see the top."""
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # LaTeX only: the library's reader of plain expressions calls sympy's parse_expr, which evaluates text as Python
    config = [LatexExtractionConfig()]

    def reply(text: str) -> None:
        replies.write(text + "\n")
        replies.flush()

    reply("ready")
    for line in sys.stdin:
        result, gold = json.loads(line)
        parsed = [parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (gold, result)]
        reply("true" if all(parsed) and verify(*parsed, timeout_seconds=None) else "false")


if __name__ == "__main__":
    main()
