"""The processes of a run: one, plain data parallelism (DDP) or FSDP2, as accelerate's launcher was told.

Every process holds its own rows; gradients are averaged. Under FSDP2 (`fully_shard`) each also holds only its part of
every weight, gradient and optimiser state: a layer's weights are gathered for its forward and backward alone. The
settings are those of accelerate's config file (`fsdp_version: 2`, examples/fsdp2.yaml); the sharding itself is torch's,
the same on GPUs and on the CPU, where accelerate has none.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treegrpo.logprobs import unwrap


def gather_apart() -> Callable[[list], list]:
    """A function from this process's list to the lists of all, one after another; all processes call both.

    It has a group of its own, so that a thread may gather while another trains: messages of one group in two orders
    would be taken for each other.
    """
    group = torch.distributed.new_group(backend="gloo")

    def gather(items: list) -> list:
        lists: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(lists, items, group=group)
        return [item for of_one in lists for item in of_one]

    return gather


@dataclass(frozen=True)
class Sharding:
    """What accelerate's config says of FSDP2."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for backward."""
    layer_names: tuple[str, ...] = ()
    """Classes of the layers that are gathered one at a time; empty takes those the model names itself."""
    by_layer: bool = True
    """False gathers the whole model at once."""
    full_checkpoints: bool = False
    """Checkpoints in one piece (FULL_STATE_DICT), not one file a process."""

    @classmethod
    def from_environment(cls) -> Sharding | None:
        """The settings the launcher left in the environment, None without FSDP.

        Raises:
            ValueError: FSDP1, or an option this trainer does not have; each names the key of accelerate's config.
        """
        from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
        from torch.distributed.fsdp import StateDictType
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
            return None
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"fsdp_version: {version} of accelerate's config: only FSDP2 is supported, set it to 2")
        plugin = FullyShardedDataParallelPlugin()
        refused = {
            "fsdp_offload_params": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
            "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        }
        for name, is_set in refused.items():
            if is_set:
                cure = ", and give --gradient-checkpointing" if name == "fsdp_activation_checkpointing" else ""
                raise ValueError(f"{name} of accelerate's config is not supported here: set it to false{cure}")
        kind = plugin.state_dict_type
        if kind not in (StateDictType.SHARDED_STATE_DICT, StateDictType.FULL_STATE_DICT):
            raise ValueError("fsdp_state_dict_type of accelerate's config: give SHARDED_STATE_DICT or FULL_STATE_DICT")
        # the plugin keeps a function, or None for NO_WRAP
        policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
        if policy not in (None, transformer_auto_wrap_policy):
            raise ValueError("fsdp_auto_wrap_policy of accelerate's config: give TRANSFORMER_BASED_WRAP or NO_WRAP")
        names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        return cls(
            reshard_after_forward=bool(plugin.reshard_after_forward),
            layer_names=tuple(name.strip() for name in names.split(",") if name.strip()),
            by_layer=policy is not None,
            full_checkpoints=kind == StateDictType.FULL_STATE_DICT,
        )

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the causal LM `model` that are gathered one at a time.

        Raises:
            ValueError: the model names none, or has none of the given names.
        """
        if not self.by_layer:
            return []
        names = set(self.layer_names or getattr(model, "_no_split_modules", None) or ())
        found = [module for module in model.modules() if type(module).__name__ in names]
        if not found:
            known = f"has no layer called {' or '.join(sorted(names))}" if names else "does not name its layers"
            raise ValueError(
                f"{type(model).__name__} {known}: give their class in accelerate's config, as"
                " fsdp_transformer_layer_cls_to_wrap"
            )
        return found


class Parallel:
    """Wraps models for the processes there are, and does what has to know of all of them.

    Args:
        bf16: under FSDP2, weights are gathered in bfloat16 and gradients summed in float32.

    Raises:
        ValueError: a launch that this trainer cannot follow; see `Sharding.from_environment`.
    """

    def __init__(self, *, bf16: bool = False) -> None:
        from accelerate import Accelerator

        # Without a GPU accelerate would leave launched processes alone, each the main one, unless told of the CPU.
        # bf16 is our own autocast in step.py: the frozen reference, which accelerate does not wrap, must compute alike.
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
        self.bf16 = bf16
        self._check_launch()
        sharding = Sharding.from_environment()
        self.sharding = sharding if self.accelerator.num_processes > 1 else None
        """None where nothing is sharded: one process, or plain data parallelism."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def end(self) -> None:
        """Wait for all processes, as the last thing. One that ended right behind its last message could be aborted:
        gloo's threads let go of a message's tensors a little later, for which they need a living interpreter."""
        self.accelerator.wait_for_everyone()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in place of `model`, which is on the device afterwards. Under FSDP2 it is the same object,
        its parameters DTensors from here on, so optimisers are made afterwards."""
        if self.sharding is None:
            return self.accelerator.prepare(model)
        # The root holds the head, which backward needs first: freeing it in between gains nothing.
        return self._shard(model, self.sharding, self.sharding.reshard_after_forward, reshard_root=False)

    def wrap_frozen(self, model: nn.Module) -> nn.Module:
        """The same for a model that is never trained."""
        if self.sharding is None:
            return model.to(self.device)
        # without a backward nothing else would free what was gathered
        return self._shard(model, self.sharding, reshard=True, reshard_root=True)

    def _shard(self, model: nn.Module, sharding: Sharding, reshard: bool, reshard_root: bool) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        base = unwrap(model)
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.accelerator.num_processes,)),
            "mp_policy": precision,
            "reshard_after_forward": reshard,
            # packed 4-bit weights are whole on every process
            "ignored_params": {p for p in model.parameters() if not p.is_floating_point()},
        }
        for layer in sharding.layers(base):
            fully_shard(layer, **options)
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if not {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}:
            fully_shard(embedding, **options)
        # in place: the model becomes a subclass of its class
        fully_shard(model, **options | {"reshard_after_forward": reshard_root})
        return model

    @contextlib.contextmanager
    def accumulation(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around the backward of one row. DDP sends gradients once, in the last one; FSDP2 in each, so that no process
        ever holds all gradients."""
        if is_last or self.sharding is not None:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """The norm of all gradients over all processes, a scalar; they are scaled down to `max_norm` (0: not)."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        return norm

    def _check_launch(self) -> None:
        from accelerate.utils import DistributedType

        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(f"{kind.value} is not supported: launch with FSDP2 or plain data parallelism")
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            raise ValueError("parallelism_config of accelerate's config is not supported: remove it")
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched != "no" and not (launched == "bf16" and self.bf16):
            raise ValueError(
                f"mixed_precision: {launched} of accelerate's config: set it to 'no'; --bf16 computes in bfloat16"
            )


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor (every process calls it), any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_like(value: Tensor, like: Any) -> Tensor:
    """`value`, whole on every process, distributed as the DTensor `like` is; as it is where `like` is none."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # each process cuts its own part out of what it read, nothing is sent
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Fills `target`, whole on every process, from the trained parameters of `source`, which may be sharded; every
    process calls it."""
    into = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            into[name].copy_(full(parameter))
