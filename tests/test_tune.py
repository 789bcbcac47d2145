"""The tuner goes on past candidates that fail, hang, die or are wrong; here in Triton's interpreter."""

import os
import time

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the tuner's own test runs in Triton's interpreter, which needs no GPU", allow_module_level=True)

from bench.candidates import Candidate, _delta, _dq, _fwd, candidates, make_problem
from bench.tune import FORESTS, Setup, table, tune
from treegrpo_kernels.triton.common import TileConfig

TILE = TileConfig(64, 64, 4, 1)


class Spoiled:
    def __init__(self, launches, spoil):
        self.launches, self.spoil = launches, spoil

    def run(self):
        for launch in self.launches:
            launch.run()
        self.spoil()


def _wrong(problem):
    return [Spoiled(_fwd(TILE, False)(problem), lambda: problem.tensors["out"][3].add_(1))]


def _hangs(problem):
    time.sleep(600)


def _dies(problem):
    os._exit(3)


def listed(kernels):
    return [
        Candidate("fwd", "ptr", _fwd(TILE, False)),
        Candidate("fwd", "wrong", _wrong),
        Candidate("fwd", "dies", _dies),
        Candidate("dq", "no such tile", _dq(TileConfig(17, 64, 4, 1), True)),
        Candidate("delta", "ptr", _delta),
    ]


def one_hangs(kernels):
    return [Candidate("fwd", "hangs", _hangs), Candidate("delta", "ptr", _delta)]


def rows_of(listed, limit):
    found = tune(Setup(("fwd", "dq"), 64, 1, "cpu", tiny=True, listed=listed), 400, limit, 1)
    assert table(found).count("\n") == len(found["rows"]) + 1
    return {(row["kernel"], row["name"]): row for row in found["rows"]}


@pytest.mark.slow
def test_one_bad_candidate_costs_its_own_row_only():
    rows = rows_of(listed, 120)
    errors = {key: row["error"] for key, row in rows.items()}
    assert "died" in errors["fwd", "dies"] and "power of 2" in errors["dq", "no such tile"]
    assert "out is off by" in errors["fwd", "wrong"]
    for key in (("fwd", "ptr"), ("delta", "ptr")):
        assert errors[key] is None and set(rows[key]["tflops"]) == set(FORESTS)


def test_one_that_hangs_is_ended():
    rows = rows_of(one_hangs, 15)
    assert "no answer within 15 s" in rows["fwd", "hangs"]["error"] and rows["delta", "ptr"]["error"] is None


def test_every_candidate_gives_its_kernel_all_arguments():
    problem = make_problem(torch.full((300,), 300), 4, 2, 64, torch.device("cpu"), torch.bfloat16)
    found = candidates(["fwd", "dq", "dkv", "one"])
    assert len({(c.kernel, c.name) for c in found}) == len(found) > 50
    for candidate in found:
        for launch in candidate.build(problem):
            assert set(launch.args) == set(launch.kernel.arg_names), (candidate.kernel, candidate.name)


def test_what_was_not_tried_says_so():
    found = tune(Setup(("fwd",), 64, 1, "cpu", tiny=True, listed=listed), 4, 40, 1)
    assert all("out of time" in row["error"] for row in found["rows"])
