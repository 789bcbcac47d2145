"""The pictures of a result: training steps, growth, races on a GPU. Each is False when the run has no such rows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.race_report import CHAINS, by_cell, contenders_of, label, ours_of

Row = dict[str, Any]
COLOURS = {
    "tree_triton": "#2a6fb0",
    "tree_cpu": "#2a6fb0",
    "flex": "#d9822b",
    "flex_and_mask": "#f2c48d",
    "gather_varlen": "#5a9e6f",
    "prefix_grouping": "#a9cfae",
    "chain_triton": "#8fb4dd",
    "chain_varlen": "#8a8f98",
    "chain_cudnn": "#4a4f57",
    "chain_cudnn_leaves": "#1f2328",
}
SPARE_COLOURS = ("#b0569d", "#c94f4f", "#7a6fd0", "#c9b44f")
# nominal (dense bf16 TFLOP/s, memory TB/s) by a part of the device's name
ROOFS = {"H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.0), "B200": (2250, 8.0)}


def pairs_of_contenders(rows: list[Row]) -> list[tuple[str, Row, Row]]:
    """(workload, chain, tree) of the training steps."""
    steps: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "step":
            steps.setdefault(row["workload"], {})[row["contender"]] = row
    return [(name, by["chain"], by["tree"]) for name, by in steps.items() if {"chain", "tree"} <= set(by)]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(pyplot, figure, path: Path) -> bool:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def draw_chain_against_tree(rows: list[Row], path: Path) -> bool:
    """Three panels of bars; False when the run has no training step of both."""
    steps = pairs_of_contenders(rows)
    if not steps:
        return False
    pyplot = _pyplot()
    from matplotlib import ticker

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 0.6 * len(steps) + 1.8), sharey=True)
    measures = [("tokens forwarded", "tokens"), ("training FLOPs (exact)", "flops"), ("seconds per step", "time")]
    for panel, (title, key) in zip(panels, measures, strict=True):
        for place, (_, chain, tree) in enumerate(steps):
            if key == "time":
                values = tree.get("baseline_s", chain["median_s"]), tree["median_s"]
            else:
                values = chain[key], tree[key]
            panel.barh(place - 0.19, values[0], 0.36, color="#b8bcc2", label="chain" if place == 0 else None)
            panel.barh(place + 0.19, values[1], 0.36, color="#2a6fb0", label="tree" if place == 0 else None)
            panel.annotate(f" {values[0] / values[1]:.2f}x", (max(values), place), va="center", fontsize=9)
        panel.set_title(title, fontsize=10)
        if key != "time":
            panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.set_xlim(right=1.25 * panel.get_xlim()[1])
    panels[0].set_yticks(range(len(steps)), [name for name, _, _ in steps])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False)
    figure.suptitle(
        "chain against tree: one training step of the same rollouts (chain / tree beside the bars)", fontsize=11
    )
    return _finish(pyplot, figure, path)


def draw_growth(rows: list[Row], path: Path) -> bool:
    """Seconds and GFLOP/s over tokens; False when the run has no growth rows."""
    own = [row for row in rows if row["suite"] == "growth"]
    if not own:
        return False
    pyplot = _pyplot()
    figure, (spent, rate) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for passes in dict.fromkeys(row["passes"] for row in own):
        line = sorted((row["tokens"], row["median_s"], row["gflops_per_s"]) for row in own if row["passes"] == passes)
        tokens, medians, speeds = zip(*line, strict=True)
        spent.loglog(tokens, medians, "o-", label=passes.replace("_", " + "))
        rate.semilogx(tokens, speeds, "o-", label=passes.replace("_", " + "))
    linear = [medians[0] * n / tokens[0] for n in tokens]
    spent.loglog(tokens, linear, ":", color="gray", label="proportional to tokens")
    spent.set(xlabel="tokens (trees of 4,096)", ylabel="seconds")
    rate.set(xlabel="tokens (trees of 4,096)", ylabel="GFLOP/s on visible pairs", ylim=(0, None))
    for panel in (spent, rate):
        panel.legend(frameon=False, fontsize=8)
    return _finish(pyplot, figure, path)


def colour_of(contender: str, contenders: list[str]) -> str:
    others = [name for name in contenders if name not in COLOURS]
    return COLOURS.get(contender) or SPARE_COLOURS[others.index(contender) % len(SPARE_COLOURS)]


def draw_race(rows: list[Row], path: Path) -> bool:
    """TFLOP/s by workload: grouped bars by contender, forward above backward."""
    contenders = contenders_of(rows)
    if not contenders:
        return False
    pyplot = _pyplot()
    num_cells = len(by_cell(rows, "forward"))
    figure, panels = pyplot.subplots(2, 1, figsize=(max(8, 1.1 * num_cells + 2), 8), sharex=True)
    width = 0.85 / len(contenders)
    for panel, passes in zip(panels, ("forward", "backward"), strict=True):
        cells = by_cell(rows, passes)
        for i, name in enumerate(contenders):
            heights = [row_of[name]["tflops_per_s"] if name in row_of else 0 for row_of in cells.values()]
            places = [place + (i - (len(contenders) - 1) / 2) * width for place in range(len(cells))]
            panel.bar(places, heights, width, color=colour_of(name, contenders), label=label(name))
        panel.set_ylabel(f"{passes}, TFLOP/s over visible pairs")
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    names = [f"{workload}\nD {head_dim}" for workload, head_dim in by_cell(rows, "forward")]
    panels[1].set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    panels[0].legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _finish(pyplot, figure, path)


def draw_sharing(rows: list[Row], path: Path) -> bool:
    """Best chain kernel's time over ours, forward + backward, against how many times as many pairs the chains have."""
    points = []
    for (workload, head_dim), row_of in by_cell(rows, "forward_backward").items():
        ours, chains = ours_of(row_of), [row_of[name] for name in CHAINS if name in row_of]
        if ours is not None and chains:
            best = min(chains, key=lambda row: row["median_s"])
            sharing = ours["chain_pairs"] / ours["tree_pairs"]
            points.append((sharing, best["median_s"] / ours["median_s"], workload, head_dim, best["contender"]))
    if not points:
        return False
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(7.5, 5))
    top = 1.15 * max(max(point[:2]) for point in points)
    panel.plot([1, top], [1, top], ":", color="gray", label="time falls as pairs do")
    panel.axhline(1, color="#c94f4f", lw=1, label="break-even: above it the tree is faster")
    for head_dim, marker in zip(sorted({point[3] for point in points}), "^vos", strict=False):
        own = [point for point in points if point[3] == head_dim]
        x, y = [point[0] for point in own], [point[1] for point in own]
        panel.plot(x, y, marker, color="#2a6fb0", label=f"D {head_dim}")
    for sharing, times, workload, *_ in points:
        panel.annotate(workload, (sharing, times), xytext=(4, -9), textcoords="offset points", fontsize=6.5)
    panel.set(xscale="log", yscale="log", xlabel="pairs, chains / tree", ylabel="time, best chain kernel / ours")
    panel.set_xlim(0.95, top)
    from matplotlib import ticker

    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    return _finish(pyplot, figure, path)


