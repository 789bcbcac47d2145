"""One process of a distributed run: `python trl_worker.py FOLDER OUT JSON`, started by torch's launcher or alone.

Writes the parameters after training and TRL's log, from the main process. JSON: the trainer's class ("tree" or
"chain") as `kind`, its arguments, and how weights are sharded: `sharding` "fsdp2", "zero2" or "zero3" (DeepSpeed).
"""

import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer
from trl_tiny import make

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def shard(sharding: str, batch_size: int) -> dict:
    """Arguments of TRL for it. accelerate shards on accelerators alone: it is told that this CPU is one."""
    state = accelerate.state.PartialState
    state._prepare_backend = lambda *args: ("gloo", accelerate.DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    arguments = dict(use_cpu=False, ddp_backend="gloo")
    if sharding == "fsdp2":
        os.environ |= FSDP2
        return arguments
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    config = {
        "zero_optimization": {"stage": int(sharding.removeprefix("zero"))},
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return arguments | dict(deepspeed=config)


def parameters(trainer) -> dict:
    """All of them, whole, from every process."""
    found = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def main() -> None:
    folder, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    if sharding := arguments.pop("sharding", None):
        arguments |= shard(sharding, arguments["per_device_train_batch_size"])
    if arguments.pop("kind") == "chain":
        trainer = make(GRPOTrainer, folder, out, **arguments)
    else:
        trainer = make(TreeGRPOTrainer, folder, out, config=TreeGRPOConfig, **arguments)
    trainer.train()
    whole, kinds = parameters(trainer), sorted({type(p).__name__ for p in trainer.model.parameters()})
    if trainer.accelerator.is_main_process:
        processes = trainer.accelerator.num_processes
        result = dict(parameters=whole, kinds=kinds, log=trainer.state.log_history, processes=processes)
        torch.save(result, out / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # what is done is done: gloo's threads may abort an interpreter that is being torn down
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
