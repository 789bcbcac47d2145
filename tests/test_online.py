"""Sampled rollouts in the trainer: same bits again, cut and resumed equals uncut, overlapped, refilled, evaluated,
interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from boxes import online_config
from safetensors.torch import load_file

from treegrpo import checkpoint, load
from treegrpo.metrics import read_metrics
from treegrpo.rollout.engine import EngineError
from treegrpo.rollout.online import OnlineRollouts, Sampler, StepRollouts
from treegrpo.rollout.search import SampledGroup, SearchOptions
from treegrpo.trainer import Trainer
from treegrpo.tree import Trajectory, build_tree

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")
# A late twin of a prompt forwards its last token once more, and a row's log-probs differ in the last bits with what
# else is in the engine's batch: what was prefilled, and those bits, depend on timing as well.
TIMED = ("step_time", "perf/", "rollout/seconds", "rollout/prefilled_tokens", "sampling/")


def run(box, output, **changes):
    trainer = Trainer(online_config(box, output, **changes))
    history = trainer.train()
    return history, {name: p.detach().cpu().clone() for name, p in trainer.policy.named_parameters()}, trainer


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(TIMED)}


def test_a_run_repeats_bit_for_bit_and_learns_something(box, tmp_path):
    history, weights, _ = run(box, tmp_path / "a")
    again, weights_again, _ = run(box, tmp_path / "b")
    assert same(weights, weights_again)
    assert [untimed(row) for row in history] == [untimed(row) for row in again]
    start = Trainer(online_config(box, tmp_path / "c")).policy
    assert not same(weights, dict(start.named_parameters()))
    row = history[-1]
    for name in ("reward", "rewards/token_reward/mean", "rollout/generated_tokens", "rollout/prefilled_tokens"):
        assert math.isfinite(row[name]), name
    assert row["rollout/leaves"] == 3 * 2 * 2 and row["tools/call_frequency"] >= 0
    assert row["rollout/total_generated_tokens"] == sum(r["rollout/generated_tokens"] for r in history)
    # what is trained is what was sampled: the trainer's log-probs on the tree are the engine's
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)
    assert row["batch/packing_ratio"] > 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2}, {"overlap_rollouts": True}, {"overlap_rollouts": True, "num_iterations": 2}],
    ids=["plain", "mid_iteration", "overlap", "overlap_mid_iteration"],
)
def test_a_resumed_run_is_the_uncut_one_bit_for_bit(box, tmp_path, changes):
    changes = {"max_steps": 5, "zero_std_groups": "refill", "max_refills": 1, **changes}
    # the weights of off-policy steps would bring the engine's last bits into the loss
    changes["vllm_importance_sampling_correction"] = False
    whole, weights, _ = run(box, tmp_path / "whole", **changes)
    cut = tmp_path / "cut"
    run(box, cut, save_strategy="steps", save_steps=3, **changes)
    for path in checkpoint.listed(cut)[1:]:
        shutil.rmtree(path)
    resumed, again, _ = run(box, cut, resume_from_checkpoint="latest", save_rollouts=True, **changes)
    kept = sorted(path.name for path in (cut / "rollouts").iterdir())
    assert kept == [f"step-{step}.jsonl.gz" for step in ((5,) if "num_iterations" in changes else (4, 5))]
    assert [row["step"] for row in resumed] == [4, 5]
    assert [untimed(row) for row in whole[3:]] == [untimed(row) for row in resumed]
    assert same(weights, again)


def test_overlap_samples_one_step_behind(box, tmp_path):
    """The first two steps sample from the first weights; the second is then off-policy, and corrected."""
    plain, _, _ = run(box, tmp_path / "a", max_steps=3)
    behind, _, trainer = run(box, tmp_path / "b", max_steps=3, overlap_rollouts=True)
    assert trainer.config.corrects_sampling
    name = "sampling/sampling_logp_difference/max"
    assert plain[1][name] < 1e-4 and behind[0][name] < 1e-4
    assert behind[1][name] > 1e-3
    assert plain[0]["reward"] == behind[0]["reward"]


def test_the_token_limit_of_the_run_ends_it(box, tmp_path):
    history, _, _ = run(box, tmp_path, max_steps=50, max_generated_tokens=150)
    total = [row["rollout/total_generated_tokens"] for row in history]
    assert total[-1] >= 150 and all(value < 150 for value in total[:-1])


def test_evaluation_keeps_the_best_checkpoint_which_loads_in_plain_transformers(box, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {"eval_dataset": str(box / "validation.jsonl"), "eval_rows": 5, "eval_steps": 2, "save_strategy": "steps"}
    history, _, trainer = run(box, tmp_path, save_rollouts=True, **changes)
    assert [row["step"] for row in trainer.evaluations] == [0, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 0
    assert "eval_reward" in history[1] and "eval_reward" not in history[0]
    best = max(row["eval_reward"] for row in trainer.evaluations)
    state = json.loads((tmp_path / "best" / "trainer_state.json").read_text())
    assert state["best_reward"] == best
    assert state["step"] == next(row["step"] for row in trainer.evaluations if row["eval_reward"] == best)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "best")
    assert len(tokenizer) == model.config.vocab_size
    rollouts = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in rollouts] == ["step-1.jsonl.gz", "step-2.jsonl.gz", "step-3.jsonl.gz"]
    assert all(t.reward is not None for t in load(rollouts[0]))


def nowhere(prompts, completions, completion_ids, **columns) -> list[None]:
    """Applies to nothing here."""
    return [None] * len(completions)


def test_every_evaluation_is_kept_and_reads_as_json(box, tmp_path):
    changes = {"eval_dataset": str(box / "validation.jsonl"), "eval_rows": 2, "eval_steps": 2, "logging_steps": 3}
    changes["reward_funcs"] = ("boxes:token_reward", "test_online:nowhere")
    history, _, trainer = run(box, tmp_path, max_steps=5, groups_per_step=1, **changes)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 5] and rows[1:] == history
    kept = [row["eval_reward"] for row in rows if "eval_reward" in row]
    assert kept == [row["eval_reward"] for row in trainer.evaluations] and len(kept) == 4
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "eval_rewards/token_reward/mean" in rows[0]


def test_eval_samples_on_the_settings_of_the_run(box, tmp_path, capsys):
    pytest.importorskip("tyro", reason="the command line is not installed")
    from treegrpo.cli import main

    changes = {"eval_dataset": str(box / "validation.jsonl"), "eval_rows": 5, "eval_steps": 3, "save_strategy": "steps"}
    history, _, _ = run(box, tmp_path / "run", **changes)
    argv = ["eval", "--model", str(tmp_path / "run" / "checkpoint-3"), "--rollouts", "hf"]
    assert main([*argv, "--config", str(tmp_path / "run" / "config.yaml"), "--json", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["eval_reward"] == pytest.approx(history[-1]["eval_reward"]) and result["eval_num_prompts"] == 5
    assert main(argv) == 2
    assert "needs --config" in capsys.readouterr().err


class Interrupter:
    """A reward that presses Ctrl-C, or breaks the engine's connection, the n-th time it is asked."""

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.left = error, at

    def __call__(self, completions, **columns):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return [0.1 * (i % 3) for i in range(len(completions))]


