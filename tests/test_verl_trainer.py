"""What verl's trainer does differently with ours: which rows stand together, and advantages; no engine here."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")
pytest.importorskip("transfer_queue")
import numpy as np
import torch
import verl_tiny as tiny
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.utils import tensordict_utils as tu

import treegrpo
from treegrpo.integrations import verl as ours
from treegrpo.integrations.verl import advantages, micro_batches

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_settings_of_the_docs_are_verls():
    text = (Path(__file__).resolve().parents[1] / "docs" / "verl.md").read_text()
    command = text.split("python -m verl.trainer.main_ppo", 1)[1].split("```", 1)[0]
    overrides = [word for word in command.split() if "=" in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert len(overrides) == 3 and config.trainer.v1.trainer_mode == ours.TRAINER_MODE
    assert config.actor_rollout_ref.model.override_config == dict(attn_implementation=ours.ATTENTION)


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
        # groups one after the other as they came, whatever they cost
        first = [[keys.index(key) for key in dict.fromkeys(keys[i] for i in rank)] for rank in found]
        assert first == [sorted(rank) for rank in first]
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
    logprobs = [draw.normal(-2, 1, len(r)).astype(np.float32) for *_, r in samples]
    rows = rows_of(samples, logprobs=logprobs)
    for name in ("tree_grpo", "tree_siblings", "tree_treerl", "tree_at2po"):
        estimator = name if name == "tree_grpo" else name.removeprefix("tree_")
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
                    logprobs=[math.nan] * len(samples[i][1]) + logprobs[i].tolist(),
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


def test_without_std_as_verl_leaves_it_out():
    samples = tiny.rows(3)
    columns = max(len(r) for *_, r in samples)
    mask = torch.tensor([[1] * len(r) + [0] * (columns - len(r)) for *_, r in samples])
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.tensor([float(i * 5 % 3) for i in range(len(samples))])
    uid = np.array([uid for uid, *_ in samples], dtype=object)
    given = dict(token_level_rewards=rewards, response_mask=mask, index=uid)
    with_std, without = (AlgoConfig(norm_adv_by_std_in_grpo=flag) for flag in (True, False))
    want = [compute_grpo_outcome_advantage(**given, norm_adv_by_std_in_grpo=flag)[0] for flag in (True, False)]
    assert not torch.allclose(*want)
    with advantages.known_rows(rows_of(samples, logprobs=[[-1.0] * len(r) for *_, r in samples])):
        for name in ("tree_grpo", "tree_inter", "tree_arpo_soft"):
            for config, expected in zip((with_std, without), want, strict=True):
                got, _ = get_adv_estimator_fn(name)(**given, config=config)
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        for name in set(advantages.ESTIMATOR_NAMES) - {"tree_intra"}:
            got = [get_adv_estimator_fn(name)(**given, config=config)[0] for config in (with_std, without)]
            # these divide by no std of a group
            assert torch.allclose(*got) == (name in ("tree_treerl", "tree_treepo", "tree_siblings", "tree_spo")), name


@pytest.mark.parametrize("estimator", ["tree_grpo", "inter", "arpo_soft"])
def test_sessions_are_compared_as_verl_compares_them(estimator):
    """Sessions of one to three samples: earlier turns of the last, or others that the agent has forgotten."""
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    draw = np.random.default_rng(4)
    samples, sessions, numbers, rewards = [], [], [], []
    for number, (uid, prompt, response) in enumerate(tiny.rows(3)):
        calls = [(prompt, response)]
        if number % 3 == 1:
            calls = [
                (prompt, response[:2]),
                (prompt + response[:2], response[2:3]),
                (prompt + response[:3], response[3:]),
            ]
        elif number % 3 == 2:
            calls = [([5, 6], [7, 8, 9]), (prompt, response)]
        reward = float(draw.integers(3))
        for at, call in enumerate(calls):
            samples.append((uid, *call))
            sessions.append(str(number))
            numbers.append(at)
            rewards.append(reward)
    order = draw.permutation(len(samples)).tolist()
    samples, sessions, numbers, rewards = ([x[i] for i in order] for x in (samples, sessions, numbers, rewards))
    columns = max(len(r) for *_, r in samples)
    mask = torch.tensor([[1] * len(r) + [0] * (columns - len(r)) for *_, r in samples])
    uids = [uid for uid, *_ in samples]
    scores = torch.zeros(mask.shape).index_fill(1, torch.tensor([0]), 1) * torch.tensor(rewards)[:, None]
    data = DataProto.from_dict(
        tensors=dict(response_mask=mask, token_level_rewards=scores), non_tensors=dict(uid=np.array(uids, dtype=object))
    )
    keys = [f"{uid}_{session}_{n}" for uid, session, n in zip(uids, sessions, numbers, strict=True)]
    want = compute_advantage_for_multi_trajectories(data, keys, "grpo").batch["advantages"]
    got = advantages.tree_advantages(rows_of(samples, sessions, numbers), rewards, uids, estimator, columns) * mask
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.abs().max() > 0.5


@pytest.mark.parametrize("estimator", ["siblings", "treerl", "spo", "at2po"])
def test_turns_of_a_session_are_those_of_one_row(estimator):
    """A row per model call carries what the same tokens carry in one row with the tools' answers masked."""
    samples = tiny.rows(2)
    whole, turns, sessions, numbers, masks, where = [], [], [], [], [], []
    draw, logprobs, per_turn = np.random.default_rng(1), [], []
    for number, (uid, prompt, response) in enumerate(samples):
        tool, again = [3, 4], [9 + number, 10]
        whole.append((uid, prompt, response + tool + again))
        masks.append([1] * len(response) + [0, 0, 1, 1])
        logprobs.append(draw.normal(-2, 1, len(response) + 4))
        per_turn += [logprobs[-1][: len(response)], logprobs[-1][-2:]]
        turns += [(uid, prompt, response), (uid, prompt + response + tool, again)]
        sessions += [str(number)] * 2
        numbers += [0, 1]
        where += [(number, 0, len(response)), (number, len(response) + 2, 2)]
    rewards = [float(i * 5 % 3) for i in range(len(samples))]
    columns = max(len(r) for *_, r in whole)
    uids = [uid for uid, *_ in whole]
    want = advantages.tree_advantages(rows_of(whole, masks=masks, logprobs=logprobs), rewards, uids, estimator, columns)
    twice = [reward for reward in rewards for _ in range(2)]
    uids = [uid for uid, *_ in turns]
    rows = rows_of(turns, sessions, numbers, logprobs=per_turn)
    got = advantages.tree_advantages(rows, twice, uids, estimator, columns)
    for row, (number, start, length) in enumerate(where):
        torch.testing.assert_close(got[row, :length], want[number, start : start + length])
    assert any(len(set(own.tolist())) > 1 for own in want)


