"""pytest-benchmark's JSON -> one readable page and two pictures: `python -m bench.report result.json --out DIR`.

Writes report.md (also printed), chain_against_tree.png (tokens, FLOPs, seconds of a training step) and growth.png.
Every row was measured after its check against the oracle had passed in the same run; a row without that mark is left
out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUITES = ("step", "rate", "growth", "attention", "head", "plan", "pack", "rollout")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(machine and commit, rows) of a result file; rows carry extra_info plus `median_s` and `rounds`.

    Raises ValueError if the file is not pytest-benchmark's JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        benchmarks, machine, commit = list(data["benchmarks"]), dict(data["machine_info"]), data["commit_info"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of pytest --benchmark-json ({error!r}): measure again") from error
    rows = []
    for entry in benchmarks:
        info = entry["extra_info"]
        if info.get("oracle") == "passed":
            rows.append(info | {"median_s": entry["stats"]["median"], "rounds": entry["stats"]["rounds"]})
    machine["commit"] = f"{str(commit.get('id'))[:10]}{' + local changes' if commit.get('dirty') else ''}"
    machine["date"] = str(data.get("datetime"))[:19]
    return machine, rows


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def count(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A table whose columns line up in plain text too; the first two columns are names."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def cells(line: list[str]) -> str:
        return (
            "| "
            + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            + " |"
        )

    rule = "|" + "|".join(("-" * (w + 1)) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([cells(header), rule, *map(cells, body)])


def pairs_of_contenders(rows: list[Row]) -> list[tuple[str, Row, Row]]:
    """(workload, chain, tree) of the training steps."""
    steps: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "step":
            steps.setdefault(row["workload"], {})[row["contender"]] = row
    return [(name, by["chain"], by["tree"]) for name, by in steps.items() if {"chain", "tree"} <= set(by)]


def step_table(rows: list[Row]) -> str:
    header = ["workload", "", "tokens", "pairs", "training FLOPs", "seconds"]
    body = []
    for name, chain, tree in pairs_of_contenders(rows):
        # the tree row timed the chain between its own rounds: that is the fair time
        chain_s = tree.get("baseline_s", chain["median_s"])
        for label, row, spent in (("chain", chain, chain_s), ("tree", tree, tree["median_s"])):
            body.append([name, label, f"{row['tokens']:,}", count(row["pairs"]), count(row["flops"]), seconds(spent)])
        ratios = [chain[key] / tree[key] for key in ("tokens", "pairs", "flops")]
        body.append(["", "chain / tree", *map(times, ratios), times(chain_s / tree["median_s"])])
    stock = [row for row in rows if row["suite"] == "step" and row["contender"] == "stock_transformers"]
    for row in stock:
        cells = [f"{row['tokens']:,}", count(row["pairs"]), count(row["flops"]), seconds(row["median_s"])]
        body.append([row["workload"], "stock transformers, a leaf at a time", *cells])
    return markdown(header, body)


def attention_table(rows: list[Row]) -> str:
    header = ["workload", "contender", "tokens", "pairs", "median", "GFLOP/s", "chain time / this"]
    chain = {(r["workload"], r["passes"]): r["median_s"] for r in rows if r["contender"] == "chain_sdpa"}
    body = []
    for passes in dict.fromkeys(row["passes"] for row in rows):
        body.append([f"**{passes.replace('_', ' + ')}**", "", "", "", "", "", ""])
        for row in (r for r in rows if r["passes"] == passes):
            apart = chain.get((row["workload"], passes))
            ratio = row.get("time_ratio") or (apart / row["median_s"] if apart else None)
            speed = f"{row['gflops_per_s']:.1f}"
            size = [f"{row['tokens']:,}", count(row["pairs"]), seconds(row["median_s"]), speed]
            body.append([row["workload"], row["contender"], *size, times(ratio)])
    return markdown(header, body)


def rate_table(rows: list[Row]) -> str:
    header = ["workload", "pass", "tokens", "ours, GFLOP/s", "causal SDPA, GFLOP/s", "ours / SDPA"]
    body = [
        [
            row["workload"],
            f"{row['passes'].replace('_', ' + ')} ({row['contender']})",
            f"{row['tokens']:,}",
            f"{row['gflops_per_s']:.1f}",
            f"{row['baseline_gflops_per_s']:.1f}",
            times(row["gflops_ratio"]),
        ]
        for row in rows
    ]
    return markdown(header, body)


def rollout_table(rows: list[Row]) -> str:
    header = ["workload", "contender", "sampled", "prefilled", "median", "sampled/s", "generate time / this"]
    body = [
        [
            row["workload"],
            row["contender"],
            f"{row['tokens']:,}",
            f"{row['prefilled_tokens']:,}",
            seconds(row["median_s"]),
            f"{row['tokens'] / row['median_s']:,.0f}",
            times(row.get("time_ratio")),
        ]
        for row in rows
    ]
    return markdown(header, body)


def plain_table(rows: list[Row]) -> str:
    header = ["workload", "contender", "tokens", "chain tokens", "head rows", "median", "GFLOP/s", "chain time / this"]
    body = []
    for row in rows:
        passes = f" {row['passes'].replace('_', ' + ')}" if "passes" in row else ""
        sizes = [f"{row[key]:,}" if key in row else "" for key in ("tokens", "chain_tokens", "head_rows")]
        rate = f"{row['gflops_per_s']:.1f}" if "gflops_per_s" in row else ""
        cells = [*sizes, seconds(row["median_s"]), rate, times(row.get("time_ratio"))]
        body.append([row["workload"], row["contender"] + passes, *cells])
    used = [i for i in range(len(header)) if i < 2 or any(line[i] for line in body)]
    return markdown([header[i] for i in used], [[line[i] for i in used] for line in body])


TITLES = {
    "step": "Training step: forward, loss, backward; the chain is padding-free, head on trained tokens only",
    "rate": "Attention rate on visible pairs against causal SDPA on a chain of as many tokens (interleaved)",
    "growth": "Growth: pairs grow like tokens, so GFLOP/s must stay flat",
    "attention": "Attention; GFLOP/s on visible pairs of each one's own layout; times against chain_sdpa, "
    "interleaved for tree rows, measured apart for the others",
    "head": "Log-prob head, forward + backward",
    "plan": "TreePlan",
    "pack": "Trie and packing",
    "rollout": "Sampling rollouts: the hf engine against resubmitting the whole context to `generate`",
}
TABLES = {"step": step_table, "rate": rate_table, "attention": attention_table, "rollout": rollout_table}


def page(machine: dict[str, Any], rows: list[Row]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = ["# Bench", f"Medians. {facts}.", f"{len(rows)} rows, each checked against the oracle in this run."]
    for suite in SUITES:
        own = [row for row in rows if row["suite"] == suite]
        if own:
            parts += [f"## {TITLES[suite]}", TABLES.get(suite, plain_table)(own)]
    return "\n\n".join(parts) + "\n"


def draw_chain_against_tree(rows: list[Row], path: Path) -> bool:
    """Three panels of bars; False when the run has no training step of both."""
    steps = pairs_of_contenders(rows)
    if not steps:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

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
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(steps)), [name for name, _, _ in steps])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False)
    figure.suptitle(
        "chain against tree: one training step of the same rollouts (chain / tree beside the bars)", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def draw_growth(rows: list[Row], path: Path) -> bool:
    """Seconds and GFLOP/s over tokens; False when the run has no growth rows."""
    own = [row for row in rows if row["suite"] == "growth"]
    if not own:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def write(result: Path, out: Path) -> str:
    """Write the page and the pictures of one result file into `out`; returns the page."""
    machine, rows = load(result)
    text = page(machine, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    try:
        draw_chain_against_tree(rows, out / "chain_against_tree.png")
        draw_growth(rows, out / "growth.png")
    except ModuleNotFoundError as missing:
        text += f"\nno pictures: {missing.name} is not installed\n"
    return text


def main() -> None:
    # argparse, for a bare GPU machine has torch and pytest but seldom tyro
    import argparse

    about = "Turn a result of `pytest bench/ --benchmark-json=result.json` into a page and pictures."
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=about)
    parser.add_argument("result", type=Path, help="the JSON file")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the pictures")
    options = parser.parse_args()
    try:
        print(write(options.result, options.out), end="")
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench.report: {error}") from error


if __name__ == "__main__":
    main()
