"""A CPU platform for verl, which knows none: import it before the modules of verl's that ask for the platform.

In processes that verl starts it is named in VERL_USE_EXTERNAL_MODULES.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.utils import distributed

MEMORY = {name: lambda *args: 0 for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated")}
MEMORY |= dict(memory_reserved=lambda *args: 0, mem_get_info=lambda *args: (0, 0), empty_cache=lambda: None)
NAME = dict(get_device_name=lambda *args: "CPU")


class CPU(PlatformCUDA):
    """What verl's FSDP engine and its workers ask a platform for. Ray is told of GPUs, and gives out that many."""

    device_name = "cpu"
    device_module = SimpleNamespace(**vars(torch.cpu) | MEMORY | NAME)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def empty_cache(self) -> None:
        pass

    def set_allocator_settings(self, settings: Any) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(CPU())
# workers ask for one backend for the CPU and one for the device
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)

# isort: split
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402


class FSDP1(transformer_impl.FSDP):
    """Sends no weights from the first process to the others, which FSDP1 does on GPUs alone: all must load them. A
    reference's stay where they are, for FSDP1 too would pin them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | dict(sync_module_states=False, cpu_offload=None))


transformer_impl.FSDP = FSDP1
_offload = transformer_impl.CPUOffloadPolicy
# the frozen reference's weights wait in pinned memory, which a machine without accelerator has none of
transformer_impl.CPUOffloadPolicy = lambda pin_memory: _offload(pin_memory=False)
