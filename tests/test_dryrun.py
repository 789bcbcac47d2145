"""A dry run refuses what would stop the run at its start, with the same words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from boxes import online_config, quick_box
from models import HYBRID

from treegrpo import Trajectory, dryrun
from treegrpo.cli import main
from treegrpo.dryrun import _ranges, _small_copy, run_plan
from treegrpo.models import read_model_config
from treegrpo.rollout.order import EpochOrder
from treegrpo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return quick_box(tmp_path_factory.mktemp("box"))


@pytest.fixture
def argv(tmp_path):
    rollouts, model = tiny.write(tmp_path)
    return ["train", "--rollouts", f"replay:{rollouts}", "--model", str(model), "--output-dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--row-token-budget", "12"], "over row_token_budget=12"),
        (["--row-token-budget", "25", "--shared-tokens", "once"], "needs it in one row"),
        pytest.param(
            ["--backend", "cuda"],
            "backend 'cuda' does not work here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--resume-from-checkpoint", "nowhere"], "nowhere is not a whole checkpoint"),
        (["--resume-from-checkpoint", "latest"], "no checkpoint-* in"),
        (["--lora-r", "2", "--lora-target-modules", "nosuch"], "Target modules {'nosuch'} not found"),
        (["--lr-scheduler-type", "polynomial", "--learning-rate", "1e-8"], "must be smaller than initial lr"),
        (["--lora-r", "2", "--load-in-4bit"], "load_in_4bit needs"),
    ],
)
def test_settings_that_stop_the_run(more, message, argv, capsys):
    for dry in (["--dry-run"], []):
        assert main([*argv, *more, *dry]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_key_value_heads": 3}, "k and v must agree and divide q's number"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ({"model_type": "mamba"}, "take a model whose layers are all attention"),
    ],
)
def test_models_that_stop_the_run(model, message, argv, tmp_path, capsys):
    tiny.write(tmp_path, **model)
    for dry in (["--dry-run"], []):
        assert main([*argv, *dry]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_is_there_is_refused(argv, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    assert main([*argv, "--dry-run"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*argv, "--dry-run", "--overwrite-output-dir"]) == 0
    assert "the self-check passes" in " ".join(capsys.readouterr().out.split())


def test_a_folder_without_weights_is_refused(argv, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(tiny.MODEL))
    argv[argv.index("--model") + 1] = str(tmp_path / "empty")
    for dry in (["--dry-run"], []):
        assert main([*argv, *dry]) == 2
        assert ".safetensors" in capsys.readouterr().err


def test_a_large_model_is_checked_as_a_small_copy(argv, tmp_path, capsys):
    large = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 50_000, "num_hidden_layers": 8}
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 6
    rows = [Trajectory([1, 2, i], [0, 1, 1], reward=float(i), group="g") for i in (0, 1)]
    tiny.write(tmp_path, rows, **large, layer_types=kinds, use_sliding_window=True, sliding_window=64)
    assert main([*argv, "--dry-run"]) == 0
    assert "a random copy of few layers" in " ".join(capsys.readouterr().out.split())
    tiny.write(tmp_path, rows, **large, num_key_value_heads=3)
    assert main([*argv, "--dry-run"]) == 2
    assert "divide q's number" in capsys.readouterr().err
    # three linear layers before the first of attention
    experts = dict(num_experts=4, num_experts_per_tok=2)
    tiny.write(tmp_path, rows, **large, **experts, model_type="qwen3_next")
    assert main([*argv, "--dry-run"]) == 0
    kinds = ["linear_attention"] * 3 + ["full_attention"] * 5
    tiny.write(tmp_path, rows, **large, **experts, model_type="minimax", layer_types=kinds)
    assert main([*argv, "--dry-run"]) == 2
    assert "layers of type linear_attention" in capsys.readouterr().err


@pytest.mark.skipif("nemotron_h" not in HYBRID, reason="a family of newer releases of transformers")
def test_a_large_hybrid_is_checked_in_the_fewest_layers_of_all_kinds(argv, tmp_path, capsys, monkeypatch):
    # a quarter of Nemotron-H-8B's width, a sixteenth of its weights
    monkeypatch.setattr(dryrun, "_SMALL", dryrun._SMALL // 16)
    monkeypatch.setattr(dryrun, "_LARGEST", dryrun._LARGEST // 16)
    rows = [Trajectory([1, 2, i], [0, 1, 1], reward=float(i), group="g") for i in (0, 1)]
    # its first layers of all kinds are eight: more than a check should build
    shape = {"hidden_size": 1024, "intermediate_size": 5376, "hybrid_override_pattern": "M-M-M-M*-" + "M-" * 4}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "n_groups": 8}
    shape |= {"mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128, "num_hidden_layers": None}
    _, model = tiny.write(tmp_path, rows, model_type="nemotron_h", **shape)
    config = read_model_config(model)
    assert _ranges(config) == [(0, 8), (5, 8)]
    assert _small_copy(config, 5, 8).layer_types == ["mlp", "linear_attention", "full_attention"]
    assert main([*argv, "--dry-run", "--lora-r", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a random copy of few layers" in out and "LoRA rank 2 on down_proj, in_proj, k_proj" in out
    # one that says where its layers of attention are cannot be cut behind the first
    shape = {"attn_layer_indices": [9], "num_hidden_layers": 10, "hidden_size": 1024, "intermediate_size": 3584}
    shape |= {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
    tiny.write(tmp_path, rows, model_type="bamba", **shape)
    assert main([*argv, "--dry-run"]) == 0
    assert "not checked: 10 layers of it have" in " ".join(capsys.readouterr().out.split())


def test_a_tokenizer_of_another_model_is_refused(box, tmp_path):
    model = tmp_path / "model.json"
    size = read_model_config(box).vocab_size
    values = {**tiny.MODEL, "vocab_size": size - 1, "max_position_embeddings": 512}
    model.write_text(json.dumps(values))
    config = online_config(box, tmp_path / "out", model=str(model), tokenizer=str(box))
    for start in (run_plan, Trainer):
        with pytest.raises(ValueError, match=rf"has id {size - 1}, but the model .* has ids 0 to {size - 2}"):
            start(config)
    model.write_text(json.dumps({**values, "vocab_size": size}))
    run_plan(config)


def test_prompts_that_leave_no_room_are_named_before_the_run(box, tmp_path):
    rows = [json.loads(line) for line in (box / "train.jsonl").read_text().splitlines()[:6]]
    for index in (2, 4):
        rows[index]["question"] = "why " * 300
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset": str(tmp_path / "train.jsonl"), "max_context_length": 128, "shuffle": False, "max_steps": 2}
    config = online_config(box, tmp_path / "out", **changes)
    for start in (run_plan, Trainer):
        with pytest.raises(ValueError, match=r"dataset: .* row 2 has 3\d\d, row 4 has 3\d\d; take"):
            start(config)
    # four prompts at a time, so that no later one is read
    rows = [rows[i] for i in (0, 1, 3, 5, 2, 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, groups_per_step=4, max_steps=1)
    for start in (run_plan, Trainer):
        start(config)
        with pytest.raises(ValueError, match=r"eval_dataset: .* row 4 has"):
            start(replace(config, eval_dataset=config.dataset, eval_steps=1))


def test_an_environment_with_a_reset_of_its_own_is_not_begun_to_measure_it(box, tmp_path, monkeypatch):
    def begun(self, row):
        raise AssertionError("this may start a browser")

    monkeypatch.setattr("boxes.EchoEnv.reset", begun)
    own = {"env": "boxes:EchoEnv", "retriever": ""}
    templates = dict.fromkeys(("prompt_template", "observation_template", "document_template"))
    config = online_config(box, tmp_path / "out", **own, **templates)
    run_plan(config)
    Trainer(config)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_items_of_the_next_places(shuffle):
    order = EpochOrder(5, seed=3, shuffle=shuffle)
    for place in range(11):
        for count in range(14):
            assert order.upcoming(place, count) == sorted({order[p] for p in range(place, place + count)})
