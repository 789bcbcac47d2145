"""FSDP2 on two gloo processes trains as one process does; a checkpoint resumes with any number of them."""

import json
import shutil
import sys

import models as zoo
import pytest
import tiny
import torch
import yaml
from boxes import online_config
from distributed_worker import gradients, run
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from two_processes import DDP, FSDP2, KEEP, RESHARD, ROOT, run_command, two_processes

from treegrpo import checkpoint, models
from treegrpo.cli import main
from treegrpo.config import TrainConfig
from treegrpo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TIED = {"tie_word_embeddings": True}

# name: (settings, environment, model)
RUNS = {
    "uneven": (dict(groups_per_step=3, row_token_budget=200), RESHARD, {}),
    "one_empty": (dict(groups_per_step=1), KEEP, {}),
    "everything": (
        dict(groups_per_step=2, samples="call", num_iterations=2, gradient_accumulation_steps=2, beta=0.05)
        | dict(gradient_checkpointing=True, entropy_coef=0.01),
        RESHARD,
        TIED,
    ),
    "tied_kept": (dict(groups_per_step=3, beta=0.05), KEEP, TIED),
    "chain": (dict(groups_per_step=3, attention="chain", gradient_checkpointing=True), KEEP, {}),
    "at_once": (dict(groups_per_step=3, row_token_budget=60), RESHARD | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}),
    "lora": (dict(groups_per_step=3, lora_r=3, beta=0.05, gradient_checkpointing=True), RESHARD, TIED),
    "lora_empty": (dict(groups_per_step=1, lora_r=3, num_iterations=2), KEEP, {}),
    "lora_kept": (dict(groups_per_step=3, lora_r=3, beta=0.05, num_iterations=2, max_steps=4), KEEP, {}),
    "lora_at_once": (dict(groups_per_step=3, lora_r=3, beta=0.05), KEEP | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}),
    "clipped": (dict(groups_per_step=3, max_grad_norm=1e-2), RESHARD, {}),
}
# layers with states: (family, environment, settings)
HYBRIDS = {
    "hybrid_ddp": ("qwen3_5_text", DDP, dict(gradient_checkpointing=True)),
    # one process without a group: its blank rows of one token go through every layer
    "hybrid_empty": ("nemotron_h", DDP, dict(groups_per_step=1)),
    "hybrid": ("qwen3_5_text", RESHARD, dict(gradient_checkpointing=True)),
    "hybrid_lora": ("nemotron_h", RESHARD, dict(lora_r=3)),
}
HYBRIDS = {name: given for name, given in HYBRIDS.items() if given[0] in zoo.EXACT}
BF16 = dict(groups_per_step=3, bf16=True, beta=0.05, max_steps=1)
# cut after step 3, the first of the two updates on its groups
CUT = dict(groups_per_step=3, num_iterations=2, max_steps=5, lr_scheduler_type="cosine", warmup_steps=2, beta=0.05)
SAVING = dict(save_strategy="steps", save_steps=3)
LORA = dict(lora_r=3)
# what the second half runs on: written by (processes, environment), resumed by (processes, environment), settings
RESUMED = {
    "sharded_2_to_1": ("two_sharded", None, {}),
    "sharded_2_to_ddp": ("two_sharded", DDP, {}),
    "sharded_2_to_2": ("two_sharded", FSDP2, {}),
    "full_2_to_1": ("two_full", None, {}),
    "1_to_2": ("one", FSDP2, {}),
    "lora_2_to_1": ("two_lora", None, LORA),
    "lora_1_to_2": ("one_lora", FSDP2, LORA),
}
# (units, freed after forward, tied embeddings, checkpointing)
UNITS = [
    (units, reshard, tied, False)
    for units in ("root", "layers", "tail")
    for reshard in (True, False)
    for tied in (True, False)
]
UNITS += [
    ("head", True, False, False),
    ("head", True, False, True),
    ("tail", True, True, True),
    ("layers", False, True, True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


def settings(folder, name, changes, model=None):
    files = folder / f"files-{len(model or {})}"
    files.mkdir(exist_ok=True)
    rollouts, config = tiny.write(files, **(model or {}))
    base = dict(rollouts=f"replay:{rollouts}", model=str(config), output_dir=str(folder / name), max_steps=3)
    # Adam divides gradients by their size: with its own epsilon 1e-9 in one of 5e-8 shows as 4e-6 in a weight
    base |= dict(learning_rate=2e-3, adam_epsilon=1e-3, save_strategy="no", disable_tqdm=True)
    return base | changes


@pytest.fixture(scope="module")
def whole(folder):
    """Runs of one process, nothing cut; each leaves a checkpoint of step 3."""
    names = {"one": CUT, "one_lora": CUT | LORA}
    return {name: run(settings(folder, name, changes | SAVING)) for name, changes in names.items()}


@pytest.fixture(scope="module")
def shared(folder, whole, box):
    """All runs of two processes, in one launch."""
    full = FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    runs = {name: (settings(folder, f"two-{name}", s, model), FSDP2 | e) for name, (s, e, model) in RUNS.items()}
    runs |= {name: (hybrid_settings(folder, "two", name), FSDP2 | e) for name, (_, e, _) in HYBRIDS.items()}
    runs["two_sharded"] = settings(folder, "two_sharded", CUT | SAVING), FSDP2 | KEEP
    runs["two_full"] = settings(folder, "two_full", CUT | SAVING), full
    runs["two_lora"] = settings(folder, "two_lora", CUT | LORA | SAVING), FSDP2
    for name, (written, environment, changes) in RESUMED.items():
        if environment is not None:
            runs[name] = resumed_settings(folder, name, written, changes), environment
    runs["bf16"] = settings(folder, "two-bf16", BF16), FSDP2 | RESHARD
    runs["bf16_lora"] = settings(folder, "two-bf16-lora", BF16 | LORA), FSDP2 | KEEP
    jobs = {name: dict(settings=s, environment=e) for name, (s, e) in runs.items()}
    jobs |= online_jobs(folder, box)
    jobs |= {str(case): dict(gradients=gradient_arguments(folder, *case)) for case in UNITS}
    return two_processes(folder, jobs)


def online_jobs(folder, box):
    """The same sampled run with plain data parallelism, sharded, and its second half from a checkpoint."""
    changes = dict(groups_per_step=4, max_steps=3, adam_epsilon=1e-3, eval_dataset=str(box / "train.jsonl"))
    changes |= dict(eval_steps=2, eval_rows=3, save_strategy="steps", save_steps=2)
    resumed = dict(resume_from_checkpoint=str(folder / "online-fsdp2" / "checkpoint-2"))
    recomputed = dict(gradient_checkpointing=True)
    jobs = {}
    for name, environment, more in (
        ("ddp", DDP, {}),
        ("fsdp2", FSDP2 | RESHARD, recomputed),
        ("on", FSDP2 | KEEP, resumed),
    ):
        given = online_config(box, folder / f"online-{name}", **changes).to_dict() | more
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        jobs[f"online-{name}"] = dict(settings=given, environment=environment | cache)
    return jobs


def gradient_arguments(folder, units, reshard, tied, checkpointing):
    given = settings(folder, "", {}, TIED if tied else {})
    rollouts = given["rollouts"].removeprefix("replay:")
    return dict(rollouts=rollouts, model=given["model"], units=units, reshard=reshard, checkpointing=checkpointing)


def resumed_settings(folder, name, written, changes):
    checkpoint = str(folder / written / "checkpoint-3")
    return settings(folder, f"resumed-{name}", CUT | changes | dict(resume_from_checkpoint=checkpoint))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(folder, shared, name):
    changes, _, model = RUNS[name]
    history, parameters, gradients, _ = run(settings(folder, f"one-{name}", changes, model))
    assert not isinstance(shared[name], str), shared[name]
    rows, found, found_gradients, _ = shared[name]
    assert found.keys() == parameters.keys() and found_gradients.keys() == gradients.keys()
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-4
    assert max(float((found_gradients[n] - g).abs().max()) for n, g in gradients.items()) < 1e-7
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-6
    for key in ("loss", "grad_norm", "tree/chain_tokens", "num_tokens", "entropy", "ratio/min", "kl", "reward"):
        got, want = ([row.get(key) for row in every] for every in (rows, history))
        if want != [None] * len(want):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6, nan_ok=True), key


def hybrid_settings(folder, processes, name):
    family, _, changes = HYBRIDS[name]
    base = dict(groups_per_step=3, beta=0.05, learning_rate=2e-3, adam_epsilon=1e-3)
    model = zoo.COMMON | zoo.HYBRID[family] | dict(attention_dropout=0.0, vocab_size=tiny.VOCAB, model_type=family)
    place = folder / family
    place.mkdir(exist_ok=True)
    return tiny.settings(tiny.write(place, **model), folder / f"{processes}-{name}", **base | changes).to_dict()


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_train_as_one(folder, shared, name):
    found = shared[name]
    assert not isinstance(found, str), found
    history, parameters, gradients, _ = run(hybrid_settings(folder, "one", name))
    assert tiny.largest_difference(found[2], gradients) < 1e-6
    assert tiny.largest_difference(found[1], parameters) < 1e-6
    assert [row["loss"] for row in found[0]] == pytest.approx([row["loss"] for row in history], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["tied_kept", "lora", "everything"])
def test_each_process_holds_its_part(folder, shared, name):
    changes, _, model = RUNS[name]
    whole = run(settings(folder, f"held-{name}", changes, model))[3]
    part = shared[name][3]
    # rows do not divide evenly
    for here, everything in zip(part, whole, strict=True):
        assert abs(here - everything / 2) <= 0.1 * everything
    assert whole[0] > 15_000 and bool(whole[2]) == (name != "lora")


@pytest.mark.parametrize(("name", "changes"), [("bf16", {}), ("bf16_lora", LORA)])
def test_bf16_stays_near_one_process_and_keeps_float32_weights(folder, shared, name, changes):
    """Gathered in bfloat16, so the residual stream is bfloat16 too; one process rounds its products only."""
    history, parameters, gradients_of_one, _ = run(settings(folder, f"one-{name}", BF16 | changes))
    rows, found, found_gradients, _ = shared[name]
    assert rows[0]["entropy"] == pytest.approx(history[0]["entropy"], rel=0.02)
    assert rows[0]["grad_norm"] == pytest.approx(history[0]["grad_norm"], rel=0.1)
    assert {p.dtype for p in found.values()} == {g.dtype for g in found_gradients.values()} == {torch.float32}
    moved = max(float((found[n] - p).abs().max()) for n, p in parameters.items())
    # gathered in bfloat16 indeed
    assert 0 < moved < 5e-3 and found_gradients.keys() == gradients_of_one.keys()


def test_trees_are_sampled_from_sharded_weights(folder, shared):
    """Engines sample from a whole copy, which follows the weights: as with plain data parallelism."""
    (plain, weights, _, _), (sharded, own, _, _) = shared["online-ddp"], shared["online-fsdp2"]
    for a, b in zip(plain, sharded, strict=True):
        for name in ("reward", "rollout/generated_tokens", "rollout/leaves", "rewards/token_reward/mean"):
            assert b[name] == a[name], name
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-6)
        assert b.get("eval_completions/mean_length") == a.get("eval_completions/mean_length")
        assert b["sampling/sampling_logp_difference/max"] < 1e-4
    assert max(float((own[name] - p).abs().max()) for name, p in weights.items()) < 1e-5
    assert max(float((shared["online-on"][1][name] - p).abs().max()) for name, p in own.items()) < 1e-6
    assert (folder / "online-fsdp2" / "best" / "shards").is_dir()


