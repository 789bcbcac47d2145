"""Launches prepared by treegrpo_kernels.triton.prepared against those of Triton's own launcher, byte by byte, on the
libcuda of fake_libcuda.c; test_prepared.py runs this.
"""

import copy
import ctypes
import os
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia import driver as nvidia

from treegrpo_kernels import triton as kernels
from treegrpo_kernels.plan import TreePlan
from treegrpo_kernels.triton import aot, backward, common, forward, hopper, hopper_common, prepared

STREAM, FUNCTION = 5, 77
libcuda = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
# what of libcuda is not there is not called either
sys.setdlopenflags(os.RTLD_LAZY)
utils = nvidia.CudaUtils()
triton.runtime.driver.set_active(SimpleNamespace(utils=utils, get_current_stream=lambda index: STREAM))
# a launch hands over arguments, whatever the kernel's code: nothing is assembled
nvidia_compiler.CUDABackend.make_cubin = lambda *args: b"not run"
# the device of a tensor on the CPU
torch.cuda.current_device = lambda: -1


def sizes(kind):
    if isinstance(kind, (tuple, list)):
        return [size for each in kind for size in sizes(each)]
    if kind.startswith("tensordesc"):
        return [128, 4, 4, 8, 8]
    return [] if kind == "constexpr" else [{"i32": 4, "fp32": 4}.get(kind, 8)]


def handed_over(kernel, launch):
    # two scratch buffers follow the kernel's own
    of_params = [*sizes(list(kernel.src.signature.values())), 8, 8]
    libcuda.fake_expect((ctypes.c_size_t * len(of_params))(*of_params), len(of_params))
    launch()
    record = ctypes.c_void_p()
    libcuda.fake_record.restype = ctypes.c_size_t
    found = ctypes.string_at(record, libcuda.fake_record(ctypes.byref(record)))
    assert len(found) == 48 + sum(of_params), (len(found), of_params)
    return found


arch, compiled_once = None, {}


def kernel_of(launch):
    key = arch, aot.specialization_key(launch, arch)
    if key not in compiled_once:
        source, options, target = aot.source_of(launch, arch)
        compiled = triton.compile(source, target=target, options=options)
        compiled_once[key] = SimpleNamespace(
            run=nvidia.CudaLauncher(compiled.src, compiled.metadata),
            function=FUNCTION,
            metadata=compiled.metadata,
            packed_metadata=compiled.packed_metadata,
            src=compiled.src,
        )
    return compiled_once[key]


def run(launch):
    kernel = kernel_of(launch)
    kernel.run(
        *(*launch.grid, 1, 1)[:3],
        STREAM,
        FUNCTION,
        kernel.packed_metadata,
        None,
        None,
        None,
        *[launch.args[name] for name in kernel.src.fn.arg_names],
    )
    return kernel


common.Launch.run = hopper_common.HopperLaunch.run = run
compared, made = [], []


def both(known, key, make, changing):
    """Triton's launch, and what is prepared for it; a first time for ``known`` goes Triton's way."""
    launch = make()
    kernel = kernel_of(launch)
    wanted = handed_over(kernel, lambda: run(launch))

    def make_again():
        made.append(key)
        return launch

    assert handed_over(kernel, lambda: prepared.launch(known, key, make_again, changing)) == wanted
    # nothing is made any more
    got = handed_over(kernel, lambda: prepared.launch(known, key, None, changing))
    assert got == wanted, (launch.kernel, [at for at in range(len(wanted)) if got[at] != wanted[at]])
    compared.append(got)


for module in (hopper, forward, backward):
    module.launch = both


def tensors(d, dtype, seed):
    # q is a slice of a wider row: its token stride is not its width
    gen = torch.Generator().manual_seed(seed)
    wide = torch.randn(300, 4 + seed, d, generator=gen).to(dtype)
    k, v = torch.randn(2, 300, 2, d, generator=gen).to(dtype).unbind()
    return wide[:, :4], k, v


# so that no call gets the memory of an earlier one
kept = []


def step(config, d, dtype, shifted=False, sinks=None, window=0, softcap=0.0):
    """Three calls with one plan, the second of another stride: how many launches that was, how many of them went
    Triton's way, and for how many a kernel was compiled."""
    before = len(compared), len(made), len(compiled_once)
    plan = TreePlan.build(torch.full((300,), 300))
    for place, seed in enumerate((1, 2, 1)):
        q, k, v = tensors(d, dtype, seed)
        if shifted and place == 2:
            # a layer whose values begin off a multiple of 16 bytes
            v = torch.empty(v.numel() + 1, dtype=dtype)[1:].view(v.shape).copy_(v)
        tiles = kernels.tile_tensors(plan, q, v, window, config)
        rest = plan.subtree_end, tiles, 0.1, softcap
        out, lse = kernels.attn_fwd(q, k, v, sinks, *rest)
        dout = torch.ones_like(out)
        kept.append((q, k, v, out, lse, tiles, dout, kernels.attn_bwd(dout, q, k, v, out, lse, *rest)))
    # a copy of a plan has memory of its own
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        theirs = kernels.tile_tensors(other, q, v, window, config)
        assert theirs is not tiles and theirs[0].launches == {} != tiles[0].launches
    return len(compared) - before[0], len(made) - before[1], len(compiled_once) - before[2]


BF16, FP32 = torch.bfloat16, torch.float32
sinks = torch.linspace(-1, 1, 4)
arch = 90
# forward, delta, dQ, dK/dV, all but delta for two strides; the sum where key tiles are parted
assert step(replace(hopper.config(64), split=False), 64, BF16) == (12, 7, 4)
assert step(hopper.config(64), 64, BF16) == (15, 8, 2)
assert step(hopper.config(64), 64, BF16, sinks=sinks.to(BF16), window=100) == (12, 7, 3)
assert step(hopper.config(64), 64, BF16, sinks=sinks) == (15, 8, 1)
# copies with padding all lie alike
assert step(hopper.config(40), 40, BF16) == (15, 5, 1)
# the plain kernels: through descriptors and, what lies off a multiple of 16 bytes, through pointers
config = common.config(64, 64, BF16, arch)
forward.arch_of = backward.arch_of = lambda device: arch
assert step(config, 64, BF16, sinks=sinks, window=100, softcap=20.0) == (12, 7, 3)
assert step(config, 64, BF16, shifted=True) == (15, 11, 6)
# through pointers alone, which are compiled for such multiples and for others
arch = 80
config = common.config(64, 64, BF16, arch)
assert step(config, 64, BF16, sinks=sinks, window=100, softcap=20.0) == (15, 8, 5)
assert step(config, 64, BF16, shifted=True) == (15, 11, 6)
assert step(common.config(20, 20, FP32, arch), 20, FP32) == (12, 7, 4)
triton.__version__ = "99.0"
assert prepared.prepare(next(iter(compiled_once.values())), (1,), {}, ()) is None
