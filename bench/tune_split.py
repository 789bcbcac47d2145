"""Hopper's dK/dV with whole and with parted key tiles: `python -m bench.tune_split [--out FILE] [--quick]`.

A program is a key tile of one key/value head. With eight such heads there are enough of them; with two, as Qwen2.5 has,
a root's key tile, which every token of its tree sees, is still at work when all else is done. Times the whole backward
both ways, interleaved, for the heads of Qwen2.5 and of the attention races; says whether the results agree.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import treegrpo_kernels as tk
from bench import gpu_workloads, workloads
from bench.real_step import WORKLOADS
from bench.report import markdown
from bench.timing import Stopwatch, spread
from treegrpo import build_forest
from treegrpo_kernels import triton
from treegrpo_kernels.flops import attention_backward

# query heads, key/value heads, head dim
QWEN_15B, QWEN_05B, WIDE = (12, 2, 128), (14, 2, 64), (32, 8, 128)
CELLS = [
    *((name, QWEN_15B) for name in WORKLOADS),
    ("search_2_6", QWEN_05B),
    ("tau_calls", QWEN_05B),
    *((name, WIDE) for name in ("search_2_6_32k", "star_8k", "chain_16k")),
]
ROUNDS, QUICK_ROUNDS = 7, 3


def forest_of(name: str) -> torch.Tensor:
    if name in WORKLOADS:
        return workloads.lay_out(name, tuple(build_forest(WORKLOADS[name](gpu_workloads.K)))).subtree_end
    return gpu_workloads.forest(name).subtree_end


def measure(name: str, heads: tuple[int, int, int], device: torch.device, rounds: int) -> dict[str, object]:
    """Milliseconds of attn_bwd whole and parted, TFLOP/s over visible pairs, the largest relative difference."""
    from treegrpo_kernels.triton import hopper

    hq, hkv, d = heads
    plan = tk.TreePlan.build(forest_of(name).to(device))
    gen = torch.Generator(device).manual_seed(0)
    shapes = (hq, d), (hkv, d), (hkv, d), (hq, d)
    q, k, v, dout = (torch.randn(plan.num_tokens, *s, generator=gen, device=device).bfloat16() for s in shapes)
    scale = d**-0.5
    runs, results = {}, {}
    for kind in ("whole", "parted"):
        tiles = triton.tile_tensors(plan, q, v, 0, replace(hopper.config(d), split=kind == "parted"))
        out, lse = triton.attn_fwd(q, k, v, None, plan.subtree_end, tiles, scale, 0.0)
        args = (dout, q, k, v, out, lse, plan.subtree_end, tiles, scale, 0.0)
        runs[kind] = lambda args=args: triton.attn_bwd(*args)
        results[kind] = runs[kind]()
        runs[kind]()
        num_parted = tiles[-1].shape[0]
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(rounds):
        for kind, run in runs.items():
            times[kind] += watch.once(run)
    differences = [
        float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(*results.values(), strict=True)
    ]
    medians = {kind: spread(values)["median_s"] for kind, values in times.items()}
    flops = attention_backward(plan.num_pairs, hq, d)
    return dict(
        workload=name,
        heads=f"{hq}:{hkv}x{d}",
        tokens=plan.num_tokens,
        parted=num_parted,
        whole_ms=medians["whole"] * 1e3,
        parted_ms=medians["parted"] * 1e3,
        tflops={kind: flops / median / 1e12 for kind, median in medians.items()},
        ratio=medians["whole"] / medians["parted"],
        difference=max(differences),
    )


def table(rows: list[dict[str, object]]) -> str:
    header = ["workload", "heads", "tokens", "parted tiles", "whole", "parted", "TFLOP/s", "ratio", "difference"]
    body = [
        [
            *(str(row[key]) for key in ("workload", "heads", "tokens", "parted")),
            *(f"{row[key]:.3f} ms" for key in ("whole_ms", "parted_ms")),
            f"{row['tflops']['whole']:.0f} -> {row['tflops']['parted']:.0f}",
            f"{row['ratio']:.2f}x",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    return markdown(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_split", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("bench.tune_split: needs a GPU of compute capability 9.0")
    device, rows = torch.device("cuda"), []
    for name, heads in CELLS:
        try:
            rows.append(measure(name, heads, device, QUICK_ROUNDS if args.quick else ROUNDS))
        except workloads.Unavailable as absent:
            print(f"{name}: {absent}")
        else:
            print(table(rows[-1:]), flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
