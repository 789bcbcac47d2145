"""Hybrid models (short convolutions, recurrences) through the whole trainer: trees against chains, resumed against
uncut, and the folders that come out of it. Two processes against one: test_fsdp.py."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path

import models as zoo
import pytest
import tiny
import torch
from tiny import largest_difference, run, settings

transformers = pytest.importorskip("transformers", "5.17")
from transformers import AutoModelForCausalLM  # noqa: E402

import treegrpo_kernels as tk  # noqa: E402
from treegrpo import checkpoint, export, models, recurrent  # noqa: E402
from treegrpo.cli import main  # noqa: E402
from treegrpo.dryrun import run_plan  # noqa: E402
from treegrpo.evaluate import evaluate  # noqa: E402
from treegrpo.hf import CHECK_SUBTREE_END, check_model, use_tree_attention  # noqa: E402
from treegrpo.trainer import Trainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# what a run is: LoRA adapters, or all weights call by call
LORA = {"lora_r": 2, "beta": 0.1, "gradient_checkpointing": True, "row_token_budget": 60}
FULL = {"gradient_checkpointing": True, "samples": "call", "num_iterations": 2, "beta": 0.1}
# (family, settings): gated delta rules, Kimi's, Mamba-2's scan, short convolutions; experts beside them
RUNS = [("qwen3_5_text", FULL), ("qwen3_next", LORA), ("kimi_linear", FULL), ("lfm2", FULL)]
RUNS += [("nemotron_h", LORA), ("granitemoehybrid", FULL), ("falcon_h1", LORA)]
RUNS = [(family, changes) for family, changes in RUNS if family in zoo.TAUGHT]


def files(folder: Path, family: str, **model) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**zoo.COMMON, **zoo.HYBRID[family], "attention_dropout": 0.0, "vocab_size": tiny.VOCAB}
    return tiny.write(folder, model_type=family, **shape | model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 30)[None]).logits


@pytest.mark.parametrize(("family", "changes"), RUNS, ids=lambda x: x if isinstance(x, str) else "")
def test_tree_and_chain_train_alike_and_what_is_exported_loads(tmp_path, family, changes):
    given = files(tmp_path, family)
    trainer = Trainer(settings(given, tmp_path / "tree", adam_epsilon=1e-3, save_strategy="steps", **changes))
    tree, weights = trainer.train(), {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
    chain, chain_weights = run(given, tmp_path / "chain", attention="chain", adam_epsilon=1e-3, **changes)
    for a, b in zip(tree, chain, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    assert largest_difference(weights, chain_weights) < 1e-5
    # nothing that is trained is without a gradient, which DDP would wait for
    trained = {name: p.grad for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert len(trained) > 5 and all(grad is not None for grad in trained.values())
    if "lora_r" in changes:
        assert any("in_proj" in name for name in trained) and not any("conv1d" in name for name in trained)
    (last,) = checkpoint.listed(tmp_path / "tree")
    loaded = AutoModelForCausalLM.from_pretrained(export.export(last, tmp_path / "out"))
    assert float((logits(loaded) - logits(trainer.policy)).abs().max()) < 1e-4
    result = evaluate(str(tmp_path / "out"), tiny.trajectories(), attention="both")
    assert result["eval_tree_vs_chain/max"] < 1e-4


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_resume_is_bit_exact(tmp_path, family):
    given = files(tmp_path, family)
    changes = {"max_steps": 4, "num_iterations": 2, "lr_scheduler_type": "cosine", "save_steps": 3}
    _, whole = run(given, tmp_path / "a", save_strategy="steps", **changes)
    first = str(tmp_path / "a" / "checkpoint-3")
    _, resumed = run(given, tmp_path / "b", resume_from_checkpoint=first, **changes)
    assert largest_difference(whole, resumed) == 0.0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert largest_difference(whole, dict(loaded.named_parameters())) == 0.0


@pytest.mark.parametrize("family", zoo.TAUGHT)
def test_models_in_low_precision_pass_the_check(family):
    """Their logits may be cast to float32 behind a head in bfloat16."""
    use_tree_attention(zoo.tiny_model(family, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_bf16_stays_near_float32(tmp_path, family):
    given = files(tmp_path, family)
    exact, _ = run(given, tmp_path / "a", max_steps=1)
    low, weights = run(given, tmp_path / "b", max_steps=1, bf16=True)
    assert low[0]["entropy"] == pytest.approx(exact[0]["entropy"], rel=0.02)
    assert low[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.1)
    assert {p.dtype for p in weights.values()} == {torch.float32}


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    # blocks of 4-bit weights are 64 wide
    given = files(tmp_path, "qwen3_5_text", hidden_size=64, intermediate_size=64, head_dim=16)
    with warnings.catch_warnings():
        # bitsandbytes asks the Hub for a faster kernel, once, and goes on without
        warnings.simplefilter("ignore")
        models.build_model(given[1], 0).save_pretrained(tmp_path / "model")
        changes = {"lora_r": 4, "load_in_4bit": True, "model": str(tmp_path / "model"), "adam_epsilon": 1e-3}
        trainer = Trainer(settings(given, tmp_path / "tree", save_strategy="steps", **changes))
        trainer.train()
        _, chain = run(given, tmp_path / "chain", attention="chain", **changes)
    weights = dict(trainer.policy.named_parameters())
    packed = {name.split(".layers.0.")[1] for name, p in weights.items() if p.dtype == torch.uint8 and ".0." in name}
    assert {"linear_attn.in_proj_qkv.base_layer.weight", "linear_attn.out_proj.base_layer.weight"} <= packed
    assert not [name for name in packed if "conv1d" in name]
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    assert largest_difference(trained, {name: chain[name] for name in trained}) < 1e-5
    (last,) = checkpoint.listed(tmp_path / "tree")
    loaded = AutoModelForCausalLM.from_pretrained(export.export(last, tmp_path / "out"))
    assert float((logits(loaded) - logits(trainer.policy)).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as Qwen publishes them: language and vision model in one."""
    config = transformers.AutoConfig.for_model(
        "qwen3_5",
        text_config={**zoo.COMMON, **zoo.HYBRID["qwen3_5_text"], "vocab_size": tiny.VOCAB + 2},
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32),
        image_token_id=tiny.VOCAB,
        video_token_id=tiny.VOCAB + 1,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published") / "model"
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_language_model_of_a_published_folder_is_trained_and_said_to_be(published, tmp_path, capsys):
    given = files(tmp_path, "qwen3_5_text")
    config = settings((given[0], published), tmp_path / "out", save_strategy="steps")
    note = "the language model alone (qwen3_5_text) is trained and saved, without what vision_config describes"
    assert dict(run_plan(config))["trained"] == f"all weights; {note}"
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    whole = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(published).state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, whole[name.replace("model.", "model.language_model.", 1)]), name
    trainer.train()
    assert f"model {published}: {note}\n" in capsys.readouterr().err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert largest_difference(dict(loaded.named_parameters()), dict(trainer.policy.named_parameters())) == 0.0
    assert largest_difference(dict(loaded.named_parameters()), before) > 1e-3


