"""`treegrpo inspect`: a rollout tree in the terminal, and as a picture with its packed row and mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from treegrpo.shown import plain
from treegrpo.tree import RolloutTree, Segment

# The mask picture samples this many rows and columns, whatever the number of tokens.
_CANVAS = 512


def tree_lines(tree: RolloutTree, advantages: list[np.ndarray] | None = None):
    """A rich Tree: one line per segment with its tokens, where it lies and what ends there.

    `advantages`: that of `compute_advantages` for this tree.
    """
    from rich.tree import Tree

    segments = tree.segments()
    share = tree.num_chain_tokens / tree.num_tokens
    root = Tree(
        f"[bold]group {plain(tree.group)}[/bold]  {tree.num_leaves} leaves, {tree.num_tokens:,} unique of"
        f" {tree.num_chain_tokens:,} tokens ({share:.2f}x), {tree.num_pairs:,} of {tree.num_chain_pairs:,} pairs"
        f" ({tree.num_chain_pairs / tree.num_pairs:.2f}x)",
        guide_style="dim",
    )
    lines: dict[int, Tree] = {}
    leaves_below = _leaves_below(segments)
    for index, segment in enumerate(segments):
        branch = lines[segment.parent] if segment.parent >= 0 else root
        # Samples that end on one path, call after call, stand below one another, not ever further to the right.
        continues = segment.parent >= 0 and len(segments[segment.parent].children) == 1
        line = branch.add(("↓ " if continues else "") + _segment_line(tree, segment, leaves_below[index], advantages))
        lines[index] = branch if len(segment.children) == 1 else line
    return root


def _segment_line(tree: RolloutTree, segment: Segment, num_below: int, advantages: list[np.ndarray] | None) -> str:
    parts = [f"{segment.end - segment.start:,} tokens  [dim]{segment.start:,}..{segment.end:,}[/dim]"]
    if num_below > 1:
        parts.append(f"[cyan]shared by {num_below}[/cyan]")
    for leaf in segment.leaves:
        trajectory = tree.trajectories[leaf]
        reward = "unknown" if trajectory.reward is None else f"{trajectory.reward:g}"
        text = f"[green]leaf {leaf}[/green] reward {reward}"
        if advantages is not None:
            text += f" advantage {_brief(advantages[leaf])}"
        parts.append(text + (f" [dim]tree {trajectory.tree}[/dim]" if trajectory.tree else ""))
    return "  ".join(parts)


def _brief(advantage: np.ndarray) -> str:
    if np.all(advantage == advantage[0]):
        return f"{advantage[0]:+.3f}"
    return f"{len(advantage)} steps {advantage.min():+.3f}..{advantage.max():+.3f}"


def _leaves_below(segments: list[Segment]) -> list[int]:
    counts = [len(segment.leaves) for segment in segments]
    # Packed order puts parents before children, so the reverse sums every subtree before its parent reads it.
    for index in range(len(segments) - 1, 0, -1):
        if segments[index].parent >= 0:
            counts[segments[index].parent] += counts[index]
    return counts


def visible_fraction(subtree_end: np.ndarray, canvas: int = _CANVAS) -> np.ndarray:
    """Mask `[c, c]` in `[0, 1]`, queries down and keys across, sampled at c = min(T, canvas) evenly spaced tokens."""
    num_tokens = len(subtree_end)
    at = np.unique(np.linspace(0, num_tokens - 1, min(num_tokens, canvas)).astype(np.int64))
    return ((at[None, :] <= at[:, None]) & (at[:, None] < np.asarray(subtree_end)[at][None, :])).astype(np.float32)


def draw(tree: RolloutTree, path: str | Path) -> None:
    """Writes a PNG, and its folder: the tree over depth, the packed row, and the mask (sampled, never T x T)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["tree", "row"], ["tree", "mask"]],
        figsize=(14, 7),
        width_ratios=(1.1, 1),
        height_ratios=(1, 20),
        layout="constrained",
    )
    figure.suptitle(f"group {tree.group}: {tree.num_tokens:,} unique tokens of {tree.num_chain_tokens:,}")
    _draw_tree(axes["tree"], tree)
    _draw_row(axes["row"], tree)
    size = tree.num_tokens
    mask = visible_fraction(tree.trie.subtree_end)
    axes["mask"].imshow(
        mask, cmap="Blues", vmin=0, vmax=1.3, extent=(0, size, size, 0), interpolation="nearest", aspect="auto"
    )
    axes["mask"].set(xlabel=f"key; {tree.num_pairs:,} visible pairs", ylabel="query (index in the packed row)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_tree(axes, tree: RolloutTree) -> None:
    """Depth in tokens across, one lane per leaf; a segment sits in the middle of its leaves' lanes."""
    segments = tree.segments()
    lanes = [0.0] * len(segments)
    children: dict[int, list[float]] = {index: [] for index in range(len(segments))}
    num_lanes = sum(not segment.children for segment in segments)
    free = num_lanes - 1.0
    for index in range(len(segments) - 1, -1, -1):
        if segments[index].children:
            lanes[index] = float(np.mean(children[index]))
        else:
            lanes[index], free = free, free - 1.0
        if segments[index].parent >= 0:
            children[segments[index].parent].append(lanes[index])
    below = _leaves_below(segments)
    begins = [int(tree.trie.position[segment.start]) for segment in segments]
    ends = [begin + segment.end - segment.start for begin, segment in zip(begins, segments, strict=True)]
    # one artist for all: each costs a millisecond
    axes.hlines(lanes, begins, ends, color="tab:blue", linewidth=1.5 + 1.5 * np.log2(np.array(below) + 1))
    forks = [(begins[i], lanes[segment.parent], lanes[i]) for i, segment in enumerate(segments) if segment.parent >= 0]
    if forks:
        axes.vlines(*zip(*forks, strict=True), color="0.6", linewidth=1)
    for end, lane, segment in zip(ends, lanes, segments, strict=True):
        if segment.leaves and not segment.children and num_lanes <= 64:
            rewards = ", ".join(
                "?" if tree.trajectories[i].reward is None else f"{tree.trajectories[i].reward:g}"
                for i in segment.leaves
            )
            axes.annotate(f" {rewards}", (end, lane), va="center", fontsize=8)
    axes.set(
        xlabel="depth in tokens",
        title=f"{tree.num_leaves} leaves, rewards at their ends",
        yticks=[],
        ylim=(num_lanes - 0.5, -0.5),
    )
    axes.margins(x=0.06)


def _draw_row(axes, tree: RolloutTree) -> None:
    """The packed row, shaded by how many leaves share each segment."""
    segments = tree.segments()
    below = np.array(_leaves_below(segments), dtype=float)
    shades = [(0.1, 0.3, 0.6, 0.15 + 0.85 * shade) for shade in below / below.max()]
    spans = [(segment.start, segment.end - segment.start) for segment in segments]
    axes.broken_barh(spans, (0, 1), color=shades, linewidth=0)
    axes.set(yticks=[], xticks=[], xlim=(0, tree.num_tokens), ylim=(0, 1))
    axes.set_title("the packed row, darker where more leaves share; below, who sees whom", fontsize=10)
