"""verl's engine on packed trees against verl's own on the same batches, and its trainer's hooks; CPU, gloo."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")
import numpy as np
import torch
import verl_tiny as tiny
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss, sft_loss
from verl.workers.utils.padding import no_padding_2_padding

import treegrpo
from treegrpo.integrations import verl as ours
from treegrpo.integrations.verl import advantages, engine, micro_batches

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
        with made.train_mode():
            made.optimizer_zero_grad()
            data = tiny.batch(samples, **asked)
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
    assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert float(got["norm"]) == pytest.approx(float(want["norm"]), rel=1e-4) and float(want["norm"]) > 1e-3
    assert got["grads"].keys() == want["grads"].keys() and got["metrics"].keys() == want["metrics"].keys()
    for key, value in want["grads"].items():
        torch.testing.assert_close(got["grads"][key], value, rtol=0, atol=1e-5, msg=key)
    for key, value in want["parameters"].items():
        difference = (got["parameters"][key] - value).abs()
        if key in want["grads"]:
            # Adam's first step is the gradient's sign: where that is nearly zero it is anybody's
            difference = difference.masked_fill(want["grads"][key].abs() < 1e-5, 0)
        assert float(difference.max()) < 1e-5, key
    assert bool(model.get("lora_rank")) == (want["grads"].keys() != want["parameters"].keys())
    if not settings.keys() & {"max_token_len_per_gpu", "use_dynamic_bsz"}:
        unique = micro_batches.unique_tokens([np.array(p + r) for _, p, r in samples])
        assert got["tokens"] == unique
    assert got["tokens"] < 0.75 * want["tokens"]


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

    def log_probs(tree, dtype):
        options = dict(mixed_precision=dict(param_dtype=dtype, reduce_dtype="fp32", buffer_dtype="fp32"))
        made = tiny.engine(folder, tree=tree, **options)
        with made.eval_mode():
            rows = made.infer_batch(tiny.batch(tiny.rows()))["model_output"]["log_probs"].unbind()
        return torch.cat([row[:-1] for row in rows])

    exact = log_probs(False, "fp32")
    theirs, mine = (log_probs(tree, "bf16") - exact for tree in (False, True))
    assert 1e-4 < float(mine.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt())
    assert float(mine.abs().max()) <= 2 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ulysses_sequence_parallel_size=2), "ulysses"),
        (dict(pad_to_length=True), "pad_to_length"),
        (dict(model=dict(use_fused_kernels=True)), "use_fused_kernels"),
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
    ):
        with made.eval_mode(), pytest.raises(ValueError, match=message):
            made.infer_batch(tiny.batch(tiny.rows(), **changes))


def test_a_model_it_would_get_wrong_is_refused(folder, monkeypatch):
    monkeypatch.setattr(engine, "check_model", lambda module: (_ for _ in ()).throw(ValueError("mixes siblings")))
    with pytest.raises(ValueError, match="mixes siblings"):
        tiny.engine(folder, tree=True)


def test_two_processes(folder, tmp_path):
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
                [*command, str(rank), str(port), str(folder), str(tmp_path / kind), kind],
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
        want, got = found["verl"][rank], found["tree"][rank]
        for key, value in want["grads"].items():
            torch.testing.assert_close(got["grads"][key], value, rtol=0, atol=1e-5, msg=key)


def test_micro_batches_keep_siblings_together():
    samples = tiny.rows(5)
    rows = [np.array(p + r) for _, p, r in samples]
    groups = micro_batches.groups_of([uid for uid, *_ in samples])
    for budget in (30, 45, 70, 500):
        batches = micro_batches.by_budget(rows, groups, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
        assert all(micro_batches.unique_tokens([rows[i] for i in batch]) <= budget for batch in batches)
        for group in groups:
            if micro_batches.unique_tokens([rows[i] for i in group]) <= budget:
                assert sum(bool(set(group) & set(batch)) for batch in batches) == 1
    filled = micro_batches.fill_up([[0, 1, 2], [3]], 4)
    assert sorted(map(len, filled)) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="another needs 5"):
        micro_batches.fill_up([[0, 1, 2], [3]], 5)
    with pytest.raises(ValueError, match="multiple"):
        micro_batches.by_count([[0, 1, 2]], 2)


def test_ranks_keep_siblings_together():
    keys = [f"u{i % 6}" for i in range(24)]
    costs = [1 + 7 * (i % 6) for i in range(24)]
    for ranks in (1, 2, 3):
        found = micro_batches.by_rank(keys, costs, ranks)
        assert sorted(i for rank in found for i in rank) == list(range(24)) and {len(rank) for rank in found} == {
            24 // ranks
        }
        assert sum(len({keys[i] for i in rank}) for rank in found) == 6
    # groups of four on ranks of three rows must be cut
    found = micro_batches.by_rank(keys[:12], costs[:12], 4)
    assert {len(rank) for rank in found} == {3}
    with pytest.raises(ValueError, match="multiple"):
        micro_batches.by_rank(keys, costs, 5)


def test_advantages_are_those_of_the_forest():
    draw = np.random.default_rng(0)
    samples = tiny.rows(3)
    samples = samples[::2] + samples[1::2]
    columns = max(len(r) for *_, r in samples)
    mask = torch.zeros(len(samples), columns)
    rewards = torch.zeros_like(mask)
    for row, (*_, response) in enumerate(samples):
        mask[row, : len(response)] = 1
        rewards[row, len(response) - 1] = float(draw.random())
    uid = np.array([uid for uid, *_ in samples], dtype=object)
    sessions = [str(i) for i in range(len(samples))]
    rows = advantages.Rows([p for _, p, _ in samples], [r for *_, r in samples], sessions)
    for estimator, name in (("tree_grpo", "tree_grpo"), ("siblings", "tree_siblings"), ("treerl", "tree_treerl")):
        estimate = get_adv_estimator_fn(name)
        with pytest.raises(ValueError, match="trainer_mode=tree_sync"):
            estimate(token_level_rewards=rewards, response_mask=mask, index=uid)
        with advantages.known_rows(rows):
            got, returns = estimate(token_level_rewards=rewards, response_mask=mask, index=uid)
        assert torch.equal(got, returns) and (got[mask == 0] == 0).all() and got.abs().max() > 0.1
        for group in sorted(set(uid)):
            mine = [i for i in range(len(samples)) if uid[i] == group]
            leaves = [
                treegrpo.Trajectory(
                    samples[i][1] + samples[i][2],
                    [0] * len(samples[i][1]) + [1] * len(samples[i][2]),
                    reward=float(rewards[i].sum()),
                    group=group,
                    tree=number,
                    steps=steps,
                )
                for number, (i, steps) in enumerate(zip(mine, steps_of([samples[i] for i in mine]), strict=True))
            ]
            (own,) = treegrpo.compute_advantages(treegrpo.build_forest(leaves), estimator)
            for i, leaf, values in zip(mine, leaves, own, strict=True):
                ends = [*leaf.steps[1:], leaf.num_tokens]
                wanted = np.repeat(values, np.subtract(ends, leaf.steps))
                start = leaf.steps[0] - len(samples[i][1])
                np.testing.assert_allclose(got[i, start : start + len(wanted)].numpy(), wanted, atol=1e-6)


def steps_of(samples):
    """By the definition: a step begins with the response, and where two responses of the group part."""
    found = []
    for _, prompt, response in samples:
        starts = {len(prompt)}
        for _, _, other in samples:
            common = next((i for i, (a, b) in enumerate(zip(response, other, strict=False)) if a != b), None)
            if common is not None:
                starts.add(len(prompt) + common)
        found.append(sorted(starts))
    return found


class Batch:
    """What of KVBatchMeta the trainer's hooks touch: TransferQueue itself wants a cluster."""

    def __init__(self, samples, order=None):
        self.keys = [f"{uid}_{i}_0" for i, (uid, *_) in enumerate(samples)]
        self.tags = [dict(seq_len=len(p) + len(r)) for _, p, r in samples]
        self.partition_id = "train"

    def __len__(self):
        return len(self.keys)

    def reorder(self, order):
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]


