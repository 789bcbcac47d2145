"""Adapters on a frozen base in 4 bits: exact gradients, the base untouched, the reference it is with adapters off."""

import pytest
import tiny
import torch
from distributed_worker import run
from tiny_engine import alone, greedy, make_tokenizer, together
from transformers import AutoModelForCausalLM
from two_processes import DDP, FSDP2, RESHARD, two_processes

pytest.importorskip("bitsandbytes")

from treegrpo import build_forest, models, pack, token_logprobs
from treegrpo.cli import main
from treegrpo.config import TrainConfig
from treegrpo.rollout.hf import HFEngine
from treegrpo.trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # bitsandbytes asks the Hub for a faster kernel, once, and goes on without
    pytest.mark.filterwarnings("ignore"),
]
# blocks of 4-bit weights are 64 wide
SHAPE = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    _, config = tiny.write(folder, **SHAPE)
    models.build_model(config, 0).save_pretrained(folder / "model")
    return folder


def settings(folder, name, **changes):
    base = dict(rollouts=f"replay:{folder / 'rollouts.jsonl'}", model=str(folder / "model"), max_steps=3)
    base |= dict(output_dir=str(folder / name), learning_rate=2e-3, adam_epsilon=1e-3, groups_per_step=3)
    base |= dict(lora_r=4, load_in_4bit=True, beta=0.05, save_strategy="no", disable_tqdm=True)
    return base | changes


@pytest.fixture(scope="module")
def trained(folder):
    return run(settings(folder, "tree", save_strategy="steps"))


def largest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a if a[name].is_floating_point())


def test_tree_equals_chain_and_the_base_stays(folder, trained):
    trainer = Trainer(TrainConfig(**settings(folder, "chain", attention="chain", gradient_checkpointing=True)))
    frozen = {name: p for name, p in trainer.policy.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    history = trainer.train()
    packed = [name for name, p in frozen.items() if p.dtype == torch.uint8]
    assert len(packed) == 14 and all(torch.equal(before[name], p) for name, p in frozen.items())
    assert largest(trained[1], dict(trainer.policy.named_parameters())) < 1e-6
    for name in ("loss", "grad_norm", "kl"):
        assert [row[name] for row in history] == pytest.approx([row[name] for row in trained[0]], rel=1e-4, abs=1e-7)
    # the reference is the base: no distance before the first update, some after
    assert abs(history[0]["kl"]) < 1e-9 and history[2]["kl"] > 1e-6


def test_gradients_are_those_of_the_values_the_four_bits_stand_for(folder):
    config = TrainConfig(**settings(folder, "unused"))
    (batch,) = pack(build_forest(tiny.trajectories()))
    found = []
    for dequantize in (False, True):
        model = models.build_policy(config, None, dequantize=dequantize)
        with torch.no_grad():
            # B starts at zero, where A has no gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        # a forward in eval mode, as engines and evaluations make, must not cost the gradients
        token_logprobs(model.eval(), batch)
        logp = token_logprobs(model.train(), batch)
        logp.sum().backward()
        found.append({"logp": logp} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert float(found[0]["base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"].abs().max()) > 0.1
    scale = max(float(x.detach().abs().max()) for x in found[1].values())
    assert largest(*found) < 1e-6 * scale


def test_export_gives_the_model_that_was_trained(folder, trained, tmp_path):
    checkpoint = folder / "tree" / "checkpoint-3"
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()} == {torch.float32}
    config = TrainConfig(**settings(folder, "unused"))
    (batch,) = pack(build_forest(tiny.trajectories()))
    with torch.no_grad():
        want = token_logprobs(models.build_policy(config, checkpoint), batch)
        base = token_logprobs(models.build_policy(config, None), batch)
        got = token_logprobs(models.build_model(tmp_path / "out", 0), batch)
    assert float((got - want).abs().max()) < 1e-5 and float((base - want).abs().max()) > 1e-2
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "out").config, "quantization_config")


def test_two_processes_train_as_one(folder, trained):
    jobs = {
        "ddp": dict(settings=settings(folder, "ddp"), environment=DDP),
        "fsdp2": dict(
            settings=settings(folder, "fsdp2", save_strategy="steps", gradient_checkpointing=True),
            environment=FSDP2 | RESHARD,
        ),
    }
    low = dict(settings=settings(folder, "low", bf16=True, max_steps=1), environment=FSDP2 | RESHARD)
    found = two_processes(folder, jobs | {"low": low})
    for name in jobs:
        history, parameters, gradients, _ = found[name]
        assert largest(gradients, trained[2]) < 1e-6, name
        assert largest(parameters, trained[1]) < 1e-6, name
        assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in trained[0]], rel=1e-4), name
    packed, floats = (
        sum(p.numel() for p in trained[1].values() if p.is_floating_point() == is_float) for is_float in (False, True)
    )
    # 4-bit weights are whole on both processes, of the rest each holds half
    assert found["fsdp2"][3][0] == pytest.approx(packed + floats / 2, abs=0.01 * floats)
    assert found["low"][0][0]["entropy"] == pytest.approx(trained[0][0]["entropy"], rel=0.02)
    assert found["low"][0][0]["grad_norm"] == pytest.approx(trained[0][0]["grad_norm"], rel=0.1)
    # one process goes on from what two sharded ones wrote
    resume = str(folder / "fsdp2" / "checkpoint-3")
    rows, found, _, _ = run(
        settings(folder, "on", max_steps=5, lr_scheduler_type="constant", resume_from_checkpoint=resume)
    )
    resume = str(folder / "tree" / "checkpoint-3")
    _, alone, _, _ = run(
        settings(folder, "off", max_steps=5, lr_scheduler_type="constant", resume_from_checkpoint=resume)
    )
    assert [row["step"] for row in rows] == [4, 5] and largest(found, alone) < 1e-6


def test_bad_settings(folder):
    with pytest.raises(ValueError, match="load_in_4bit freezes the base: give lora_r"):
        TrainConfig(**settings(folder, "x", lora_r=0))
    with pytest.raises(ValueError, match="needs a folder with weights"):
        Trainer(TrainConfig(**settings(folder, "x", model=str(folder / "model.json"))))
    with pytest.raises(ValueError, match="4 bits would change more than they do; sample with rollouts=hf"):
        Trainer(TrainConfig(**settings(folder, "x", rollouts="server:http://127.0.0.1:1")))


def test_an_engines_copy_gets_the_adapters(folder):
    policy = models.build_policy(TrainConfig(**settings(folder, "unused")), None)
    engine = HFEngine(policy, make_tokenizer(), copy_weights=True)
    engine._end_ids = frozenset()
    (before,) = together(engine, [([5, 6, 7], greedy())])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    engine.sync_weights(policy)
    (after,) = together(engine, [([5, 6, 7], greedy())])
    engine.close()
    assert after.token_ids == alone(policy, [5, 6, 7], ends=False) != before.token_ids
