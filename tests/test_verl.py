"""verl's engine on packed trees against verl's own on the same batches, and what is registered where; CPU, gloo."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")
import numpy as np
import torch
import transformers
import verl_tiny as tiny
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.workers.utils.losses import ppo_loss, sft_loss
from verl.workers.utils.padding import no_padding_2_padding

from treegrpo.integrations.verl import engine, micro_batches
from treegrpo.recurrent import SINCE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path)
    if not torch.distributed.is_initialized():
        tiny.join()
    yield path
    torch.distributed.destroy_process_group()


def count_tokens(made):
    """A list that every forward adds its tokens to."""
    seen = []
    base = made.module.get_input_embeddings()
    base.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    return seen


# name -> (settings of the batch, of the model, of the engine), changes for ours alone
CASES = {
    "plain": ({}, {}, {}),
    "temperature": (dict(temperature=0.7), {}, {}),
    "a temperature a row": (dict(temperature=torch.full((12,), 0.8)), {}, {}),
    "micro-batches": (dict(max_token_len_per_gpu=60), {}, {}),
    "a group beyond the budget": (dict(max_token_len_per_gpu=25), {}, {}),
    "micro-batches of four rows": (dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=4), {}, {}),
    "checkpointing": ({}, dict(enable_gradient_checkpointing=True), {}),
    "lora": ({}, dict(lora_rank=4, target_modules=["q_proj", "v_proj"]), {}),
    "gathered layers kept": ({}, {}, dict(reshard_after_forward=False)),
    "fsdp1": (dict(max_token_len_per_gpu=60), {}, dict(strategy="fsdp")),
    "fsdp1, parameters as they were": ({}, {}, dict(strategy="fsdp", use_orig_params=True)),
    "fsdp1, lora": (
        {},
        dict(lora_rank=4, target_modules=["q_proj", "v_proj"]),
        dict(strategy="fsdp", use_orig_params=True),
    ),
    "fsdp1, checkpointing": ({}, dict(enable_gradient_checkpointing=True), dict(strategy="fsdp")),
}


@pytest.mark.parametrize("name", CASES)
def test_engine(name, folder):
    settings, model, options = CASES[name]
    samples = tiny.rows()
    # siblings apart: it is the engine that brings them together
    samples = samples[::2] + samples[1::2]
    found = {}
    for kind in ("verl", "tree"):
        torch.manual_seed(0)
        made = tiny.engine(folder, tree=kind == "tree", model=model, **options)
        assert (type(made) is engine.TreeFSDPEngine) == (kind == "tree")
        forwarded = count_tokens(made)
        # verl counts a row's padding against the budget, and has nothing to keep together
        asked = settings if kind == "tree" or "max_token_len_per_gpu" not in settings else {}
        data = tiny.batch(samples, **asked)
        with made.eval_mode():
            output = made.infer_batch(data)["model_output"]
            if kind == "tree" and made.model_config.lora_rank:
                with made.disable_adapter():
                    reference = made.infer_batch(data)["model_output"]
                # a fresh adapter adds nothing
                torch.testing.assert_close(reference["log_probs"].values(), output["log_probs"].values())
        with made.train_mode():
            made.optimizer_zero_grad()
            forwarded.clear()
            result = made.forward_backward_batch(data, functools.partial(ppo_loss, tiny.actor_config()))
            grads = tiny.parameters(made, grad=True)
            norm = made.optimizer_step()
        scored = {k: [row[:-1] for row in v.unbind()] for k, v in output.items()}
        loss = float(sum(result["loss"]))
        found[kind] = dict(
            scored=scored, padded=no_padding_2_padding(output["log_probs"], data), loss=loss, grads=grads, norm=norm
        )
        found[kind] |= dict(parameters=tiny.parameters(made), tokens=sum(forwarded), metrics=result["metrics"])
    want, got = found["verl"], found["tree"]
    for key in ("log_probs", "entropy"):
        for x, y in zip(got["scored"][key], want["scored"][key], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["padded"], want["padded"], rtol=0, atol=1e-5)
    tiny.assert_same_step(got, want)
    assert float(got["norm"]) == pytest.approx(float(want["norm"]), rel=1e-4) and float(want["norm"]) > 1e-3
    assert got["metrics"].keys() == want["metrics"].keys() | {"packing_ratio"}
    assert bool(model.get("lora_rank")) == (want["grads"].keys() != want["parameters"].keys())
    if not settings.keys() & {"max_token_len_per_gpu", "use_dynamic_bsz"}:
        unique = micro_batches.unique_tokens([np.array(p + r) for _, p, r in samples])
        assert got["tokens"] == unique
    assert got["tokens"] < 0.75 * want["tokens"]


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_reference(strategy, folder):
    """A frozen reference, whose weights verl offloads: no optimiser, several micro-batches, no entropies."""
    found, with_grad = [], []
    for tree in (False, True):
        made = tiny.engine(folder, tree=tree, strategy=strategy, forward_only=True)
        assert made.optimizer is None
        made.module.register_forward_pre_hook(lambda *args: with_grad.append(torch.is_grad_enabled()))
        data = tiny.batch(tiny.rows(), calculate_entropy=False, max_token_len_per_gpu=60 if tree else 4096)
        with made.eval_mode():
            output = made.infer_batch(data)["model_output"]
        assert output.keys() == {"log_probs"}
        found.append(no_padding_2_padding(output["log_probs"], data))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert float(found[0].abs().max()) > 1 and len(with_grad) > 2 and not any(with_grad)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_hybrids(family, folder, tmp_path):
    """Layers that carry a state are handed the tree since transformers 5.17, which verl 0.9.1 does not ask for yet."""
    tiny.write_model(tmp_path, family)
    if Version(transformers.__version__) < SINCE:
        with pytest.raises(ValueError, match=r"take transformers 5\.17 or newer"):
            tiny.engine(tmp_path, tree=True)
        return
    found = []
    for tree in (False, True):
        made = tiny.engine(tmp_path, tree=tree)
        with made.train_mode():
            made.optimizer_zero_grad()
            loss = functools.partial(ppo_loss, tiny.actor_config())
            loss = sum(made.forward_backward_batch(tiny.batch(tiny.rows()), loss)["loss"])
            grads = tiny.parameters(made, grad=True)
            made.optimizer_step()
        found.append(dict(loss=float(loss), grads=grads, parameters=tiny.parameters(made)))
    tiny.assert_same_step(found[1], found[0])


def test_a_saved_config_names_no_attention(folder, tmp_path):
    tiny.engine(folder, tree=True).module.config.save_pretrained(tmp_path)
    assert "treegrpo" not in (tmp_path / "config.json").read_text()


def test_supervised_loss(folder):
    """sft_loss reads whole rows, prompts too."""
    found = []
    for tree in (False, True):
        made = tiny.engine(folder, tree=tree)
        data = tiny.batch(tiny.rows(), calculate_entropy=False)
        data["loss_mask"] = torch.nested.as_nested_tensor(
            [
                torch.ones(len(p) + len(r), dtype=torch.int64).index_fill(0, torch.tensor([0]), 0)
                for _, p, r in tiny.rows()
            ],
            layout=torch.jagged,
        )
        with made.train_mode():
            made.optimizer_zero_grad()
            loss = sum(made.forward_backward_batch(data, functools.partial(sft_loss, None))["loss"])
            found.append((loss, tiny.parameters(made, grad=True)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=0, atol=1e-5, msg=key)


def test_bfloat16_errs_as_much_as_verl(folder):
    """verl's default: weights in float32, computed in bfloat16."""

    autocast = []

    def log_probs(tree, dtype):
        options = dict(mixed_precision=dict(param_dtype=dtype, reduce_dtype="fp32", buffer_dtype="fp32"))
        made = tiny.engine(folder, tree=tree, **options)
        made.module.register_forward_pre_hook(lambda *args: autocast.append(torch.is_autocast_enabled("cpu")))
        with made.eval_mode():
            rows = made.infer_batch(tiny.batch(tiny.rows()))["model_output"]["log_probs"].unbind()
        return torch.cat([row[:-1] for row in rows])

    exact = log_probs(False, "fp32")
    theirs, mine = (log_probs(tree, "bf16") - exact for tree in (False, True))
    assert autocast == [False, True, True]
    assert 1e-4 < float(mine.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt())
    assert float(mine.abs().max()) <= 2 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ulysses_sequence_parallel_size=2), "ulysses"),
        (dict(pad_to_length=True), "pad_to_length"),
        (dict(model=dict(use_fused_kernels=True)), "use_fused_kernels"),
        (dict(model=dict(use_liger=True)), "use_liger"),
        (dict(model=dict(tiled_mlp=dict(enabled=True, num_shards=4))), "tiled_mlp"),
    ],
    ids=str,
)
def test_engine_refuses(change, message, folder):
    with pytest.raises(ValueError, match=message):
        tiny.engine(folder, tree=True, **change)