@pytest.mark.parametrize("case", UNITS, ids=lambda case: "-".join(map(str, case)))
def test_log_probs_have_their_gradients_however_the_model_is_cut(folder, shared, case):
    want = gradients(**gradient_arguments(folder, *case) | dict(units=""))
    found = shared[str(case)]
    assert found.keys() == want.keys() and len(want) > 20
    for name, gradient in want.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_resumes(folder, whole, shared, name):
    written, environment, changes = RESUMED[name]
    history, parameters, _, _ = whole["one_lora" if changes else "one"]
    if environment is None:
        assert not isinstance(shared[written], str), shared[written]
        rows, found, _, _ = run(resumed_settings(folder, name, written, changes))
    else:
        assert not isinstance(shared[name], str), shared[name]
        rows, found, _, _ = shared[name]
    assert [row["step"] for row in rows] == [4, 5]
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-6
    for key in ("loss", "grad_norm", "kl", "ratio/max", "learning_rate", "num_tokens"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in history[3:]], rel=1e-4, abs=1e-6), key


def weights(path):
    return dict(AutoModelForCausalLM.from_pretrained(path, local_files_only=True).named_parameters())


def test_checkpoints_become_folders_that_load_anywhere(folder, shared, tmp_path):
    last = folder / "two_sharded" / "checkpoint-5"
    assert {file.name for file in last.iterdir()} >= {"shards", "config.json", "manifest.json", "optimizer.pt"}
    assert not list(last.rglob("*.metadata")) and not list(last.rglob("*.pkl"))
    held = [set(safe_open(file, "pt").keys()) for file in (last / "shards").glob("*.safetensors")]
    # both processes hold a part of every weight
    assert len(held) == 2 and all(sum(name.startswith("weight.") for name in names) > 20 for names in held)
    with pytest.raises(ValueError, match="treegrpo export"):
        models.build_model(last, 0)
    assert main(["export", str(last), str(tmp_path / "out")]) == 0
    exported, parameters = weights(tmp_path / "out"), shared["two_sharded"][1]
    assert all(torch.equal(exported[name], p) for name, p in parameters.items())
    # FULL_STATE_DICT needs no export
    loaded = weights(folder / "two_full" / "checkpoint-5")
    assert all(torch.equal(loaded[name], p) for name, p in shared["two_full"][1].items())