def rows_of(samples, sessions=None, numbers=None, masks=None, logprobs=None):
    """What the trainer knows of (uid, prompt, response) samples; each a session of its own by default."""
    return advantages.Rows(
        [p for _, p, _ in samples],
        [r for *_, r in samples],
        masks or [[1] * len(r) for *_, r in samples],
        sessions or [str(i) for i in range(len(samples))],
        numbers or [0] * len(samples),
        logprobs,
    )


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

    def __init__(self, samples):
        self.keys = [f"{uid}_{i}_0" for i, (uid, *_) in enumerate(samples)]
        self.tags = [dict(seq_len=len(p) + len(r), prompt_len=len(p)) for _, p, r in samples]
        self.partition_id = "train"

    def __len__(self):
        return len(self.keys)

    def reorder(self, order):
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]


def trainer_of(num_ranks=2, estimator="tree_grpo"):
    from treegrpo.integrations.verl.trainer import TreePPOTrainerSync

    made = object.__new__(TreePPOTrainerSync)
    actor = dict(ppo_mini_batch_size=2)
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
    assert metrics["global_seqlen/balanced_max"] == max(halves)
    assert metrics["global_seqlen/balanced_min"] == min(halves)


def test_padding_fills_ranks_up_and_stands_last(monkeypatch):
    """Three groups of four on two ranks of eight, and four rows of padding, which verl's own order has in between."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    batch = Batch(tiny.rows(3))

    def pad_and_shuffle(self, batch, metrics):
        batch.keys += [f"pad0_{i}_0" for i in range(4)]
        batch.tags += [dict(seq_len=128, prompt_len=127, is_padding=True) for _ in range(4)]
        batch.reorder([15, 3, 14, 2, 13, 1, 12, 0, *range(4, 12)])
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_balance_batch", pad_and_shuffle)
    after = trainer_of()._balance_batch(batch, {})
    ranks = [[key.split("_")[0] for key in part] for part in (after.keys[:8], after.keys[8:])]
    assert sorted(ranks) == [["u0"] * 4 + ["u1"] * 4, ["u2"] * 4 + ["pad0"] * 4]


def test_a_shuffled_actor_is_refused_before_anything_starts():
    from treegrpo.integrations.verl.trainer import TreePPOTrainerSync, sample_of

    config = OmegaConf.create(dict(actor_rollout_ref=dict(actor=dict(shuffle=True))))
    with pytest.raises(ValueError, match="shuffle=True"):
        TreePPOTrainerSync(config)
    assert sample_of("a_b_3_0") == ("a_b", "3", 0)
    for key in ("abc", "u_1_x"):
        with pytest.raises(ValueError, match="not of the form"):
            sample_of(key)


@pytest.mark.parametrize("estimator", ["tree_grpo", "tree_at2po"])
def test_the_trainer_gives_estimators_the_tokens(estimator, monkeypatch):
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
        old_log_probs=jagged([-torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in lengths]),
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
    trainer_of(estimator=estimator)._compute_advantage(Batch(samples), {})
    rewards = [float(score(i).sum()) for i in range(len(samples))]
    uids = [uid for uid, *_ in samples]
    rows = rows_of(samples, logprobs=[row.tolist() for row in stored["old_log_probs"].unbind()])
    name = estimator if estimator == "tree_grpo" else estimator.removeprefix("tree_")
    want = advantages.tree_advantages(rows, rewards, uids, name, max(lengths))
    for row, (got, n) in enumerate(zip(written["advantages"].unbind(), lengths, strict=True)):
        torch.testing.assert_close(got, want[row, :n])
    assert written["advantages"].values().abs().max() > 0.1