def test_batches_it_refuses(folder):
    made = tiny.engine(folder, tree=True)
    for changes, message in (
        (dict(calculate_sum_pi_squared=True), "calculate_sum_pi_squared"),
        (dict(temperature=torch.linspace(0.5, 1, 12)), "temperatures"),
        (dict(max_token_len_per_gpu=9), "max_token_len_per_gpu=9"),
        (dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=5), "multiple"),
        (dict(multi_modal_inputs=[{}] * 11 + [dict(pixel_values=torch.ones(1, 3))]), "text only"),
        (dict(distillation_use_topk=True), "distillation_use_topk"),
    ):
        with made.eval_mode(), pytest.raises(ValueError, match=message):
            made.infer_batch(tiny.batch(tiny.rows(), **changes))


def test_an_adapter_that_draws_is_refused(folder, tmp_path):
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], lora_dropout=0.1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj\.lora_dropout\.default=0\.1"):
        tiny.engine(folder, tree=True, model=dict(lora_rank=4, lora_adapter_path=str(tmp_path)))


def test_a_model_it_would_get_wrong_is_refused(folder, monkeypatch):
    monkeypatch.setattr(engine, "check_model", lambda module: (_ for _ in ()).throw(ValueError("mixes siblings")))
    with pytest.raises(ValueError, match="mixes siblings"):
        tiny.engine(folder, tree=True)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_two_processes(strategy, tmp_path):
    # tied: verl loads such models on every process
    tiny.write_model(tmp_path / "model", tie_word_embeddings=strategy == "fsdp")
    found = {}
    for kind in ("verl", "tree"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(HERE / "verl_worker.py")]
        paths = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            env.pop(name, None)
        started = [
            subprocess.Popen(
                [*command, str(rank), str(port), str(tmp_path / "model"), str(tmp_path / kind), kind, strategy],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        for process in started:
            text, _ = process.communicate(timeout=240)
            assert process.returncode == 0, text[-3000:]
        found[kind] = [torch.load(f"{tmp_path / kind}.{rank}") for rank in range(2)]
    # the first process alone would need two
    assert [x["passes"] for x in found["tree"]] == [3, 3]
    for rank in range(2):
        tiny.assert_same_step(found["tree"][rank], found["verl"][rank])


def test_importing_verl_says_what_was_registered():
    env = os.environ | dict(VERL_USE_EXTERNAL_MODULES="treegrpo.integrations.verl")
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")])
    done = subprocess.run([sys.executable, "-c", "import verl"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "engine vendor 'treegrpo'" in line]
    assert line.startswith("INFO") and "tree_grpo" in line and "trainer_mode tree_sync" in line
    # the line is there once: what registers twice would fail
    assert "left out" not in line


def test_ray_workers_register_and_select():
    """Real Ray worker processes import verl, find the plugin and are given our engine and trainer."""
    ray = pytest.importorskip("ray")
    root = HERE.parent
    env = dict(
        PYTHONPATH=os.pathsep.join([str(root), str(root / "kernels")]),
        VERL_USE_EXTERNAL_MODULES="treegrpo.integrations.verl",
        VERL_ENGINE_VENDOR="treegrpo",
        VERL_ENGINE_DEVICE="cuda",
    )
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", runtime_env=dict(env_vars=env))

    @ray.remote
    class Worker:
        def chosen(self):
            import verl  # noqa: F401
            from verl.trainer.ppo.v1 import get_trainer_cls
            from verl.workers.engine.base import EngineRegistry

            get_adv_estimator_fn("tree_grpo")
            engines = [EngineRegistry.get_engine_cls("language_model", name) for name in ("fsdp", "fsdp2")]
            value = EngineRegistry.get_engine_cls("value_model", "fsdp2")
            return [x.__name__ for x in (*engines, value, get_trainer_cls("tree_sync"))]

    try:
        want = ["TreeFSDPEngine", "TreeFSDPEngine", "FSDPEngineWithValueHead", "TreePPOTrainerSync"]
        assert ray.get([Worker.remote().chosen.remote() for _ in range(2)], timeout=180) == [want, want]
    finally:
        ray.shutdown()
