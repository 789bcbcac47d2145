"""Where a training step's GPU time goes: `python -m bench.profile_step --model 1.5b --workload search_2_6`.

Profiles steps of real_step.py, tree and chain, and prints GPU time by kind of kernel, the share in which the GPU had
nothing to do, and how often the host waited for the device.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch

from bench import workloads
from bench.real_step import MODELS, WORKLOADS, Case, Problem, step, trainee
from bench.report import markdown

# kind -> pattern of kernel names, the first that matches; products of layers and of the head have the same names
KINDS = {
    "attention": r"tree_attention",
    "log-softmax passes": r"^head_",
    "products": r"gemm|nvjet|cutlass|xmma|wgmma|splitK",
    "optimiser": r"adam|multi_tensor",
    "copies and fills": r"memcpy|memset|fill|copy",
    "sorting, gathers, sums": r"sort|index|gather|scatter|embedding|segment|radix|scan|unique",
    "elementwise and norms": r".",
}
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize")


def profile(case: Case, contender: str, device: torch.device, steps: int, tiny: bool) -> dict[str, object]:
    """Milliseconds a step by kind of kernel, of the wall, idle; waits of the host a step."""
    problem = Problem(case, device, tiny)
    net = trainee(case.model, device)
    net.set_checkpointing(case.checkpointing)
    problem.prepare(net)
    step(net, problem, contender)
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as found:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step(net, problem, contender)
        if on_gpu:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e3 / steps
    kinds = dict.fromkeys(KINDS, 0.0)
    largest: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent = event.self_device_time_total / 1e3 / steps
            kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE))
            kinds[kind] += spent
            largest[event.key[:80]] = spent
    waits = sum(event.count for event in found.key_averages() if WAITS.search(event.key))
    busy = sum(kinds.values())
    top = dict(sorted(largest.items(), key=lambda item: -item[1])[:12])
    # the last wait is the profile's own
    waits = max(0, waits - 1) / steps
    return dict(contender=contender, wall_ms=wall, idle=max(0.0, 1 - busy / wall), waits=waits, kinds=kinds, top=top)


def table(results: list[dict]) -> str:
    names = [result["contender"] for result in results]
    body = [[kind, "ms", *(f"{result['kinds'][kind]:.1f}" for result in results)] for kind in KINDS]
    body += [
        ["wall", "ms", *(f"{result['wall_ms']:.1f}" for result in results)],
        ["GPU idle", "", *(f"{result['idle']:.0%}" for result in results)],
        ["waits of the host", "a step", *(f"{result['waits']:.1f}" for result in results)],
    ]
    return markdown(["part of a step", "", *names], body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="1.5b")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="search_2_6")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--steps", type=int, default=3, help="steps in the profile")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="one step")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU: the tiny model's step is profiled, whose kernels are not listed")
    case = Case(args.model if device.type == "cuda" else "tiny", args.workload, args.checkpointing)
    steps = 1 if args.quick else args.steps
    try:
        results = [profile(case, name, device, steps, device.type == "cpu") for name in ("tree", "chain")]
    except workloads.Unavailable as absent:
        raise SystemExit(f"bench.profile_step: {absent}") from absent
    print(f"{case.name}\n{table(results)}")
    for result in results:
        print(f"\n{result['contender']}: the largest kernels, ms a step")
        print("\n".join(f"{spent:9.2f}  {name}" for name, spent in result["top"].items()))
    if args.out is not None:
        args.out.write_text(json.dumps({"case": case.name, "steps": steps, "results": results}, indent=1))


if __name__ == "__main__":
    main()
