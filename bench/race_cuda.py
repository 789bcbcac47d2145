"""Our CUDA kernels for Hopper beside our Triton ones: `python -m bench.race_cuda [--out FILE] [--quick]`.

bf16, interleaved in one run, CUDA events from a cold L2. TFLOP/s over visible pairs: forward 4 D Hq a pair, backward
2.5 times that. Backward of the CUDA kernels twice: bitwise repeatable, and with dQ added in any order. Says how far
their results are from Triton's, which the tests hold against the oracle.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import treegrpo_kernels as tk
from bench import gpu_workloads, workloads
from bench.report import markdown
from bench.timing import Stopwatch, spread
from treegrpo_kernels.flops import attention_backward

WIDE, NARROW = (32, 8, 128), (32, 8, 64)
NAMES = ("chain_16k", "chain_32k", "star_8k", "star_2k", "search_2_2_32k", "search_2_6_32k")
CELLS = [*((name, WIDE) for name in NAMES), ("chain_64k", WIDE), *((name, NARROW) for name in ("star_2k", NAMES[-1]))]
QUICK_CELLS = [("chain_16k", WIDE), ("star_8k", WIDE), ("search_2_6_32k", WIDE)]
ROUNDS, QUICK_ROUNDS = 7, 3
# name -> backend and whether backward repeats bit for bit
WAYS = {"triton": ("triton", True), "cuda": ("cuda", True), "cuda, any order": ("cuda", False)}


def measure(name: str, heads: tuple[int, int, int], device: torch.device, rounds: int) -> dict[str, object]:
    """Median milliseconds and TFLOP/s of both passes each way, and the largest relative difference from Triton's."""
    hq, hkv, d = heads
    plan = tk.TreePlan.build(gpu_workloads.forest(name).subtree_end.to(device))
    gen = torch.Generator(device).manual_seed(0)
    shapes = (hq, d), (hkv, d), (hkv, d), (hq, d)
    *leaves, dout = (torch.randn(plan.num_tokens, *s, generator=gen, device=device).bfloat16() for s in shapes)
    leaves = [x.requires_grad_() for x in leaves]
    forwards, backwards, results = {}, {}, {}
    for way, (backend, deterministic) in WAYS.items():

        def forward(backend: str = backend, deterministic: bool = deterministic) -> Tensor:
            return tk.tree_attention(*leaves, plan, backend=backend, deterministic=deterministic)

        out = forward()
        forwards[way] = forward
        backwards[way] = lambda out=out: torch.autograd.grad(out, leaves, dout, retain_graph=True)
        results[way] = [out.detach(), *backwards[way]()]
    watch = Stopwatch(device)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for kind, runs in (("forward", forwards), ("backward", backwards)):
            for way, run in runs.items():
                times.setdefault((kind, way), []).extend(watch.once(run))
    backward_flops = attention_backward(plan.num_pairs, hq, d)
    flops = {"forward": backward_flops / 2.5, "backward": backward_flops}
    row: dict[str, object] = dict(workload=name, heads=f"{hq}:{hkv}x{d}", tokens=plan.num_tokens, pairs=plan.num_pairs)
    for (kind, way), seconds in times.items():
        timed = spread(seconds)
        row[f"{kind} {way}"] = timed | {"tflops_per_s": flops[kind] / timed["median_s"] / 1e12}
    for way in list(WAYS)[1:]:
        pairs = zip(results[way], results["triton"], strict=True)
        row[f"difference {way}"] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    return row


def table(rows: list[dict[str, object]]) -> str:
    """TFLOP/s of each way, the ratio to Triton in brackets."""
    columns = [
        (kind, way) for kind in ("forward", "backward") for way in WAYS if (kind, way) != ("forward", "cuda, any order")
    ]
    header = ["workload", "heads", "tokens", *(f"{kind}: {way}" for kind, way in columns), "difference"]
    body = []
    for row in rows:
        cells = [str(row[key]) for key in ("workload", "heads", "tokens")]
        for kind, way in columns:
            mine, triton = (row[f"{kind} {name}"] for name in (way, "triton"))
            ratio = "" if way == "triton" else f" ({triton['median_s'] / mine['median_s']:.2f}x)"
            cells.append(f"{mine['tflops_per_s']:.0f}{ratio}")
        body.append([*cells, f"{max(row[f'difference {way}'] for way in list(WAYS)[1:]):.1e}"])
    return markdown(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.race_cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="three workloads, three rounds")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("bench.race_cuda: needs a GPU of compute capability 9.0")
    device, rows = torch.device("cuda"), []
    for name, heads in QUICK_CELLS if args.quick else CELLS:
        # before, for what never ends leaves no other trace
        print(f"{name}, {heads[0]}:{heads[1]} heads of {heads[2]}", flush=True)
        try:
            rows.append(measure(name, heads, device, QUICK_ROUNDS if args.quick else ROUNDS))
        except workloads.Unavailable as absent:
            print(absent)
            continue
        print(table(rows[-1:]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
