"""A device that is not the CPU, on the CPU: its tensors refuse to meet the CPU's, as a GPU's do.

`pytest -p other_device FILES` runs tests on it: whatever takes the accelerator that is there takes this one. It
computes what the CPU computes, on the `inner` tensor of each of its own; what it has not is kernels, streams and speed.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import library as registration
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
# its name before it has its own
DEVICE = torch.device("privateuseone", 0)
# what takes CPU tensors beside a GPU's, too
MIXED = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")


class OtherTensor(Tensor):
    inner: Tensor
    """On the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), layout=inner.layout)
        self = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **layout)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.inner}, {DEVICE}"

    def tolist(self) -> Any:
        _waited()
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol):
        # what map_location="cpu" makes of a GPU's
        return self.inner.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied: Tensor = OtherTensor(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied)
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied


# what a GPU is waited for: its values come to the CPU, or say how long the result is
WAITS = (
    *("_local_scalar_dense", "equal", "nonzero", "bincount", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive"),
)
_watchers: list[list[str]] = []


@contextmanager
def watched() -> Iterator[list[str]]:
    """Who waits for the device meanwhile: functions of treegrpo, as "step.check_finite", or "elsewhere"."""
    found: list[str] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers.remove(found)


def _waited() -> None:
    if _watchers:
        where = "elsewhere"
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if path.parent.name == "treegrpo":
                where = f"{path.stem}.{frame.name}"
        for found in _watchers:
            found.append(where)


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, OtherTensor) else x


def run(func, args: tuple, kwargs: dict) -> Any:
    """`func` on the CPU, its results here unless it moves them."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    name = func.overloadpacket.__name__
    # numbers may come from the CPU, as they may for a GPU
    strangers = [x for x in tensors if not isinstance(x, OtherTensor) and x.dim()]
    if strangers and name not in MIXED:
        shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, got {shapes}")
    device = kwargs.get("device")
    leaves = device is not None and torch.device(device).type != NAME
    masks = [x for x in tree_flatten(args[1:2])[0] if isinstance(x, Tensor) and x.dtype == torch.bool]
    unknown = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITS or unknown or (leaves and tensors) or (name == "index" and masks):
        _waited()
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(inner, (args, kwargs))
    if name == "histc" and not args[0].is_floating_point():
        # a GPU counts integers, a CPU does not
        return OtherTensor(func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype))
    result = func(*args, **kwargs)
    if any(x.shape != x.inner.shape for x in tensors if isinstance(x, OtherTensor)):
        raise RuntimeError(f"{func} gave a tensor another shape: make the operator that calls it here, as arange")
    if leaves:
        return result
    # what is written in place stays the tensor it was
    known = {id(x.inner): x for x in tensors if isinstance(x, OtherTensor)}
    return tree_map(
        lambda x: (known[id(x)] if id(x) in known else OtherTensor(x)) if isinstance(x, Tensor) else x, result
    )


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    return OtherTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return OtherTensor(torch.empty_strided(size, stride, dtype=dtype))


def _arange(*bounds, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return OtherTensor(torch.arange(*bounds, dtype=dtype))


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    inner(to).copy_(inner(source))
    return to


def _cast(name: str):
    """The operator under autocast: float32 is rounded to its dtype first."""
    operator = getattr(torch.ops.aten, name)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args):
        dtype = torch.get_autocast_dtype(NAME)
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*cast)

    return call


class _Module(_DummyBackendModule):
    """`torch.other`."""

    def get_rng_state(self, device=None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device=None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_aten, _every = registration.Library("aten", "IMPL"), registration.Library("_", "IMPL")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
for _name in ("arange", "arange.start", "arange.start_step"):
    _aten.impl(_name, _arange, "PrivateUse1")
_aten.impl("copy_", _copy, "PrivateUse1")
_every.fallback(registration.fallthrough_kernel, "AutocastPrivateUse1")
for _name in ("linear", "mm", "bmm", "matmul"):
    _aten.impl(_name, _cast(_name), "AutocastPrivateUse1")
# a parameter that moves stays the object it was, and tied ones tied
torch.__future__.set_swap_module_params_on_conversion(True)
# accelerate and transformers know the devices of others by name alone
os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
