"""Tables of the attention races: TFLOP/s over visible pairs of every contender, and how many times as long as ours.

A cell reads `412 (1.53x)`: 412 TFLOP/s over the contender's own visible pairs, 1.53 times our time for the same
forest. Chains do more pairs than the tree, hence can have more TFLOP/s and take longer. Where a contender is faster
than ours the ratio is bold.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
OURS = ("tree_triton", "tree_cpu")
PASSES = ("forward", "backward", "forward_backward")
CHAINS = ("chain_triton", "chain_varlen", "chain_cudnn", "chain_cudnn_leaves", "chain_flash_attn")
LABELS = {
    "tree_triton": "ours",
    "tree_cpu": "ours (CPU)",
    "tree_cuda": "ours, plain CUDA",
    "flex": "FlexAttention",
    "flex_and_mask": "Flex + mask build",
    "gather_varlen": "gathered paths",
    "gather_flash_attn": "gathered, flash-attn",
    "trl_flash3": "TRL, FA3",
    "prefix_grouping": "prefix grouping",
    "chain_triton": "chains, ours",
    "chain_varlen": "chains, varlen FA2",
    "chain_cudnn": "chains, cuDNN",
    "chain_cudnn_leaves": "chains, cuDNN, one by one",
    "chain_flash_attn": "chains, flash-attn",
    "sdpa_dense_mask": "dense mask",
}
ORDER = tuple(LABELS)

Cell = tuple[str, int]


def label(contender: str) -> str:
    return LABELS.get(contender, contender)


def expand(row: Row) -> list[Row]:
    """One row per pass of a race's entry, each with that pass's median_s, iqr_s, tflops_per_s."""
    shared = {name: value for name, value in row.items() if name not in ("passes", "median_s", "rounds")}
    return [
        shared | {"passes": name, "rounds": len(timed["rounds_s"])} | timed for name, timed in row["passes"].items()
    ]


def by_cell(rows: list[Row], passes: str) -> dict[Cell, dict[str, Row]]:
    """(workload, head dim) -> contender -> row, in the order measured."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "race" and row["passes"] == passes:
            cells.setdefault((row["workload"], row["head_dim"]), {})[row["contender"]] = row
    return cells


def ours_of(row_of: dict[str, Row]) -> Row | None:
    return next((row_of[name] for name in OURS if name in row_of), None)


def contenders_of(rows: list[Row]) -> list[str]:
    present = {row["contender"] for row in rows if row["suite"] == "race"}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def ratio(row: Row, ours: Row | None) -> float | None:
    """How many times our time this one took; None for ours itself or where ours is missing."""
    return None if ours is None or row is ours else row["median_s"] / ours["median_s"]


def cell_text(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return ""
    speed, times = f"{row['tflops_per_s']:.0f}", ratio(row, ours)
    if row["tflops_per_s"] < 10:
        speed = f"{row['tflops_per_s']:.2g}"
    if times is None:
        return f"{speed} ± {100 * row['iqr_s'] / row['median_s']:.0f}%"
    return f"{speed} ({times:.2f}x)" if times >= 1 else f"{speed} (**{times:.2f}x**)"


def race_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, body) of all passes; ours with its interquartile range over the median."""
    contenders = contenders_of(rows)
    header = ["workload", "D", "tokens", "chain / tree: tokens", "pairs", *map(label, contenders)]
    body = []
    for passes in PASSES:
        cells = by_cell(rows, passes)
        if cells:
            body.append([f"**{passes.replace('_', ' + ')}**", *[""] * (len(header) - 1)])
        for (workload, head_dim), row_of in cells.items():
            any_row, ours = next(iter(row_of.values())), ours_of(row_of)
            sizes = [
                f"{any_row['tree_tokens']:,}",
                f"{any_row['chain_tokens'] / any_row['tree_tokens']:.2f}x",
                f"{any_row['chain_pairs'] / any_row['tree_pairs']:.2f}x",
            ]
            speeds = [cell_text(row_of.get(name), ours) for name in contenders]
            body.append([workload, str(head_dim), *sizes, *speeds])
    return header, body


def memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Peak memory of one forward and backward beyond its inputs, in MiB."""
    contenders = contenders_of(rows)
    body = []
    for (workload, head_dim), row_of in by_cell(rows, "forward_backward").items():
        peaks = [(row_of.get(name) or {}).get("peak_bytes") for name in contenders]
        if any(peaks):
            body.append([workload, str(head_dim), *("" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks)])
    return ["workload", "D", *map(label, contenders)], body


def absences(rows: list[Row]) -> list[str]:
    """Why contenders are missing, each reason once with the workloads it is about; then notes on those that ran."""
    reasons: dict[tuple[str, str], list[str]] = {}
    notes: dict[str, str] = {}
    for row in rows:
        if row["suite"] == "race" and row["passes"] == "forward_backward":
            for name, reason in (row.get("absent") or {}).items():
                reasons.setdefault((name, reason), []).append(row["workload"])
            if row.get("note"):
                notes[row["contender"]] = row["note"]
    lines = [
        f"- {label(name)}: {reason} ({', '.join(where) if len(where) < 4 else f'{len(where)} workloads'})"
        for (name, reason), where in reasons.items()
    ]
    return lines + [f"- {label(name)}: {note}" for name, note in notes.items()]


def short(rows: list[Row]) -> list[str]:
    """A narrow table for a terminal: TFLOP/s of ours, and each rival's time over ours, forward and backward."""
    shown = [name for name in contenders_of(rows) if name not in OURS]
    names = {"flex": "flex", "flex_and_mask": "flex+m", "gather_varlen": "gather", "prefix_grouping": "prefix"}
    names |= {"chain_varlen": "varlen", "chain_cudnn": "cudnn", "sdpa_dense_mask": "dense", "tree_cuda": "cuda"}
    names |= {"chain_triton": "ours,chain", "chain_cudnn_leaves": "cudnn,each"}
    lines = []
    for passes in PASSES:
        cells = by_cell(rows, passes)
        if not cells:
            continue
        heads = "".join(f"{names.get(name, name)[:10]:>11}" for name in shown)
        lines.append(f"{passes:<16} {'D':>3} {'tokens':>6} {'ours':>5}{heads}   TFLOP/s; rivals: TFLOP/s, time / ours")
        for (workload, head_dim), row_of in cells.items():
            ours = ours_of(row_of)
            speed = "-" if ours is None else f"{ours['tflops_per_s']:.0f}"
            line = f"{workload:<16} {head_dim:>3} {next(iter(row_of.values()))['tree_tokens']:>6} {speed:>5}"
            for name in shown:
                row = row_of.get(name)
                times = None if row is None else ratio(row, ours)
                text = "-" if row is None else f"{row['tflops_per_s']:.0f}"
                line += (text if times is None else f"{text} {times:.2f}x").rjust(11)
            lines.append(line)
    return lines
