"""Two processes train as one does: groups dealt by cost, one process without any, parameters equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from treegrpo import balance, build_forest, toy
from treegrpo.config import TrainConfig
from treegrpo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent

# the same in one process and in two
RUN = """
import json, os, sys
import torch
from treegrpo.config import TrainConfig
from treegrpo.trainer import Trainer

torch.set_num_threads(1)
settings, out = json.loads(sys.argv[1]), sys.argv[2]
trainer = Trainer(TrainConfig(**settings))
history = trainer.train()
if trainer.accelerator.is_main_process:
    torch.save([history, {name: p.detach() for name, p in trainer.policy.named_parameters()}], out)
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
# what is done is done: gloo's threads may abort an interpreter that is being torn down
os._exit(0)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def settings(files, folder, **changes):
    rollouts, model = files
    base = dict(rollouts=f"replay:{rollouts}", model=str(model), output_dir=str(folder), max_steps=3)
    base |= dict(learning_rate=2e-3, save_strategy="no", disable_tqdm=True)
    return base | changes


def one_process(**options):
    trainer = Trainer(TrainConfig(**options))
    history = trainer.train()
    return history, {name: p.detach() for name, p in trainer.policy.named_parameters()}


def two_processes(out, **options):
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = out.with_suffix(".py")
    script.write_text(RUN)
    command = [*launch, str(script), json.dumps(options), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(groups_per_step=3, row_token_budget=200),
        dict(groups_per_step=1, loss_type="dapo"),
        dict(groups_per_step=2, samples="call", num_iterations=2, gradient_accumulation_steps=2, beta=0.05),
        dict(groups_per_step=3, attention="chain"),
    ],
    ids=["uneven", "one_empty", "calls_iterations_reference", "chain"],
)
def test_two_processes_train_as_one(files, tmp_path, changes):
    history, parameters = one_process(**settings(files, tmp_path / "one", **changes))
    shared, found = two_processes(tmp_path / "two.pt", **settings(files, tmp_path / "two", **changes))
    assert max(float((found[name] - p).abs().max()) for name, p in parameters.items()) < 1e-6
    # not unique tokens: groups on two processes cannot share a beginning
    for name in ("loss", "grad_norm", "tree/chain_tokens", "num_tokens", "entropy", "ratio/min"):
        got, want = ([row.get(name) for row in rows] for rows in (shared, history))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6, nan_ok=True), name
    assert all(row["batch/rank_imbalance"] == 1.0 for row in history)
    imbalance = [row["batch/rank_imbalance"] for row in shared]
    assert all(1.0 <= x <= 2.0 for x in imbalance) and (changes["groups_per_step"] > 1 or imbalance == [2.0] * 3)


def test_groups_are_dealt_longest_first():
    gen = torch.Generator().manual_seed(0)
    for num_ranks in (1, 2, 3, 8, 64):
        costs = torch.randint(1, 1000, (40,), generator=gen).tolist()
        parts = balance.assign(costs, num_ranks)
        assert sorted(i for part in parts for i in part) == list(range(40)) and len(parts) == num_ranks
        loads = [sum(costs[i] for i in part) for part in parts]
        assert max(loads) <= 4 / 3 * max(sum(costs) / num_ranks, max(costs)) + 1
        # whoever has the most would not gain by giving its smallest away
        busiest = max(range(num_ranks), key=loads.__getitem__)
        assert loads[busiest] - min(costs[i] for i in parts[busiest]) <= min(loads)
    with pytest.raises(ValueError, match="at least 1"):
        balance.assign([1], 0)


def test_costs_are_flops_or_tokens(files):
    trees = build_forest(toy.sample_groups(3))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files[1])
    tree, chain = (balance.costs(trees, config, attention) for attention in ("tree", "chain"))
    assert all(a < b for a, b in zip(tree, chain, strict=True))
    assert balance.costs(trees, {"model_type": "unheard_of"}, "tree") == [one.num_tokens for one in trees]