def use(trainer, reward):
    trainer.online.sampler = dataclasses.replace(trainer.online.sampler, reward_funcs=[reward])
    return trainer


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError], ids=["ctrl_c", "reward_raises"])
def test_a_run_that_ends_early_writes_a_checkpoint_and_goes_on_as_if_nothing_had_been(box, tmp_path, error):
    def trainer(output, **changes):
        return Trainer(online_config(box, output, max_steps=4, save_strategy="steps", **changes))

    whole = use(trainer(tmp_path / "whole"), Interrupter(error(), 99))
    whole.train()
    cut = use(trainer(tmp_path / "cut"), Interrupter(error("no such column"), 2))
    with pytest.raises(error, match="no such column"):
        cut.train()
    (path,) = checkpoint.listed(tmp_path / "cut")
    assert path.name == "checkpoint-2"
    again = use(trainer(tmp_path / "cut", resume_from_checkpoint="latest"), Interrupter(error(), 99))
    again.train()
    assert same(dict(whole.policy.named_parameters()), dict(again.policy.named_parameters()))


def test_a_step_that_does_not_fit_is_kept_for_a_larger_budget(box, tmp_path):
    _, weights, _ = run(box, tmp_path / "whole")
    cut = Trainer(online_config(box, tmp_path / "cut", save_strategy="steps"))

    def shrink(step, model):
        cut.config = dataclasses.replace(cut.config, row_token_budget=5 if step else None)

    cut.on_gradients = shrink
    with pytest.raises(ValueError, match="over row_token_budget=5"):
        cut.train()
    (path,) = checkpoint.listed(tmp_path / "cut")
    assert path.name == "checkpoint-2" and (path / "rollouts-0.jsonl.gz").exists()
    _, again, _ = run(box, tmp_path / "cut", resume_from_checkpoint="latest")
    assert same(weights, again)


