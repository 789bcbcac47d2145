"""Work for the processes of torch's launcher, one job after another: `distributed_worker.py JOBS.json`.

A job is {"settings": of TrainConfig, "environment": what the launcher would set, "out": file}: the main process
writes `[history, parameters, gradients of the first step, numbers held]` there, or as text what was raised. With
"gradients" in place of "settings" it holds the arguments of `gradients`, whose result is written.
"""

import json
import os
import sys
from pathlib import Path

import torch

from treegrpo import build_forest, load, pack, token_logprobs
from treegrpo.config import TrainConfig
from treegrpo.models import build_model
from treegrpo.parallel import full
from treegrpo.trainer import Trainer


def run(settings: dict) -> list:
    """Tensors come whole; the numbers held are those of this process: of the policy, of AdamW, of the reference."""
    kept = {}

    def keep(step, model):
        if not kept:
            kept.update({n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = Trainer(TrainConfig(**settings), on_gradients=keep)
    history = trainer.train()
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    reference = trainer.reference.model.parameters() if trainer.reference and trainer.reference.model else []
    held = [sum(map(num_held, tensors)) for tensors in (trainer.policy.parameters(), moments, reference)]
    parameters = {name: full(p.detach()).clone() for name, p in trainer.policy.named_parameters()}
    return [history, parameters, kept, held]


def num_held(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def gradients(rollouts: str, model: str, units: str, reshard: bool, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Of a function of all log-probs and entropies, with the model cut into the FSDP2 units people cut models into:
    "layers" and the rest, the "head" for itself, accelerate's "tail" of norm and head, or the "root" alone."""
    model = build_model(model, 0).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if units:
        shard(model, units, reshard)
    (batch,) = pack(build_forest(load(rollouts)))
    with torch.no_grad():
        frozen = token_logprobs(model, batch)
    logp, entropy = token_logprobs(model, batch, entropy=True)
    weight = torch.linspace(-1, 1, len(logp))
    ((logp - 0.5 * frozen) * logp * weight + 0.1 * entropy).sum().backward()
    return {name: full(p.grad).clone() for name, p in model.named_parameters()}


def shard(model, units: str, reshard: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    inner = model.model
    is_tied = inner.embed_tokens.weight is model.lm_head.weight
    tail = [inner.norm, *([inner.embed_tokens] if is_tied else []), model.lm_head]
    parts = {"root": [], "layers": [*inner.layers]}
    parts |= {"head": [*inner.layers, inner.embed_tokens, model.lm_head], "tail": [*inner.layers, tail]}
    for part in [*parts[units], model]:
        fully_shard(part, reshard_after_forward=reshard)


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(job.get("environment", {}))
        try:
            result = gradients(**job["gradients"]) if "gradients" in job else run(job["settings"])
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
