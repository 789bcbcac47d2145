"""The second half of `treegrpo demo`: logged rollouts, a small model, training on the tree against flattened chains."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from treegrpo import flops, toy
from treegrpo.config import TrainConfig
from treegrpo.report import progress_bar
from treegrpo.rollout.replay import Replay
from treegrpo.samples import split_calls
from treegrpo.trainer import Trainer
from treegrpo.tree import RolloutTree, Trajectory, build_forest, load

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
# How many groups are trained, one at a time: the smallest with mixed rewards, as chains of calls cost minutes.
NUM_GROUPS = 5
_WHY = {
    "trajectory": "Whole trajectories share little: the trials of a task part in the customer's first words, and"
    " after them every turn is new, so a tree is a common system prompt with long branches. Late tokens also see most"
    " pairs, and none of those are shared.",
    "call": "Calls share a lot: each sample is the conversation so far plus one turn, so n calls of one trajectory"
    " are n prefixes of one path. Flattened, turn one is computed n times; on the tree once.",
}


@dataclass(frozen=True)
class Run:
    """One training run: its metrics, and the gradient of every step as one flat vector."""

    history: list[dict[str, Any]]
    gradients: list[torch.Tensor]

    @property
    def seconds(self) -> float:
        """Of a median step."""
        return statistics.median(row["step_time"] for row in self.history)

    def total(self, name: str) -> float:
        return sum(row[name] for row in self.history)


def run(console, steps: int = 20, data: Path | None = None, samples: str = "both", backend: str = "auto") -> None:
    """Trains and prints to a rich Console; writes only to a temporary folder. ValueError where `data` has none."""
    trajectories, source = read_rollouts(data)
    trajectories, vocabulary = renumber(trajectories)
    model = {**MODEL, "vocab_size": len(vocabulary)}
    console.print(f"[bold]Rollouts[/bold]: {source}")
    console.print(
        f"[bold]Model[/bold]: Qwen3 architecture, {MODEL['num_hidden_layers']} layers, hidden {MODEL['hidden_size']},"
        f" random weights. Its vocabulary is the {len(vocabulary):,} token ids that occur, renumbered: most rows of a"
        " full one would never be read."
    )
    kinds: tuple[Any, ...] = ("trajectory", "call") if samples == "both" else (samples,)
    forests = {kind: build_forest(split_calls(trajectories) if kind == "call" else trajectories) for kind in kinds}
    console.print()
    console.print(_forest_table(forests, model))
    with tempfile.TemporaryDirectory(prefix="treegrpo-demo-") as folder:
        model_file = Path(folder) / "model.json"
        model_file.write_text(json.dumps(model))
        for kind in kinds:
            console.print()
            chosen = _smallest_groups(forests[kind], trajectories, NUM_GROUPS)
            config = TrainConfig(
                model=str(model_file),
                output_dir=f"{folder}/{kind}",
                samples=kind,
                backend=backend,
                advantage_estimator="grpo",
                groups_per_step=1,
                max_steps=steps,
                # On a group's first step the ratio is 1, so the loss says nothing of the model; on its second it does.
                num_iterations=2,
                learning_rate=1e-4,
                save_strategy="no",
            )
            num_groups = len({t.group for t in chosen})
            console.print(
                f"[bold]Training on samples={kind}[/bold]: {steps} steps, two a group, on the {num_groups} smallest"
                " groups whose rewards differ"
            )
            runs = _train_side_by_side(config, chosen)
            console.print(_run_table(runs, config, chosen, model))
            # the scripted agent's customers do not improvise, so what is said of recorded ones does not hold there
            if kind == "call" or source.startswith("tau-bench"):
                console.print(f"[dim]{_WHY[kind]}[/dim]")


def read_rollouts(data: Path | None = None) -> tuple[list[Trajectory], str]:
    """tau-bench's trajectories where they are, else those of the scripted agent; and where they come from."""
    given = data or (Path(os.environ["TREEGRPO_DATA"]) if os.environ.get("TREEGRPO_DATA") else None)
    folder = given or Path(__file__).resolve().parents[2] / "shared" / "data"
    path = folder / "tau_bench_airline" / "tokens.jsonl.gz"
    if path.is_file():
        return load(
            path
        ), f"tau-bench airline, 50 tasks x 4 trials of GPT-4o as an agent with tools, real tokenizer ({path})"
    if given is not None:
        raise ValueError(
            f"no rollouts at {path}: --data (or TREEGRPO_DATA) is the folder that holds"
            " tau_bench_airline/tokens.jsonl.gz"
        )
    return toy.sample_groups(
        24
    ), "a scripted furniture-shop agent with tools, 24 tasks, byte tokens (tau-bench is not at hand)"


def renumber(trajectories: list[Trajectory]) -> tuple[list[Trajectory], np.ndarray]:
    """The same trajectories over the ids that occur, 0 to n-1 in ascending order, and those ids [n]."""
    vocabulary = np.unique(np.concatenate([t.token_ids for t in trajectories]))
    return [replace(t, token_ids=np.searchsorted(vocabulary, t.token_ids)) for t in trajectories], vocabulary