def test_a_reward_that_does_not_apply_names_the_row(box, tmp_path):
    changes = {"reward_funcs": ("test_online:nowhere",), "shuffle": False, "groups_per_step": 1}
    with pytest.raises(ValueError, match=r"None for completion 0 \(leaf 0 of group 'train.jsonl:.*:0@0', row 0\): add"):
        run(box, tmp_path, **changes)


def test_ctrl_c_in_an_evaluation_keeps_the_metrics_of_its_step(box, tmp_path):
    changes = {"eval_dataset": str(box / "validation.jsonl"), "eval_rows": 2, "eval_steps": 2, "save_strategy": "steps"}
    cut = Trainer(online_config(box, tmp_path, max_steps=3, **changes))
    evaluate, calls = cut.online.evaluate, iter([False, True])

    def interrupted(*args, **kwargs):
        if next(calls):
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    cut.online.evaluate = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    run(box, tmp_path, max_steps=3, resume_from_checkpoint="latest", **changes)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_stopped_run_does_not_wait_for_what_it_samples_ahead(box, tmp_path):
    trainer = Trainer(online_config(box, tmp_path, overlap_rollouts=True, save_strategy="steps", max_concurrency=4))
    trainer.online.start_next(1, 3, trainer.policy)
    first = trainer.online.pending
    trainer.online.abandon()
    assert trainer.online.pending is None
    with pytest.raises(EngineError, match="stopped when 1 of 3 groups were sampled"):
        first.result(30)
    trainer.close()


def test_ctrl_c_inside_an_update_waits_for_its_end(box, tmp_path):
    """The signal comes while the optimiser writes: the checkpoint is that of the whole step, whose row is written."""
    trainer = Trainer(online_config(box, tmp_path, save_strategy="steps"))
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: (signal.raise_signal(signal.SIGINT), step(*args))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["checkpoint-1"]
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["online"]["waiting"] == []
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 1 and row["num_tokens"] == state["num_tokens"] > 0


def test_an_engine_that_gives_up_leaves_what_it_delivered(box, tmp_path, capsys):
    trainer = Trainer(online_config(box, tmp_path, save_strategy="steps"))
    engine, generate = trainer.online.sampler.engine, trainer.online.sampler.engine.generate
    groups: list[str] = []

    async def breaks(prompt_ids, sampling, *, session=""):
        if trainer.step == 1 and session.endswith("@5"):
            while len(groups) < 2:
                import asyncio

                await asyncio.sleep(0.01)
            raise EngineError("server unreachable: start it again")
        return await generate(prompt_ids, sampling, session=session)

    release = engine.release

    async def counted(session):
        groups.append(session)
        await release(session)

    engine.generate = breaks
    engine.release = counted
    groups.clear()

    def start_counting(step, model):
        groups.clear()

    trainer.on_gradients = start_counting
    with pytest.raises(EngineError, match="start it again"):
        trainer.train()
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["checkpoint-1"]
    unfinished = load(tmp_path / "unfinished-step-2.jsonl.gz")
    assert len(unfinished) == 2 * 4 and all(t.reward is None for t in unfinished)
    assert "8 trajectories" in capsys.readouterr().err


