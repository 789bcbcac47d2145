"""Word problems with exact answers: TRL's GRPO on packed trees, trees grown through TRL's own generation.

A small run on a CPU, generated problems and a tiny model that has imitated a careless pupil, in about half a minute:

    python examples/trl_gsm8k.py

A real one (GSM8K's own files, or any JSON lines with question and answer or answers):

    accelerate launch examples/trl_gsm8k.py --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k/train.jsonl \\
        --output_dir runs/gsm8k --num_generations 8 --num_trees 2 --num_expansions 3 --max_step_tokens 96 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --max_completion_length 512 \\
        --learning_rate 1e-6 --max_steps 500 --use_vllm --vllm_mode colocate

All arguments of GRPOConfig and TreeGRPOConfig are flags; `--num_expansions 0` samples plain chains.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import TrlParser

from treegrpo.answers import extract_result, number
from treegrpo.envs.data import read_rows
from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer
from treegrpo.rewards import completion_text

INSTRUCTION = "{question}\nThink step by step, then write #### and the number alone."
HIGHEST = 12
"""The generated problems add numbers up to this."""


@dataclass
class Task:
    """What is trained on what."""

    model: str | None = field(default=None, metadata={"help": "Name or folder of a model; none: a tiny one made here."})
    data: str | None = field(default=None, metadata={"help": "JSON lines of problems; none: generated sums."})


def exact_answer(completions: list, answers: list[list[str]], **columns: object) -> list[float]:
    """1 where the number behind #### is one of the row's answers, else 0."""
    results = [extract_result(completion_text(completion)) for completion in completions]
    golds = [[number(gold) for gold in own] for own in answers]
    return [
        float(result is not None and number(result) is not None and number(result) in own)
        for result, own in zip(results, golds, strict=True)
    ]


def sums() -> list[dict]:
    """Problems a tiny model can learn."""
    pairs = [(a, b) for a in range(HIGHEST + 1) for b in range(HIGHEST + 1)]
    random.Random(0).shuffle(pairs)
    return [{"question": f"{a} + {b} =", "answers": [str(a + b)]} for a, b in pairs]


def tiny_model(rows: list[dict], steps: int = 300) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A decoder of two layers over words, after imitating a pupil who is wrong every other time."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "+", "=", "and", "make", "####", *map(str, range(2 * HIGHEST + 1))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    for _ in range(steps):
        lines = []
        for row in draw.sample(rows, 32):
            a, _, b, _ = row["question"].split()
            c = int(row["answers"][0]) if draw.random() < 0.5 else draw.randrange(2 * HIGHEST + 1)
            lines.append(f"{row['question']} {a} and {b} make {c} #### {c} <eos>")
        ids = tokenizer(lines, return_tensors="pt", add_special_tokens=False)["input_ids"]
        labels = ids.clone()
        labels[:, :4] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = TrlParser((Task, TreeGRPOConfig))
    # what suits the small run; flags override
    parser.set_defaults(
        output_dir="runs/trl_gsm8k",
        num_generations=8,
        num_trees=2,
        num_expansions=3,
        max_step_tokens=3,
        per_device_train_batch_size=64,
        max_completion_length=12,
        learning_rate=1e-3,
        max_steps=60,
        logging_steps=10,
        save_strategy="no",
        gradient_checkpointing=on_gpu,
        use_cpu=not on_gpu,
        bf16=on_gpu,
    )
    task, args = parser.parse_args_and_config()
    rows = read_rows(task.data) if task.data else sums()
    if task.model is None and task.data is not None:
        raise SystemExit("--data needs --model: the tiny model knows the words of generated sums alone")
    model, tokenizer = (task.model, AutoTokenizer.from_pretrained(task.model)) if task.model else tiny_model(rows)
    if tokenizer.chat_template:
        prompts = [[{"role": "user", "content": INSTRUCTION.format(question=row["question"])}] for row in rows]
    else:
        prompts = [row["question"] for row in rows]
    trainer = TreeGRPOTrainer(
        model,
        exact_answer,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts, "answers": [row["answers"] for row in rows]}),
        processing_class=tokenizer,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    if trainer.accelerator.is_main_process:
        first, last = history[0], history[-1]
        print(f"reward {first['reward']:.3f} -> {last['reward']:.3f}, packing ratio {last['batch/packing_ratio']:.2f}")


if __name__ == "__main__":
    main()
