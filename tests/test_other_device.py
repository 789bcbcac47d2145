"""Training and sampling on a device that is not the CPU (other_device.py): nothing is left behind on the CPU, what
comes out is the same, and a step waits for the device at its end alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

ROOT = Path(__file__).resolve().parent.parent


FILES = {
    "training": ["other_device_waits.py", "test_trainer.py"],
    "sampling": ["test_online.py", "test_engine_hf_weights.py"],
    "trl": ["test_trl.py", "test_trl_tree.py"],
}
CHOSEN = {
    "training": "waits or seen or same_curves or written_out or (resume_is and lora) or loads_anywhere",
    "sampling": "repeats_bit_for_bit or copy_samples or adapters",
    "trl": "dapo or two_iterations or accumulation or lora or changes_nothing or transformers or evaluation",
}


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} takes no device written in Python",
)
@pytest.mark.parametrize("part", FILES)
def test_on_another_device(part):
    if part == "trl":
        pytest.importorskip("trl", reason="trl is not installed: make test-trl")
    command = [sys.executable, "-m", "pytest", "-p", "other_device", "-q", "-p", "no:cacheprovider"]
    command += [*(f"tests/{file}" for file in FILES[part]), "-k", CHOSEN[part]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("tests", ".", "kernels"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
