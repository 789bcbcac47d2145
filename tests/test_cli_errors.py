"""What the commands refuse, before the work where they can, in one line that names the flag or the file."""

from __future__ import annotations

import dataclasses
import json
import math
import resource

import pytest
import tiny
from test_convert import CHATML, TALK, byte_tokenizer

from treegrpo import Trajectory, load, models
from treegrpo.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with 2, and gives what it printed as its error."""

    def run(*argv) -> str:
        assert main([str(word) for word in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and "Traceback" not in err
        return err

    return run


def _chat(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps({"messages": TALK, "group": "g", "reward": 1}) + "\n")
    return source, tmp_path / "tokenizer"


def test_the_folder_of_an_output_is_made(tmp_path):
    rollouts, model = tiny.write(tmp_path)
    source, tokenizer = _chat(tmp_path)
    for argv, name in (
        (["eval", "--model", model, "--rollouts", f"replay:{rollouts}", "--json"], "a/eval.json"),
        (["flops", rollouts, "--model", model, "--json"], "b/flops.json"),
        (["inspect", rollouts, "--png"], "c/tree.png"),
        (["convert", "--tokenizer", tokenizer, source], "d/tokens.jsonl"),
    ):
        assert main([*map(str, argv), str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size
        assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]
    assert len(load(tmp_path / "d" / "tokens.jsonl")) == 1


def test_convert_does_not_replace_what_it_reads(tmp_path, refused):
    source, tokenizer = _chat(tmp_path)
    before = source.read_text()
    (tmp_path / "link.jsonl").symlink_to(source)
    for out in (source, tmp_path / "link.jsonl"):
        assert "is the file that is read" in refused("convert", source, out, "--tokenizer", tokenizer)
    assert source.read_text() == before


def test_files_of_editors_that_mark_utf8(tmp_path):
    """A byte order mark is no part of JSON, nor of what the model reads."""
    source, tokenizer = _chat(tmp_path)
    template, listed = tmp_path / "chat.jinja", tmp_path / "chat.json"
    template.write_text(CHATML)
    listed.write_text(f"[{source.read_text()}]")
    _, model = tiny.write(tmp_path)
    outs = []
    for encoding in ("utf-8", "utf-8-sig"):
        for path in (source, listed, template, model):
            path.write_text(path.read_text(), encoding=encoding)
        for path in (source, listed):
            outs.append(tmp_path / f"{encoding}-{path.name}")
            argv = ["convert", path, outs[-1], "--tokenizer", tokenizer, "--chat-template", template]
            assert main([*map(str, argv)]) == 0
    assert len({path.read_text() for path in outs}) == 1
    assert main(["flops", str(outs[0]), "--model", str(model)]) == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, refused):
    def no_work(*args, **kwargs):
        raise AssertionError("the work has begun")

    for name in ("models.read_model_config", "load", "convert.read_records", "demo.run", "study.run"):
        monkeypatch.setattr(f"treegrpo.{name}", no_work)
    rollouts, model = tiny.write(tmp_path)
    in_file = rollouts / "x"
    for argv in (
        ["eval", "--model", model, "--rollouts", f"replay:{rollouts}", "--json", in_file],
        ["flops", rollouts, "--model", model, "--json", in_file],
        ["inspect", rollouts, "--png", in_file],
        ["convert", "--tokenizer", model, rollouts, in_file],
        ["train", "--rollouts", f"replay:{rollouts}", "--model", model, "--output-dir", rollouts],
        ["train", "--rollouts", f"replay:{rollouts}", "--model", model, "--output-dir", in_file, "--dry-run"],
        ["export", model, in_file],
        ["demo", "--output-dir", rollouts],
        ["study", "--runs-dir", in_file],
    ):
        assert f"{rollouts} is a file, not a folder" in refused(*argv)
    assert "is a folder: give the name of a file" in refused("inspect", rollouts, "--png", tmp_path)


def test_a_failed_write_is_one_line(tmp_path, monkeypatch, refused):
    rollouts, model = tiny.write(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "x.json"))

    monkeypatch.setattr("treegrpo.files.os.replace", full)
    assert "No space left" in refused("flops", rollouts, "--model", model, "--json", tmp_path / "x.json")
    assert not list(tmp_path.glob("*x.json*"))


def test_a_full_disk_is_one_line(tmp_path, refused):
    """Imitated by a limit on a file's size; safetensors and torch.save raise errors of their own where they meet it."""
    rollouts, model = tiny.write(tmp_path)
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-1"
    flags = ["--rollouts", f"replay:{rollouts}", "--model", model, "--output-dir", run, "--max-steps", "1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (20_000, 150_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            err = refused("train", *flags, "--overwrite-output-dir", "--disable-tqdm")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"{checkpoint} cannot be written: " in err
        assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert main([*map(str, ["train", *flags]), "--overwrite-output-dir", "--disable-tqdm"]) == 0
    weights, moments = (checkpoint / name for name in ("model.safetensors", "optimizer.pt"))
    assert 20_000 < weights.stat().st_size < 150_000 < moments.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        err = refused("export", checkpoint, tmp_path / "out" / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'out' / 'model'} cannot be written: " in err and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:8] + b"zz" + data[10:]]
)
def test_damaged_weights_are_named(tmp_path, damage, refused):
    rollouts, model = tiny.write(tmp_path)
    models.build_model(model, 0).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    for command in ("eval", "train"):
        err = refused(command, "--model", tmp_path / "model", "--rollouts", f"replay:{rollouts}")
        assert f"model {tmp_path / 'model'}: cannot load its weights" in err and "whole .safetensors files" in err


