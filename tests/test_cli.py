"""Every command end to end on tiny files, and the error a user sees for bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny
import torch
from test_convert import CHATML, TALK, byte_tokenizer
from transformers import AutoConfig

from treegrpo import compare, load
from treegrpo.cli import main
from treegrpo.config import TrainConfig, read_config
from treegrpo.flops import model_shape
from treegrpo.metrics import read_metrics
from treegrpo.models import read_model_config

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_help_lists_every_command_and_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = ("doctor", "inspect", "flops", "train", "eval", "export", "report", "convert", "demo", "study")
    assert all(name in text for name in names)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in TrainConfig.__dataclass_fields__)


def test_python_m_runs():
    done = subprocess.run([sys.executable, "-m", "treegrpo", "--help"], capture_output=True, text=True, check=True)
    assert "Prefix-tree attention for training" in done.stdout


def test_train_ends_with_the_other_processes(tmp_path, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr("treegrpo.parallel.Parallel.end", lambda self: ends.append(capsys.readouterr().out))
    rollouts, model = tiny.write(tmp_path)
    flags = ["--rollouts", f"replay:{rollouts}", "--model", str(model), "--output-dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--max-steps", "1", "--disable-tqdm"]) == 0
    (printed,) = ends
    assert "metrics and checkpoints are in" in printed


def test_train_report_eval(tmp_path, capsys):
    rollouts, model = tiny.write(tmp_path)
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"rollouts: replay:{rollouts}\nmodel: {model}\nlearning_rate: 1e-3\nmax_steps: 5\nsamples: call\n"
    )
    out = tmp_path / "out"
    flags = ["--config", str(settings), "--output_dir", str(out), "--max-steps", "2", "--groups_per_step", "2"]
    assert main(["train", *flags, "--disable-tqdm"]) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["learning_rate"] == 1e-3
    assert "tree/unique_tokens" in capsys.readouterr().out
    resolved = read_config(out / "config.yaml")
    assert (resolved.max_steps, resolved.samples, resolved.groups_per_step) == (2, "call", 2)

    assert main(["report", str(out)]) == 0
    assert (out / "curves.png").stat().st_size > 10_000
    assert "| loss |" in (out / "report.md").read_text()

    numbers = tmp_path / "eval.json"
    command = ["eval", "--model", str(out / "checkpoint-2"), "--rollouts", f"replay:{rollouts}", "--json", str(numbers)]
    assert main(command) == 0
    result = json.loads(numbers.read_text())
    assert result["eval_tree_vs_chain/max"] < 1e-4 and result["eval_logp/mean"] < 0 and "eval_logp/rewarded" in result
    assert result["eval_num_unique_tokens"] < result["eval_num_chain_tokens"]


def test_inspect_draws_nodes_rewards_and_picture(tmp_path, capsys):
    rollouts, _ = tiny.write(tmp_path)
    picture = tmp_path / "tree.png"
    assert main(["inspect", str(rollouts), "--group", "g1", "--png", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "group g1" in text and "5 leaves" in text and "shared by 5" in text
    assert all(f"leaf {leaf}" in text for leaf in range(5)) and "advantage" in text
    assert picture.stat().st_size > 10_000
    assert main(["inspect", str(rollouts), "--samples", "call", "--max-groups", "1"]) == 0
    assert "3 more groups" in capsys.readouterr().out


def test_group_names_are_shown_as_they_are(tmp_path, capsys):
    rows = [dataclasses.replace(row, group="train.jsonl:train:7@3") for row in tiny.trajectories(1)]
    rollouts, _ = tiny.write(tmp_path, rows)
    assert main(["inspect", str(rollouts)]) == 0
    assert "group train.jsonl:train:7@3" in capsys.readouterr().out
    # a terminal obeys escapes, and half a surrogate pair cannot be printed
    rows = [dataclasses.replace(row, group="\x1b[2J\ud800") for row in rows]
    rollouts, _ = tiny.write(tmp_path, rows)
    assert main(["inspect", str(rollouts)]) == 0 and main(["inspect", str(rollouts), "--group", "x"]) == 2
    out, err = capsys.readouterr()
    assert r"group \x1b[2J\ud800" in out and r"it has \x1b[2J\ud800, ..." in err and "\x1b" not in out + err


def test_flops_prints_a_table_and_writes_json(tmp_path, capsys):
    rollouts, model = tiny.write(tmp_path)
    numbers = tmp_path / "flops.json"
    assert main(["flops", str(rollouts), "--model", str(model), "--json", str(numbers)]) == 0
    result = json.loads(numbers.read_text())
    assert result["chain"]["tokens"] > result["tree"]["tokens"] and result["flop_ratio"] > 1
    assert "attention FLOPs" in capsys.readouterr().out


def test_convert_reads_messages_and_writes_tokens(tmp_path, capsys):
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    source, out = tmp_path / "chat.jsonl", tmp_path / "tokens.jsonl.gz"
    records = [{"messages": TALK, "group": "g", "reward": 1, "trial": trial} for trial in range(2)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["convert", str(source), str(out), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "2 trajectories in 1 groups" in capsys.readouterr().out
    assert [t.tree for t in load(out)] == [0, 1]
    source.write_text(source.read_text() + '{"messages": [')
    again = tmp_path / "again.jsonl"
    assert main(["convert", str(source), str(again), "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "line 3: not valid JSON" in capsys.readouterr().err and not again.exists()


def test_doctor_says_which_triton_has_the_hopper_kernels(monkeypatch):
    triton = pytest.importorskip("triton")
    from treegrpo import doctor

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    assert doctor._usable("triton") == "usable, with Hopper kernels for bf16 and fp16 heads of 33 to 256"
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert "without its Hopper kernels, which do not serve Triton 3.10.0" in doctor._usable("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (8, 0))
    assert doctor._usable("triton") == "usable"


def test_doctor_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f"backend {name}" in text for name in ("reference", "cpu", "triton", "cuda", "gather"))
    assert "torch" in text and "transformers" in text and "nvcc" in text
    assert "recurrent layers" in text


def test_doctor_says_what_recurrent_layers_lack_on_a_gpu(monkeypatch):
    from treegrpo import doctor
    from treegrpo_kernels import recurrence

    def found():
        [finding] = doctor._recurrence()
        return finding

    assert found().cure is None or "flash-linear-attention" in found().cure
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(recurrence, "_missing", lambda *kind: "pip install it")
    assert found().cure == "pip install it"
    monkeypatch.setattr(recurrence, "_missing", lambda *kind: None)
    assert found().cure is None


def test_doctor_prints_extras_whole(monkeypatch, capsys):
    """In brackets, which rich takes for markup."""
    from treegrpo import doctor

    monkeypatch.setattr(doctor, "examine", lambda: [doctor._engines()])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    assert "needs httpx (pip install 'treegrpo[server]')" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("name", "missing", "needs"), [("cpu", "_C", "a C++"), ("cuda", "_C_cuda", "a CUDA toolkit (nvcc)")]
)
def test_doctor_says_how_to_build_what_pip_left_out(monkeypatch, gpu, name, missing, needs):
    """As after `pip install .` without --no-build-isolation, where a compiler is there."""
    import treegrpo_kernels
    from treegrpo import doctor
    from treegrpo_kernels import native

    failure = native._failure.__wrapped__
    monkeypatch.setattr(native, "__file__", "/nowhere/native.py")
    monkeypatch.setattr(native, "_failure", lambda object_: failure(object_) if object_ == missing else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    reason = treegrpo_kernels.api._reason(treegrpo_kernels.Backend(name), torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(treegrpo_kernels, "backends", lambda: {name: reason})
    (finding,) = doctor._backends()
    if name == "cuda" and not gpu:
        assert finding.cure == "run on a machine with an NVIDIA GPU"
        return
    assert "was not built: in treegrpo's folder run" in finding.state and needs in finding.state
    assert finding.cure.startswith("pip install --no-build-isolation .") and needs in finding.cure


def test_demo_compares_tree_and_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        compare, "MODEL", {**compare.MODEL, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    )
    monkeypatch.setattr(compare, "read_rollouts", lambda data: (tiny.trajectories(2), "tiny"))
    assert main(["demo", "--part", "compare", "--compare-steps", "2"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "visible pairs",
        "training GFLOPs",
        "seconds",
        "largest difference of the loss",
        "Calls share a lot",
    ):
        assert expected in text
    monkeypatch.undo()
    assert main(["demo", "--part", "compare", "--data", str(tmp_path)]) == 2
    assert "no rollouts at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "error: rollouts='': give replay:FILE"),
        (["train", "--config", "nothing.yaml"], "error: config: no such file: nothing.yaml"),
        (["train", "--backend", "magic"], "error: backend='magic': choose one of"),
        (["inspect", "nothing.jsonl"], "error: no such file: nothing.jsonl"),
        (["report", "nothing"], "error: no metrics at"),
    ],
)
def test_errors_are_one_line_and_exit_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'; did you mean learning_rate"),
        ("max_steps: many", "max_steps='many'"),
        ("bf16: 1", "write true or false"),
        ("config: y.yaml", "config='y.yaml' is a flag only: leave it out of the file"),
        (f"max_steps: {10**30}", "max_steps=10+: must be a whole number >= 1 and below"),
        ("max_steps: 1.5", "max_steps=1.5"),
        ("max_steps: .inf", "max_steps=inf"),
        ("- 1", "must be a mapping"),
        ("a: [", "x.yaml: not valid YAML"),
        pytest.param("[" * 3000, "x.yaml: not valid YAML .* recursion", id="nested"),
        ("save_strategy: no", "save_strategy=False: YAML reads a bare no, .* put it into quotes"),
        ("output_dir: l\xe4ufe", "x.yaml: not valid YAML in UTF-8: .* byte 0xe4"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_yaml_values_take_their_types(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "learning_rate: 1e-5\nrow_token_budget: 4096\nlora_target_modules: [q_proj, v_proj]\nepsilon_high: null\n"
        "vllm_importance_sampling_correction: false\n"
    )
    config = read_config(path)
    assert config.vllm_importance_sampling_correction is False
    assert (config.learning_rate, config.row_token_budget, config.epsilon_high) == (1e-5, 4096, None)
    assert config.lora_target_modules == ("q_proj", "v_proj")


# accelerate's are no settings of ours
@pytest.mark.parametrize(
    "path",
    sorted({*EXAMPLES.glob("*.yaml")} - {EXAMPLES / "ddp.yaml", EXAMPLES / "fsdp2.yaml"}),
    ids=lambda path: path.stem,
)
def test_examples_are_valid_settings(path):
    config = read_config(path)
    assert not config.model or read_model_config(EXAMPLES.parent / config.model).model_type == "qwen3"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_models_have_known_costs(path):
    assert model_shape(read_model_config(path)).linear_parameters > 0


def test_a_stored_config_with_an_infinite_limit_is_read(tmp_path):
    """JSON has no infinity: transformers writes another value in its place."""
    config = AutoConfig.for_model("bamba", hidden_size=32, mamba_n_heads=4)
    if not hasattr(config, "time_step_limit"):
        pytest.skip("this transformers knows no limits of step sizes")
    config.save_pretrained(tmp_path)
    assert read_model_config(tmp_path / "config.json").time_step_limit == config.time_step_limit == (0.0, math.inf)


def test_missing_packages_of_the_command_line_are_named(monkeypatch, capsys):
    from treegrpo import __main__ as entry

    find_spec = entry.find_spec
    monkeypatch.setattr(entry, "find_spec", lambda name: None if name in ("tyro", "rich") else find_spec(name))
    assert entry.main() == 2
    assert "the command line needs tyro, rich: pip install" in capsys.readouterr().err


def test_a_source_archive_holds_what_build_and_tests_read(tmp_path):
    """Headers, CUDA sources and the tests' helpers are nobody's sources: only MANIFEST.in brings them in."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    folders = ("bench", "csrc", "docs", "examples", "kernels", "tests", "treegrpo")
    wanted = [p for folder in folders for p in (EXAMPLES.parent / folder).rglob("*") if p.is_file()]
    wanted = {p.relative_to(EXAMPLES.parent).as_posix() for p in wanted if p.suffix not in (".so", ".pyc")}
    assert wanted | {"setup.py", "CMakeLists.txt", "Makefile", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_an_old_setuptools_is_told_what_to_do(tmp_path):
    """It would fail on pyproject.toml with a message about the license."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nExtension = setup = None\n")
    command = [sys.executable, "setup.py", "egg_info"]
    done = subprocess.run(
        command, cwd=EXAMPLES.parent, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install -U 'setuptools>=77'" in done.stderr
    assert '"setuptools>=77"' in (EXAMPLES.parent / "pyproject.toml").read_text()