def test_adapters_are_merged_on_export(folder, shared, tmp_path):
    last = folder / "two_lora" / "checkpoint-5"
    assert (last / "adapter_model.safetensors").is_file() and not (last / "shards").exists()
    assert main(["export", str(last), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(last), str(tmp_path / "out")]) == 2
    exported, parameters = weights(tmp_path / "out"), shared["two_lora"][1]
    name = "model.layers.1.mlp.up_proj"
    base, a, b = (parameters[f"base_model.model.{name}.{part}.weight"] for part in _PARTS)
    merged = base + 16 / LORA["lora_r"] * b @ a
    assert float((b @ a).abs().max()) > 1e-6 and exported[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(exported[f"{name}.weight"], merged.bfloat16())


_PARTS = ("base_layer", "lora_A.default", "lora_B.default")


def test_a_cut_shard_is_refused(folder, shared):
    path = folder / "two_sharded" / "checkpoint-5"
    shard = max((path / "shards").iterdir())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"damaged: shards/{shard.name} has .* bytes instead of"):
        checkpoint.check(path)
    shard.write_bytes(content)
    checkpoint.check(path)


def test_a_checkpoint_of_another_model_is_refused(folder, shared, tmp_path):
    path = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "two_sharded" / "checkpoint-3", path)
    config = json.loads((path / "config.json").read_text()) | {"intermediate_size": 64}
    (path / "config.json").write_text(json.dumps(config))
    sizes = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(sizes | {"config.json": (path / "config.json").stat().st_size}))
    with pytest.raises(ValueError, match=r"holds \(48, 32\) for model.layers.0.mlp.*, the model \(64, 32\)"):
        Trainer(TrainConfig(**settings(folder, "wide", CUT | dict(resume_from_checkpoint=str(path)))))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1 .*set it to 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP or NO_WRAP"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16 .*--bf16"),
    ],
)
def test_what_accelerate_may_ask_and_we_cannot_do_is_refused(folder, monkeypatch, environment, message):
    for name, value in (FSDP2 | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**settings(folder, "refused", {})))
    assert not (folder / "refused").exists()


def test_accelerate_launches_the_example_config(folder, tmp_path):
    """The command of the documentation, down to the model it leaves."""
    changes = dict(groups_per_step=3, save_strategy="steps", lr_scheduler_type="constant")
    config = settings(folder, "launched", changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples" / "fsdp2.yaml"),
    ]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    run_command([*launch, "-m", "treegrpo", "train", "--config", str(tmp_path / "run.yaml")])
    last = folder / "launched" / "checkpoint-3"
    assert len(list((last / "shards").iterdir())) == 2
    assert main(["export", str(last), str(tmp_path / "out")]) == 0
    parameters = run(settings(folder, "alone", changes | dict(save_strategy="no")))[1]
    exported = weights(tmp_path / "out")
    assert max(float((exported[name] - p).detach().abs().max()) for name, p in parameters.items()) < 1e-6
