"""What a run shows: progress bar and final table in the terminal, `treegrpo report` as PNG curves and a one-page
summary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treegrpo.metrics import read_metrics
from treegrpo.shown import plain, shown

# Curves of the picture, in reading order; those a run has no numbers for are left out.
_CURVES = (
    "loss",
    "reward",
    "eval_reward",
    "tools/call_frequency",
    "rollout/generated_tokens",
    "grad_norm",
    "entropy",
    "kl",
    "clip_ratio/region_mean",
    "ratio/max",
    "sampling/sampling_logp_difference/mean",
    "batch/packing_ratio",
    "step_time",
    "learning_rate",
    "completions/mean_length",
)
_PACKING = {"tree/unique_tokens", "tree/chain_tokens", "batch/packing_ratio"}


class RunProgress:
    """What a run reports while it works; this one says nothing."""

    def advance(self, row: dict[str, Any]) -> None:
        """Once per step, with its metrics."""

    def sampling(self, done: int, total: int) -> None:
        """Groups sampled for the step."""


class _Bar(RunProgress):
    def __init__(self, progress: Any, name: str, step: int, max_steps: int) -> None:
        self.progress, self.name, self.text = progress, name, ""
        self.task = progress.add_task(name, total=max_steps, completed=step, text="")

    def advance(self, row: dict[str, Any]) -> None:
        parts = [f"loss {row['loss']:+.4f}", f"reward {row['reward']:.3f}", f"{row['step_time']:.2f} s"]
        if "tools/call_frequency" in row:
            saved = row["tree/chain_tokens"] - row["tree/unique_tokens"]
            # What matters first: a narrow terminal cuts the end.
            parts = [parts[1], f"{row['tools/call_frequency']:.1f} calls", f"{saved:,.0f} tokens saved", parts[2]]
        self.text = "  ".join(parts)
        self.progress.update(self.task, completed=row["step"], text=self.text)

    def sampling(self, done: int, total: int) -> None:
        self.progress.update(self.task, text=f"{self.text}  sampling {done}/{total}")


@contextlib.contextmanager
def progress_bar(name: str, step: int, max_steps: int, enabled: bool = True) -> Iterator[RunProgress]:
    """A bar in the terminal, or nothing where it is not enabled."""
    if not enabled:
        yield RunProgress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns) as progress:
        yield _Bar(progress, name, step, max_steps)


def final_table(history: list[dict[str, Any]], title: str):
    """A rich table: first, last and mean of the numbers that matter."""
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left")
    table.add_column("metric")
    for name in ("first", "last", "mean"):
        table.add_column(name, justify="right")
    for name, first, last, mean in _rows(history):
        table.add_row(plain(name), number(first), number(last), number(mean))
    return table


def _rows(history: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    names = dict.fromkeys(name for row in history for name in row if name != "step")
    rows = []
    for name in names:
        if values := [row[name] for row in history if row.get(name) is not None]:
            rows.append((name, values[0], values[-1], sum(values) / len(values)))
    return rows


def _cell(name: str) -> str:
    return shown(name).replace("|", "\\|")


def number(value: float) -> str:
    """Whole numbers with commas, others with four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_report(run_dir: str | Path) -> tuple[Path, Path]:
    """Writes curves.png and report.md into the run's folder and returns their paths.

    Raises:
        ValueError: no metrics there, or a line that does not read.
    """
    run_dir = Path(run_dir)
    history = read_metrics(run_dir / "metrics.jsonl")
    if not history:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} is empty: the run has not finished its first step")
    picture, page = run_dir / "curves.png", run_dir / "report.md"
    _draw_curves(history, picture)
    page.write_text(_page(run_dir, history, picture.name), encoding="utf-8")
    return picture, page


def _draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in _CURVES if any(row.get(name) is not None for row in history)]
    columns = 4
    lines = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.8 * lines), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        axis.plot(
            *zip(*points, strict=True),
            color="tab:blue",
            marker="o" if len(points) < 40 else None,
            markersize=3,
            linewidth=1.2,
        )
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _page(run_dir: Path, history: list[dict[str, Any]], picture: str) -> str:
    times = [row["step_time"] for row in history if row.get("step_time") is not None]
    tokens = [f", {number(row['num_tokens'])} tokens of trajectories" for row in history if "num_tokens" in row]
    # An evaluation before the first step has no packed rows.
    packed = [row for row in history if row.keys() >= _PACKING]
    lines = [
        f"# Run {run_dir.name}",
        "",
        f"{history[-1]['step']} steps, {sum(times):.1f} s in the {len(times)} logged ones{''.join(tokens[-1:])}.",
        *(
            f"Packed rows held {number(row['tree/unique_tokens'])} unique of {number(row['tree/chain_tokens'])} tokens"
            f" in the last step ({row['batch/packing_ratio']:.2f}x)."
            for row in packed[-1:]
        ),
        "",
        f"![curves]({picture})",
        "",
        "| metric | first | last | mean |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {_cell(name)} | {number(first)} | {number(last)} | {number(mean)} |"
            for name, first, last, mean in _rows(history)
        ),
        "",
    ]
    settings = run_dir / "config.yaml"
    if settings.is_file():
        lines += ["## Settings", "", "```yaml", settings.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)
