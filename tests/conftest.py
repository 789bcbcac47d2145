"""Shared set-up: Triton's interpreter where there is no GPU, as many processes as cores, repeatable hypothesis,
NaN-poisoned memory on request.
"""

import importlib.metadata
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

if not torch.cuda.is_available():
    # read by triton.jit when the kernels are imported, hence before any test module
    os.environ.setdefault("TRITON_INTERPRET", "1")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # the workers share the cores, and so do the processes they start
    threads = max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run the kernels here; None if it can, or need not."""
    if os.environ.get("TRITON_INTERPRET", "0") == "0" or importlib.util.find_spec("triton") is None:
        return None
    releases = [importlib.metadata.version(name) for name in ("triton", "numpy")]
    if releases[0].startswith("3.6.") and tuple(map(int, releases[1].split(".")[:2])) >= (2, 4):
        return f"Triton {releases[0]}'s interpreter fails under numpy {releases[1]}: pip install 'numpy<2.4'"
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers ``-n auto`` starts: none where there is a GPU, whose memory and clock tests want alone."""
    return 0 if torch.cuda.is_available() else min(CORES, 8)


def pytest_configure(config: pytest.Config) -> None:
    fault = interpreter_fault()
    if fault is not None:
        raise pytest.UsageError(fault)
    if os.environ.get("TRITON_INTERPRET", "0") != "0" and importlib.util.find_spec("triton") is not None:
        from interpreter import speed_up

        speed_up()
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.addinivalue_line("markers", "cuda_kernels: launches kernels of csrc/cuda, on Hopper those of sm90")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        asks = "cuda" in [given.get(name) for name in ("backend", "name")]
        if asks or item.path.name in ("test_cuda.py", "test_hopper_cuda.py"):
            item.add_marker(pytest.mark.cuda_kernels)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models spend their time waiting for threads: a hundred times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a warm start too short to know anything; see boxes.py."""
    from boxes import quick_box

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = quick_box(tmp_path_factory.mktemp("box"))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, also where the shell started this in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are cached in a folder of this test run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and friends hand out NaN-filled memory, so that an output nobody writes fails the comparison."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point():
                # detached: a leaf that requires a gradient may not be written in place
                x.detach().fill_(float("nan"))
            return x

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