def _smallest_groups(forest: list[RolloutTree], trajectories: list[Trajectory], count: int) -> list[Trajectory]:
    sizes = {tree.group: tree.num_chain_tokens for tree in forest if len({t.reward for t in tree.trajectories}) > 1}
    chosen = set(sorted(sizes, key=sizes.__getitem__)[:count])
    return [t for t in trajectories if t.group in chosen]


def _train_side_by_side(config: TrainConfig, trajectories: list[Trajectory]) -> dict[str, Run]:
    """A tree run and a chain run that take turns step by step, so that both meet the same machine."""
    runs = {attention: Run([], []) for attention in ("tree", "chain")}

    def keep(attention: str):
        def on_gradients(step: int, model: torch.nn.Module) -> None:
            gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            runs[attention].gradients.append(torch.cat(gradient))

        return on_gradients

    trainers = {}
    ways: tuple[Literal["tree", "chain"], ...] = ("tree", "chain")
    for attention in ways:
        own = replace(config, attention=attention, output_dir=f"{config.output_dir}/{attention}", disable_tqdm=True)
        trainers[attention] = Trainer(own, trajectories, on_gradients=keep(attention)).steps()
    with progress_bar("tree and chain", 0, config.max_steps) as progress:
        for tree_row, chain_row in zip(trainers["tree"], trainers["chain"], strict=True):
            runs["tree"].history.append(tree_row)
            runs["chain"].history.append(chain_row)
            progress.advance({**tree_row, "step_time": tree_row["step_time"] + chain_row["step_time"]})
    return runs


def _forest_table(forests: dict[str, list[RolloutTree]], model: dict[str, Any]):
    """All groups, each on its own: counted, not trained."""
    table = _table(
        "All groups, each on its own (counted, not trained)", ("samples", "", "chain", "tree", "chain / tree")
    )
    for kind, forest in forests.items():
        result = flops.report(model, forest)
        _compare(table, kind, "tokens", result.chain.tokens, result.tree.tokens)
        _compare(table, kind, "visible pairs", result.chain.pairs, result.tree.pairs)
        _compare(table, kind, "training GFLOPs", result.chain.training / 1e9, result.tree.training / 1e9)
    return table


def _run_table(runs: dict[str, Run], config: TrainConfig, trajectories: list[Trajectory], model: dict[str, Any]):
    tree, chain = runs["tree"], runs["chain"]
    table = _table("Trained", ("", "chain", "tree", "chain / tree"))
    _compare(table, "tokens", tree.total("tree/chain_tokens"), tree.total("tree/unique_tokens"))
    _compare(table, "visible pairs", tree.total("tree/chain_pairs"), tree.total("tree/pairs"))
    counts = [_step_flops(trees, config, model) for trees in _step_trees(config, trajectories)]
    chain_flops, tree_flops = (sum(getattr(c, side).training for c in counts) for side in ("chain", "tree"))
    _compare(table, "training GFLOPs", chain_flops / 1e9, tree_flops / 1e9)
    _compare(table, "seconds of a step (median)", chain.seconds, tree.seconds)
    _compare(table, "seconds of all steps", chain.total("step_time"), tree.total("step_time"))
    table.add_row("loss of the last step", *(f"{run.history[-1]['loss']:+.6f}" for run in (chain, tree)), "")
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(tree.history, chain.history, strict=True)]
    table.add_row("largest difference of the loss", "", f"{max(losses):.1e}", "")
    differences = [float((a - b).abs().max()) for a, b in zip(tree.gradients, chain.gradients, strict=True)]
    scale = max(float(gradient.abs().max()) for gradient in chain.gradients)
    text = f"{differences[0]:.1e} at step 1, {max(differences):.1e} over all"
    table.add_row("largest difference of a gradient", "", text, f"largest {scale:.1e}")
    return table


def _step_trees(config: TrainConfig, trajectories: list[Trajectory]) -> list[list[RolloutTree]]:
    replay = Replay(trajectories, seed=config.seed, shuffle=config.shuffle)
    reads = [replay.read(step // config.num_iterations, config.groups_per_step) for step in range(config.max_steps)]
    return [[replay.trees[i] for i in read] for read in reads]


def _step_flops(trees: Sequence[RolloutTree], config: TrainConfig, model: dict[str, Any]) -> flops.ChainVsTree:
    whole = [t for tree in trees for t in tree.trajectories]
    forest = build_forest(split_calls(whole) if config.samples == "call" else whole)
    return flops.report(model, forest, share_across_groups=True)


def _table(title: str, columns: Sequence[str]):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= len(columns) - 3 else "left")
    return table


def _compare(table, *cells: Any) -> None:
    *labels, chain, tree = cells
    table.add_row(*labels, _amount(chain), _amount(tree), f"{chain / tree:.2f}x")


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