def family(workload: str) -> str:
    """The shape without its length: chain_16k and chain_64k are one family, star_2k and star_2k_x3 too."""
    head, _, tail = workload.rpartition("_")
    is_length = tail[:1] == "x" or (tail.endswith("k") and not workload.startswith("star"))
    return head if is_length and head else workload


def draw_length(rows: list[Row], path: Path) -> bool:
    """Time of forward + backward against tokens, for shapes measured at several lengths."""
    cells = by_cell(rows, "forward_backward")
    families: dict[str, list[dict[str, Row]]] = {}
    measured_most = statistics.mode(head_dim for _, head_dim in cells) if cells else None
    for (workload, head_dim), row_of in cells.items():
        if head_dim == measured_most:
            families.setdefault(family(workload), []).append(row_of)
    families = {name: several for name, several in families.items() if len(several) > 1}
    if not families:
        return False
    pyplot = _pyplot()
    from matplotlib import ticker

    figure, panels = pyplot.subplots(1, len(families), figsize=(3.4 * len(families) + 1, 3.8), sharey=True)
    contenders = contenders_of(rows)
    for panel, (name, several) in zip([panels] if len(families) == 1 else panels, families.items(), strict=True):
        for contender in contenders:
            line = sorted(
                (row_of[contender]["tree_tokens"], row_of[contender]["median_s"])
                for row_of in several
                if contender in row_of
            )
            if line:
                tokens, seconds = zip(*line, strict=True)
                milliseconds = [1000 * value for value in seconds]
                panel.loglog(
                    tokens, milliseconds, "o-", ms=3, color=colour_of(contender, contenders), label=label(contender)
                )
        ticks = sorted({next(iter(row_of.values()))["tree_tokens"] for row_of in several})
        panel.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:.0f}k")
        panel.set(title=name, xlabel="packed tokens")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("forward + backward, ms")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return _finish(pyplot, figure, path)


