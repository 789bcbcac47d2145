"""Draws docs/tiles.svg, which tiles of three forests the forward visits, and prints docs/kernels.md's table of such
counts. `python -m docs.tiles`

Everything is read from the tile lists of the plans, which the kernels walk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench import gpu_workloads
from bench.workloads import lay_out
from treegrpo import build_forest
from treegrpo_kernels import TreePlan

# query and key rows of the Hopper kernels' tiles at head dims of 64 and 128
FORWARD = (128, 128)
NAMES = ("chain_16k", "star_8k", "star_2k", "search_2_2_32k", "search_2_6_32k", "binary_32k")
# the goal and the tensor cores' peak, for 32 heads of 128
PEAK, HEADS, HEAD_DIM = 989e12, 32, 128
PANELS = {
    "GRPO star, prompt 2k, 8 x 2k": lambda: gpu_workloads.star(2048, 2048, 8),
    "search agent (2,6,1), one prompt": lambda: gpu_workloads.search(2, 6, 1, 1024),
    "binary tree, 64 leaves": lambda: gpu_workloads.binary(7, 96),
}
SIDE, GAP, TOP = 250, 18, 62

STYLE = """
.card { fill: #ffffff; stroke: #d0d7de }
text { fill: #59636e; font: 13px system-ui, sans-serif }
.title { fill: #1f2328; font-weight: 600 }
.ground { fill: #eff2f5 } .full { fill: #4c8fe0 } .partial { fill: #f0a43a }
@media (prefers-color-scheme: dark) {
  .card { fill: #151b23; stroke: #3d444d }
  text { fill: #9198a1 } .title { fill: #f0f6fc }
  .ground { fill: #212830 }
}
"""


def visits(plan: TreePlan) -> np.ndarray:
    """[query tiles, key tiles]: 0 never visited, 1 in part, 2 in full."""
    lists = plan.tile_lists(*FORWARD)
    seen = np.zeros((len(lists.q_full), len(lists.kv_max)), dtype=np.int8)
    offsets = lists.q_offsets.tolist()
    for row, (start, num_full) in enumerate(zip(offsets, lists.q_full.tolist(), strict=False)):
        keys = lists.q_indices[start : offsets[row + 1]].numpy()
        seen[row, keys[:num_full]], seen[row, keys[num_full:]] = 2, 1
    return seen


def table() -> str:
    """Markdown: tokens, what a causal mask on the row would compute, the forward's tiles, and its floor."""
    lines = [
        "| workload | tokens | causal mask on the row | tiles met | in full | pairs visible of computed | floor |",
        f"| --- | {' | '.join(['---:'] * 6)} |",
    ]
    for name in NAMES:
        plan = TreePlan.build(gpu_workloads.forest(name).subtree_end)
        num_tokens, lists = plan.num_tokens, plan.tile_lists(*FORWARD)
        num_tiles = len(lists.q_indices)
        cells = [
            f"{num_tokens:,}",
            f"{num_tokens * (num_tokens + 1) / 2 / plan.num_pairs:.2f}x",
            f"{num_tiles:,}",
            f"{int(lists.q_full.sum()) / num_tiles:.0%}",
            f"{plan.num_pairs / (num_tiles * FORWARD[0] * FORWARD[1]):.0%}",
            f"{4 * HEAD_DIM * HEADS * plan.num_pairs / PEAK * 1e3:.2f} ms",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rectangles(mask: np.ndarray) -> str:
    """An SVG path of the cells where ``mask`` is true, neighbours in a row as one rectangle."""
    parts = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.r_[0, row.astype(np.int8), 0])).reshape(-1, 2)
        parts += [f"M{start} {y}h{stop - start}v1h-{stop - start}z" for start, stop in edges.tolist()]
    return "".join(parts)


def _panel(x: int, title: str, plan: TreePlan) -> str:
    seen = visits(plan)
    share = (seen == 2).sum() / (seen > 0).sum()
    scale = SIDE / len(seen)
    return (
        f'<text class="title" x="{x}" y="{TOP - 30}">{title}</text>\n'
        f'<text x="{x}" y="{TOP - 10}">{plan.num_tokens:,} tokens, {share:.0%} of tiles in full</text>\n'
        f'<g transform="translate({x} {TOP}) scale({scale:.5f})">'
        f'<rect class="ground" width="{len(seen)}" height="{len(seen)}"/>'
        f'<path class="full" d="{_rectangles(seen == 2)}"/><path class="partial" d="{_rectangles(seen == 1)}"/></g>'
    )


def draw() -> str:
    """The picture as SVG text; readable on a light and on a dark page, for it brings its own ground."""
    width, height = 2 * 24 + 3 * SIDE + 2 * GAP, TOP + SIDE + 44
    parts = []
    for place, (title, rows) in enumerate(PANELS.items()):
        plan = TreePlan.build(lay_out(title, tuple(build_forest(rows()))).subtree_end)
        parts.append(_panel(24 + place * (SIDE + GAP), title, plan))
    legend = [("full", "all pairs visible: no mask arithmetic"), ("partial", "some visible: two comparisons a pair")]
    for place, (kind, text) in enumerate(legend):
        x, y = 24 + place * 290, height - 18
        parts.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="12" height="12"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{text}</text>')
    parts.append(f'<text x="604" y="{height - 18}">grey: never visited</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-label="Tiles of 128 queries (rows) by 128 keys (columns) that the forward visits">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".svg")
    path.write_text(draw(), encoding="utf-8")
    print(f"wrote {path}\n\n{table()}")
