"""The demo's picture: curves of the run, and one sampled tree with its words and advantages."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from treegrpo.advantages import compute_advantages
from treegrpo.credit import step_starts
from treegrpo.tree import RolloutTree, Trajectory, build_forest

_CURVES = (
    ("reward", "mean reward of the leaves"),
    ("eval_em", "validation, exact match"),
    ("tools/call_frequency", "tool calls a trajectory"),
    ("batch/packing_ratio", "tokens, chains / tree"),
)
# Characters of a step's box, in a line and in all.
_WIDTH, _LENGTH = 46, 230


def draw_run(
    history: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    trajectories: list[Trajectory],
    tokenizer: Any,
    folder: Path,
) -> Path:
    """Writes demo.png: four curves over the steps, and below them the last step's most telling tree.

    Args:
        history: a row a step.
        evaluations: rows with step and eval_em, the one before the first step too.
        trajectories: of the last step, rewards known.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(16, 13), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 3))
    for axis, (name, title) in zip(top.subplots(1, len(_CURVES)), _CURVES, strict=True):
        rows = evaluations if name.startswith("eval_") else history
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue", marker="o" if len(points) < 30 else None, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    draw_tree(bottom, telling_tree(trajectories), tokenizer)
    path = folder / "demo.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def telling_tree(trajectories: list[Trajectory]) -> RolloutTree:
    """The group whose rewards differ most, of these the one with the most agent steps."""
    forest = build_forest(trajectories)

    def worth(tree: RolloutTree) -> tuple[float, int]:
        rewards = [t.reward for t in tree.trajectories if t.reward is not None]
        return float(np.std(rewards)), sum(t.num_steps for t in tree.trajectories)

    return max(forest, key=worth)


def draw_tree(figure: Any, tree: RolloutTree, tokenizer: Any) -> None:
    """Agent steps from left to right, one lane a leaf; a step is coloured by the mean advantage of its leaves."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    (advantages,) = compute_advantages([tree])
    nodes = _nodes(tree, advantages)
    limit = max(1e-6, max(abs(node["advantage"]) for node in nodes))
    norm, colors = Normalize(-limit, limit), colormaps["RdYlGn"]
    axis = figure.subplots()
    for node in nodes:
        parent = nodes[node["parent"]] if node["parent"] >= 0 else None
        if parent is not None:
            axis.plot([parent["x"] + 0.86, node["x"]], [parent["y"], node["y"]], color="0.5", linewidth=1, zorder=0)
        text = "\n".join(textwrap.wrap(_shortened(tokenizer.decode(node["ids"])), _WIDTH))
        label = "\n".join([text, *(f"[{label}]" for label in node["labels"])])
        color = colors(norm(node["advantage"])) if parent is not None else (0.93, 0.93, 0.93, 1)
        axis.text(
            node["x"], node["y"], label, fontsize=7, va="center", bbox={"facecolor": color, "alpha": 0.6, "pad": 3}
        )
    depth = max(node["x"] for node in nodes)
    lanes = max(node["y"] for node in nodes)
    axis.set(xlim=(-0.05, depth + 1), ylim=(lanes + 0.6, -0.6))
    axis.axis("off")
    figure.suptitle(
        f"one question of the last step, {tree.num_leaves} leaves; green and red: advantage up to ±{limit:.2f}",
        fontsize=10,
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _LENGTH else text[: _LENGTH - 4] + " ..."


def _nodes(tree: RolloutTree, advantages: list[np.ndarray]) -> list[dict[str, Any]]:
    """Agent steps as boxes: the prompt first; equal steps of one sampled tree are one box."""
    prompt_end = int(step_starts(tree.trajectories[0])[0])
    prompt = tree.trajectories[0].token_ids[:prompt_end]
    nodes: list[dict[str, Any]] = [{"ids": prompt, "parent": -1, "x": 0, "values": [], "labels": []}]
    found: dict[tuple, int] = {}
    for trajectory, advantage in zip(tree.trajectories, advantages, strict=True):
        above = 0
        cuts = [*step_starts(trajectory).tolist(), trajectory.num_tokens]
        for step, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            key = (trajectory.tree, trajectory.token_ids[:end].tobytes())
            if key not in found:
                found[key] = len(nodes)
                ids = trajectory.token_ids[begin:end][trajectory.loss_mask[begin:end]]
                nodes.append({"ids": ids, "parent": above, "x": step + 1, "values": [], "labels": []})
            above = found[key]
            nodes[above]["values"].append(float(advantage[min(step, len(advantage) - 1)]))
        nodes[above]["labels"].append(
            f"tree {trajectory.tree}, reward {trajectory.reward:g}, advantage {advantage[-1]:+.2f}"
        )
    for node in nodes:
        node["advantage"] = float(np.mean(node["values"])) if node["values"] else 0.0
    _place(nodes)
    return nodes


def _place(nodes: list[dict[str, Any]]) -> None:
    """y of every box: leaves one below the other in depth-first order, the others in the middle of their children."""
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes[1:], 1):
        children[node["parent"]].append(index)
    lane = 0
    open_boxes = [(0, False)]
    while open_boxes:
        index, is_done = open_boxes.pop()
        if is_done:
            nodes[index]["y"] = float(np.mean([nodes[child]["y"] for child in children[index]]))
        elif children[index]:
            open_boxes += [(index, True), *((child, False) for child in reversed(children[index]))]
        else:
            nodes[index]["y"] = float(lane)
            lane += 1
