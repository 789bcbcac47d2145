"""One process of a distributed run: `python trl_worker.py FOLDER OUT JSON`, started by torch's launcher or alone.

Writes the parameters after training and TRL's log, from the main process. JSON: the trainer's class ("tree" or
"chain") as `kind`, and its arguments.
"""

import json
import os
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer
from trl_tiny import make, parameters

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer


def main() -> None:
    folder, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    if arguments.pop("kind") == "chain":
        trainer = make(GRPOTrainer, folder, out, **arguments)
    else:
        trainer = make(TreeGRPOTrainer, folder, out, config=TreeGRPOConfig, **arguments)
    trainer.train()
    if trainer.accelerator.is_main_process:
        processes = trainer.accelerator.num_processes
        result = dict(parameters=parameters(trainer), log=trainer.state.log_history, processes=processes)
        torch.save(result, out / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # what is done is done: gloo's threads may abort an interpreter that is being torn down
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
