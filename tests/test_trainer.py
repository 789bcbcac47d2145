"""The training loop: tree equals chain, cut and resumed equals uncut, accumulated equals whole, and bad input changes
nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from tiny import largest_difference, listing, run, settings

from treegrpo import Trajectory, checkpoint
from treegrpo.config import TrainConfig
from treegrpo.metrics import read_metrics
from treegrpo.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"samples": "call", "num_iterations": 2, "beta": 0.1, "loss_type": "grpo", "epsilon": 0.02},
        {
            "loss_type": "dr_grpo",
            "lora_r": 2,
            "beta": 0.1,
            "gradient_checkpointing": True,
            "shared_tokens": "mean",
            "row_token_budget": 60,
        },
        {
            "loss_type": "cispo",
            "importance_sampling_level": "sequence",
            "entropy_coef": 0.01,
            "num_iterations": 3,
            "temperature": 0.7,
        },
    ],
    ids=["default", "call_grpo_kl", "lora_checkpointing", "cispo_sequence_entropy"],
)
def test_tree_and_chain_give_the_same_curves(files, tmp_path, changes):
    tree, tree_weights = run(files, tmp_path / "tree", **changes)
    chain, chain_weights = run(files, tmp_path / "chain", attention="chain", **changes)
    for a, b in zip(tree, chain, strict=True):
        for name in ("loss", "grad_norm", "reward", "entropy", "ratio/mean", "learning_rate", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
        assert a["batch/forwarded_tokens_per_step"] < b["batch/forwarded_tokens_per_step"]
    # Adam divides by the gradient's size: a rounding of a tiny gradient becomes a visible part of a step of 0.01.
    assert largest_difference(tree_weights, chain_weights) < 1e-3
    assert tree[-1]["loss"] != 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_calls_are_weighted_one_by_one_as_the_samples_written_out(tmp_path, level):
    files = tiny.write(tmp_path, tiny.trajectories(logprobs=True))
    changes = {
        "samples": "call",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": f"{level}_truncate",
        "vllm_importance_sampling_clip_max": 50.0,
        "importance_sampling_level": level,
        "loss_type": "grpo",
        "num_iterations": 2,
        "max_steps": 2,
    }
    tree, _ = run(files, tmp_path / "tree", **changes)
    chain, _ = run(files, tmp_path / "chain", attention="chain", **changes)
    ratio = "sampling/importance_sampling_ratio"
    for a, b in zip(tree, chain, strict=True):
        for name in ("loss", "grad_norm", "ratio/mean", "clip_ratio/region_mean", f"{ratio}/min", f"{ratio}/mean"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert tree[0][f"{ratio}/min"] < tree[0][f"{ratio}/mean"]


def test_old_logprobs_of_other_samples_are_refused(files, tmp_path):
    changes = {"samples": "call", "num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    run(files, tmp_path, attention="chain", **changes)
    shutil.rmtree(checkpoint.listed(tmp_path)[-1])
    with pytest.raises(ValueError, match="no old log-probs of leaf"):
        Trainer(settings(files, tmp_path, resume_from_checkpoint="latest", **changes))


def test_same_seed_same_bits(files, tmp_path):
    first, weights = run(files, tmp_path / "a", num_iterations=2)
    second, again = run(files, tmp_path / "b", num_iterations=2)
    assert largest_difference(weights, again) == 0.0
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "beta": 0.1}, {"lora_r": 2, "num_iterations": 2, "beta": 0.1}],
    ids=["plain", "mid_iteration_kl", "lora"],
)
def test_resume_is_bit_exact(files, tmp_path, changes):
    changes = {"max_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 2, **changes}
    whole, weights = run(files, tmp_path / "whole", **changes)
    cut = tmp_path / "cut"
    Trainer(settings(files, cut, save_strategy="steps", save_steps=3, **changes)).train()
    # As if it had been stopped after step 3: later checkpoints gone, later metrics still there.
    for path in checkpoint.listed(cut)[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed, again = run(files, cut, resume_from_checkpoint="latest", **changes)
    assert largest_difference(weights, again) == 0.0
    assert [row["step"] for row in resumed] == [4, 5]
    timed = ("step_time", "perf/")
    for a, b in zip(whole[3:], resumed, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(timed)} == {
            k: v for k, v in b.items() if not k.startswith(timed)
        }
    assert [row["step"] for row in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_from_before_rollouts_were_sampled_resumes(files, tmp_path):
    run(files, tmp_path, save_strategy="steps", save_steps=2, max_steps=3)
    (path, last) = checkpoint.listed(tmp_path)
    shutil.rmtree(last)
    state = json.loads((path / "trainer_state.json").read_text())
    del state["generated_tokens"], state["best_reward"], state["lora_alpha"], state["lora_target_modules"]
    (path / "trainer_state.json").write_text(json.dumps(state))
    sizes = json.loads((path / "manifest.json").read_text())
    sizes["trainer_state.json"] = (path / "trainer_state.json").stat().st_size
    (path / "manifest.json").write_text(json.dumps(sizes))
    resumed, _ = run(files, tmp_path, resume_from_checkpoint="latest", max_steps=3)
    assert [row["step"] for row in resumed] == [3]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("shared_tokens", ["per_leaf", "once"])
def test_budget_and_accumulation_change_no_result(files, tmp_path, loss_type, shared_tokens):
    options = {
        "loss_type": loss_type,
        "shared_tokens": shared_tokens,
        "shuffle": False,
        "max_steps": 2,
        "entropy_coef": 0.01,
    }
    whole, weights = run(files, tmp_path / "a", groups_per_step=4, **options)
    budget, budget_weights = run(files, tmp_path / "b", groups_per_step=4, row_token_budget=40, **options)
    accumulated, accumulated_weights = run(
        files, tmp_path / "c", groups_per_step=2, gradient_accumulation_steps=2, **options
    )
    assert budget[0]["tree/rows"] == 4 and whole[0]["tree/rows"] == 1 and accumulated[0]["tree/rows"] == 2
    for other in (budget, accumulated):
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in whole], rel=1e-4, abs=1e-7)
        assert [row["grad_norm"] for row in other] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-4)
    assert largest_difference(weights, budget_weights) < 1e-3
    assert largest_difference(weights, accumulated_weights) < 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_tree_over_the_budget_is_cut_between_its_leaves(files, tmp_path, loss_type):
    options = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 2, "beta": 0.1, "epsilon": 0.02}
    whole, weights = run(files, tmp_path / "a", **options)
    cut, cut_weights = run(files, tmp_path / "b", row_token_budget=24, save_strategy="steps", save_steps=1, **options)
    assert cut[0]["tree/rows"] > 2 and cut[0]["tree/unique_tokens"] > whole[0]["tree/unique_tokens"]
    for name in ("loss", "grad_norm", "kl", "ratio/max"):
        assert [row[name] for row in cut] == pytest.approx([row[name] for row in whole], rel=1e-4, abs=1e-7), name
    assert largest_difference(weights, cut_weights) < 1e-3
    # old log-probs belong to leaves, however they were packed
    first = tmp_path / "b" / "checkpoint-1"
    resumed, again = run(files, tmp_path / "c", resume_from_checkpoint=str(first), **options)
    assert [row["step"] for row in resumed] == [2] and resumed[0]["tree/rows"] == 1
    assert largest_difference(weights, again) < 1e-3


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_metrics_do_not_depend_on_how_the_step_is_cut(tmp_path, loss_type):
    """Two trained leaves of unlike length, both the better ones, and a worse one of which nothing is trained."""
    rows = [
        Trajectory([1, 2, *ids], [0, 0] + [is_trained] * len(ids), reward=reward, group="g")
        for ids, is_trained, reward in (([3, 4, 5, 6, 7, 8], 1, 1.0), ([9], 1, 0.9), ([10] * 6, 0, 0.0))
    ]
    files = tiny.write(tmp_path, rows)
    options = {"loss_type": loss_type, "importance_sampling_level": "sequence", "num_iterations": 2}
    options |= {"groups_per_step": 1, "max_steps": 2, "epsilon": 0.02}
    options |= {"epsilon_high": 1.02 if loss_type == "cispo" else None}
    whole, _ = run(files, tmp_path / "a", **options)
    cut, _ = run(files, tmp_path / "b", row_token_budget=8, **options)
    assert cut[0]["tree/rows"] == 3 and whole[1]["ratio/min"] > 1
    for name in (name for name in whole[1] if name.startswith(("clip_ratio", "cispo", "ratio", "entropy"))):
        assert cut[1][name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-7), name


def test_the_optimiser_settings_are_those_of_the_run_that_goes_on(files, tmp_path):
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_steps": 4}
    run(files, tmp_path, save_strategy="steps", save_steps=2, **schedule)
    changes = {"learning_rate": 5e-3, "weight_decay": 0.3, "adam_beta1": 0.5, "adam_epsilon": 1e-6}
    first = str(tmp_path / "checkpoint-2")
    whole = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    trainer = Trainer(settings(files, tmp_path, resume_from_checkpoint=first, **schedule, **changes))
    rates = [row["learning_rate"] for row in trainer.train()]
    assert rates == pytest.approx([rate / 2 for rate in whole[2:]])
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.999), 1e-6)


def test_recorded_logprobs_are_used(tmp_path):
    files = tiny.write(tmp_path, tiny.trajectories(logprobs=True))
    recorded, _ = run(files, tmp_path / "a", old_logprobs="recorded", max_steps=1)
    computed, _ = run(files, tmp_path / "b", max_steps=1)
    assert recorded[0]["ratio/max"] != 1.0 and computed[0]["ratio/max"] == 1.0
    assert recorded[0]["sampling/sampling_logp_difference/mean"] == 0.0
    assert computed[0]["sampling/sampling_logp_difference/mean"] > 0.1
    plain = tiny.write(tmp_path)
    with pytest.raises(ValueError, match=r"trajectory 0 .*logprobs is missing"):
        run(plain, tmp_path / "c", old_logprobs="recorded")
    rows = [dataclasses.replace(row, logprobs=np.exp(row.logprobs)) for row in tiny.trajectories(logprobs=True)]
    with pytest.raises(ValueError, match=r"trajectory 0 \(group 'g0'\): logprobs\[8\] is 0\..*not probabilities"):
        run(tiny.write(tmp_path, rows), tmp_path / "d")


def test_bf16_stays_near_float32(files, tmp_path):
    exact, _ = run(files, tmp_path / "a", max_steps=1)
    low, weights = run(files, tmp_path / "b", max_steps=1, bf16=True)
    assert low[0]["entropy"] == pytest.approx(exact[0]["entropy"], rel=0.02)
    assert low[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.1)
    assert all(p.dtype == torch.float32 for p in weights.values())


def test_training_raises_the_probability_of_rewarded_leaves(files, tmp_path):
    from treegrpo.evaluate import evaluate

    rows = tiny.trajectories()
    before = evaluate(str(files[1]), rows, attention="both")
    Trainer(settings(files, tmp_path, max_steps=20, groups_per_step=4, save_strategy="steps")).train()
    after = evaluate(str(checkpoint.listed(tmp_path)[-1]), rows, attention="both")
    gap = [result["eval_logp/rewarded"] - result["eval_logp/unrewarded"] for result in (before, after)]
    assert gap[1] > gap[0] + 0.1
    assert before["eval_tree_vs_chain/max"] < 1e-4


def test_checkpoint_loads_anywhere_and_metrics_have_trl_names(files, tmp_path):
    from transformers import AutoModelForCausalLM

    history, weights = run(files, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1, beta=0.1)
    (path,) = checkpoint.listed(tmp_path)
    assert path.name == "checkpoint-3"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert largest_difference(weights, dict(loaded.named_parameters())) == 0.0
    assert load_file(path / "model.safetensors").keys() >= {"model.embed_tokens.weight"}
    names = "loss grad_norm learning_rate reward reward_std frac_reward_zero_std kl entropy"
    names += " clip_ratio/low_mean clip_ratio/low_min"
    names += (
        " clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean completions/mean_length num_tokens step_time"
    )
    names += " tree/unique_tokens tree/chain_tokens tree/depth_max tree/forks tree/flop_ratio"
    names += " batch/packing_ratio batch/row_imbalance"
    names += " batch/masked_token_frac batch/forwarded_tokens_per_step perf/fwd_bwd_s perf/forwarded_tok_s_fwd_bwd"
    assert set(names.split()) <= set(history[0])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == history and all(isinstance(json.dumps(row), str) for row in rows)
    first = history[0]
    assert first["tree/unique_tokens"] < first["tree/chain_tokens"] and first["tree/flop_ratio"] > 1


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    rows = tiny.trajectories(logprobs=True)
    # A log-prob this low is legal, but its ratio overflows; the reward makes the advantage negative.
    low = np.where(rows[5].loss_mask, np.float32(-1000.0), np.float32(np.nan))
    rows[5] = dataclasses.replace(rows[5], logprobs=low, reward=-9.0)
    files = tiny.write(tmp_path, rows)
    options = {
        "old_logprobs": "recorded",
        "groups_per_step": 1,
        "shuffle": False,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = Trainer(settings(files, tmp_path / "out", **options))
    with pytest.raises(
        ValueError, match=r"step 2: the loss is inf, stopped before the update; groups 'g1': .*overflowed"
    ):
        trainer.train()
    (last,) = checkpoint.listed(tmp_path / "out")
    assert last.name == "checkpoint-1"
    checkpoint.check(last)
    saved = load_file(last / "model.safetensors")
    assert all(torch.equal(saved[name], p.cpu()) for name, p in trainer.policy.state_dict().items() if name in saved)


def test_log_prob_that_is_not_finite_names_group_and_token(files, tmp_path):
    trainer = Trainer(settings(files, tmp_path / "out", groups_per_step=1, shuffle=False))
    trainer.policy.get_input_embeddings().weight.data[2] = float("nan")
    with pytest.raises(
        ValueError, match=r"step 1: the loss is nan.* group 'g0': log-prob of token 8 of its leaf is nan"
    ):
        trainer.train()


def test_log_probs_that_are_not_finite_in_several_groups_of_a_row_accuse_none_alone(files, tmp_path):
    rows = tiny.trajectories()
    sick = dataclasses.replace(rows[5], token_ids=[*rows[5].token_ids[:-1], tiny.VOCAB - 1])
    rows = [dataclasses.replace(row, token_ids=row.token_ids % (tiny.VOCAB - 1)) for row in rows]
    trainer = Trainer(settings(files, tmp_path / "out", shuffle=False), [*rows[:5], sick, *rows[6:]])
    trainer.policy.get_input_embeddings().weight.data[tiny.VOCAB - 1] = float("nan")
    with pytest.raises(ValueError, match=r"group 'g0': log-prob .* is nan; so are values of 'g1', .*_step=1"):
        trainer.train()


def bad_rows(kind: str) -> list[Trajectory]:
    rows = tiny.trajectories()
    if kind == "reward missing":
        rows[7] = dataclasses.replace(rows[7], reward=None)
    elif kind == "token outside":
        ids = rows[6].token_ids.copy()
        ids[3] = tiny.VOCAB
        rows[6] = dataclasses.replace(rows[6], token_ids=ids)
    elif kind == "nothing trained":
        rows[5:10] = [
            dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask), steps=None) for row in rows[5:10]
        ]
    return rows


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("reward missing", {}, r"trajectory 7 \(group 'g1'\): reward is missing"),
        ("token outside", {}, r"trajectory 6 \(group 'g1'\): token_ids\[3\] = 48 is outside .*vocabulary of 48"),
        ("nothing trained", {}, r"group 'g1': loss_mask is 0 everywhere"),
        ("good", {"row_token_budget": 10}, r"group 'g0': leaf 0 has 20 tokens, over row_token_budget=10"),
        (
            "good",
            {"row_token_budget": 24, "shared_tokens": "mean"},
            r"group 'g0': its tree has \d+ unique tokens, over row_token_budget=24, and shared_tokens='mean'",
        ),
        ("good", {"model": "no/such/folder"}, "no such folder or config file"),
        ("good", {"rollouts": "replay:nothing.jsonl"}, "no such file: nothing.jsonl"),
        ("good", {"rollouts": "vllm:host"}, "give replay:FILE"),
        ("good", {"dataset": "x.jsonl"}, "dataset='x.jsonl' is for rollouts that are sampled"),
        ("good", {"eval_dataset": "x.jsonl"}, "leave eval_dataset out, or give an engine"),
        ("good", {"eval_steps": 5}, "eval_steps=5 is for rollouts that are sampled"),
        ("good", {"save_rollouts": True}, "save_rollouts=True is for rollouts"),
        ("good", {"overlap_rollouts": True}, "overlap_rollouts=True is for rollouts"),
        ("good", {"resume_from_checkpoint": "latest"}, "no checkpoint-"),
        ("good", {"lr_scheduler_type": "sideways"}, "sideways"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, kind, changes, message):
    files = tiny.write(tmp_path, bad_rows(kind))
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=message):
        Trainer(settings(files, tmp_path / "out", **changes)).train()
    assert listing(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"token_ids": [1, 2], "loss_mask": [0, 1], "reward": NaN, "group": "g"}', "reward"),
        ('{"token_ids": [1, 2], "loss_mask": [0, 1], "reward": -1e200, "group": "g"}', r"reward is -1e\+200; squares"),
        ('{"token_ids": [1, 2], "loss_mask": [0, 1, 1], "reward": 1, "group": "g"}', "loss_mask"),
        ('{"token_ids": [1, 2], "loss_mask": [0, 1], "reward": 1, "gro', "line"),
        ("", "no traject|holds no"),
    ],
    ids=["nan_reward", "large_reward", "mask_length", "corrupt_line", "empty_file"],
)
def test_bad_rollout_files_write_nothing(tmp_path, line, message):
    files = tiny.write(tmp_path)
    files[0].write_text(line + "\n" if line else "")
    with pytest.raises(ValueError, match=message):
        Trainer(settings(files, tmp_path / "out")).train()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "backend='magic': choose one of auto, reference"),
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"groups_per_step": 0}, "groups_per_step=0"),
        ({"groups_per_step": 2.5}, "groups_per_step=2.5: must be a whole number >= 1"),
        ({"max_steps": True}, "max_steps=True"),
        ({"seed": 2**63}, r"seed=9223372036854775808: must be a whole number >= 0 and below 2\*\*63"),
        ({"learning_rate": 10**400}, "must be a finite number >= 0"),
        ({"delta": float("inf")}, "delta=inf"),
        ({"max_steps": None}, "max_steps=None"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: must be below 1"),
        ({"advantage_options": ("norm=foo",)}, "advantage_options: norm is 'foo': use one of"),
        ({"advantage_options": ("eps=abc",)}, "advantage_options: eps='abc' is no number"),
        ({"advantage_options": ("eps=-1",)}, "advantage_options: eps is -1.0"),
        ({"rollouts": "hf", "row_token_budget": 100, "max_context_length": 101}, "below max_context_length=101"),
        ({"rollouts": "vllm", "top_p": 0.9}, "top_p=0.9 with the sampling correction"),
        ({"rollouts": "hf", "top_p": 0.9, "overlap_rollouts": True}, "vllm_importance_sampling_correction=false"),
        ({"rollouts": "hf", "top_p": 0.9, "old_logprobs": "recorded"}, "top_p=0.9 with old_logprobs=recorded"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_truncated_sampling_is_allowed_where_nothing_compares_its_logprobs():
    for changes in ({"rollouts": "hf"}, {"rollouts": "vllm", "vllm_importance_sampling_correction": False}):
        assert not TrainConfig(top_p=0.9, **changes).corrects_sampling
    assert TrainConfig(top_p=0.9, rollouts="vllm", vllm_importance_sampling_correction=True).corrects_sampling


def test_unusable_backend_writes_nothing(files, tmp_path):
    with pytest.raises(ValueError, match="backend 'cuda'"):
        Trainer(settings(files, tmp_path / "out", backend="cuda")).train()
    assert not (tmp_path / "out").exists()


def test_two_processes_give_the_curve_of_one(files, tmp_path):
    """Three rows on one process, one on the other, gradients averaged by DDP over gloo."""
    changes = {"groups_per_step": 4, "row_token_budget": 40, "num_iterations": 2, "max_steps": 3}
    changes["save_strategy"] = "steps"
    config = settings(files, tmp_path / "two", loss_type="grpo", **changes)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "treegrpo"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    # The sources tested here, whatever is installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [*command, "train", "--config", str(tmp_path / "two.yaml")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, weights = run(files, tmp_path / "one", loss_type="grpo", **changes)
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward", "tree/unique_tokens", "tree/rows", "ratio/max"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    saved = load_file(tmp_path / "two" / "checkpoint-3" / "model.safetensors")
    assert largest_difference({name: weights[name] for name in saved}, saved) < 1e-3
