"""The folder of a run: what is resumed, set aside, refused and removed there, and what stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from tiny import largest_difference, listing, run, settings

from treegrpo import Trajectory, checkpoint, load
from treegrpo.config import read_config
from treegrpo.files import held
from treegrpo.metrics import read_metrics
from treegrpo.rollout.engine import EngineError
from treegrpo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def test_later_checkpoints_are_set_aside_when_a_run_goes_back(files, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    run(files, tmp_path, max_steps=4, **save)
    first = str(tmp_path / "checkpoint-2")
    run(files, tmp_path, max_steps=3, resume_from_checkpoint=first, **save)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-3"
    assert load_file(tmp_path / "superseded-4" / "model.safetensors")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_checkpoint_set_aside_before_stays(files, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(files, tmp_path, **save)
    first = str(tmp_path / "checkpoint-1")
    old = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for rate in (1e-3, 1e-4):
        run(files, tmp_path, resume_from_checkpoint=first, **{**save, "learning_rate": rate})
    names = {path.name for path in tmp_path.glob("*-2*")}
    assert names == {"checkpoint-2", "superseded-2", "superseded-2-2"}
    kept = load_file(tmp_path / "superseded-2" / "model.safetensors")
    assert largest_difference(old, kept) == 0.0


def test_a_checkpoint_of_another_run_leaves_a_run_alone(files, tmp_path, monkeypatch):
    save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    run(files, tmp_path / "a", **save)
    run(files, tmp_path / "b", learning_rate=1e-3, **{**save, "max_steps": 2})
    other, before = tmp_path / "a" / "checkpoint-1", listing(tmp_path / "b")
    with pytest.raises(ValueError, match="b already holds a run"):
        run(files, tmp_path / "b", resume_from_checkpoint=str(other), **save)
    assert listing(tmp_path / "b") == before
    # the folder may be written in another way
    monkeypatch.chdir(tmp_path / "b")
    run(files, "../b", resume_from_checkpoint="checkpoint-2", **save)
    assert [row["step"] for row in read_metrics("metrics.jsonl")] == [1, 2, 3]
    run(files, tmp_path / "b", resume_from_checkpoint=str(other), overwrite_output_dir=True, **save)
    assert [row["step"] for row in read_metrics("metrics.jsonl")] == [2, 3]
    assert [path.name for path in checkpoint.listed(".")] == ["checkpoint-2", "checkpoint-3"]


def test_a_run_does_not_remove_what_it_reads(files, tmp_path):
    run(files, tmp_path, max_steps=1, save_strategy="steps")
    last, rollouts = tmp_path / "checkpoint-1", tmp_path / "rollouts" / "step-1.jsonl"
    rollouts.parent.mkdir()
    shutil.copy(files[0], rollouts)
    before = listing(tmp_path)
    for name, value in (
        ("model", str(last)),
        ("rollouts", f"replay:{rollouts}"),
        ("tokenizer", str(last)),
        ("resume_from_checkpoint", "latest"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: the run needs .* overwrite_output_dir would remove with"):
            Trainer(settings(files, tmp_path, overwrite_output_dir=True, **{name: value}))
        assert listing(tmp_path) == before


def test_a_checkpoint_that_is_written_again_goes_when_the_new_one_is_there(files, tmp_path, monkeypatch):
    trainer = Trainer(settings(files, tmp_path, save_strategy="steps", max_steps=1))
    trainer.train()
    (path,) = checkpoint.listed(tmp_path)
    replace = os.replace

    def killed(source, target):
        if target == path:
            raise InterruptedError
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        trainer.save()
    checkpoint.check(tmp_path / ".checkpoint-1.old.tmp")
    monkeypatch.undo()
    trainer.save()
    assert [found for found in tmp_path.iterdir() if found.is_dir()] == [path]


def test_each_process_leaves_what_the_engine_delivered_to_it(files, tmp_path):
    trainer = Trainer(settings(files, tmp_path, save_strategy="steps"))
    trainer.online = types.SimpleNamespace(abandon=lambda: None)
    for rank in range(2):
        trainer.accelerator = types.SimpleNamespace(process_index=rank, num_processes=2)
        error = EngineError("server unreachable: start it again")
        error.trajectories = [Trajectory([1, 2 + rank], [0, 1])]
        trainer._leave(error)
    left = [load(tmp_path / f"unfinished-step-1{end}.jsonl.gz")[0].token_ids.tolist() for end in ("", "-1")]
    assert left == [[1, 2], [1, 3]]


def test_cut_checkpoint_is_refused_and_nothing_changes(files, tmp_path):
    run(files, tmp_path, save_strategy="steps")
    path = checkpoint.listed(tmp_path)[-1]
    for name in ("model.safetensors", "optimizer.pt"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: len(whole) // 2])
        before = listing(tmp_path)
        with pytest.raises(ValueError, match=rf"checkpoint-3 is damaged: {name} has .* bytes instead of"):
            Trainer(settings(files, tmp_path, max_steps=6, resume_from_checkpoint="latest"))
        assert listing(tmp_path) == before
        (path / name).write_bytes(whole)
    (path / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer.pt is missing"):
        Trainer(settings(files, tmp_path, max_steps=6, resume_from_checkpoint=str(path)))
    for damage in (b"\xff", b"[" * 100_000):
        (path / "manifest.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"checkpoint-3 is not a whole checkpoint: cannot read its manifest.json"):
            Trainer(settings(files, tmp_path, max_steps=6, resume_from_checkpoint=str(path)))


def test_other_order_settings_are_refused_on_resume(files, tmp_path):
    run(files, tmp_path, save_strategy="steps")
    with pytest.raises(ValueError, match="made with seed=42, this run has 7"):
        Trainer(settings(files, tmp_path, max_steps=6, seed=7, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="nothing left"):
        Trainer(settings(files, tmp_path, resume_from_checkpoint="latest"))


def test_other_adapters_are_refused_on_resume(files, tmp_path):
    lora = {"lora_r": 2, "lora_target_modules": ("q_proj", "v_proj")}
    run(files, tmp_path, save_strategy="steps", max_steps=1, **lora)
    resumed = {**lora, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="made with lora_alpha=16, this run has 64"):
        Trainer(settings(files, tmp_path, lora_alpha=64, **resumed))
    with pytest.raises(ValueError, match=r"lora_target_modules=\['q_proj', 'v_proj'\], this run has \['all-linear'\]"):
        Trainer(settings(files, tmp_path, **{**resumed, "lora_target_modules": ("all-linear",)}))
    assert len(run(files, tmp_path, **resumed)[0]) == 2


def test_old_run_is_not_overwritten_unasked(files, tmp_path):
    run(files, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(settings(files, tmp_path))
    names = ("best", "rollouts", "checkpoint-7", "superseded-9", "superseded-9-2", ".checkpoint-8.tmp", ".best.old.tmp")
    for name in (*names, "weights/weights-12-ab-3", "mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "unfinished-step-3.jsonl.gz").touch()
    run(files, tmp_path, max_steps=2, overwrite_output_dir=True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl", "mine"}


def test_two_runs_that_begin_together_do_not_share_a_folder(files, tmp_path):
    first, second = (Trainer(settings(files, tmp_path, max_steps=2)) for _ in range(2))
    steps = first.steps()
    next(steps)
    with pytest.raises(ValueError, match="another run is writing there"):
        second.train()
    assert len(list(steps)) == 1
    with pytest.raises(ValueError, match="already holds a run: give another"):
        second.train()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_checkpoint_on_another_disk_is_let_go(files, tmp_path):
    """Of one that was moved away and linked to, the link is removed; a file of such a name is none."""
    save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    output = tmp_path / "run"
    run(files, output, max_steps=1, **save)
    shutil.move(output / "checkpoint-1", tmp_path / "moved")
    (output / "checkpoint-1").symlink_to(tmp_path / "moved")
    for name in ("checkpoint-0", "checkpoint-9", "checkpoint-\u00b2"):
        (output / name).touch()
    run(files, output, max_steps=2, resume_from_checkpoint="latest", **save)
    assert [path.name for path in checkpoint.listed(output)] == ["checkpoint-2"]
    shutil.move(output / "checkpoint-2", output / "kept")
    (output / "checkpoint-2").symlink_to(output / "kept")
    run(files, output, max_steps=1, overwrite_output_dir=True)
    assert checkpoint.listed(output) == [] and (tmp_path / "moved" / "manifest.json").exists()


def test_the_settings_of_a_run_do_not_say_how_it_was_started(files, tmp_path):
    run(files, tmp_path, max_steps=1, save_strategy="steps", overwrite_output_dir=True)
    run(files, tmp_path, max_steps=2, save_strategy="steps", resume_from_checkpoint="latest")
    config = read_config(tmp_path / "config.yaml")
    assert config == settings(files, tmp_path, max_steps=2, save_strategy="steps")
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(config)


def test_a_run_keeps_others_out_of_its_folder(files, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1}
    first = Trainer(settings(files, tmp_path, **save)).steps()
    next(first)
    next(first)
    before = listing(tmp_path)
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        other = Trainer(settings(files, tmp_path, **save, **changes))
        with pytest.raises(ValueError, match=r"output_dir .*another run is writing there"):
            other.train()
    assert listing(tmp_path) == before
    assert len(list(first)) == 1 and [path.name for path in checkpoint.listed(tmp_path)][-1] == "checkpoint-3"
    run(files, tmp_path, overwrite_output_dir=True)


def test_a_run_that_is_killed_leaves_its_folder_to_the_next(tmp_path):
    hold = f"x = held(Path({str(tmp_path)!r}), 'x'); x.__enter__()"
    script = f"import time; from pathlib import Path; from treegrpo.files import held; {hold}; print('in', flush=True)"
    script += "; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another run"), held(tmp_path, "output_dir"):
            pass
        holder.kill()
    with held(tmp_path, "output_dir"):
        pass