def intensity(row: Row, passes: str) -> float:
    """FLOPs over bytes that must move once: q, k, v, out forward; those, dout and the gradients backward."""
    num_heads, num_kv_heads = map(int, row["heads"].split(":"))
    itemsize = {"bfloat16": 2, "float16": 2, "float32": 4}[row["dtype"]]
    forward, backward = 4, 10
    wide, narrow = (2, 2) if passes == "forward" else (4, 4)
    moved = row["tokens"] * row["head_dim"] * (wide * num_heads + narrow * num_kv_heads) * itemsize
    per_pair = forward if passes == "forward" else backward
    return per_pair * row["head_dim"] * num_heads * row["pairs"] / moved


def draw_roofline(rows: list[Row], path: Path, gpu: str) -> bool:
    """Ours and each rival's TFLOP/s against FLOPs per byte, under the device's nominal roofs where they are known."""
    contenders = contenders_of(rows)
    if not contenders:
        return False
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    roof = next((roof for name, roof in ROOFS.items() if name in gpu), None)
    for panel, passes in zip(panels, ("forward", "backward"), strict=True):
        found = []
        for name in contenders:
            own = [row_of[name] for row_of in by_cell(rows, passes).values() if name in row_of]
            x, y = [intensity(row, passes) for row in own], [row["tflops_per_s"] for row in own]
            found += x
            panel.loglog(x, y, "o", ms=4, color=colour_of(name, contenders), label=label(name))
        if roof is not None:
            peak, bandwidth = roof
            ridge = peak / bandwidth
            x = [min(ridge / 2, *found), ridge, 1.3 * max(ridge, *found)]
            panel.loglog(x, [min(peak, bandwidth * value) for value in x], "-", color="gray", lw=1)
            panel.annotate(
                f"{peak} TFLOP/s, {bandwidth} TB/s nominal",
                (x[-1], peak),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color="gray",
            )
        panel.set(title=passes, xlabel="FLOPs / byte moved once")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s over visible pairs")
    panels[1].legend(frameon=False, fontsize=7)
    return _finish(pyplot, figure, path)


def draw_all(machine: dict[str, Any], rows: list[Row], out: Path) -> list[str]:
    """Draw what the run has rows for into `out`; the names of the pictures made."""
    pictures = {
        "chain_against_tree.png": lambda path: draw_chain_against_tree(rows, path),
        "growth.png": lambda path: draw_growth(rows, path),
        "race.png": lambda path: draw_race(rows, path),
        "sharing.png": lambda path: draw_sharing(rows, path),
        "length.png": lambda path: draw_length(rows, path),
        "roofline.png": lambda path: draw_roofline(rows, path, str(machine.get("gpu", ""))),
    }
    return [name for name, draw in pictures.items() if draw(out / name)]