def trainer_of(num_ranks=2, shuffle=False, estimator="tree_grpo"):
    from treegrpo.integrations.verl.trainer import TreePPOTrainerSync

    made = object.__new__(TreePPOTrainerSync)
    actor = dict(ppo_mini_batch_size=2, shuffle=shuffle)
    made.config = OmegaConf.create(
        dict(
            actor_rollout_ref=dict(actor=actor, rollout=dict(n=tiny.GROUP, temperature=1.0)),
            algorithm=dict(adv_estimator=estimator, use_kl_in_reward=False, gamma=1.0, lam=1.0),
            trainer=dict(critic_warmup=0),
        )
    )
    made.actor_rollout_wg = SimpleNamespace(_dispatch_info=dict(actor=list(range(num_ranks))))
    made.tokenizer = SimpleNamespace(eos_token_id=1)
    made.use_critic, made.global_steps = False, 1
    made._get_required_batch_multiple = lambda dp_size: dp_size
    return made


def test_the_trainer_keeps_groups_on_a_rank():
    from verl.trainer.ppo.v1 import get_trainer_cls

    made = trainer_of()
    assert get_trainer_cls(ours.TRAINER_MODE) is type(made)
    samples = tiny.rows(4)
    batch = Batch(samples[::3] + samples[1::3] + samples[2::3])
    before = dict(zip(batch.keys, batch.tags, strict=True))
    metrics = {}
    after = made._balance_batch(batch, metrics)
    assert dict(zip(after.keys, after.tags, strict=True)) == before
    groups = [key.rsplit("_", 2)[0] for key in after.keys]
    assert all(len(set(groups[i : i + tiny.GROUP])) == 1 for i in range(0, len(groups), tiny.GROUP))
    halves = [sum(tag["seq_len"] for tag in part) for part in (after.tags[:8], after.tags[8:])]
    assert metrics["global_seqlen/balanced_max"] == max(halves) == 115
    assert metrics["global_seqlen/balanced_min"] == min(halves)
    with pytest.raises(ValueError, match="shuffle"):
        trainer_of(shuffle=True)._balance_batch(Batch(samples), {})


