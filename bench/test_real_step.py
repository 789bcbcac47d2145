"""The whole training step of Qwen2.5-0.5B, 1.5B and 3B on a GPU, tree against chains; on a CPU a tiny one, as a check.

What is timed, counted and checked: real_step.py.
"""

from functools import cache

import pytest
import torch

from bench import real_step, workloads
from bench.real_step import CONTENDERS, WORKLOADS, Case, info_of, measure, trainee, usable
from bench.timing import Stopwatch
from treegrpo.flops import Cost

# the most telling first: a run that is cut short has them
CASES = [
    *(Case("1.5b", name, False) for name in ("search_2_6", "star", "tau_calls", "search_2_2", "tau_whole", "binary")),
    *(Case("1.5b", name, True) for name in ("search_2_6", "tau_calls")),
    *(Case("0.5b", name, False) for name in ("search_2_6", "star", "tau_calls")),
    *(Case("3b", name, True) for name in ("search_2_6", "star")),
]
QUICK = CASES[:2]
TINY = [Case("tiny", name, name == "star") for name in WORKLOADS]
ROUNDS, QUICK_ROUNDS = 3, 2


@cache
def outcome(case, device, quick):
    on_cpu = device.type == "cpu"
    return measure(case, device, tiny=on_cpu, rounds=1 if on_cpu else QUICK_ROUNDS if quick else ROUNDS)


def pytest_generate_tests(metafunc):
    if "contender" not in metafunc.fixturenames:
        return
    cases = CASES if torch.cuda.is_available() else TINY
    metafunc.parametrize(
        ("case", "contender"),
        [(case, name) for case in cases for name in CONTENDERS],
        ids=lambda x: getattr(x, "name", x),
    )


def test_real_step(case, contender, meter, device, quick, steps_compiled_ahead):
    if device.type == "cuda" and quick and case not in QUICK:
        pytest.skip("left out of quick runs")
    reason = usable(contender, device)
    if reason is not None:
        pytest.skip(reason)
    try:
        problem, found = outcome(case, device, quick)
    except workloads.Unavailable as absent:
        pytest.skip(str(absent))
    if contender in found.wrong:
        pytest.skip(found.wrong[contender])
    if contender not in found.seconds:
        pytest.skip("checked against, not timed here: see timed_contenders")
    meter.benchmark.group = f"step of {case.name}"
    meter.replay(found.seconds[contender])
    meter.benchmark.extra_info.update(
        info_of(case, problem, found, contender),
        device=str(device),
        oracle="passed",
        oracle_error=found.errors[contender].gradient,
    )


CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tested where no GPU waits")


@without_gpu
def test_no_timed_step_makes_the_moments(monkeypatch):
    net, known, once = trainee("tiny", CPU), [], Stopwatch.once
    net.optimiser.state.clear()

    def watched(self, *parts):
        known.append(len(net.optimiser.state))
        return once(self, *parts)

    monkeypatch.setattr(Stopwatch, "once", watched)
    measure(Case("tiny", "binary", False), CPU, tiny=True, rounds=1)
    assert known and all(known)


@without_gpu
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_chain_that_is_wrong_is_not_timed(factor, monkeypatch):
    real = real_step.chain_logprobs

    def by_varlen(model, batch, backend):
        return real(model, batch) * (factor if backend == "gather" else 1)

    monkeypatch.setattr(real_step, "chain_logprobs", by_varlen)
    monkeypatch.setattr(real_step, "usable", lambda contender, device: None)
    _, found = measure(Case("tiny", "binary", False), CPU, tiny=True, rounds=1)
    assert ("chain_varlen" in found.seconds) == (factor == 1)
    assert list(found.wrong) == (["chain_varlen"] if factor != 1 else [])


def test_a_model_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(real_step, "_alive", {})
    monkeypatch.setattr(real_step, "Trainee", lambda name, device: made.append(name) or object())
    for name in ("0.5b", "0.5b", "1.5b", "1.5b", "0.5b"):
        trainee(name, CPU)
    assert made == ["0.5b", "1.5b", "0.5b"] and len(real_step._alive) == 1


def test_executed_flops_are_those_of_the_contenders_backward():
    cost = Cost(tokens=1, pairs=1, head_rows=1, linear=1000, attention=100, head=10)
    of = {name: real_step.executed_flops(cost, name, False) for name in CONTENDERS}
    assert of == {"tree": 3000 + 450 + 40, "chain": 3000 + 450 + 40, "chain_varlen": 3000 + 350 + 40}
    assert real_step.executed_flops(cost, "tree", True) == of["tree"] + 1100
