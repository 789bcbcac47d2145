"""Launches prepared once a plan: of a later launch the host does one lookup a descriptor and one call into C.

Triton's own path works out at every launch what a kernel is specialised on, asks the driver about each pointer and
encodes each TMA descriptor. For one kernel, one plan and fixed shapes none of that changes but the addresses of the
call's own tensors, and addresses repeat, for the caching allocator hands out the same blocks again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
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


class Launch(Protocol):
    """A kernel with everything it is launched with: common.Launch, hopper_common.HopperLaunch."""

    @property
    def grid(self) -> tuple[int, ...]: ...

    @property
    def args(self) -> dict[str, Any]: ...

    def run(self) -> Any:
        """Launch Triton's way; returns the compiled kernel."""


class PreparedLaunch:
    """One compiled kernel with all its arguments but the addresses of ``changing``."""

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
        places: dict[str, tuple[int, tuple[Any, Any, Any] | None, dict[int, Any]]] = {}
        for name in compiled.src.fn.arg_names:
            x = args[name]
            if isinstance(x, Tensor):
                places[name] = (len(self._args), None, {})
                self._args.append(x.data_ptr())
            elif hasattr(x, "block_shape"):
                # its shape and strides: the tensor below it is the first call's, and is not kept alive
                places[name] = (len(self._args), (tuple(x.shape), tuple(x.strides), next(layouts)), {})
                # the encoded descriptor, its shape, its strides
                self._args += [None, *x.shape, *x.strides]
            else:
                self._args.append(x)
        self._places = [places[name] for name in changing]

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launch with the address of each changing argument."""
        head, args = self._head.copy(), self._args.copy()
        head[_STREAM] = stream
        for (place, described, encoded), address in zip(self._places, addresses, strict=True):
            if described is None:
                args[place] = address
                continue
            found = encoded.get(address)
            if found is None:
                if len(encoded) >= MAX_ENCODED:
                    encoded.clear()
                found = encoded[address] = encode(*described, address)
            args[place] = found
        if self._nested:
            self._launch(*head, args)
        else:
            self._launch(*head, *args)


def launch(
    known: dict[tuple, PreparedLaunch | None],
    key: tuple,
    make: Callable[[], Launch],
    changing: dict[str, Tensor],
) -> None:
    """Launch what ``make`` describes; from the second time on with the addresses of ``changing`` alone.

    ``changing`` are the call's own arguments, by name; other tensors are the same in every call with ``known``, and
    outlive it. There prepared launches are kept, by what they depend on: ``key``, which tells the kernel, shapes,
    dtypes and numbers apart, and how the tensors lie in memory.
    """
    tensors = changing.values()
    addresses = [x.data_ptr() for x in tensors]
    # Triton compiles for strides, and for addresses that are multiples of 16
    key = (key, *[x.stride() for x in tensors], *[address % 16 == 0 for address in addresses])
    known = {} if hooked() else known
    prepared = known.get(key)
    if prepared is None:
        described = make()
        known[key] = prepare(described.run(), described.grid, described.args, tuple(changing))
        return
    index = next(iter(tensors)).get_device()
    if torch.cuda.current_device() == index:
        prepared(driver.active.get_current_stream(index), *addresses)
    else:
        with torch.cuda.device(index):
            prepared(driver.active.get_current_stream(index), *addresses)


def new_shape(sizes: Iterable[int], like: Tensor) -> Tensor:
    """An empty tensor of shape (0, *sizes): a tile configuration, which so travels through the operator with the lists
    made for it, and with it, as an attribute, what is prepared for launches on them."""
    shape = torch.empty((0, *sizes), dtype=torch.int32, device=like.device)
    shape.launches = {}  # type: ignore[attr-defined]
    return shape


def launches_of(shape: Tensor) -> dict[tuple, PreparedLaunch | None]:
    """What is prepared for the lists that ``shape`` opens; where a tracer put another tensor in its place, nothing."""
    found = getattr(shape, "launches", None)
    return {} if found is None else found


def prepare(
    compiled: Any, grid: tuple[int, ...], args: dict[str, Any], changing: tuple[str, ...]
) -> PreparedLaunch | None:
    """``compiled`` as a prepared launch, or None where Triton's launcher is not of a release known here, and in its
    interpreter, where nothing was compiled."""
    raw = None if compiled is None else _raw_launcher(compiled)
    return None if raw is None else PreparedLaunch(raw, compiled, grid, args, changing)


def encode(shape: tuple[int, int], strides: tuple[int, int], layout: dict[str, Any], address: int) -> Any:
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
        strides,
        0,
    )


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
