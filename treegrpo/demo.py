"""`treegrpo demo`: the whole loop in a few minutes on two CPU cores.

An agent with a search tool learns by Tree-GRPO in the world in a box; then logged rollouts are trained on as a tree and
as flattened chains, side by side.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treegrpo import compare
from treegrpo.box.warmstart import ROLLOUT_SETTINGS, warm_start
from treegrpo.config import TrainConfig
from treegrpo.envs.data import read_rows
from treegrpo.rollout.build import ENGINES, is_engine
from treegrpo.startup import check_backend
from treegrpo.trainer import Trainer

PARTS = ("both", "learn", "compare")
# Chosen by hand, looking at held-out questions; a step samples 24 groups of six leaves.
LEARNING: dict[str, Any] = {
    "groups_per_step": 24,
    "num_trees": 2,
    "num_expansions": 2,
    "num_rounds": 1,
    "advantage_estimator": "tree_grpo",
    "loss_type": "dapo",
    "learning_rate": 7e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
}
NUM_HELDOUT = 400


def run(
    console: Any,
    *,
    part: str = "both",
    steps: int = 40,
    engine: str = "hf",
    compare_steps: int = 6,
    data: Path | None = None,
    samples: str = "both",
    backend: str = "auto",
    output_dir: Path = Path("runs/demo"),
    seed: int = 42,
) -> None:
    """Runs and prints to a rich Console; the learning part writes its report to `output_dir`.

    Raises:
        ValueError: an unknown part, an argument that its halves would refuse, or no rollouts in `data`.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}: choose one of {', '.join(PARTS)}")
    # the warm start takes a minute, the learning half several
    for name, value in (("steps", steps), ("compare_steps", compare_steps)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not is_engine(engine):
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    TrainConfig(backend=backend, seed=seed)
    check_backend(backend)
    if part == "both":
        compare.read_rollouts(data)
    if part != "compare":
        learn(console, steps=steps, engine=engine, backend=backend, output_dir=output_dir, seed=seed)
    if part == "both":
        console.print()
    if part != "learn":
        console.rule("[bold]Tree against chains[/bold]", align="left")
        compare.run(console, steps=compare_steps, data=data, samples=samples, backend=backend)


def box_settings(folder: Path) -> dict[str, Any]:
    """TrainConfig's fields for a warm start's folder."""
    return {
        "model": str(folder),
        "dataset": str(folder / "train.jsonl"),
        "retriever": f"bm25:{folder / 'corpus.jsonl'}",
        **ROLLOUT_SETTINGS,
    }


@dataclass(frozen=True)
class Accuracy:
    """Right answers of n, with Wilson's 95% interval. `Accuracy(30, 100)` prints as 30.0% [21.9%, 39.6%]."""

    right: int
    num: int

    @property
    def share(self) -> float:
        return self.right / self.num

    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.num, self.share
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.1%} [{low:.1%}, {high:.1%}]"


def heldout_accuracy(
    trainer: Trainer, folder: Path, num: int = NUM_HELDOUT, all_hops: tuple[int, ...] = (1, 2, 3)
) -> dict[int, Accuracy]:
    """Greedy exact match on held-out questions by number of hops; at most `num` of each."""
    assert trainer.online is not None
    rows = read_rows(folder / "heldout.jsonl")
    result = {}
    for hops in all_hops:
        chosen = [row for row in rows if row["num_hops"] == hops][:num]
        scores = trainer.online.evaluate(trainer.policy, rows=chosen)
        result[hops] = Accuracy(round(scores["eval_em"] * len(chosen)), len(chosen))
    return result


