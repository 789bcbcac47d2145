"""What the tests of the TRL integration share: a tiny model, prompts, completions that begin alike, a training run."""

import random
from functools import cache

import tokenizers
import torch
from datasets import Dataset
from models import HYBRID, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3MoeConfig
from trl import GRPOConfig

VOCAB, GROUP = 60, 4


def save_tiny(path, kind="dense", **changes):
    """A tiny model ("dense", "moe", a hybrid family of models.py) and a tokenizer of words, saved: with beta TRL loads
    the reference from the folder."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    common = dict(
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
    if kind in HYBRID:
        numbers = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=None, eos_token_id=1)
        tiny_model(kind, dtype=torch.float32, **numbers | changes).save_pretrained(path)
        return path
    if kind == "moe":
        config = Qwen3MoeConfig(
            **common, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
        )
    else:
        config = Qwen2Config(**common)
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


def texts(number=16):
    return [
        " ".join(f"w{random.Random(i * 99 + j).randrange(2, VOCAB)}" for j in range(5 + i % 4)) for i in range(number)
    ]


def options(out, **changes):
    """Arguments of a short run, on the accelerator where there is one."""
    return dict(
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
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
        seed=3,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    ) | dict(changes)


def make(kind, folder, out, *, config=GRPOConfig, rewards=reward, **changes):
    """A trainer of class ``kind``; what TRL's constructor takes beside the arguments is passed on."""
    names = ("peft_config", "rollout_func", "tools", "environment_factory", "processing_class")
    own = {name: changes.pop(name) for name in names if name in changes}
    dataset = changes.pop("train_dataset", None) or Dataset.from_dict({"prompt": texts()})
    if not {"tools", "environment_factory", "rollout_func"} & set(own):
        own["rollout_func"] = rollouts
    own["rollout_func"] = own.get("rollout_func")
    return kind(str(folder), reward_funcs=rewards, args=config(**options(out, **changes)), train_dataset=dataset, **own)


def parameters(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def difference(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


class Forwarded:
    """Counts what a trainer's model is fed: positions, tokens that are no padding, distinct prefixes of a forward."""

    def __init__(self, trainer):
        self.positions = self.tokens = self.prefixes = 0
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.get_input_embeddings().register_forward_hook(self.count)

    def count(self, module, args, out):
        ids = args[0]
        rows = [[token for token in row if token] for row in ids.tolist()]
        self.positions += ids.numel()
        self.tokens += sum(map(len, rows))
        self.prefixes += len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
