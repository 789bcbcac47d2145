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

# the argument list of Triton's compiled launcher is its own affair: known for this release, others launch its way
KNOWN_RELEASE = "3.6."
# grid (3), stream, function, cooperative, dependent, two scratch buffers, metadata (2), hooks (2)
_STREAM, _FIXED = 3, 13
# encoded descriptors kept per argument: a training step meets a few per layer
MAX_ENCODED = 4096


class PreparedLaunch:
    """One compiled kernel with all its arguments but the addresses (and token strides) of ``changing``."""

    def __init__(self, raw: Any, compiled: Any, grid: tuple[int, ...], args: dict[str, Any], changing: tuple[str, ...]):
        grid = (*grid, 1, 1)[:3]
        launcher = compiled.run
        options = (launcher.launch_cooperative_grid, launcher.launch_pdl)
        self._launch = raw
        self._args = [*grid, 0, compiled.function, *options, None, None, compiled.packed_metadata, None, None, None]
        assert len(self._args) == _FIXED
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
        args = self._args.copy()
        args[_STREAM] = stream
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
        self._launch(*args)


def prepare(
    compiled: Any, grid: tuple[int, ...], args: dict[str, Any], changing: tuple[str, ...]
) -> PreparedLaunch | None:
    """``compiled`` as a prepared launch, or None where Triton's launcher is not of the release known here."""
    raw = _raw_launcher(compiled)
    return None if raw is None else PreparedLaunch(raw, compiled, grid, args, changing)


def encode(shape: tuple[int, int], layout: dict[str, Any], address: int, stride: int) -> Any:
    """The TMA descriptor of the matrix at ``address``; ``layout`` is the compiled kernel's account of the box."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return driver.active.utils.fill_tma_descriptor(
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
    if not triton.__version__.startswith(KNOWN_RELEASE):
        return None
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch = launcher.launch
    # around the C function lies one in Python that encodes descriptors, if the kernel takes any
    return inspect.getclosurevars(launch).nonlocals["launcher"] if inspect.isfunction(launch) else launch