def learn(
    console: Any,
    *,
    steps: int,
    engine: str = "hf",
    backend: str = "auto",
    output_dir: Path,
    seed: int = 42,
    folder: Path | None = None,
    num_heldout: int = NUM_HELDOUT,
) -> dict[str, dict[int, Accuracy]]:
    """Warm start (or the one in `folder`), Tree-GRPO, held-out accuracy before and after, a picture."""
    from treegrpo.box.draw import draw_run

    console.rule("[bold]An agent with a search tool learns by Tree-GRPO[/bold]", align="left")
    folder = folder or _warm_start(console)
    config = TrainConfig(
        rollouts=engine,
        eval_dataset=str(folder / "validation.jsonl"),
        eval_rows=100,
        eval_steps=max(1, steps // 4),
        backend=backend,
        output_dir=str(output_dir),
        overwrite_output_dir=True,
        max_steps=steps,
        save_steps=0,
        save_total_limit=1,
        save_rollouts=True,
        seed=seed,
        **box_settings(folder),
        **LEARNING,
    )
    trainer = Trainer(config)
    try:
        before = heldout_accuracy(trainer, folder, num_heldout)
        console.print(
            f"Warm start, greedy on held-out questions: two hops {before[2]} of {before[2].num};"
            f" one hop {before[1].share:.0%}, three {before[3].share:.0%}"
        )
        console.print(
            f"Training: {steps} steps of {config.groups_per_step} questions, {config.num_trees} trees each,"
            f" {config.num_expansions} branches a tree; the tree saves what the six trajectories share"
        )
        history = _train(console, trainer)
        after = heldout_accuracy(trainer, folder, num_heldout)
    finally:
        trainer.close()
    console.print(_accuracy_table(before, after))
    total = {name: sum(row[name] for row in history) for name in ("tree/chain_tokens", "tree/unique_tokens")}
    console.print(
        f"{history[-1]['rollout/total_generated_tokens']:,} tokens sampled,"
        f" {sum(row['rollout/tool_calls'] for row in history):,.0f} tool calls; trained on"
        f" {total['tree/unique_tokens']:,.0f} unique tokens instead of {total['tree/chain_tokens']:,.0f}"
        f" ({total['tree/chain_tokens'] / total['tree/unique_tokens']:.2f}x)"
    )
    sampled = trainer.sampled.trajectories() if trainer.sampled else []
    picture = draw_run(history, trainer.evaluations, sampled, trainer.tokenizer, output_dir)
    (output_dir / "accuracy.json").write_text(
        json.dumps({when: {h: [a.right, a.num] for h, a in acc.items()} for when, acc in _named(before, after)})
    )
    console.print(f"wrote {picture}; the model is in {output_dir / 'best'} and loads in plain transformers")
    return {"before": before, "after": after}


def _named(before: Any, after: Any) -> list[tuple[str, Any]]:
    return [("before", before), ("after", after)]


def _warm_start(console: Any) -> Path:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("warm start"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, text="")

        def progress(step: int, num_steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=num_steps, text=f"loss {loss:.3f}")

        folder = warm_start(progress=progress)
    console.print(f"Warm start: imitation of a careless teacher, {folder}")
    return folder


def _train(console: Any, trainer: Trainer) -> list[dict[str, Any]]:
    history = []
    for row in trainer.steps():
        history.append(row)
        if "eval_em" in row:
            console.print(
                f"step {row['step']:3d}: reward {row['reward']:.3f}, {row['tools/call_frequency']:.2f} tool calls a"
                f" trajectory, {row['tree/chain_tokens'] - row['tree/unique_tokens']:,.0f} tokens saved; validation"
                f" {row['eval_em']:.0%}"
            )
    return history


def _accuracy_table(before: dict[int, Accuracy], after: dict[int, Accuracy]) -> Any:
    from rich.table import Table

    table = Table(title="Held-out questions, greedy, exact match [95% interval]", title_justify="left")
    for i, column in enumerate(("hops", "questions", "before", "after", "after / before")):
        table.add_column(column, justify="right" if i else "left")
    for hops, old in before.items():
        ratio = f"{after[hops].share / old.share:.2f}x" if old.right else "-"
        table.add_row(str(hops), str(old.num), str(old), str(after[hops]), ratio)
    return table
