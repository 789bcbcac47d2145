"""An agent with a search tool in Search-R1's format: Tree-GRPO's trees under TRL's trainer.

A small run on a CPU, in the fictional world of treegrpo.box, with a model that has briefly imitated a careless teacher:

    python examples/trl_search.py

So brief a run learns little more than the format; `treegrpo demo` shows an agent that learns to search. A real one,
over your corpus (JSON lines of id and contents) and questions (question and answers):

    accelerate launch examples/trl_search.py --model Qwen/Qwen2.5-1.5B-Instruct --data questions.jsonl \\
        --retriever bm25:corpus.jsonl --output_dir runs/search --num_generations 6 --num_trees 2 --num_expansions 2 \\
        --per_device_train_batch_size 6 --gradient_accumulation_steps 16 --max_completion_length 2048 \\
        --max_step_tokens 256 --learning_rate 1e-6 --max_steps 500

The trees are grown by treegrpo.rollout.search: branches continue from their parent's keys and values. All arguments of
GRPOConfig and TreeGRPOConfig are flags; `--num_expansions 0 --num_trees 6` samples plain chains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from treegrpo.box.warmstart import ROLLOUT_SETTINGS, WarmStart, warm_start
from treegrpo.envs.data import read_rows
from treegrpo.envs.tools import make_env_factory
from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, tree_rollouts
from treegrpo.rewards import search_em

SMALL = WarmStart(num_steps=300, hidden_size=64, intermediate_size=256, num_hidden_layers=2)


@dataclass
class Task:
    """What is trained on what."""

    model: str | None = field(default=None, metadata={"help": "Name or folder of a model; none: the world in a box."})
    data: str | None = field(default=None, metadata={"help": "Questions and answers, .jsonl, .json or .parquet."})
    retriever: str | None = field(default=None, metadata={"help": "bm25:CORPUS.jsonl or http://HOST:PORT/retrieve."})
    topk: int = field(default=3, metadata={"help": "Documents per search."})
    max_turns: int = field(default=4, metadata={"help": "Agent steps that may search; one more must answer."})
    num_questions: int | None = field(default=None, metadata={"help": "Only the first so many questions."})


def box(task: Task) -> tuple[Path, str, str, dict]:
    """The world in a box: folder of the model, questions, retriever, and how the environment writes."""
    folder = warm_start(SMALL)
    templates = {
        name: ROLLOUT_SETTINGS[name] for name in ("prompt_template", "observation_template", "document_template")
    }
    task.topk = ROLLOUT_SETTINGS["topk"]
    return folder, str(folder / "train.jsonl"), f"bm25:{folder / 'corpus.jsonl'}", templates


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = TrlParser((Task, TreeGRPOConfig))
    # what suits the small run; flags override
    parser.set_defaults(
        output_dir="runs/trl_search",
        num_generations=6,
        num_trees=2,
        num_expansions=2,
        max_step_tokens=32,
        advantage_estimator="tree_grpo",
        per_device_train_batch_size=48,
        max_completion_length=256,
        learning_rate=3e-3,
        max_steps=20,
        logging_steps=5,
        save_strategy="no",
        gradient_checkpointing=on_gpu,
        use_cpu=not on_gpu,
        bf16=on_gpu,
    )
    task, args = parser.parse_args_and_config()
    if task.model is None:
        model, data, retriever, templates = box(task)
    elif task.data and task.retriever:
        model, data, retriever, templates = task.model, task.data, task.retriever, {}
    else:
        raise SystemExit("--model needs --data and --retriever")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_rows(data)[: task.num_questions]
    make_env = make_env_factory(
        "search", tokenizer=tokenizer, retriever=retriever, options=dict(topk=task.topk, **templates)
    )
    trainer = TreeGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32),
        partial(search_em, variant="monotone"),
        args=args,
        train_dataset=Dataset.from_dict(
            {"prompt": [make_env().reset(row) for row in rows], "answers": [row["answers"] for row in rows]}
        ),
        processing_class=tokenizer,
        rollout_func=tree_rollouts(make_env, max_turns=task.max_turns),
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    if trainer.accelerator.is_main_process:
        first, last = history[0], history[-1]
        print(f"reward {first['reward']:.3f} -> {last['reward']:.3f}, packing ratio {last['batch/packing_ratio']:.2f}")


if __name__ == "__main__":
    main()
