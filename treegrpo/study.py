"""`treegrpo study`: chains against trees at equal sampled tokens, in the world in a box.

Every run starts from the same warm start and may sample the same number of tokens. A budget B is what one question
costs in chains: a chain run samples B of them, a tree run (M, N, L) with M (1 + L N / 2) = B, the label of table 3 of
arXiv 2509.21240. All steps cost about the same: 96 chains, so 96 / B questions. What differs is how a question's
budget is spent, and who is compared with whom.

One JSON file a run; a run whose file is there is not run again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treegrpo.files import write_whole
from treegrpo.interrupt import uninterrupted

CHAINS_PER_STEP = 96
# Shares of the tokens after which the two-hop questions are asked, before the end.
MILESTONES = (0.25, 0.5)
# Two-sided 95% quantiles of Student's t by degrees of freedom.
_T_BELOW_16 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T = (*_T_BELOW_16, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


@dataclass(frozen=True)
class Cell:
    """One method at one budget: `Cell(4, 2, 2, 1, "tree_grpo")` is Tree-GRPO with two trees, two branches on each."""

    budget: int
    num_trees: int
    num_expansions: int
    num_rounds: int
    estimator: str

    @property
    def name(self) -> str:
        if not self.num_expansions:
            return f"chain G={self.num_trees}"
        shape = f"({self.num_trees},{self.num_expansions},{self.num_rounds})"
        return f"tree {shape}" + ("" if self.estimator == "tree_grpo" else f" {self.estimator} only")

    @property
    def key(self) -> str:
        return f"b{self.budget}-{self.num_trees}-{self.num_expansions}-{self.num_rounds}-{self.estimator}"


CELLS = (
    Cell(2, 2, 0, 1, "grpo"),
    Cell(2, 1, 2, 1, "tree_grpo"),
    Cell(4, 4, 0, 1, "grpo"),
    Cell(4, 2, 2, 1, "tree_grpo"),
    Cell(4, 1, 3, 2, "tree_grpo"),
    Cell(4, 2, 2, 1, "intra"),
    Cell(4, 2, 2, 1, "inter"),
    Cell(8, 8, 0, 1, "grpo"),
    Cell(8, 4, 2, 1, "tree_grpo"),
    Cell(8, 2, 6, 1, "tree_grpo"),
    Cell(8, 2, 6, 1, "intra"),
    Cell(8, 2, 6, 1, "inter"),
    Cell(16, 16, 0, 1, "grpo"),
    Cell(16, 8, 2, 1, "tree_grpo"),
    Cell(16, 2, 7, 2, "tree_grpo"),
)


def run_cell(cell: Cell, seed: int, tokens: int, learning_rate: float, num_questions: int, folder: str) -> dict:
    """One training run from the warm start in `folder`; its numbers."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    from treegrpo.config import TrainConfig
    from treegrpo.demo import LEARNING, box_settings, heldout_accuracy
    from treegrpo.trainer import Trainer

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="treegrpo-study-") as output:
        settings = {
            **LEARNING,
            **box_settings(Path(folder)),
            "groups_per_step": max(1, CHAINS_PER_STEP // cell.budget),
            "num_trees": cell.num_trees,
            "num_expansions": cell.num_expansions,
            "num_rounds": cell.num_rounds,
            "advantage_estimator": cell.estimator,
            "learning_rate": learning_rate,
        }
        trainer = Trainer(
            TrainConfig(
                rollouts="hf",
                output_dir=output,
                max_steps=100_000,
                max_generated_tokens=tokens,
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
                **settings,
            )
        )
        history: list[dict[str, Any]] = []
        milestones: list[list[float]] = []
        try:
            for row in trainer.steps():
                history.append(row)
                share = row["rollout/total_generated_tokens"] / tokens
                if passed := sum(share >= milestone for milestone in MILESTONES) - len(milestones):
                    found = heldout_accuracy(trainer, Path(folder), num_questions, (2,))[2]
                    milestones += passed * [[row["rollout/total_generated_tokens"], found.right, found.num]]
            accuracy = heldout_accuracy(trainer, Path(folder), num_questions)
        finally:
            trainer.close()
    total = {name: sum(row[name] for row in history) for name in ("tree/chain_tokens", "tree/unique_tokens")}
    return {
        **asdict(cell),
        "name": cell.name,
        "seed": seed,
        "steps": len(history),
        "generated_tokens": history[-1]["rollout/total_generated_tokens"],
        "tool_calls": sum(row["rollout/tool_calls"] for row in history),
        "trained_chain_tokens": total["tree/chain_tokens"],
        "trained_unique_tokens": total["tree/unique_tokens"],
        "zero_std_share": statistics.mean(row["frac_reward_zero_std"] for row in history),
        "milestones": milestones,
        "reward": [round(row["reward"], 4) for row in history],
        "accuracy": {hops: [a.right, a.num] for hops, a in accuracy.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(
    console: Any,
    *,
    seeds: int = 5,
    tokens: int = 80_000,
    learning_rate: float = 7e-4,
    num_questions: int = 400,
    budgets: Sequence[int] = (2, 4, 8, 16),
    workers: int | None = None,
    runs_dir: Path = Path("runs/study"),
    results_dir: Path = Path("bench/results"),
    folder: Path | None = None,
) -> list[dict]:
    """Runs what is missing in `runs_dir`, then writes study.json, study.md and study.png to `results_dir`. `folder` is
    a warm start, by default the one of the demo.

    Raises:
        ValueError: fewer than two seeds (no interval), or a budget without cells.
    """
    from treegrpo.box.warmstart import warm_start

    if seeds < 2:
        raise ValueError(f"seeds={seeds}: an interval needs at least 2")
    if unknown := set(budgets) - {cell.budget for cell in CELLS}:
        raise ValueError(f"budgets: {min(unknown)} is none of 2, 4, 8, 16")
    folder = folder or warm_start()
    setting = dict(tokens=tokens, learning_rate=learning_rate, num_questions=num_questions, warm_start=folder.name)
    runs_dir = runs_dir / "-".join(map(str, setting.values()))
    runs_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(cell, seed) for seed in range(seeds) for cell in CELLS if cell.budget in budgets]
    missing = [job for job in jobs if not _file(runs_dir, *job).exists()]
    console.print(f"{len(jobs)} runs of {tokens:,} sampled tokens, {len(missing)} to do; each a file in {runs_dir}")
    args = (tokens, learning_rate, num_questions, str(folder))
    with contextlib.closing(_results(missing, args, workers or os.cpu_count() or 1)) as found:
        for index, result in enumerate(found, 1):
            accuracy = result["accuracy"][2]
            write_whole(runs_dir / f"{_key(result)}.json", json.dumps(result))
            console.print(
                f"{index}/{len(missing)} budget {result['budget']} {result['name']}, seed {result['seed']}: two hops"
                f" {accuracy[0] / accuracy[1]:.1%}, {result['seconds']:.0f} s"
            )
    results = [json.loads(_file(runs_dir, *job).read_text()) for job in jobs]
    for result in results:
        result["accuracy"] = {int(hops): value for hops, value in result["accuracy"].items()}
    rows = summary(results)
    results_dir.mkdir(parents=True, exist_ok=True)
    saved = {"setting": setting, "machine": machine(), "summary": rows, "runs": results}
    write_whole(results_dir / "study.json", json.dumps(saved, indent=1))
    write_whole(results_dir / "study.md", markdown(rows))
    draw(rows, results, results_dir / "study.png")
    console.print(table(rows))
    console.print(f"wrote study.json, study.md and study.png to {results_dir}")
    return rows


def machine() -> dict[str, Any]:
    """Where this ran: processor, cores, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("treegrpo", "torch", "transformers", "numpy")}
    return {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _results(jobs: list[tuple[Cell, int]], args: tuple, workers: int) -> Generator[dict, None, None]:
    """Results as they come. After a job that fails no other begins, those that run are waited for, and the error comes
    last; whatever else ends this early, Ctrl-C above all, ends the jobs too."""
    if not jobs:
        return
    others = multiprocessing.active_children()
    # A fresh interpreter each: a fork of a process that has run torch may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    failed: BaseException | None = None
    # Ctrl-C in the middle of a call of the pool's could leave a lock taken that its own thread waits for at the end
    try:
        with uninterrupted():
            waiting = {pool.submit(run_cell, cell, seed, *args) for cell, seed in jobs}
        while waiting:
            with uninterrupted():
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                errors = [future.exception() for future in done]
                ended = [(e, None if e else f.result()) for e, f in zip(errors, done, strict=True)]
            for error, result in ended:
                if result is None:
                    failed = failed or error
                else:
                    yield result
            if failed:
                with uninterrupted():
                    waiting = {future for future in waiting if not future.cancel()}
        with uninterrupted():
            pool.shutdown()
    except BaseException:
        with uninterrupted():
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
        raise
    if failed:
        raise failed


def _ignore_interrupts() -> None:
    """In a worker, where Ctrl-C would end only its job: the study ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _key(result: dict) -> str:
    fields = ("budget", "num_trees", "num_expansions", "num_rounds", "estimator")
    return f"{Cell(*(result[name] for name in fields)).key}-s{result['seed']}"


def _file(folder: Path, cell: Cell, seed: int) -> Path:
    return folder / f"{cell.key}-s{seed}.json"


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95% interval (Student's t) of at least two values.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    n = len(values)
    quantile = _T[n - 2] if n - 2 < len(_T) else 1.96
    return statistics.mean(values), quantile * statistics.stdev(values) / n**0.5


def summary(results: list[dict]) -> list[dict]:
    """One row a cell, means over seeds; `versus_chain`: the mean difference to the chain run of the same budget and
    seed, paired, with its interval."""
    share = {(r["budget"], r["name"], r["seed"]): r["accuracy"][2][0] / r["accuracy"][2][1] for r in results}
    rows = []
    for budget, name in dict.fromkeys((r["budget"], r["name"]) for r in results):
        own = [r for r in results if (r["budget"], r["name"]) == (budget, name)]
        row: dict[str, Any] = {"budget": budget, "name": name, "seeds": len(own)}
        for hops in (1, 2, 3):
            values = [r["accuracy"][hops][0] / r["accuracy"][hops][1] for r in own]
            row[f"hops{hops}"], row[f"hops{hops}_interval"] = mean_interval(values)
        for index, share_of in enumerate(MILESTONES):
            values = [r["milestones"][index][1] / r["milestones"][index][2] for r in own]
            row[f"hops2_at_{share_of}"], row[f"hops2_at_{share_of}_interval"] = mean_interval(values)
        chain = next(r["name"] for r in results if r["budget"] == budget and not r["num_expansions"])
        differences = [share[budget, name, r["seed"]] - share[budget, chain, r["seed"]] for r in own]
        row["versus_chain"], row["versus_chain_interval"] = mean_interval(differences)
        for key in ("generated_tokens", "tool_calls", "steps", "zero_std_share", "seconds"):
            row[key] = statistics.mean(r[key] for r in own)
        chain_tokens, tokens = (sum(r[f"trained_{kind}_tokens"] for r in own) for kind in ("chain", "unique"))
        row["packing_ratio"] = chain_tokens / tokens
        rows.append(row)
    return rows


_COLUMNS: tuple[str, ...] = (
    "budget",
    "method",
    "two hops, at 1/4",
    "at 1/2",
    "at the end",
    "versus chain",
    "one hop",
    "three hops",
)
_COLUMNS += ("tokens", "tool calls")
_COLUMNS += ("equal groups", "chain / tree tokens")


def _cells(row: dict) -> list[str]:
    percent = lambda name: f"{100 * row[name]:.1f} ± {100 * row[name + '_interval']:.1f}"  # noqa: E731
    is_chain = row["name"].startswith("chain")
    return [
        str(row["budget"]),
        row["name"],
        *(percent(f"hops2_at_{share}") for share in MILESTONES),
        percent("hops2"),
        "" if is_chain else f"{100 * row['versus_chain']:+.1f} ± {100 * row['versus_chain_interval']:.1f}",
        percent("hops1"),
        percent("hops3"),
        f"{row['generated_tokens']:,.0f}",
        f"{row['tool_calls']:,.0f}",
        f"{row['zero_std_share']:.0%}",
        f"{row['packing_ratio']:.2f}x",
    ]


def table(rows: list[dict]) -> Any:
    from rich.table import Table

    result = Table(title="Held-out exact match in percent, mean and 95% interval over seeds", title_justify="left")
    for i, column in enumerate(_COLUMNS):
        result.add_column(column, justify="left" if i == 1 else "right")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| ---: | --- |" + " ---: |" * (len(_COLUMNS) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], results: list[dict], path: Path) -> None:
    """Accuracy of every cell with its interval, and the mean reward over sampled tokens at budget 4."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained", width_ratios=(1.6, 1))
    for place, row in enumerate(rows):
        color = "tab:gray" if row["name"].startswith("chain") else "tab:blue"
        left.errorbar(place, 100 * row["hops2"], 100 * row["hops2_interval"], fmt="o", color=color, capsize=4)
    labels = [f"B={row['budget']}\n{row['name']}" for row in rows]
    left.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=8)
    left.set(ylabel="held-out two-hop exact match, %", title="equal sampled tokens; mean and 95% interval over seeds")
    left.grid(alpha=0.3)
    shown = 4 if any(r["budget"] == 4 for r in results) else results[0]["budget"]
    for name in dict.fromkeys(r["name"] for r in results if r["budget"] == shown):
        curves = [r["reward"] for r in results if r["budget"] == shown and r["name"] == name]
        tokens = statistics.mean(r["generated_tokens"] for r in results if r["budget"] == shown and r["name"] == name)
        length = min(map(len, curves))
        mean = np.mean([curve[:length] for curve in curves], axis=0)
        smooth = np.convolve(mean, np.ones(5) / 5, "valid") if length >= 5 else mean
        right.plot(np.linspace(0, tokens / 1000, len(smooth)), smooth, label=name)
    right.set(xlabel="thousand sampled tokens", ylabel="mean reward", title=f"training reward, budget {shown}")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