def group(place: int, rewards: list[float], reads: list[str]) -> SampledGroup:
    from treegrpo.rollout.search import RolloutStats

    reads.append(str(place))
    trajectories = [
        Trajectory([1, 2, 3 + i], [0, 1, 1], reward=r, logprobs=[math.nan, -1, -1], group=f"g{place}", steps=[1])
        for i, r in enumerate(rewards)
    ]
    return SampledGroup(
        group=f"g{place}",
        row={},
        prompt="",
        trajectories=trajectories,
        completion_ids=[[2, 3]] * len(rewards),
        completions=[""] * len(rewards),
        own_texts=[""] * len(rewards),
        environments=[],
        stats=RolloutStats(groups=1, generated_tokens=10, leaves=len(rewards)),
    )


class Scripted(Sampler):
    """Groups whose rewards are equal at every third row; of rows from the fourth on a reward function logs more."""

    def sample(self, rows, groups, options, seeds, progress=None, indices=None, state=None):
        found = [group(row["index"], [0.0, float(row["index"] % 3 != 0)], READS) for row in rows]
        logged = {"late": 2.0} if rows and rows[0]["index"] > 2 else {}
        return found, [{"rewards/x/mean": 1.0, **logged} for _ in rows]


READS: list[str] = []


def scripted(**changes) -> OnlineRollouts:
    class Engine:
        num_syncs = 0

        def sync_weights(self, model):
            self.num_syncs += 1

        def close(self):
            pass

    READS.clear()
    sampler = Scripted(engine=Engine(), make_env=None, reward_funcs=[], reward_weights=[])
    rows = [{"index": i} for i in range(9)]
    return OnlineRollouts(sampler, rows, SearchOptions(), shuffle=False, **changes)


def names(rollouts: StepRollouts) -> list[list[str]]:
    return [[tree.group for tree in read] for read in rollouts.trees]


def test_groups_without_spread_are_counted_and_refilled():
    keep = scripted()
    first = keep.step_rollouts(1, 3, None)
    assert names(first) == [["g0", "g1", "g2"]] and first.metrics["rollout/zero_std_groups"] == 1
    refill = scripted(refills=2)
    first, second = (refill.step_rollouts(1, 3, None) for _ in range(2))
    assert names(first) == [["g1", "g2", "g4"]]
    assert READS[:5] == ["0", "1", "2", "3", "4"]
    assert (first.metrics["rewards/x/mean"], first.metrics["late"]) == (1.0, 2.0)
    assert first.metrics["rollout/zero_std_groups"] == 2 and first.metrics["rollout/refilled_groups"] == 2
    # everything sampled is counted, the rejected too, and the next step goes on where this one stopped
    assert first.generated_tokens == 50
    assert names(second) == [["g5", "g7", "g8"]]
    once = scripted(refills=1).step_rollouts(1, 1, None)
    assert names(once) == [["g1"]]


def test_reads_are_kept_apart_and_come_back_from_a_checkpoint(tmp_path):
    online = scripted()
    first = online.step_rollouts(2, 2, None)
    assert names(first) == [["g0", "g1"], ["g2", "g3"]]
    state = json.loads(json.dumps(online.save_state(tmp_path, first)))
    restored = scripted()
    restored.restore(state, tmp_path)
    again = restored.step_rollouts(2, 2, None)
    assert again.trajectories() == first.trajectories() and names(again) == names(first)
    assert again.metrics == first.metrics
    assert names(restored.step_rollouts(2, 2, None)) == [["g4", "g5"], ["g6", "g7"]]
    assert restored.sampler.engine.num_syncs == 1