def test_a_config_nested_beyond_reading_is_named(tmp_path, refused):
    rollouts, model = tiny.write(tmp_path)
    model.write_text("[" * 100_000)
    assert f"model {model}: not a model folder or a config" in refused("flops", rollouts, "--model", model)


@pytest.mark.parametrize("values", [{"vocab_size": "48"}, {"num_hidden_layers": -1}, {"num_attention_heads": None}])
def test_values_of_a_config_that_make_no_model_are_named(tmp_path, values, refused):
    rollouts, model = tiny.write(tmp_path, **values)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(model.read_text())
    for place, named in ((model, model), (tmp_path / "folder", tmp_path / "folder")):
        err = refused("eval", "--model", place, "--rollouts", f"replay:{rollouts}")
        assert f"model {named}" in err and "mend" in err


def test_adapters_alone_are_no_model(tmp_path, refused):
    rollouts, model = tiny.write(tmp_path)
    flags = ["--rollouts", f"replay:{rollouts}", "--model", model, "--output-dir", tmp_path / "out", "--lora-r", "2"]
    assert main([*map(str, ["train", *flags]), "--max-steps", "1", "--disable-tqdm"]) == 0
    adapters = tmp_path / "out" / "checkpoint-1"
    for command in ("eval", "train"):
        err = refused(command, "--model", adapters, "--rollouts", f"replay:{rollouts}")
        assert f"`treegrpo export {adapters} OUT`" in err


@pytest.mark.parametrize(
    ("rollouts", "flags", "kind"),
    [
        ("hf", ["--samples", "call"], "replay:FILE"),
        ("hf", ["--attention", "tree"], "replay:FILE"),
        ("hf", ["--row-token-budget", "5"], "replay:FILE"),
        ("hf", ["--backend", "cpu"], "replay:FILE"),
        ("replay:x.jsonl", ["--config", "run.yaml"], "an engine"),
        ("replay:x.jsonl", ["--dataset", "rows.jsonl"], "an engine"),
        ("replay:x.jsonl", ["--rows", "0"], "an engine"),
    ],
)
def test_eval_refuses_flags_it_would_not_read(rollouts, flags, kind, refused):
    err = refused("eval", "--model", "m", "--rollouts", rollouts, *flags)
    assert f"{flags[0]}: only with rollouts of {kind}, not with {rollouts}" in err


def test_eval_says_what_rollouts_may_be(tmp_path, refused):
    rollouts, model = tiny.write(tmp_path)
    for flags in ([], ["--attention", "tree"]):
        assert "give replay:FILE, or an engine" in refused("eval", "--model", model, "--rollouts", rollouts, *flags)


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path, refused):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    err = refused("export", tmp_path, tmp_path / "out")
    assert "is the folder of a run: give one of its checkpoints, such as" in err and "checkpoint-10" in err


def test_eval_samples_with_the_temperature_and_seed_given(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "treegrpo.evaluate.evaluate_sampled", lambda config: seen.append(config) or {"eval_reward": 1.0}
    )
    settings = tmp_path / "run.yaml"
    settings.write_text("eval_temperature: 0.5\nseed: 7\n")
    argv = ["eval", "--model", "m", "--rollouts", "hf", "--config", str(settings)]
    assert main(argv) == 0
    assert main([*argv, "--temperature", "0", "--seed", "3", "--dataset", "rows.jsonl", "--rows", "2"]) == 0
    assert [(config.eval_temperature, config.seed) for config in seen] == [(0.5, 7), (0.0, 3)]
    assert (seen[1].eval_dataset, seen[1].eval_rows, seen[1].model) == ("rows.jsonl", 2, "m")