def test_the_trainer_gives_estimators_the_tokens(monkeypatch):
    import transfer_queue as tq

    samples = tiny.rows(2)
    jagged = lambda xs: torch.nested.as_nested_tensor(xs, layout=torch.jagged)  # noqa: E731
    lengths = [len(r) for *_, r in samples]
    score = lambda i: torch.zeros(lengths[i]).index_fill(0, torch.tensor([lengths[i] - 1]), (i * 7) % 5)  # noqa: E731
    stored = dict(
        prompts=jagged([torch.tensor(p) for _, p, _ in samples]),
        responses=jagged([torch.tensor(r) for *_, r in samples]),
        response_mask=jagged([torch.ones(n, dtype=torch.int64) for n in lengths]),
        rm_scores=jagged([score(i) for i in range(len(samples))]),
        old_log_probs=jagged([torch.zeros(n) for n in lengths]),
    )
    written = {}

    def get(keys, partition_id, select_fields):
        data = TensorDict({k: v for k, v in stored.items() if k in select_fields}, batch_size=len(samples))
        if "uid" in select_fields:
            tu.assign_non_tensor(data, uid=[uid for uid, *_ in samples])
        return data

    def put(keys, partition_id, fields):
        written.update(fields.items())
        return SimpleNamespace(keys=keys, partition_id=partition_id)

    monkeypatch.setattr(tq, "kv_batch_get", get)
    monkeypatch.setattr(tq, "kv_batch_put", put)
    trainer_of()._compute_advantage(Batch(samples), {})
    rows = advantages.Rows([p for _, p, _ in samples], [r for *_, r in samples], [str(i) for i in range(len(samples))])
    mask = np.zeros((len(samples), max(lengths)))
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    rewards = [float(score(i).sum()) for i in range(len(samples))]
    want = advantages.tree_advantages(rows, rewards, mask, [uid for uid, *_ in samples], "tree_grpo")
    for row, (got, n) in enumerate(zip(written["advantages"].unbind(), lengths, strict=True)):
        torch.testing.assert_close(got, want[row, :n])
    assert written["advantages"].values().abs().max() > 0.1


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
            from verl.trainer.ppo.core_algos import get_adv_estimator_fn
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
