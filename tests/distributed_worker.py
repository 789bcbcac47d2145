"""Runs of the trainer in the processes of torch's launcher, one after another: `distributed_worker.py JOBS.json`.

A job is {"settings": of TrainConfig, "environment": what accelerate's launcher would set, "out": file or null}. The
main process writes `[history, parameters, gradients of the first step]` there, every tensor whole. What a job raises is
written in its place, as text.
"""

import json
import os
import sys
from pathlib import Path

import torch

from treegrpo.config import TrainConfig
from treegrpo.parallel import full
from treegrpo.trainer import Trainer


def run(settings: dict) -> tuple[list, dict, dict]:
    gradients = {}

    def keep(step, model):
        if not gradients:
            gradients.update({n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = Trainer(TrainConfig(**settings), on_gradients=keep)
    history = trainer.train()
    return history, {name: full(p.detach()).clone() for name, p in trainer.policy.named_parameters()}, gradients


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(job["environment"])
        try:
            result = list(run(job["settings"]))
        except ValueError as error:
            result = str(error)
        if torch.distributed.get_rank() == 0:
            torch.save(result, job["out"])
    torch.distributed.barrier()
    # what is done is done: gloo's threads may abort an interpreter that is being torn down
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