def test_eval_refuses_numbers_that_mean_nothing(tmp_path, refused):
    rollouts, model = tiny.write(tmp_path)
    argv = ["eval", "--model", model, "--rollouts", f"replay:{rollouts}"]
    assert "row_token_budget=0" in refused(*argv, "--row-token-budget", 0)
    assert "temperature=0.0" in refused(*argv, "--temperature", 0)


def test_eval_of_a_row_without_trained_tokens(tmp_path):
    plain = Trajectory([7, 8, 9], [0, 0, 0], reward=0.0, group="plain")
    rows = tiny.trajectories(1)
    results = []
    for held in (rows, [plain, *rows]):
        rollouts, model = tiny.write(tmp_path, held)
        argv = ["eval", "--model", model, "--rollouts", f"replay:{rollouts}", "--json", tmp_path / "eval.json"]
        assert main([*map(str, argv), "--row-token-budget", "29"]) == 0
        results.append(json.loads((tmp_path / "eval.json").read_text()))
    assert results[1]["eval_num_groups"] == 2 and results[1]["eval_tree_vs_chain/max"] < 1e-4
    assert math.isclose(results[0]["eval_logp/mean"], results[1]["eval_logp/mean"], rel_tol=1e-5)


def test_an_empty_file_is_named(tmp_path, refused):
    _, model = tiny.write(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for argv in (
        ["eval", "--model", model, "--rollouts", f"replay:{empty}"],
        ["inspect", empty],
        ["flops", empty, "--model", model],
        ["convert", empty, tmp_path / "out.jsonl", "--tokenizer", model],
    ):
        assert f"{empty} holds no trajectory" in refused(*argv)


def test_inspect_leaves_out_groups_without_calls(tmp_path, capsys, refused):
    plain = Trajectory([1, 2, 3], [0, 0, 0], group="plain")
    unknown = [dataclasses.replace(row, reward=None) for row in tiny.trajectories(2)]
    rollouts, _ = tiny.write(tmp_path, [plain, *unknown])
    assert main(["inspect", str(rollouts), "--samples", "call", "--max-groups", "1"]) == 0
    text = capsys.readouterr().out
    assert "group g0" in text and "1 more groups: give" in text and "1 groups left out: nothing in them" in text
    assert "there is no call to draw" in refused("inspect", rollouts, "--samples", "call", "--group", "plain")
    assert main(["inspect", str(rollouts), "--group", "plain"]) == 0
    assert "more groups" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, -1])
def test_inspect_draws_at_least_one_group(number, tmp_path, refused):
    rollouts, _ = tiny.write(tmp_path)
    err = refused("inspect", rollouts, "--max-groups", number, "--png", tmp_path / "x.png")
    assert f"--max-groups {number}: give at least 1" in err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--engine", "foo"], "engine='foo': choose one of hf, vllm, server:URL"),
        (["demo", "--engine", "server:host"], "engine='server:host'"),
        (["demo", "--steps", "0"], "steps=0: give at least 1"),
        (["demo", "--compare-steps", "0"], "compare_steps=0: give at least 1"),
        (["demo", "--backend", "foo"], "backend='foo': choose one of"),
        (["demo", "--seed", "-1"], "seed=-1"),
        (["demo", "--data", "nowhere"], "no rollouts at nowhere"),
        (["study", "--tokens", "0"], "--tokens 0: give at least 1"),
        (["study", "--questions", "0"], "--questions 0: give at least 1"),
        (["study", "--workers", "0"], "--workers 0: give at least 1"),
        (["study", "--learning-rate", "-1"], "--learning-rate -1.0"),
        (["study", "--seeds", "1"], "seeds=1: an interval needs at least 2"),
    ],
)
def test_arguments_are_checked_before_the_warm_start(argv, message, tmp_path, monkeypatch, refused):
    def trained(*args, **kwargs):
        raise AssertionError("the warm start has begun")

    monkeypatch.setattr("treegrpo.demo.warm_start", trained)
    monkeypatch.setattr("treegrpo.box.warmstart.warm_start", trained)
    monkeypatch.chdir(tmp_path)
    assert message in refused(*argv)
    assert list(tmp_path.iterdir()) == []
