"""When a shared prompt pays: prints the table of README's "What it saves". `python docs/break_even.py`

A group is one prompt with G independent answers, the least a tree can share; counted exactly by ``treegrpo.flops``.
"""

from __future__ import annotations

import numpy as np

import treegrpo
from treegrpo.flops import report

GROUPS = [(100, 1000, 8), (500, 500, 8), (500, 2000, 8), (2000, 500, 8), (2000, 500, 16), (8000, 1000, 16)]


def qwen(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    """A Qwen2.5 config."""
    return dict(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


MODELS = {
    "0.5B": qwen(896, 4864, 24, 14, 2, 151_936),
    "7B": qwen(3584, 18_944, 28, 28, 4, 152_064),
    "32B": qwen(5120, 27_648, 64, 40, 8, 152_064),
}


def group(prompt: int, response: int, answers: int) -> treegrpo.RolloutTree:
    """One prompt with ``answers`` answers that part at their first token."""
    mask = np.repeat([0, 1], [prompt, response])
    ids = np.arange(prompt + response)
    return treegrpo.build_tree(
        [treegrpo.Trajectory(np.where(mask, prompt + g, ids), mask, group="question") for g in range(answers)]
    )


def table() -> str:
    """Markdown: chain over tree in tokens, visible pairs, and training FLOPs of each model."""
    lines = [
        f"| prompt | answer | G | tokens | pairs | {' | '.join(f'FLOPs, {name}' for name in MODELS)} |",
        f"| {' | '.join(['---:'] * (5 + len(MODELS)))} |",
    ]
    for prompt, response, answers in GROUPS:
        trees = [group(prompt, response, answers)]
        counts = [report(config, trees) for config in MODELS.values()]
        ratios = [counts[0].token_ratio, counts[0].pair_ratio, *(count.flop_ratio for count in counts)]
        cells = [f"{prompt:,}", f"{response:,}", str(answers), *(f"{ratio:.2f}x" for ratio in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
