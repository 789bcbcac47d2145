"""Command line: `treegrpo doctor | inspect | flops | train | eval | export | report | convert | demo | study`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from treegrpo.config import TrainConfig, read_config
from treegrpo.files import check_file, check_folder, write_whole
from treegrpo.rollout.engine import EngineError
from treegrpo.shown import plain, shown

_File = tyro.conf.Positional[Path]


def doctor() -> None:
    """What this machine can run: versions, compilers, every backend or why it is missing, one cure per problem."""
    from treegrpo.doctor import print_report

    print_report(_console())


def inspect(
    file: _File,
    /,
    group: str | None = None,
    samples: Literal["trajectory", "call"] = "trajectory",
    advantage_estimator: str = "tree_grpo",
    max_groups: int = 3,
    png: Path | None = None,
) -> None:
    """Draw rollout trees in the terminal: nodes, lengths, rewards, advantages.

    Args:
        file: Token trajectories, .jsonl or .jsonl.gz.
        group: Only this group.
        samples: Whole trajectories, or one sample per assistant turn.
        advantage_estimator: tree_grpo, grpo, intra, treerl, spo, ...; shown where all rewards are known.
        max_groups: Draw at most so many groups.
        png: Also write a picture of the first drawn group: tree, packed row and mask.
    """
    import numpy as np

    from treegrpo import build_forest
    from treegrpo.advantages import compute_advantages
    from treegrpo.inspect import draw, tree_lines
    from treegrpo.samples import call_trees

    check_file(png, "--png")
    if max_groups < 1:
        raise ValueError(f"--max-groups {max_groups}: give at least 1")
    trees = build_forest(_read_trajectories(file))
    if group is not None:
        chosen = [tree for tree in trees if tree.group == group]
        if not chosen:
            raise ValueError(
                f"group {group!r} is not in {file}; it has {', '.join(tree.group for tree in trees[:8])}, ..."
            )
        trees = chosen
    num_untrained = 0
    if samples == "call":
        # a group of which nothing is trained has no call
        trained = [tree for tree in trees if any(t.loss_mask.any() for t in tree.trajectories)]
        num_untrained, trees = len(trees) - len(trained), trained
        if not trees:
            raise ValueError(
                f"{file}: loss_mask is 0 everywhere, so there is no call to draw; leave out --samples call"
            )
    shown = trees[:max_groups]
    has_rewards = all(t.reward is not None for tree in shown for t in tree.trajectories)
    blank = [[np.zeros(t.num_steps) for t in tree.trajectories] for tree in shown]
    advantages = compute_advantages(shown, advantage_estimator) if has_rewards else blank
    if samples == "call":
        shown, advantages = call_trees(shown, advantages)
    console = _console()
    for tree, values in zip(shown, advantages, strict=True):
        console.print(tree_lines(tree, values if has_rewards else None))
    if len(trees) > len(shown):
        console.print(f"{len(trees) - len(shown)} more groups: give --group or --max-groups")
    if num_untrained:
        console.print(f"{num_untrained} groups left out: nothing in them is trained, so they have no call")
    if png is not None:
        draw(shown[0], png)
        console.print(f"wrote {png}")


def flops(
    file: _File,
    /,
    model: str,
    samples: Literal["trajectory", "call"] = "trajectory",
    share_across_groups: bool = False,
    json: Path | None = None,
) -> None:
    """Exact tokens, visible pairs and FLOPs of flattened chains against trees, per part.

    Args:
        file: Token trajectories, .jsonl or .jsonl.gz.
        model: A model folder or a .json/.yaml config (any transformers decoder; typed numbers are fine).
        samples: Whole trajectories, or one sample per assistant turn.
        share_across_groups: Count what several groups begin with once, as one packed batch would.
        json: Also write the numbers there.
    """
    from treegrpo import build_forest, split_calls
    from treegrpo.flops import report
    from treegrpo.models import read_model_config

    check_file(json, "--json")
    trajectories = _read_trajectories(file)
    trees = build_forest(split_calls(trajectories) if samples == "call" else trajectories)
    result = report(read_model_config(model), trees, share_across_groups=share_across_groups)
    print(result.table())
    if json is not None:
        write_whole(json, result.to_json() + "\n")
        print(f"wrote {json}")


def evaluate(
    model: str,
    rollouts: str,
    samples: Literal["trajectory", "call"] | None = None,
    attention: Literal["tree", "chain", "both"] | None = None,
    temperature: float | None = None,
    row_token_budget: int | None = None,
    backend: str | None = None,
    seed: int | None = None,
    config: Path | None = None,
    dataset: Path | None = None,
    rows: int | None = None,
    json: Path | None = None,
) -> None:
    """Log-probs of a checkpoint on logged rollouts, or the rewards of what it samples on held-out prompts.

    Args:
        model: A checkpoint or model folder, or a config for random weights.
        rollouts: replay:FILE, or an engine (hf, vllm, server:URL) that samples one chain a prompt.
        samples: With replay: whole trajectories (the default), or one sample per assistant turn.
        attention: With replay: tree, chain, or both (the default): then the largest difference of a token's log-prob
            is shown.
        temperature: The logits are divided by it, default 1; with an engine it samples so, default the config's
            eval_temperature.
        row_token_budget: With replay: unique tokens in one packed row.
        backend: With replay: kernel backend, default auto.
        seed: Seed of random weights and of what is sampled; default 42, with an engine the config's.
        config: With an engine: the run's settings (environment, retriever, rewards), such as the config.yaml in its
            output_dir.
        dataset: With an engine: the prompts; default the eval_dataset of the config.
        rows: With an engine: only the first so many prompts.
        json: Also write the numbers there.
    """
    from rich.table import Table

    from treegrpo.evaluate import evaluate as run
    from treegrpo.report import number
    from treegrpo.rollout.build import check_engine

    check_file(json, "--json")
    _quiet_transformers()
    of_replay: dict[str, Any] = dict(
        samples=samples, attention=attention, row_token_budget=row_token_budget, backend=backend
    )
    of_both = dict(temperature=temperature, seed=seed)
    if rollouts.startswith("replay:"):
        _refuse(rollouts, "an engine", dict(config=config, dataset=dataset, rows=rows))
        given = {name: value for name, value in {**of_replay, **of_both}.items() if value is not None}
        trajectories = _read_trajectories(Path(rollouts.removeprefix("replay:")))
        result = run(model, trajectories, **{"attention": "both", **given})
    else:
        check_engine(rollouts)
        _refuse(rollouts, "replay:FILE", of_replay)
        result = _sampled_evaluation(
            model, rollouts, config, eval_dataset=dataset, eval_rows=rows, eval_temperature=temperature, seed=seed
        )
    table = Table(title=plain(f"{model} on {rollouts}"), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(plain(name), number(value))
    _console().print(table)
    if json is not None:
        _write_json(json, result)


def _refuse(rollouts: str, kind: str, flags: Mapping[str, object]) -> None:
    """ValueError where a flag is given that these rollouts would not read."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only with rollouts of {kind}, not with {rollouts}; leave out")


