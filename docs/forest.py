"""Draws docs/forest.svg: two rollout trees, the packed row they become, and its mask. `python docs/forest.py`

Every number in the picture is read from the batch that ``treegrpo.pack`` makes of the leaves.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import treegrpo

LEAVES = {"question 1": ["ABCD", "ABCE", "ABF"], "question 2": ["GHI", "GJ"]}
# the trees as drawn: (tokens of the node, its children)
NODES = [("AB", [("C", [("D", []), ("E", [])]), ("F", [])]), ("G", [("HI", []), ("J", [])])]
COLOURS = ("one", "two")
CELL = 26
LINE = 34

STYLE = """
.card { fill: #ffffff; stroke: #d0d7de }
text { fill: #1f2328; font: 13px ui-monospace, Menlo, Consolas, monospace; text-anchor: middle }
.title { font: 600 14px system-ui, sans-serif; text-anchor: start }
.note { font: 13px system-ui, sans-serif; text-anchor: start; fill: #59636e }
.name { text-anchor: end; fill: #59636e }
.edge { stroke: #818b98; stroke-width: 1.5; fill: none }
.one { fill: #b6d4fb } .two { fill: #f9d8a8 } .hidden { fill: none; stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
  .card { fill: #151b23; stroke: #3d444d }
  text { fill: #f0f6fc } .note, .name { fill: #9198a1 }
  .edge { stroke: #9198a1 } .one { fill: #1f4f8f } .two { fill: #7a4d0b } .hidden { stroke: #3d444d }
}
"""


def batch() -> treegrpo.TreeBatch:
    """The leaves, packed; a token's id is its letter's place in the alphabet."""
    leaves = [
        treegrpo.Trajectory([ord(c) - ord("A") for c in text], [0] + [1] * (len(text) - 1), group=group)
        for group, texts in LEAVES.items()
        for text in texts
    ]
    [packed] = treegrpo.pack(treegrpo.build_forest(leaves))
    return packed


def draw() -> str:
    """The picture as SVG text; readable on a light and on a dark page, for it brings its own ground."""
    packed = batch()
    tokens = [chr(ord("A") + t) for t in packed.input_ids.tolist()]
    end = packed.subtree_end.tolist()
    roots = [t for t, above in enumerate(packed.prev.tolist()) if above < 0]
    tree_of = [sum(root <= t for root in roots) - 1 for t in range(len(tokens))]
    parts = [_forest(28, 62), _chains(288, 62)]
    arrays = {"subtree_end": end, "prev": packed.prev, "position": packed.position_ids}
    parts.append(_row(122, 268, tokens, tree_of, arrays))
    parts.append(_mask(470, 82, tokens, tree_of, end))
    chain, pairs = packed.num_chain_tokens, packed.num_chain_pairs
    notes = [
        (28, 36, "title", "rollout trees"),
        (288, 36, "title", "the same as chains"),
        (28, 248, "title", "one packed row: every token once, depth first"),
        (470, 36, "title", "the mask"),
        (470, 58, "note", "query i (row) sees key j iff j ≤ i < subtree_end[j]"),
        (28, 398, "note", f"flattened chains: {chain} tokens, {pairs} visible pairs"),
        (28, 418, "note", f"packed row: {len(tokens)} tokens, {packed.num_pairs} visible pairs"),
    ]
    parts += [f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>' for x, y, kind, text in notes]
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 440" width="820" height="440" role="img"'
        ' aria-label="Two rollout trees, the packed row of their unique tokens, and its mask">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="819" height="439" rx="8"/>\n{body}\n</svg>\n'
    )


def _box(x: float, y: float, kind: str, text: str = "") -> str:
    label = f'<text x="{x + CELL / 2:g}" y="{y + CELL / 2 + 4.5:g}">{text}</text>' if text else ""
    return f'<rect class="{kind}" x="{x + 1:g}" y="{y + 1:g}" width="{CELL - 2}" height="{CELL - 2}" rx="3"/>{label}'


def _forest(x: float, y: float) -> str:
    """Trees from left to right, a node's tokens in a row, branches to the right of their parent."""
    parts: list[str] = []
    gap = 34

    def lay(node: tuple, x: float, y: float, kind: str) -> float:
        """Draws a node and what is below it; returns the y below its last line."""
        text, children = node
        parts.extend(_box(x + i * CELL, y, kind, letter) for i, letter in enumerate(text))
        stop = x + len(text) * CELL
        below = y
        for child in children:
            middle = CELL / 2
            parts.append(
                f'<path class="edge" d="M{stop:g} {y + middle:g} C{stop + gap / 2:g} {y + middle:g}'
                f' {stop + gap / 2:g} {below + middle:g} {stop + gap:g} {below + middle:g}"/>'
            )
            below = lay(child, stop + gap, below, kind)
        return max(below, y + LINE)

    for tree, kind in zip(NODES, COLOURS, strict=True):
        y = lay(tree, x, y, kind)
    return "\n".join(parts)


def _chains(x: float, y: float) -> str:
    """The leaves one below the other, each beside its end in the trees."""
    leaves = [(text, kind) for texts, kind in zip(LEAVES.values(), COLOURS, strict=True) for text in texts]
    return "\n".join(
        _box(x + i * CELL, y + line * LINE, kind, letter)
        for line, (text, kind) in enumerate(leaves)
        for i, letter in enumerate(text)
    )


def _row(x: float, y: float, tokens: list[str], tree_of: list[int], arrays: dict) -> str:
    parts = [_box(x + t * CELL, y, COLOURS[tree_of[t]], token) for t, token in enumerate(tokens)]
    for line, (name, values) in enumerate(arrays.items(), start=1):
        level = y + line * CELL + CELL / 2 + 4.5
        parts.append(f'<text class="name" x="{x - 8:g}" y="{level:g}">{name}</text>')
        parts += [f'<text x="{x + (t + 0.5) * CELL:g}" y="{level:g}">{int(v)}</text>' for t, v in enumerate(values)]
    return "\n".join(parts)


def _mask(x: float, y: float, tokens: list[str], tree_of: list[int], end: list[int]) -> str:
    x, y = x + CELL, y + CELL
    parts = []
    for i, token in enumerate(tokens):
        parts.append(f'<text x="{x + (i + 0.5) * CELL:g}" y="{y - 8:g}">{token}</text>')
        parts.append(f'<text x="{x - CELL / 2:g}" y="{y + (i + 0.5) * CELL + 4.5:g}">{token}</text>')
        for j in range(i + 1):
            kind = COLOURS[tree_of[i]] if i < end[j] else "hidden"
            parts.append(_box(x + j * CELL, y + i * CELL, kind))
    return "\n".join(parts)


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".svg")
    path.write_text(draw(), encoding="utf-8")
    print(f"wrote {path}")
