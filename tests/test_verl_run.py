"""verl's own ``main_ppo`` for two steps with its engine and trainer, and with ours: two Ray workers, gloo, CPU.

Only sampling is a script (verl_script.py), since verl's rollout servers want a GPU.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("transfer_queue")
import pandas
import torch
import verl_tiny as tiny
from safetensors.torch import load_file
from transformers import AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).resolve().parent
VERL = dict(vendor="nvidia", attention="sdpa", mode="sync", remove_padding=False)
TREE = dict(vendor="treegrpo", attention="treegrpo", mode="tree_sync", remove_padding=True)
FLOAT32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
NOT_COMPARED = ("timing", "perf/", "actor/perf", "global_seqlen/balanced")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verl")
    tiny.write_model(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path / "model")
    draw = random.Random(3)
    rows = []
    for index in range(8):
        words = " ".join(f"w{draw.randrange(2, tiny.VOCAB)}" for _ in range(5 + index % 3))
        extra = dict(split="train", index=index)
        rows.append(dict(data_source="script", prompt=[dict(role="user", content=words)], extra_info=extra))
    pandas.DataFrame(rows).to_parquet(path / "prompts.parquet")
    return path


def main_ppo(folder, name, *, vendor, attention, mode, remove_padding, more=()):
    """(what trainer it was, metrics of each step, weights at the end or None)."""
    model, actor, ref = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "ref"))
    data, rollout = folder / "prompts.parquet", "actor_rollout_ref.rollout"
    overrides = [
        *(f"data.{key}={data}" for key in ("train_files", "val_files")),
        *("data.train_batch_size=4", "data.max_prompt_length=32", "data.max_response_length=32"),
        *("data.dataloader_num_workers=0", "data.shuffle=False"),
        *(f"{model}.path={folder / 'model'}", f"{model}.use_remove_padding={remove_padding}"),
        *(f"+{model}.override_config.attn_implementation={attention}", f"{model}.enable_gradient_checkpointing=False"),
        # a step is one mini-batch, so that nothing depends on which rows verl puts into which
        *(f"{actor}.strategy=fsdp2", f"{actor}.ppo_mini_batch_size=4", f"{rollout}.n=8", f"{actor}.optim.lr=1e-3"),
        # a reference of its own, in the same workers
        *(f"{actor}.use_kl_loss=True", f"{actor}.kl_loss_coef=0.5"),
        *(f"{actor}.use_dynamic_bsz=True", f"{actor}.ppo_max_token_len_per_gpu=200", f"{actor}.entropy_coeff=0.01"),
        *(f"{rollout}.log_prob_max_token_len_per_gpu=200", f"{actor}.use_torch_compile=False"),
        *(f"+{part}.fsdp_config.mixed_precision={FLOAT32}" for part in (actor, ref)),
        *(f"{actor}.fsdp_config.use_torch_compile=False", f"{actor}.checkpoint.save_contents=[model,hf_model]"),
        *(f"{rollout}.name=script", f"{rollout}.nnodes=1"),
        f"+{rollout}.agent.agent_loop_manager_class=verl_script.ScriptedAgentLoops",
        *(f"trainer.v1.trainer_mode={mode}", "algorithm.adv_estimator=grpo", "trainer.device=cpu"),
        *("trainer.n_gpus_per_node=2", "trainer.nnodes=1", "trainer.logger=[file]", "trainer.val_before_train=False"),
        *("trainer.total_training_steps=2", "trainer.save_freq=2", f"trainer.default_local_dir={folder / name}"),
        *("transfer_queue.backend.SimpleStorage.num_data_storage_units=1", "reward.num_workers=1"),
        *("ray_kwargs.ray_init.num_cpus=32", "+ray_kwargs.ray_init.num_gpus=2"),
        "+ray_kwargs.ray_init.include_dashboard=False",
        *more,
    ]
    log = folder / f"{name}.jsonl"
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent / "kernels"))),
        OMP_NUM_THREADS="1",
        VERL_USE_EXTERNAL_MODULES="verl_script,treegrpo.integrations.verl",
        VERL_ENGINE_VENDOR=vendor,
        VERL_ENGINE_DEVICE="cuda",
        VERL_FILE_LOGGER_PATH=str(log),
    )
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(key, None)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    metrics = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    weights = folder / name / "global_step_2" / "actor" / "huggingface" / "model.safetensors"
    return json.loads(log.with_suffix(".json").read_text()), metrics, load_file(weights) if weights.exists() else None


def assert_metrics_agree(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() - theirs.keys() == {"actor/packing_ratio"} and not theirs.keys() - mine.keys()
        assert mine["actor/packing_ratio"] > 1.5
        for key, value in theirs.items():
            if not key.startswith(NOT_COMPARED):
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        # groups of five rows, and padding to fill up: as even as single rows
        assert mine["global_seqlen/balanced_max"] < 1.05 * theirs["global_seqlen/balanced_max"]


def test_two_steps(folder):
    """tree_grpo compares sessions as verl's GRPO does, for each of verl's sessions is a tree by itself."""
    who, want, weights = main_ppo(folder, "verl", **VERL)
    assert who == dict(trainer="PPOTrainerSync", buffer="ReplayBuffer")
    who, got, found = main_ppo(folder, "tree", **TREE, more=["algorithm.adv_estimator=tree_grpo"])
    assert who == dict(trainer="TreePPOTrainerSync", buffer="ReplayBuffer")
    assert_metrics_agree(got, want)
    assert min(step["actor/grad_norm"] for step in want) > 0.1 and want[1]["actor/kl_loss"] > 1e-4
    start = load_file(folder / "model" / "model.safetensors")
    assert max(float((weights[key] - start[key]).abs().max()) for key in start) > 1e-3
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)
