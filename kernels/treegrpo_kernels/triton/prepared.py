"""Launches prepared once a plan: of a later launch the host does one lookup a descriptor and one call into C.

Triton's own path works out at every launch what a kernel is specialised on, asks the driver about each pointer and
encodes each TMA descriptor. For one kernel, one plan and fixed shapes none of that changes but the addresses of the
call's own tensors, and addresses repeat, for the caching allocator hands out the same blocks again.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver

# the argument list of Triton's compiled launcher is its own affair: known for these, other releases launch their way
FLAT_RELEASES = ("3.6.",)
# one launcher for all kernels, which is told how to read the kernel's arguments
NESTED_RELEASES = ("3.7.", "3.8.", "3.9.")
_STREAM = 3
# encoded descriptors kept per argument: a training step meets a few per layer
MAX_ENCODED = 4096


class PreparedLaunch:
    """One compiled kernel with all its arguments but the addresses (and token strides) of ``changing``."""

    def __init__(self, raw: Any, compiled: Any, grid: tuple[int, ...], args: dict[str, Any], changing: tuple[str, ...]):
        launcher = compiled.run
        self._launch, self._nested = raw, triton.__version__.startswith(NESTED_RELEASES)
        self._head = [*(*grid, 1, 1)[:3], 0, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl]
        scratch, metadata, hooks = (None, None), (compiled.packed_metadata, None), (None, None)
        if self._nested:
            self._head += [*metadata, *hooks, *scratch, launcher.arg_annotations, launcher.kernel_signature]
        else:
            self._head += [*scratch, *metadata, *hooks]
        self._args: list[Any] = []
        layouts = iter(compiled.metadata.tensordesc_meta or ())
        places: dict[str, tuple] = {}
        for name in compiled.src.fn.arg_names:
            x = args[name]
            if isinstance(x, Tensor):
                places[name] = (len(self._args), None, None)
                self._args.append(x.data_ptr())
            elif hasattr(x, "block_shape"):
                # its shape alone: the tensor below it is the first call's, and is not kept alive
                places[name] = (len(self._args), (tuple(x.shape), next(layouts)), {})
                # the encoded descriptor, its shape, its strides
                self._args += [None, *x.shape, *x.strides]
            else:
                self._args.append(x)
        self._places = [places[name] for name in changing]

    def __call__(self, stream: int, *tensors: tuple[int, int]) -> None:
        """Launch with (address, token stride) of each changing argument; a pointer's stride is not looked at."""
        head, args = self._head.copy(), self._args.copy()
        head[_STREAM] = stream
        for (place, described, encoded), tensor in zip(self._places, tensors, strict=True):
            if described is None:
                args[place] = tensor[0]
                continue
            found = encoded.get(tensor)
            if found is None:
                if len(encoded) >= MAX_ENCODED:
                    encoded.clear()
                found = encoded[tensor] = encode(*described, *tensor)
            args[place] = found
            args[place + 3] = tensor[1]
        if self._nested:
            self._launch(*head, args)
        else:
            self._launch(*head, *args)


def prepare(
    compiled: Any, grid: tuple[int, ...], args: dict[str, Any], changing: tuple[str, ...]
) -> PreparedLaunch | None:
    """``compiled`` as a prepared launch, or None where Triton's launcher is not of a release known here."""
    raw = _raw_launcher(compiled)
    return None if raw is None else PreparedLaunch(raw, compiled, grid, args, changing)


def encode(shape: tuple[int, int], layout: dict[str, Any], address: int, stride: int) -> Any:
    """The TMA descriptor of the matrix at ``address``; ``layout`` is the compiled kernel's account of the box."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    utils = driver.active.utils
    fill = utils.fill_tma_descriptor_tiled if hasattr(utils, "fill_tma_descriptor_tiled") else utils.fill_tma_descriptor
    return fill(
        address,
        layout["swizzle"],
        layout["elem_size"],
        TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]],
        layout["block_size"],
        shape,
        (stride, 1),
        0,
    )


def stream_of(index: int) -> int:
    """The current stream of a device, as the launcher takes it."""
    return driver.active.get_current_stream(index)


def hooked() -> bool:
    """Whether a profiler listens to launches through Triton's hooks; they see only launches made Triton's way."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _raw_launcher(compiled: Any) -> Any:
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    if triton.__version__.startswith(NESTED_RELEASES):
        return driver.active.utils.launch
    if not triton.__version__.startswith(FLAT_RELEASES):
        return None
    launch = launcher.launch
    # around the C function lies one in Python that encodes descriptors, if the kernel takes any
    return inspect.getclosurevars(launch).nonlocals["launcher"] if inspect.isfunction(launch) else launch
