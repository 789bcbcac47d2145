"""Prepared launches hand the kernel exactly what Triton's own launcher would, for new tensors too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

# in a process of its own: kernels compile there, which the interpreter of the other tests does not
COMPARED = """
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from treegrpo_kernels.plan import TreePlan
from treegrpo_kernels.triton import aot, hopper, prepared

NAMES = ("q_desc", "k_desc", "v_desc", "out_desc", "lse")
utils = SimpleNamespace(fill_tma_descriptor=lambda *args: ("encoded", *map(str, args)))
triton.runtime.driver.set_active(SimpleNamespace(utils=utils))


def tensors(seed):
    # q is a slice of a wider row: its token stride is not its width
    gen = torch.Generator().manual_seed(seed)
    wide = torch.randn(300, 4 + seed, 64, generator=gen).to(torch.bfloat16)
    k, v = torch.randn(2, 300, 2, 64, generator=gen).to(torch.bfloat16).unbind()
    return wide[:, :4], k, v, torch.empty(300, 4, 64, dtype=torch.bfloat16), torch.empty(300, 4)


plan = TreePlan.build(torch.full((300,), 300))
tiles = hopper.tile_tensors(plan, hopper.config(64), 2)
tile, *lists = tiles[hopper._FWD]


def launch(seed):
    return hopper.fwd_launch(*tensors(seed), hopper._tile_of(tile), lists, 0.1)


first, second = launch(1), launch(2)
compiled, *_ = aot.compile_launch(first, 90)
signature = {name: kind for name, kind in compiled.src.signature.items()}
seen = []
theirs = nvidia.wrap_handle_tensordesc(lambda *args: seen.append(args), signature, compiled.metadata.tensordesc_meta)
launcher = SimpleNamespace(launch=theirs, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
                           profile_scratch_size=0)
fake = SimpleNamespace(run=launcher, function=77, packed_metadata=(12, 1, 5), metadata=compiled.metadata,
                       src=compiled.src)
mine = prepared.prepare(fake, first.grid, first.args, NAMES)


def as_launched(args):
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]


def normal(args):
    return [tuple(str(y).replace("[", "(").replace("]", ")") for y in x) if isinstance(x, tuple) else x for x in args]


for which in (first, second, first):
    seen.clear()
    theirs(*which.grid, 1, 1, 5, 77, False, False, None, None, (12, 1, 5), None, None, None,
           *[which.args[name] for name in compiled.src.fn.arg_names])
    mine(5, *[(x.data_ptr(), x.stride(0)) for x in
              (getattr(which.args[name], "base", which.args[name]) for name in NAMES)])
    expected, got = normal(as_launched(seen[0])), normal(seen[1])
    assert expected == got, [pair for pair in zip(expected, got) if pair[0] != pair[1]]
assert first.args["q_desc"].strides != second.args["q_desc"].strides
assert all(len(encoded) == 2 for _, shape, encoded in mine._places if shape is not None)
triton.__version__ = "99.0"
assert prepared.prepare(fake, first.grid, first.args, NAMES) is None
"""


@pytest.mark.skipif(
    not triton.__version__.startswith("3.6."),
    reason="Triton's launcher is known for 3.6; other releases launch their way",
)
def test_the_kernel_gets_what_tritons_launcher_would_pass(tmp_path):
    root = Path(__file__).resolve().parent.parent
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", COMPARED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