def _sampled_evaluation(model: str, rollouts: str, config: Path | None, **changes: Any) -> dict[str, float]:
    from dataclasses import replace

    from treegrpo.evaluate import evaluate_sampled

    if config is None:
        raise ValueError(f"rollouts={rollouts!r} needs --config, the settings of the run (its output_dir/config.yaml)")
    changes = {name: str(x) if isinstance(x, Path) else x for name, x in changes.items() if x is not None}
    return evaluate_sampled(replace(read_config(config), model=model, rollouts=rollouts, **changes))


def export(
    checkpoint: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    config: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write the model of a checkpoint, sharded or with adapters, as one folder that from_pretrained reads.

    Args:
        checkpoint: A checkpoint folder of a run.
        out: The folder to write; it must not exist.
        config: The run's settings; default config.yaml beside the checkpoint.
        dtype: Of the weights written.
    """
    import torch

    from treegrpo.export import export as write

    check_folder(out.parent, "OUT")
    _quiet_transformers()
    print(f"wrote {write(checkpoint, out, config=config, dtype=getattr(torch, dtype))}")


def report(run_dir: tyro.conf.Positional[Path], /) -> None:
    """PNG curves and a one-page summary of a run, written into its folder.

    Args:
        run_dir: output_dir of a training run.
    """
    from treegrpo.metrics import read_metrics
    from treegrpo.report import final_table, write_report

    picture, page = write_report(run_dir)
    console = _console()
    console.print(final_table(read_metrics(run_dir / "metrics.jsonl"), str(run_dir)))
    console.print(f"wrote {page} and {picture}", soft_wrap=True)


def convert(
    file: _File,
    out: tyro.conf.Positional[Path],
    /,
    tokenizer: str,
    chat_template: Path | None = None,
    parse_arguments: bool = False,
) -> None:
    """Chat-format trajectories (OpenAI messages, or tau-bench's own JSON) to token trajectories.

    Args:
        file: A .json list or .jsonl of objects with messages (or traj), group (or task_id) and reward; .gz allowed.
        out: Where to write: .jsonl or .jsonl.gz.
        tokenizer: A folder with a tokenizer and its chat template, or a name on the Hugging Face Hub.
        chat_template: A jinja file to use instead of the tokenizer's.
        parse_arguments: Give the template tool-call arguments as objects (templates that apply tojson to them need it).
    """
    from transformers import AutoTokenizer

    from treegrpo import build_forest, save
    from treegrpo.convert import convert_records, read_records

    check_file(out, "OUT")
    if out.exists() and out.samefile(_existing(file)):
        raise ValueError(f"OUT {out} is the file that is read, and would be replaced; give another name")
    records = _not_empty(file, read_records(_existing(file)))
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {tokenizer!r} cannot be loaded: {error}") from error
    if chat_template is not None:
        loaded.chat_template = _existing(chat_template).read_text(encoding="utf-8-sig")
    if not loaded.chat_template:
        raise ValueError(f"tokenizer {tokenizer} has no chat template: give --chat-template FILE")
    trajectories = convert_records(records, loaded, parse_arguments=parse_arguments)
    trees = build_forest(trajectories)
    save(out, trajectories)
    num_chain, num_unique = sum(tree.num_chain_tokens for tree in trees), sum(tree.num_tokens for tree in trees)
    print(
        f"wrote {out}: {len(trajectories)} trajectories in {len(trees)} groups, {num_chain:,} tokens, {num_unique:,}"
        " unique"
    )


def demo(
    part: Literal["both", "learn", "compare"] = "both",
    steps: int = 40,
    engine: str = "hf",
    compare_steps: int = 6,
    data: Path | None = None,
    samples: Literal["both", "trajectory", "call"] = "both",
    backend: str = "auto",
    output_dir: Path = Path("runs/demo"),
    seed: int = 42,
) -> None:
    """Watch an agent with a search tool learn by Tree-GRPO, then train on real rollouts as a tree and as chains.

    Args:
        part: Only one half: learn (sampled rollouts) or compare (logged rollouts, tree against chain).
        steps: Optimiser steps of the learning half.
        engine: What samples its rollouts: hf (in this process), vllm, or server:URL.
        compare_steps: Optimiser steps of each run of the comparison.
        data: Folder with tau_bench_airline/tokens.jsonl.gz; default $TREEGRPO_DATA, then ../shared/data, then scripted
            rollouts.
        samples: Whole trajectories, one sample per assistant turn, or both.
        backend: Kernel backend.
        output_dir: Where the learning half writes metrics, checkpoints and demo.png; overwritten.
        seed: Of the order of questions and of what is sampled.
    """
    from treegrpo.demo import run

    check_folder(output_dir, "--output-dir")
    _quiet_transformers()
    run(
        _console(),
        part=part,
        steps=steps,
        engine=engine,
        compare_steps=compare_steps,
        data=data,
        samples=samples,
        backend=backend,
        output_dir=output_dir,
        seed=seed,
    )


def study(
    seeds: int = 5,
    tokens: int = 80_000,
    learning_rate: float = 7e-4,
    questions: int = 400,
    budgets: tuple[int, ...] = (2, 4, 8, 16),
    workers: int | None = None,
    runs_dir: Path = Path("runs/study"),
    results_dir: Path = Path("bench/results"),
) -> None:
    """Chains against trees at equal sampled tokens: many small training runs, a table with intervals, a plot.

    Args:
        seeds: Runs of each method.
        tokens: Sampled tokens of a run.
        learning_rate: Of all runs.
        questions: Held-out questions of each number of hops.
        budgets: Chains a question costs: of 2, 4, 8, 16.
        workers: Runs at the same time, one thread each; default one a core.
        runs_dir: One file a run; what is there is not run again.
        results_dir: Where study.json, study.md and study.png go.
    """
    from treegrpo.study import run

    # the warm start takes a minute
    for flag, value in (("--tokens", tokens), ("--questions", questions), ("--workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: give at least 1")
    if not 0 <= learning_rate < float("inf"):
        raise ValueError(f"--learning-rate {learning_rate}: give a finite number, at least 0")
    if not budgets:
        raise ValueError("--budgets is empty: give some of 2, 4, 8, 16")
    check_folder(runs_dir, "--runs-dir")
    check_folder(results_dir, "--results-dir")
    _quiet_transformers()
    run(
        _console(),
        seeds=seeds,
        tokens=tokens,
        learning_rate=learning_rate,
        num_questions=questions,
        budgets=budgets,
        workers=workers,
        runs_dir=runs_dir,
        results_dir=results_dir,
    )


def train(config: TrainConfig) -> None:
    """Train on logged or sampled rollouts with the tree-grouped GRPO loss, each shared prefix computed once."""
    from treegrpo.report import final_table
    from treegrpo.trainer import Trainer

    check_folder(config.output_dir, "--output-dir")
    _quiet_transformers()
    if config.dry_run:
        from treegrpo.dryrun import run_plan, table

        _console().print(table(run_plan(config)))
        return
    trainer = Trainer(config)
    history = trainer.train()
    if trainer.accelerator.is_main_process:
        console = _console()
        console.print(final_table(history, f"{config.output_dir}: {trainer.step} steps"))
        console.print(
            f"metrics and checkpoints are in {config.output_dir}; `treegrpo report {config.output_dir}` draws them",
            soft_wrap=True,
        )
    trainer.parallel.end()


def _commands(defaults: TrainConfig) -> dict[str, Callable]:
    def _train(config: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults) -> None:
        train(config)

    _train.__doc__ = train.__doc__
    named: dict[str, Callable] = {"doctor": doctor, "inspect": inspect, "flops": flops, "train": _train}
    return {
        **named,
        "eval": evaluate,
        "export": export,
        "report": report,
        "convert": convert,
        "demo": demo,
        "study": study,
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0; 2 after printing what was wrong with the input or a file, 1 when a rollout engine gave
    up, 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        # The file's values become the defaults of the flags, so it is read before they are parsed.
        defaults = read_config(path) if (path := _config_flag(argv)) else TrainConfig()
        tyro.extras.subcommand_cli_from_dict(_commands(defaults), prog="treegrpo", description=_DESCRIPTION, args=argv)
    except (ValueError, OSError) as error:
        _print_error(error)
        return 2
    except EngineError as error:
        _print_error(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _print_error(error: Exception) -> None:
    # it may quote a file or a server
    print("error:", "\n".join(map(shown, str(error).split("\n"))), file=sys.stderr)


_DESCRIPTION = (
    "Prefix-tree attention for training: GRPO on trees of agent rollouts, every shared prefix computed once."
    " Start with `treegrpo doctor` and `treegrpo demo`; each command has its own --help."
)


def _config_flag(argv: list[str]) -> str | None:
    if argv[:1] != ["train"]:
        return None
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            return word.removeprefix("--config=")
        if word == "--config" and i + 1 < len(argv):
            return argv[i + 1]
    return None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _read_trajectories(path: Path):
    from treegrpo import load

    return _not_empty(path, load(_existing(path)))


def _not_empty(path: Path, rows: list) -> list:
    if not rows:
        raise ValueError(f"{path} holds no trajectory: give a file with at least one")
    return rows


def _write_json(path: Path, values: dict) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")
    print(f"wrote {path}")


def _console():
    from rich.console import Console

    # A group called "train:7" is not a picture of one.
    console = Console(emoji=False)
    # A pipe has no width: 80 columns would fold the tables.
    return console if console.is_terminal else Console(width=140, emoji=False)


def _quiet_transformers() -> None:
    """Its bars would cut through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