def in_two_threads(work) -> list:
    """`[work(rank, gather)]` of two processes played by threads; what was raised stands in place of a result."""
    barrier, lists, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def gather(rank, items):
        lists[rank] = items
        barrier.wait()
        gathered = [*lists[0], *lists[1]]
        barrier.wait()
        return gathered

    def run_one(rank):
        try:
            results[rank] = work(rank, lambda items: gather(rank, items))
        except EngineError as error:
            results[rank] = error

    threads = [threading.Thread(target=run_one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_processes_share_the_prompts_and_see_all_of_them():
    def work(rank, gather):
        online = scripted(rank=rank, world=2, gather=gather)
        return [names(online.step_rollouts(1, 3, None)) for _ in range(2)]

    first, second = in_two_threads(work)
    assert first == second == [[["g0", "g1", "g2"]], [["g3", "g4", "g5"]]]


@pytest.mark.parametrize("one_engine", [False, True])
def test_one_process_brings_a_server_the_weights(one_engine):
    def work(rank, gather):
        online = scripted(rank=rank, world=2, gather=gather, one_engine=one_engine)
        online.step_rollouts(1, 2, None)
        return online.sampler.engine.num_syncs

    assert in_two_threads(work) == ([1, 0] if one_engine else [1, 1])


def test_a_server_that_takes_no_weights_stops_every_process():
    def work(rank, gather):
        online = scripted(rank=rank, world=2, gather=gather, one_engine=True)

        def refuse(model):
            raise EngineError("no room")

        online.sampler.engine.sync_weights = refuse
        online.step_rollouts(1, 2, None)

    assert [str(error) for error in in_two_threads(work)] == ["no room", "no room"]


def test_two_real_processes_sample_what_one_does(box, tmp_path):
    """Each process samples its prompts, both hold all of them, gradients are averaged over gloo."""
    changes = {"groups_per_step": 4, "max_steps": 2, "save_strategy": "steps"}
    config = online_config(box, tmp_path / "two", **changes)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "treegrpo"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
    done = subprocess.run(
        [*command, "train", "--config", str(tmp_path / "two.yaml")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, weights, _ = run(box, tmp_path / "one", **changes)
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for a, b in zip(one, two, strict=True):
        for name in ("reward", "rollout/generated_tokens", "rollout/leaves", "rewards/token_reward/mean"):
            assert b[name] == a[name], name
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-6)
    saved = load_file(tmp_path / "two" / "checkpoint-2" / "model.safetensors")
    for name, value in saved.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-3)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="dataset: it holds no row"):
        OnlineRollouts(None, [], SearchOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "dataset='nowhere.jsonl': no such file"),
        ({"retriever": ""}, "retriever is missing"),
        ({"rollouts": "sglang"}, "give replay:FILE, or an engine"),
        ({"eval_steps": 1}, "eval_steps=1 needs eval_dataset"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights has 2 entries for 1"),
        ({"num_trees": 0}, "num_trees=0"),
        ({"zero_std_groups": "drop"}, "zero_std_groups='drop'"),
        ({"rollouts": "vllm"}, "vLLM is not installed here .pip install vllm."),
        ({"rollouts": "server:http://127.0.0.1:9"}, "no HTTP client is installed here"),
        ({"vllm_gpu_memory_utilization": 0.3}, "vllm_gpu_memory_utilization=0.3 with rollouts='hf'"),
        ({"vllm_gpu_memory_utilization": -1}, "vllm_gpu_memory_utilization=-1"),
    ],
)
def test_bad_settings_write_nothing(box, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        Trainer(online_config(box, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_trees_of_one_step_are_trained_together(box, tmp_path):
    """All leaves of a group are in one packed row, whatever the row budget: no tree is torn apart."""
    trainer = Trainer(online_config(box, tmp_path, row_token_budget=400, groups_per_step=4))
    seen = []
    trainer.on_gradients = lambda step, model: seen.append(
        [[t.group for t in r.batch.trees] for r in trainer.data.rows]
    )
    trainer.train()
    for rows in seen:
        flat = [name for row in rows for name in row]
        assert len(flat) == len(set(flat)) == 4
    assert np.all([tree.num_leaves == 4 for tree in trainer.data.trees])
    assert build_tree(trainer.data.trees[0].trajectories).num_leaves == 4
