"""TreeGRPOTrainer against TRL's own GRPOTrainer: parameters after five updates, forwarded tokens, metrics."""

import json
import random
from functools import cache

import pytest

trl = pytest.importorskip("trl")
import tokenizers  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from treegrpo.integrations.trl import TreeGRPOTrainer, packed, plan_of_row, take, use_tree_op  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
VOCAB, GROUP = 60, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a tokenizer of words, saved: with beta TRL loads the reference from the folder."""
    path = tmp_path_factory.mktemp("model")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@cache
def completion(prompt, number):
    """Completions of a prompt begin alike, two and two."""
    draw = random.Random(f"{prompt} {number}")
    common = random.Random(f"{prompt} {number // 2}")
    return [common.randrange(2, VOCAB) for _ in range(3)] + [
        draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 6))
    ]


def rollouts(prompts, trainer):
    # not through the tokenizer: TRL loads it by the model's type, whose rules are not those of words
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
    seen = {}
    completions = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        completions.append(completion(prompt, seen[prompt]))
    return dict(prompt_ids=ids, completion_ids=completions, logprobs=[[0.0] * len(c) for c in completions])


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def train(kind, folder, out, peft_config=None, **changes):
    """(parameters, logged rows, forwarded tokens) of five updates."""
    texts = [" ".join(f"w{random.Random(i * 99 + j).randrange(2, VOCAB)}" for j in range(5 + i % 4)) for i in range(16)]
    options = dict(
        output_dir=str(out),
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_completion_length=10,
        max_steps=5,
        learning_rate=1e-3,
        # Adam divides rounding by itself where a gradient is nearly zero
        adam_epsilon=1e-5,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=3,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = kind(
        str(folder),
        reward_funcs=reward,
        args=GRPOConfig(**options | changes),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        rollout_func=rollouts,
        peft_config=peft_config,
    )
    forwarded = []
    trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings().register_forward_hook(
        lambda module, args, out: forwarded.append(out.shape[:-1].numel())
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, trainer.state.log_history, sum(forwarded)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CASES = {
    **{loss: dict(loss_type=loss) for loss in LOSSES},
    "beta": dict(beta=0.05),
    "two_iterations": dict(num_iterations=2, beta=0.05),
    "accumulation": dict(gradient_accumulation_steps=2, loss_type="grpo"),
    "sequence_level": dict(importance_sampling_level="sequence", num_iterations=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "temperature": dict(temperature=0.7, top_entropy_quantile=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_five_updates_are_those_of_grpo_trainer(name, folder, tmp_path):
    changes = CASES[name]
    want, theirs, chain_tokens = train(GRPOTrainer, folder, tmp_path / "chain", **changes)
    got, ours, tree_tokens = train(TreeGRPOTrainer, folder, tmp_path / "tree", **changes)
    start = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert max(float((want[n] - p).abs().max()) for n, p in start.items()) > 1e-3
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
    assert tree_tokens < 0.7 * chain_tokens
    assert all(row.keys() <= mine.keys() for row, mine in zip(theirs, ours, strict=True))
    for row, mine in zip(theirs[:-1], ours[:-1], strict=True):
        for metric in ("loss", "entropy", "reward", "grad_norm", "kl", "clip_ratio/region_mean"):
            if metric in row:
                assert float(mine[metric]) == pytest.approx(float(row[metric]), rel=1e-3, abs=1e-5), metric
        assert mine["batch/packing_ratio"] > 1.3
    json.dumps(ours)


def test_lora(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # noqa: E731
    torch.manual_seed(0)
    want, _, chain_tokens = train(GRPOTrainer, folder, tmp_path / "chain", config(), beta=0.05)
    torch.manual_seed(0)
    got, _, tree_tokens = train(TreeGRPOTrainer, folder, tmp_path / "tree", config(), beta=0.05)
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
    assert tree_tokens < 0.7 * chain_tokens


def test_refuses_what_tears_groups_apart(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        train(TreeGRPOTrainer, folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)


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