def test_tokens_that_stand_for_images_are_refused(published, tmp_path):
    rows = tiny.trajectories()
    ids = [*rows[3].token_ids[:-1], tiny.VOCAB]
    rows[3] = type(rows[3])(ids, rows[3].loss_mask, reward=1.0, group="g0")
    given = tiny.write(tmp_path, rows)
    config = settings((given[0], published), tmp_path / "out")
    for start in (run_plan, Trainer):
        with pytest.raises(ValueError, match=rf"trajectory 3 \(group 'g0'\): token_ids\[\d+\] = {tiny.VOCAB} stands"):
            start(config)


def test_a_model_without_a_causal_lm_is_refused_in_a_line(tmp_path, capsys):
    rollouts, _ = tiny.write(tmp_path)
    (tmp_path / "vl.json").write_text(json.dumps({"model_type": "lfm2_vl"}))
    for dry in (["--dry-run"], []):
        assert main(["train", "--rollouts", f"replay:{rollouts}", "--model", str(tmp_path / "vl.json"), *dry]) == 2
        err = capsys.readouterr().err
        assert "makes no causal LM of a lfm2_vl" in err and len(err) < 600


def test_biases_of_routers_stay_float32_in_a_bfloat16_export(tmp_path):
    moe = {"layers_block_type": ["linear_attention", "moe", "full_attention"], "n_routed_experts": 4}
    moe |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    given = files(tmp_path, "nemotron_h", **moe, n_group=1, topk_group=1)
    model = models.build_model(given[1], 0)
    (name,) = (name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    # as close as balanced routers have them: bfloat16 knows 7 and 7.03125
    biases = torch.tensor([7.001, 7.002, 7.003, 7.004])
    model.get_buffer(name).copy_(biases)
    model.save_pretrained(tmp_path / "model")
    run(given, tmp_path / "run", model=str(tmp_path / "model"), max_steps=1, save_strategy="steps")
    export.export(tmp_path / "run" / "checkpoint-1", tmp_path / "out", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert torch.equal(loaded[name], biases)
    assert {x.dtype for other, x in loaded.items() if other != name} == {torch.bfloat16}


def test_an_adapter_on_one_of_two_tied_weights_is_not_merged(tmp_path):
    given = files(tmp_path, "qwen3_5_text", tie_word_embeddings=True)
    changes = {"lora_r": 2, "lora_target_modules": ("embed_tokens", "q_proj"), "max_steps": 1}
    run(given, tmp_path / "run", save_strategy="steps", **changes)
    with pytest.raises(ValueError, match="are one weight, and an adapter changes one of them"):
        export.export(tmp_path / "run" / "checkpoint-1", tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "lfm2"])
def test_a_model_that_was_not_taught_is_refused_and_copies_of_a_taught_one_know_the_tree(family, monkeypatch):
    plan = tk.TreePlan.build(torch.tensor(CHECK_SUBTREE_END))
    inputs = dict(input_ids=torch.arange(1, 11)[None], position_ids=plan.position[None].long(), attention_mask=None)

    def logits(model):
        return model(**inputs, use_cache=False, tree_plan=plan).logits

    model = zoo.tiny_model(family, attention="treegrpo")
    file = sys.modules[type(model).__module__]
    for name in recurrent._FUNCTIONS:
        # as in a process that has taught no model of this file yet
        if recurrent._knows_trees(getattr(file, name, None)):
            monkeypatch.setattr(file, name, getattr(file, name).__wrapped__)
    with pytest.raises(ValueError, match=r"mix siblings: call treegrpo\.hf\.check_model\(model\)"):
        logits(model.train())
    check_model(model)
    found, other = logits(model), zoo.tiny_model(family, attention="treegrpo", seed=1)
    # one process, one family, taught twice
    check_model(other)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(same), found)
    assert not torch.equal(logits(other), found)
