"""Prepared launches hand the GPU exactly what Triton's own would, in every release whose launcher is known.

The launchers are Triton's compiled ones, on a libcuda that writes down what a launch would hand to the kernel.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(
    not triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")),
    reason="nothing is prepared for the launcher of this Triton",
)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_the_gpu_gets_what_tritons_launcher_would_hand_over(tmp_path):
    from triton.backends.nvidia import driver

    headers = Path(driver.__file__).parent / "include"
    library = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{headers}", "-o", str(library)]
    subprocess.run([*command, str(ROOT / "tests" / "fake_libcuda.c")], check=True)
    (tmp_path / "libcuda.so").symlink_to(library.name)
    # in a process of its own: kernels compile there, which the interpreter of the other tests does not
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT / "kernels"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "PYTHONPATH": paths}
    # launches are compared, not code
    env |= {"CUDA_VISIBLE_DEVICES": "", "DISABLE_LLVM_OPT": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compare_launches.py")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
