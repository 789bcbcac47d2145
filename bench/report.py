"""pytest-benchmark's JSON -> one readable page and pictures: `python -m bench.report RESULT.json [--out DIR]`.

Prints the page; with --out it is also written there as report.md, with the pictures of draw.py. Several files of one
machine and commit become one with --merge, later rows replacing earlier ones of the same bench.
Every row was measured after its check against the oracle had passed in the same run; a row without that mark is left
out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import draw, race_report
from bench.draw import pairs_of_contenders

Row = dict[str, Any]
# of head rows that do not name theirs: results before 2026-11-27
OLD_HIDDEN = 1536
# of these a CPU runs tiny siblings, to see that they work: no result
GPU_SUITES = ("real_step", "real_head")
SUITES = (
    "race",
    "host",
    "real_step",
    "step",
    "recurrence",
    "rate",
    "growth",
    "attention",
    "real_head",
    "head",
    "plan",
    "pack",
    "rollout",
)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(machine and commit, rows) of a result file; rows carry extra_info plus `median_s` and `rounds`.

    What a CPU only tried out is left out.

    Raises ValueError if the file is not pytest-benchmark's JSON.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        benchmarks, machine, commit = list(data["benchmarks"]), dict(data["machine_info"]), data["commit_info"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of pytest --benchmark-json ({error!r}): measure again") from error
    rows: list[Row] = []
    for entry in benchmarks:
        info = entry["extra_info"]
        if info.get("oracle") == "passed" and not (info.get("suite") in GPU_SUITES and info.get("device") == "cpu"):
            # a row that was timed elsewhere says its own median
            row = {"median_s": entry["stats"]["median"], "rounds": entry["stats"]["rounds"]} | info
            rows += race_report.expand(row) if info.get("suite") == "race" else [row]
    dirty = " + local changes" if commit.get("dirty") else ""
    machine["commit"] = f"{str(commit.get('id')).removesuffix('-dirty')[:10]}{dirty}"
    machine["date"] = str(data.get("datetime"))[:19]
    return machine, rows


def merge(paths: list[Path], into: Path) -> None:
    """Join results of one commit and GPU, else ValueError; a bench found twice keeps its last measurement."""
    merged: dict[str, Any] | None = None
    for path in [into, *paths] if into.exists() else paths:
        load(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        if merged is None:
            merged = data
            continue
        for what, of in (("commit", ("commit_info", "id")), ("GPU", ("machine_info", "gpu"))):
            here, there = (one.get(of[0], {}).get(of[1]) for one in (merged, data))
            if here != there:
                raise ValueError(f"{path} is of another {what} than {into} ({there}, {here}): choose another file")
        found = {entry["fullname"]: entry for entry in (*merged["benchmarks"], *data["benchmarks"])}
        merged["benchmarks"] = list(found.values())
    if merged is not None:
        into.write_text(json.dumps(merged), encoding="utf-8")


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


def real_step_table(rows: list[Row]) -> str:
    header = [
        *("model", "workload", "contender", "tokens", "pairs", "model FLOPs", "executed", "time", "spread", "MFU"),
        *("peak GiB", "time ratio", "FLOP ratio", "time / FLOP ratio"),
    ]
    body = []
    for row in rows:
        model = row["model"] + (", checkpointing" if row["checkpointing"] else "")
        sizes = [f"{row['tokens']:,}", *(count(row[key]) for key in ("pairs", "flops", "executed_flops"))]
        spent = [seconds(row["median_s"]), f"{row['iqr_s'] / row['median_s']:.0%}", f"{row['mfu']:.0%}"]
        ratios = [times(row.get(key)) for key in ("time_ratio", "flop_ratio", "time_over_flop_ratio")]
        against = f"tree, against {row['best_chain']}" if "best_chain" in row else row["contender"]
        body.append([model, row["workload"], against, *sizes, *spent, f"{row['peak_bytes'] / 2**30:.1f}", *ratios])
    return markdown(header, body)


def real_head_table(rows: list[Row]) -> str:
    header = ["rows", "hidden", "contender", "time", "spread", "TFLOP/s", "peak MiB", "plain time / this"]
    body = [
        [
            f"{row['head_rows']:,}",
            f"{row.get('hidden', OLD_HIDDEN):,}",
            row["contender"],
            seconds(row["median_s"]),
            f"{row['iqr_s'] / row['median_s']:.0%}",
            f"{row['flops'] / row['median_s'] / 1e12:.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            times(row["time_ratio"]),
        ]
        for row in rows
    ]
    return markdown(header, body)


def short_heads(rows: list[Row]) -> list[str]:
    return [
        f"head {row['head_rows']:>6} x {row.get('hidden', OLD_HIDDEN):>4} {row['contender']:<12}"
        f" {seconds(row['median_s']):>8} {row['flops'] / row['median_s'] / 1e12:>4.0f} TFLOP/s,"
        f" plain / this {times(row['time_ratio'])}"
        for row in rows
        if row["suite"] == "real_head"
    ]


def short_steps(rows: list[Row]) -> list[str]:
    """A line for each measured step of a real model."""
    lines = [
        f"{row['model'] + (' ckpt' if row['checkpointing'] else ''):<9} {row['workload']:<11}"
        f" {row['tokens']:>7} {seconds(row['median_s']):>8} {row['mfu']:>4.0%} {row['peak_bytes'] / 2**30:>5.0f}"
        f" {times(row['time_ratio']):>7} {times(row['flop_ratio']):>7} {times(row['time_over_flop_ratio']):>7}"
        for row in rows
        if row["suite"] == "real_step" and "time_ratio" in row
    ]
    head = "step      workload     tokens     tree  MFU   GiB  chain/   FLOPs   of it"
    return [head, *lines] if lines else []


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


def recurrence_table(rows: list[Row]) -> str:
    header = ["workload", "tokens", "way", "median", "chain / tree in tokens", "against", "time / tree"]
    body = [
        [
            row["workload"],
            f"{row['tokens']:,}",
            row["way"],
            seconds(row["median_s"]),
            times(row["token_ratio"]),
            row["baseline_name"],
            times(row["time_ratio"]),
        ]
        for row in rows
        if "time_ratio" in row
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


def race_section(rows: list[Row]) -> str:
    parts = [markdown(*race_report.race_table(rows))]
    header, body = race_report.memory_table(rows)
    if body:
        parts += ["Peak memory of forward and backward beyond the inputs, MiB:", markdown(header, body)]
    missing = race_report.absences(rows)
    if missing:
        parts.append("Not run, and notes:\n\n" + "\n".join(missing))
    return "\n\n".join(parts)


def host_table(rows: list[Row]) -> str:
    header = ["workload", "pass", "tokens", "host time per call", "device, median", "CUDA graph replay"]
    body = [
        [
            row["workload"],
            row["passes"].replace("_", " + "),
            f"{row['tokens']:,}",
            seconds(row["host_us"] / 1e6),
            seconds(row["median_s"]),
            seconds(row["graph_us"] / 1e6) if row.get("graph_us") else str(row.get("graph", "")),
        ]
        for row in rows
    ]
    return markdown(header, body)


TITLES = {
    "race": "Attention races; TFLOP/s over each one's visible pairs, in brackets its time over ours (bold: we lose)",
    "host": "A small tree, the plan reused: what a call costs the host",
    "real_step": "Training step of Qwen2.5 (random weights, bf16): forward, loss, backward, AdamW; ratios are the best "
    "chain over the tree, interleaved; MFU = model FLOPs / time / 989 TFLOP/s",
    "step": "Training step: forward, loss, backward; the chain is padding-free, head on trained tokens only",
    "recurrence": "Recurrent layer of hybrid models (gated delta rule), forward + backward; the time falls with the "
    "tokens that are shared (interleaved)",
    "rate": "Attention rate on visible pairs against causal SDPA on a chain of as many tokens (interleaved)",
    "growth": "Growth: pairs grow like tokens, so GFLOP/s must stay flat",
    "attention": "Attention; GFLOP/s on visible pairs of each one's own layout; times against chain_sdpa, "
    "interleaved for tree rows, measured apart for the others",
    "real_head": "Log-prob head at a vocabulary of 151,936, bf16: forward + backward; TFLOP/s count "
    "three products, chunked heads do four",
    "head": "Log-prob head, forward + backward",
    "plan": "TreePlan",
    "pack": "Trie and packing",
    "rollout": "Sampling rollouts: the hf engine against resubmitting the whole context to `generate`",
}
TABLES = {
    "race": race_section,
    "host": host_table,
    "real_step": real_step_table,
    "step": step_table,
    "recurrence": recurrence_table,
    "rate": rate_table,
    "attention": attention_table,
    "real_head": real_head_table,
    "rollout": rollout_table,
}


def page(machine: dict[str, Any], rows: list[Row]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = ["# Bench", f"Medians. {facts}.", f"{len(rows)} rows, each checked against the oracle in this run."]
    for suite in SUITES:
        own = [row for row in rows if row["suite"] == suite]
        if own:
            parts += [f"## {TITLES[suite]}", TABLES.get(suite, plain_table)(own)]
    return "\n\n".join(parts) + "\n"


def write(result: Path, out: Path, *, pictures: bool = True) -> str:
    """Write the page and the pictures of one result file into `out`; returns the page."""
    machine, rows = load(result)
    text = page(machine, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    if pictures:
        try:
            draw.draw_all(machine, rows, out)
        except ModuleNotFoundError as missing:
            text += f"\nno pictures: {missing.name} is not installed\n"
    return text


def main() -> None:
    # argparse, for a bare GPU machine has torch and pytest but seldom tyro
    import argparse

    about = "Turn results of `pytest bench/ --benchmark-json=result.json` into a page and pictures."
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=about)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files; several need --merge")
    parser.add_argument("--out", type=Path, help="folder for report.md and the pictures")
    parser.add_argument("--merge", type=Path, help="join the files into this one, which may exist, and report on it")
    parser.add_argument("--no-pictures", action="store_true", help="write the page alone")
    parser.add_argument("--short", action="store_true", help="print the races as a narrow table instead of the page")
    options = parser.parse_args()
    if len(options.results) > 1 and options.merge is None:
        parser.error("several results: join them with --merge FILE")
    try:
        if options.merge is not None:
            merge(options.results, options.merge)
        result = options.merge or options.results[0]
        text = page(*load(result))
        if options.out is not None:
            text = write(result, options.out, pictures=not options.no_pictures)
        rows = load(result)[1]
        print(
            "\n".join(race_report.short(rows) + short_steps(rows) + short_heads(rows))
            if options.short
            else text.rstrip("\n")
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench.report: {error}") from error


if __name__ == "__main__":
    main()
