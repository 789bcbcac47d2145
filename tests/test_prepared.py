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

# in a process of its own: kernels compile there, which the interpreter of the other tests does not
COMPARED = """
import ctypes
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from treegrpo_kernels.plan import TreePlan
from treegrpo_kernels.triton import aot, hopper, prepared

STREAM, FUNCTION = 5, 77
libcuda = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
# what of libcuda is not there is not called either
sys.setdlopenflags(os.RTLD_LAZY)
triton.runtime.driver.set_active(SimpleNamespace(utils=nvidia.CudaUtils()))


def sizes(kind):
    if isinstance(kind, (tuple, list)):
        return [size for each in kind for size in sizes(each)]
    if kind.startswith("tensordesc"):
        return [128, 4, 4, 8, 8]
    return [] if kind == "constexpr" else [{"i32": 4, "fp32": 4}.get(kind, 8)]


def handed_over(compiled, launch):
    # two scratch buffers follow the kernel's own
    of_params = [*sizes(list(compiled.src.signature.values())), 8, 8]
    libcuda.fake_expect((ctypes.c_size_t * len(of_params))(*of_params), len(of_params))
    launch()
    record = ctypes.c_void_p()
    libcuda.fake_record.restype = ctypes.c_size_t
    found = ctypes.string_at(record, libcuda.fake_record(ctypes.byref(record)))
    assert len(found) == 48 + sum(of_params), (len(found), of_params)
    return found


compiled_once = {}


def run(launch):
    key = aot.specialization_key(launch, 90)
    if key not in compiled_once:
        compiled, *_ = aot.compile_launch(launch, 90)
        compiled_once[key] = SimpleNamespace(
            run=nvidia.CudaLauncher(compiled.src, compiled.metadata), function=FUNCTION, metadata=compiled.metadata,
            packed_metadata=compiled.packed_metadata, src=compiled.src)
    kernel = compiled_once[key]
    kernel.launch = lambda: kernel.run(
        *(*launch.grid, 1, 1)[:3], STREAM, FUNCTION, kernel.packed_metadata, None, None, None,
        *[launch.args[name] for name in kernel.src.fn.arg_names])
    return kernel


known, compared = {}, []


def both(shape, key, make, names, tensors):
    launch = make()
    kernel = run(launch)
    expected = handed_over(kernel, kernel.launch)
    if (shape, key) not in known:
        known[shape, key] = prepared.prepare(kernel, launch.grid, launch.args, names)
    mine = known[shape, key]
    places = [(x.data_ptr(), x.stride(0)) for x in tensors]
    got = handed_over(kernel, lambda: mine(STREAM, *places))
    assert got == expected, (launch.kernel, [(i, x, y) for i, (x, y) in enumerate(zip(got, expected)) if x != y])
    compared.append(got)


def step(tiles, seed):
    # q is a slice of a wider row: its token stride is not its width
    gen = torch.Generator().manual_seed(seed)
    wide = torch.randn(300, 4 + seed, 64, generator=gen).to(torch.bfloat16)
    k, v = torch.randn(2, 300, 2, 64, generator=gen).to(torch.bfloat16).unbind()
    out, lse = hopper.attn_fwd(wide[:, :4], k, v, tiles, 0.1)
    hopper.attn_bwd(torch.ones_like(out), wide[:, :4], k, v, out, lse, tiles, 0.1)
    return wide, out, lse


hopper._launch = both
kept = []
for split in (False, True):
    plan = TreePlan.build(torch.full((300,), 300))
    tiles = hopper.tile_tensors(plan, replace(hopper.config(64), split=split), 2)
    assert (len(tiles[-1]) > 0) == split
    kept += [step(tiles, seed) for seed in (1, 2, 1)]
# forward, delta, dQ, dK/dV; the sum where key tiles are parted
assert len(compared) == 3 * 4 + 3 * 5 and len(compiled_once) == 6, (len(compared), len(compiled_once))
assert len(set(compared)) == len(compared), "two launches were told the same"
triton.__version__ = "99.0"
assert prepared.prepare(next(iter(compiled_once.values())), (1,), {}, ()) is None
"""


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
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT / "kernels"), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "PYTHONPATH": paths}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", COMPARED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
