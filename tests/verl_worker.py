"""One of two processes of test_verl.py: `python tests/verl_worker.py RANK PORT FOLDER OUT tree|verl fsdp2|fsdp`."""

import functools
import sys

import torch
import verl_tiny as tiny
from verl.workers.utils.losses import ppo_loss

import treegrpo.integrations.verl  # noqa: F401


def main() -> None:
    rank, port, folder, out, kind, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    tiny.join(int(rank), 2, int(port))
    engine = tiny.engine(folder, tree=kind == "tree", strategy=strategy)
    samples = tiny.rows(4)
    # whole groups on a process; under the budget the first needs two micro-batches and the second three
    mine = samples[: 2 * tiny.GROUP] if rank == "0" else samples[2 * tiny.GROUP :]
    budget = 29 if kind == "tree" else 4096
    data = tiny.batch(mine, global_batch_size=len(samples), max_token_len_per_gpu=budget)
    loss = functools.partial(ppo_loss, tiny.actor_config())
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss)
        grads = tiny.parameters(engine, grad=True)
        engine.optimizer_step()
    found = dict(grads=grads, parameters=tiny.parameters(engine), loss=sum(output["loss"]), passes=len(output["loss"]))
    torch.save(found, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
