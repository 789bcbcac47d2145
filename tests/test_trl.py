"""TreeGRPOTrainer against TRL's own GRPOTrainer: parameters after five updates, forwarded tokens, metrics."""

import json
import random

import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_tiny import VOCAB, Forwarded, difference, make, parameters, save_tiny  # noqa: E402

from treegrpo.integrations.trl import (  # noqa: E402
    TreeGRPOConfig,
    TreeGRPOTrainer,
    async_tree_attention,
    packed,
    plan_of_row,
    take,
    use_tree_op,
)
from treegrpo.integrations.trl.rows import pack_rows  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("moe"), "moe")


def train(kind, folder, out, **changes):
    """(parameters, logged rows, Forwarded) of five updates."""
    trainer = make(kind, folder, out, **changes)
    forwarded = Forwarded(trainer)
    trainer.train()
    return parameters(trainer), trainer.state.log_history, forwarded


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CASES = {
    **{loss: dict(loss_type=loss) for loss in LOSSES},
    "beta": dict(beta=0.05),
    "two_iterations": dict(num_iterations=2, beta=0.05),
    "accumulation": dict(gradient_accumulation_steps=2, loss_type="grpo"),
    "sequence_level": dict(importance_sampling_level="sequence", num_iterations=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "temperature": dict(temperature=0.7, top_entropy_quantile=0.5),
    "entropy_bonus": dict(entropy_coef=0.01, loss_type="grpo"),
}
METRICS = ("loss", "entropy", "reward", "grad_norm", "kl", "clip_ratio/region_mean", "aux_loss", "policy_loss")


def assert_same_run(chain, tree, start, one_batch=True):
    """Equal parameters to 1e-5, all of TRL's metrics, and exactly the tokens forwarded that packing leaves."""
    (want, theirs, chains), (got, ours, rows) = chain, tree
    assert difference(start, want) > 1e-3
    assert difference(want, got) < 1e-5
    assert all(row.keys() <= mine.keys() for row, mine in zip(theirs, ours, strict=True))
    for row, mine in zip(theirs[:-1], ours[:-1], strict=True):
        for metric in METRICS:
            if metric in row:
                assert float(mine[metric]) == pytest.approx(float(row[metric]), rel=1e-3, abs=1e-5), metric
        assert mine["batch/packing_ratio"] > 1.3
    json.dumps(ours)
    if one_batch:
        # the packing ratio to the token; with several micro-batches TRL's shuffle tears groups, so its forwards differ
        assert rows.positions == rows.tokens == chains.prefixes
    assert chains.tokens / rows.positions > 1.3


@pytest.mark.parametrize("name", CASES)
def test_five_updates_are_those_of_grpo_trainer(name, folder, tmp_path):
    changes = CASES[name]
    chain = train(GRPOTrainer, folder, tmp_path / "chain", **changes)
    tree = train(TreeGRPOTrainer, folder, tmp_path / "tree", **changes)
    start = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert_same_run(chain, tree, start, one_batch="accumulation" not in name)


@pytest.mark.parametrize("budget", [None, 30, 18])
def test_the_config_and_its_token_budget_change_nothing(budget, folder, tmp_path):
    chain, _, chains = train(GRPOTrainer, folder, tmp_path / "chain", beta=0.05)
    changes = dict(config=TreeGRPOConfig, token_budget=budget, beta=0.05)
    tree, logged, rows = train(TreeGRPOTrainer, folder, tmp_path / "tree", **changes)
    assert difference(chain, tree) < 1e-5
    whole = rows.positions == chains.prefixes
    assert whole if budget != 18 else rows.positions > chains.prefixes
    assert all(row["tree/unique_tokens"] <= (budget or 10**9) for row in logged[:-1])


@pytest.mark.parametrize("budget", [None, 18])
@pytest.mark.parametrize("changes", [dict(), dict(gradient_checkpointing=True)])
def test_the_router_loss_of_a_mixture_of_experts(changes, budget, moe_folder, tmp_path):
    changes = dict(router_aux_loss_coef=0.1, loss_type="grpo", **changes)
    chain = train(GRPOTrainer, moe_folder, tmp_path / "chain", **changes)
    tree = train(TreeGRPOTrainer, moe_folder, tmp_path / "tree", config=TreeGRPOConfig, token_budget=budget, **changes)
    without, _, _ = train(TreeGRPOTrainer, moe_folder, tmp_path / "no", **changes | dict(router_aux_loss_coef=0.0))
    assert difference(chain[0], tree[0]) < 1e-5
    for row, mine in zip(chain[1][:-1], tree[1][:-1], strict=True):
        assert float(mine["aux_loss"]) == pytest.approx(float(row["aux_loss"]), rel=1e-5)
    assert difference(chain[0], without) > 1e-4


@pytest.mark.parametrize("config", [None, TreeGRPOConfig])
def test_lora(config, folder, tmp_path):
    peft = pytest.importorskip("peft")
    lora = lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # noqa: E731
    changes = dict(beta=0.05) | ({} if config is None else dict(config=config, token_budget=60))
    want, _, chains = train(GRPOTrainer, folder, tmp_path / "chain", peft_config=lora(), beta=0.05)
    got, _, rows = train(TreeGRPOTrainer, folder, tmp_path / "tree", peft_config=lora(), **changes)
    assert difference(want, got) < 1e-5
    assert rows.positions < chains.tokens / 1.3


def test_refuses_what_tears_groups_apart(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        make(TreeGRPOTrainer, folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_packed_rows_keep_groups_whole_where_they_fit():
    draw = random.Random(1)
    group = lambda: [[5, 6, 7, draw.randrange(2, VOCAB), draw.randrange(2, VOCAB)] for _ in range(3)]  # noqa: E731
    ids = torch.tensor([*group(), *group(), *group()])
    mask = torch.ones_like(ids)
    (one,) = pack_rows(ids, mask, 2, group_size=3)
    assert one[0].tolist() == list(range(9))
    for budget, groups in ((9, 3), (18, 2)):
        parts = pack_rows(ids, mask, 2, group_size=3, token_budget=budget)
        assert len(parts) == groups and all(batch.num_tokens <= budget for _, batch in parts)
        owners = [{row // 3 for row in rows.tolist()} for rows, _ in parts]
        assert sum(map(len, owners)) == 3
    cut = pack_rows(ids, mask, 2, group_size=3, token_budget=7)
    assert sorted(row for rows, _ in cut for row in rows.tolist()) == list(range(9))
    assert all(batch.num_tokens <= 7 for _, batch in cut)
    for rows, batch in cut:
        assert batch.input_ids[batch.leaf_tokens].tolist() == ids[rows].flatten().tolist()
    with pytest.raises(ValueError, match=r"token_budget=4, but row 0 .* 5 tokens: raise it"):
        pack_rows(ids, mask, 2, group_size=3, token_budget=4)


def test_rows_padded_anywhere_become_leaves():
    ids = torch.tensor([[0, 5, 6, 7, 8, 0], [9, 5, 6, 7, 3, 2], [0, 5, 6, 7, 8, 4]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    batch = packed(ids, mask, 3)
    assert (batch.num_chain_tokens, batch.num_tokens) == (15, 4 + 1 + 6)
    assert batch.input_ids[batch.leaf_tokens].tolist() == ids[mask.bool()].tolist()
    assert batch.leaf_mask.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    scored = dict(prompt_ids=ids, weights=[1, 2, 3], total=torch.tensor(7), none=None)
    assert take(scored, torch.tensor([2, 0]))["weights"] == [3, 1]
    assert take(scored, torch.tensor([2, 0]))["total"] == 7


def leaves():
    """Samples that share beginnings, end inside one another, and stand alone."""
    draw = random.Random(5)
    prompt = [draw.randrange(2, VOCAB) for _ in range(6)]
    turn = [*prompt, *(draw.randrange(2, VOCAB) for _ in range(5))]
    rows = [[*turn, *(draw.randrange(2, VOCAB) for _ in range(n))] for n in (3, 7, 1)]
    return [*rows, turn, [*prompt, 3, 4, 5], [7, 8, 9, 10], [7, 8, 11]]


def tree_row():
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for ids in leaves():
        mask = torch.tensor([int(i >= 2) for i in range(len(ids))])
        row.add(
            dict(
                input_ids=torch.tensor(ids),
                completion_mask=mask,
                old_log_probs=torch.zeros(len(ids)),
                advantage=1.0,
                group_id=0,
            )
        )
    return row.pack()


def test_the_plan_of_trls_row_sees_what_its_paths_hold():
    row = tree_row()
    plan = plan_of_row(row["tree_cu_seqlens_q"], row["tree_cu_seqlens_k"])
    assert plan.position.tolist() == row["position_ids"].tolist()
    starts, paths = (row[name].tolist() for name in ("tree_cu_seqlens_q", "tree_cu_seqlens_k"))
    end = plan.subtree_end.tolist()
    for segment in range(len(starts) - 1):
        path = row["tree_kv_index"][paths[segment] : paths[segment + 1]].tolist()
        last = starts[segment + 1] - 1
        assert path == [j for j in range(last + 1) if last < end[j]]


def test_async_rows_in_float64_stay_so_under_autocast():
    row = tree_row()
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    options = {name: row[name] for name in names} | dict(tree_max_seqlen_q=0, tree_max_seqlen_k=0)
    q = torch.randn(1, 2, len(row["input_ids"]), 8, dtype=torch.float64)
    want, _ = async_tree_attention(None, q, q, q, None, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = async_tree_attention(None, q, q, q, None, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_async_rows_have_the_log_probs_of_their_samples(folder, checkpointing):
    from trl.experimental.async_grpo.packing import TREE_ATTENTION, register_tree_attention

    register_tree_attention()
    use_tree_op()
    row = tree_row()
    model, alone = (
        # float64: log-probs of float32 are themselves right to 1e-6 alone
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, dtype=torch.float64)
        for name in (TREE_ATTENTION, "sdpa")
    )
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    longest = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), row["tree_max_seqlens"].tolist(), strict=True))
    inputs = dict(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False)
    logits = model(**inputs, **{name: row[name] for name in names}, **longest).logits[0]
    found, want = [], []
    for sample, ids in enumerate(leaves()):
        own = row["token_index"][row["segment_id"] == sample]
        found.append(torch.log_softmax(logits[own], -1).gather(1, torch.tensor(ids[2:])[:, None]))
        single = alone(input_ids=torch.tensor([ids])).logits[0, 1:-1]
        want.append(torch.log_softmax(single, -1).gather(1, torch.tensor(ids[2:])[:, None]))
    torch.testing.assert_close(torch.cat(found), torch.cat(want), rtol=0, atol=1e-6)
    torch.cat(found).sum().backward()
    torch.cat(want).sum().backward()
    for (name, p), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)
