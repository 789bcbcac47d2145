"""Two gloo processes under torch's launcher: TreeGRPOTrainer against GRPOTrainer, and against one process; with
whole weights and with sharded ones."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from trl_tiny import GROUP, difference, save_tiny  # noqa: E402

TESTS = Path(__file__).resolve().parent


def run(folder, out, processes, **arguments):
    """The result that trl_worker.py writes."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TESTS / "trl_worker.py")]
    arguments |= dict(per_device_train_batch_size=2 * GROUP // processes)
    roots = [str(TESTS.parent), str(TESTS.parent / "kernels"), str(TESTS)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(roots))
    command += [str(folder), str(out), json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(out / "result.pt", weights_only=False)
    assert result["processes"] == processes
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tree"),
    [
        (dict(loss_type="dapo", beta=0.05), dict()),
        # processes have different numbers of packed rows; the norm looks at the groups of both
        (dict(loss_type="grpo", scale_rewards="batch"), dict(token_budget=18, advantage_estimator="grpo")),
    ],
)
def test_two_processes_train_as_one(changes, tree, tmp_path):
    folder = save_tiny(tmp_path / "model")
    chain = run(folder, tmp_path / "chain", 2, kind="chain", **changes)
    two = run(folder, tmp_path / "two", 2, kind="tree", **changes, **tree)
    one = run(folder, tmp_path / "one", 1, kind="tree", **changes, **tree)
    assert difference(chain["parameters"], two["parameters"]) < 1e-5
    assert difference(one["parameters"], two["parameters"]) < 1e-5
    for theirs, ours in zip(chain["log"][:-1], two["log"][:-1], strict=True):
        assert theirs.keys() <= ours.keys()
        for name in ("loss", "entropy", "reward", "grad_norm"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "zero2", "zero3"])
def test_sharded_weights(sharding, tmp_path):
    """With a reference model, checkpointing, and processes that have different numbers of packed rows."""
    if sharding != "fsdp2":
        pytest.importorskip("deepspeed")
    folder = save_tiny(tmp_path / "model")
    changes = dict(sharding=sharding, beta=0.05, gradient_checkpointing=True, max_steps=3)
    chain = run(folder, tmp_path / "chain", 2, kind="chain", **changes)
    tree = run(folder, tmp_path / "tree", 2, kind="tree", token_budget=18, **changes)
    assert chain["kinds"] == tree["kinds"] == ["DTensor" if sharding == "fsdp2" else "Parameter"]
    assert difference(chain["parameters"], tree["parameters"]) < 1e-5
    for theirs, ours in zip(chain["log"][:-1], tree["log"][:-1], strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name
