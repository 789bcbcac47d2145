"""The log-prob head at Qwen2.5's sizes: forward + backward from hidden rows to a log-prob a row; a GPU's bench.

    fused        one Triton pass over each chunk's logits, chunks of 2 GiB
    plain        torch operations, chunks of 128 MiB
    plain_large  torch operations on the fused head's chunks
    full_logits  every row's logits at once, log_softmax by torch, as a plain trainer does

The check: log-probs and both gradients at most twice as far from float64 as the plain head's.
On a CPU: tiny sizes, without the fused one, as a check of the bench.
"""

from functools import cache, lru_cache

import pytest
import torch

from bench.timing import Stopwatch, spread
from treegrpo.head import CHUNK_ELEMENTS, ChunkedHead, HeadOptions, LogitTransform, Pairs
from treegrpo_kernels import head as passes

VOCAB, TINY_HIDDEN, TINY_VOCAB = 151_936, 16, 300
# (rows, hidden): growth at 1.5B's hidden size, then those of 0.5B and 3B, which quick runs leave out
CELLS = [(2048, 1536), (8192, 1536), (16_384, 1536), (8192, 896), (8192, 2048)]
QUICK_HIDDEN = 1536
CONTENDERS = ("fused", "plain", "plain_large", "full_logits")
ROUNDS = 5
# of the check, whose oracle is in float64: two chunks of the fused head
CHECKED_ROWS = 4096


def options(contender: str, dtype: torch.dtype, num_rows: int) -> HeadOptions:
    transform = LogitTransform(1.0, 0.0)
    fused = HeadOptions(transform, 1.0, dtype, fused=True)
    if contender == "fused":
        return fused
    starts = fused.starts(num_rows, VOCAB)
    large = starts[1] - starts[0] if contender == "plain_large" else None
    return HeadOptions(transform, 1.0, dtype, chunk_rows=large)


def log_probs(contender: str, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if contender == "full_logits":
        logits = (x @ weight.t()).float()
        return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    pairs = pairs_of(len(x), x.device)
    return ChunkedHead.apply(x, weight, None, labels, pairs, options(contender, x.dtype, len(x)))[0]


@cache
def pairs_of(num_rows: int, device: torch.device) -> Pairs:
    return Pairs.of(torch.arange(num_rows, device=device), num_rows)


@cache
def inputs(num_rows: int, hidden: int, device: torch.device) -> list[torch.Tensor]:
    real = device.type == "cuda"
    vocab = VOCAB if real else TINY_VOCAB
    gen = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if real else torch.float32
    x = torch.randn(num_rows, hidden, generator=gen, device=device).to(dtype).requires_grad_()
    weight = (0.03 * torch.randn(vocab, hidden, generator=gen, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (num_rows,), generator=gen, device=device)
    return [x, weight, labels, torch.sin(torch.arange(num_rows, device=device))]


def gradients(contender: str, x, weight, labels, slope) -> list[torch.Tensor]:
    logp = log_probs(contender, x, weight, labels)
    return [logp.detach(), *torch.autograd.grad(logp, [x, weight], slope.to(logp.dtype))]


@lru_cache(maxsize=1)
def oracle(hidden: int, device: torch.device) -> tuple[list[torch.Tensor], list[float]]:
    """(log-probs and gradients in float64, how far the plain head's are off)."""
    x, weight, labels, slope = inputs(CHECKED_ROWS, hidden, device)
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels, slope]
    want = gradients("plain", *wide)
    return want, errors_of(gradients("plain", x, weight, labels, slope), want)


def errors_of(found: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)]


@cache
def check(contender: str, hidden: int, device: torch.device) -> float:
    want, allowed = oracle(hidden, device)
    errors = errors_of(gradients(contender, *inputs(CHECKED_ROWS, hidden, device)), want)
    for name, error, plain in zip(("logp", "dhidden", "dweight"), errors, allowed, strict=True):
        # logits rounded to bf16 are what the full head stands for; 2**-19 is 16 units of fp32, as for attention
        assert contender == "full_logits" or error <= 2 * plain + 2**-19, f"{contender}: {name} is off by {error:.1e}"
    return max(errors)


@cache
def outcome(num_rows: int, hidden: int, device: torch.device, rounds: int) -> dict[str, tuple[list[float], int, float]]:
    """contender -> (seconds of each round, peak bytes beyond the inputs, error)."""
    args = inputs(num_rows, hidden, device)
    names = [name for name in CONTENDERS if unusable(name, device) is None]
    errors = {name: check(name, hidden, device) for name in names}
    on_gpu, watch = device.type == "cuda", Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for name in names:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        gradients(name, *args)
        peaks[name] = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    for _ in range(rounds):
        for name in names:
            times[name] += watch.once(lambda name=name: gradients(name, *args))
    return {name: (times[name], peaks[name], errors[name]) for name in names}


def unusable(contender: str, device: torch.device) -> str | None:
    return passes.reason(device, torch.bfloat16) if contender == "fused" else None


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("num_rows", "hidden"), CELLS)
def test_head(num_rows, hidden, contender, meter, device, quick):
    reason = unusable(contender, device)
    if reason is not None:
        pytest.skip(reason)
    if hidden != QUICK_HIDDEN and (quick or device.type == "cpu"):
        pytest.skip("other hidden sizes are left out of quick runs and of a CPU's")
    if device.type == "cpu":
        num_rows, hidden = num_rows // 32, TINY_HIDDEN
    vocab = VOCAB if device.type == "cuda" else TINY_VOCAB
    found = outcome(num_rows, hidden, device, 1 if device.type == "cpu" else 3 if quick else ROUNDS)
    times, peak, error = found[contender]
    meter.benchmark.group = f"log-prob head of {num_rows} rows, hidden {hidden}"
    meter.replay(times)
    meter.benchmark.extra_info.update(
        spread(times),
        suite="real_head",
        contender=contender,
        workload=f"{num_rows} rows",
        head_rows=num_rows,
        hidden=hidden,
        chunk_elements=CHUNK_ELEMENTS,
        flops=3 * 2 * num_rows * hidden * vocab,
        peak_bytes=peak,
        time_ratio=spread(found["plain"][0])["median_s"] / spread(times)["median_s"],
        device=str(device),
        oracle="passed",
        oracle_error=error,
    )


@pytest.mark.parametrize("contender", CONTENDERS[:3])
def test_the_check_meets_the_seam_between_chunks(contender):
    assert len(options(contender, torch.bfloat16, CHECKED_ROWS).starts(CHECKED_ROWS, VOCAB)) > 2
