"""FSDP2 on two gloo processes trains as one process does; a checkpoint resumes with any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from distributed_worker import run

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP2 |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
RESHARD, KEEP = {"FSDP_RESHARD_AFTER_FORWARD": "true"}, {"FSDP_RESHARD_AFTER_FORWARD": "false"}
TIED = {"tie_word_embeddings": True}

# name: (settings, environment, model)
RUNS = {
    "uneven": (dict(groups_per_step=3, row_token_budget=200), RESHARD, {}),
    "one_empty": (dict(groups_per_step=1), KEEP, {}),
    "everything": (
        dict(groups_per_step=2, samples="call", num_iterations=2, gradient_accumulation_steps=2, beta=0.05)
        | dict(gradient_checkpointing=True, entropy_coef=0.01),
        RESHARD,
        TIED,
    ),
    "tied_kept": (dict(groups_per_step=3, beta=0.05), KEEP, TIED),
    "chain": (dict(groups_per_step=3, attention="chain", gradient_checkpointing=True), KEEP, {}),
    "at_once": (dict(groups_per_step=3, row_token_budget=60), RESHARD | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}),
    "lora": (dict(groups_per_step=3, lora_r=3, beta=0.05, gradient_checkpointing=True), RESHARD, TIED),
    "lora_empty": (dict(groups_per_step=1, lora_r=3, num_iterations=2), KEEP, {}),
    "clipped": (dict(groups_per_step=3, max_grad_norm=1e-2), RESHARD, {}),
}
# cut after step 3, the first of the two updates on its groups
CUT = dict(groups_per_step=3, num_iterations=2, max_steps=5, lr_scheduler_type="cosine", warmup_steps=2, beta=0.05)
SAVING = dict(save_strategy="steps", save_steps=3)
DDP = {"ACCELERATE_USE_FSDP": "false"}
LORA = dict(lora_r=3)
# what the second half runs on: written by (processes, environment), resumed by (processes, environment), settings
RESUMED = {
    "sharded_2_to_1": ("two_sharded", None, {}),
    "sharded_2_to_ddp": ("two_sharded", DDP, {}),
    "sharded_2_to_2": ("two_sharded", FSDP2, {}),
    "full_2_to_1": ("two_full", None, {}),
    "1_to_2": ("one", FSDP2, {}),
    "lora_2_to_1": ("two_lora", None, LORA),
    "lora_1_to_2": ("one_lora", FSDP2, LORA),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


def settings(folder, name, changes, model=None):
    files = folder / f"files-{len(model or {})}"
    files.mkdir(exist_ok=True)
    rollouts, config = tiny.write(files, **(model or {}))
    base = dict(rollouts=f"replay:{rollouts}", model=str(config), output_dir=str(folder / name), max_steps=3)
    # Adam divides gradients by their size: with its own epsilon a rounding of 1e-9 in one of 5e-8 shows as 4e-6 in a weight
    base |= dict(learning_rate=2e-3, adam_epsilon=1e-3, save_strategy="no", disable_tqdm=True)
    return base | changes


def two_processes(folder, jobs):
    """What each job `(name, settings, environment)` gave, by name."""
    spec = [dict(settings=s, environment=e, out=str(folder / f"{name}.pt")) for name, s, e in jobs]
    (folder / "jobs.json").write_text(json.dumps(spec))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests" / "distributed_worker.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name, _, _ in jobs}


@pytest.fixture(scope="module")
def whole(folder):
    """Runs of one process, nothing cut; each leaves a checkpoint of step 3."""
    names = {"one": CUT, "one_lora": CUT | LORA}
    return {name: run(settings(folder, name, changes | SAVING)) for name, changes in names.items()}


@pytest.fixture(scope="module")
def shared(folder, whole):
    """All runs of two processes, in one launch."""
    jobs = [(name, settings(folder, f"two-{name}", s, model), FSDP2 | e) for name, (s, e, model) in RUNS.items()]
    full = FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    jobs += [("two_sharded", settings(folder, "two_sharded", CUT | SAVING), FSDP2 | KEEP)]
    jobs += [("two_full", settings(folder, "two_full", CUT | SAVING), full)]
    jobs += [("two_lora", settings(folder, "two_lora", CUT | LORA | SAVING), FSDP2)]
    for name, (written, environment, changes) in RESUMED.items():
        if environment is not None:
            jobs.append((name, resumed_settings(folder, name, written, changes), environment))
    return two_processes(folder, jobs)


def resumed_settings(folder, name, written, changes):
    checkpoint = str(folder / written / "checkpoint-3")
    return settings(folder, f"resumed-{name}", CUT | changes | dict(resume_from_checkpoint=checkpoint))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder, shared, name):
    changes, _, model = RUNS[name]
    history, parameters, gradients = run(settings(folder, f"one-{name}", changes, model))
    assert not isinstance(shared[name], str), shared[name]
    rows, found, found_gradients = shared[name]
    assert found.keys() == parameters.keys() and found_gradients.keys() == gradients.keys()
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4
    assert max(float((found_gradients[n] - g).abs().max()) for n, g in gradients.items()) < 1e-7
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-6
    for key in ("loss", "grad_norm", "tree/chain_tokens", "num_tokens", "entropy", "ratio/min", "kl", "reward"):
        got, want = ([row.get(key) for row in every] for every in (rows, history))
        if want != [None] * len(want):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_resumes(folder, whole, shared, name):
    written, environment, changes = RESUMED[name]
    history, parameters, _ = whole["one_lora" if changes else "one"]
    if environment is None:
        assert not isinstance(shared[written], str), shared[written]
        rows, found, _ = run(resumed_settings(folder, name, written, changes))
    else:
        assert not isinstance(shared[name], str), shared[name]
        rows, found, _ = shared[name]
    assert [row["step"] for row in rows] == [4, 5]
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-6
    for key in ("loss", "grad_norm", "kl", "ratio/max", "learning_rate", "num_tokens"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in history[3:]], rel=1e-4, abs=1e-6), key
