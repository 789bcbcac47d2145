"""Every attention kernel on one small forest, for compute-sanitizer; wrong numbers fail too.

    python tests/sanitize.py [--seconds N]            hopper, plain, cuda under memcheck and racecheck, all six at once
    python tests/sanitize.py hopper|plain|cuda|sm90   that part alone, without compute-sanitizer

Racecheck does not follow an mbarrier from a plain store to its reader. In the Hopper kernels it therefore reports the
row values that the producer of dK/dV stores before it arrives at a barrier the consumers wait for, and the words by
which Triton's warp_specialize hands out work. Those pairs of lines are counted and passed; any other hazard fails.
The CUDA kernels for Hopper (sm90) hand over such values likewise, without line numbers: memcheck alone suits them,
and as long as they are unproven (bench/device.sh) they run apart from the others.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("hopper", "plain", "cuda")
TOOLS = ("memcheck", "racecheck")
NUM_TOKENS = 434


def calls(part: str) -> list[dict]:
    """What a part runs: as in test_gpu_attention.py, whose compiled kernels serve here too."""
    import torch

    if part in ("hopper", "sm90"):
        found = [dict(d=64, dtype=torch.bfloat16, heads=(4, 4)), dict(d=128, dtype=torch.bfloat16, heads=(4, 1))]
        # windows and heads of 256 are the Triton kernels' alone
        of_window = dict(window=100) if part == "hopper" else {}
        of_width = [dict(d=256, dtype=torch.bfloat16, heads=(4, 1))] if part == "hopper" else []
        return [*found, dict(d=64, dtype=torch.bfloat16, heads=(8, 1), sinks=True, **of_window), *of_width]
    every = dict(window=100, softcap=15.0, sinks=True)
    some = [
        dict(d=96, dtype=torch.bfloat16, heads=(8, 2), softcap=15.0, sinks=True),
        dict(d=64, heads=(4, 4), dtype=torch.float32),
    ]
    if part == "plain":
        # through descriptors, through pointers, in fp32
        return [dict(d=64, dtype=torch.bfloat16, heads=(8, 1), **every), *some]
    return [
        dict(d=64, dtype=torch.bfloat16, heads=(4, 1), **every),
        *some,
        dict(d=40, dtype=torch.float64, heads=(2, 1)),
    ]


def run(part: str) -> int:
    """0 where every result is right."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root / "kernels"), str(root / "tests")]
    import cases
    import torch

    import treegrpo_kernels as tk

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "cuda" if part in ("cuda", "sm90") else "triton"
    reason = tk.backends()[backend]
    if (
        part in ("hopper", "sm90")
        and reason is None
        and (device == "cpu" or torch.cuda.get_device_capability()[0] != 9)
    ):
        reason = "no GPU of compute capability 9.0"
    if reason is not None:
        print(f"{part}: skipped, {reason}")
        return 0
    # a long chain for the full tiles, then forks; the last query tile is short, and key tiles are full for it
    end = torch.from_numpy(cases.nested_subtree_end((128, []), (150, [(70, []), (57, [(9, []), (20, [])])])))
    assert len(end) == NUM_TOKENS
    wrong = 0
    for call in calls(part):
        d, dtype, (hq, hkv), sinks = (call.pop(name, None) for name in ("d", "dtype", "heads", "sinks"))
        gen = torch.Generator().manual_seed(0)
        shapes = (hq, d), (hkv, d), (hkv, d), (hq, d)
        # drawn and compared on the CPU: the sanitizer need not watch torch's kernels
        *leaves, dout = (torch.randn(NUM_TOKENS, *s, generator=gen).to(dtype) for s in shapes)
        leaves += [torch.linspace(-1, 1, hq)] if sinks else []

        def results(device: str, dtype: torch.dtype | None, name: str) -> list:
            mine = [x.to(device, dtype).requires_grad_() for x in leaves]  # noqa: B023
            plan = tk.TreePlan.build(end, device=device)
            options = dict(sinks=mine[3] if len(mine) > 3 else None, backend=name, **call)  # noqa: B023
            out = tk.tree_attention(*mine[:3], plan, **options)
            grads = torch.autograd.grad(out, mine, dout.to(device, dtype))  # noqa: B023
            return [x.detach().cpu().double() for x in (out, *grads)]

        found, exact = results(device, None, backend), results("cpu", torch.float64, "reference")
        for name, x, y in zip(("out", "dq", "dk", "dv", "dsinks"), found, exact, strict=False):
            error = float((x - y).abs().max() / y.abs().max())
            # not <=: NaN is wrong too
            if not error < (2e-2 if dtype.itemsize == 2 else 1e-5):
                print(f"{part} d={d} {dtype} {call}: {name} is off by {error:.2e}")
                wrong += 1
    print(f"{part}: {'wrong numbers' if wrong else 'numbers ok'}")
    return min(wrong, 1)


ACCESS = re.compile(r"(Read|Write) access at \w+\S* in (\S+):(\d+)")


def hazards(text: str) -> tuple[int, list[str]]:
    """Of racecheck's report: how many pairs of accesses meet across a barrier it does not follow, and the others."""
    root = Path(__file__).resolve().parent.parent / "kernels" / "treegrpo_kernels" / "triton"
    explained, others, first = 0, [], None
    for line in text.splitlines():
        found = ACCESS.search(line)
        if found is None:
            continue
        path = root / Path(found[2]).name
        source = path.read_text().splitlines()[int(found[3]) - 1].strip() if path.exists() else "?"
        if "Race reported" in line:
            first = source
        elif first is not None and _handed_over(first, source):
            explained += 1
        else:
            others.append(f"{first} | {source} | {line.strip('= ')}")
    return explained, others


def _handed_over(a: str, b: str) -> bool:
    # the kernel's own line and the call stand for what warp_specialize makes of its captures
    dispatch = ("def tree_attention_", "gl.warp_specialize(")
    if a.startswith(dispatch) and b.startswith(dispatch):
        return True
    stored, loaded = (re.search(r"(s_lse|s_delta|s_row|s_first)\.index\(slot\)\.(store|load)\(", x) for x in (a, b))
    return bool(stored and loaded and stored[1] == loaded[1] and {stored[2], loaded[2]} == {"store", "load"})


def sanitize(seconds: float) -> int:
    """Each part under each tool, all at once; 0 where none complains, a summary last."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not installed")
        return 3
    deadline = time.monotonic() + seconds
    known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    # torch's own kernels are not asked about, and take time
    only = ["--kernel-name", "kns=tree"] if "--kernel-name" in known and "kns" in known else []
    # the caching allocator would hide accesses past a tensor's end
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    summary, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for tool, part in itertools.product(TOOLS, PARTS):
            log = Path(folder) / f"{tool}-{part}"
            command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "200", *only]
            with log.open("w") as file:
                command += [sys.executable, __file__, part]
                # a session of its own, so that the watched program can be ended too: it would go on using the GPU
                started = subprocess.Popen(
                    command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            running.append((f"{tool} {part}", started, log))
        for name, started, log in running:
            try:
                outcome = f"exit {started.wait(max(0.0, deadline - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                outcome = f"not done after {seconds:.0f} s"
            text = log.read_text(errors="replace")
            print(f"-- {name}\n{text}")
            if name == "racecheck hopper" and outcome == "exit 9":
                explained, others = hazards(text)
                outcome = f"{explained} pairs handed over by barriers, {len(others)} other hazards"
                failed |= bool(others) or not explained
            else:
                failed |= outcome != "exit 0"
            said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|.*(?:numbers|skipped|is off by).*", text)
            summary.append(f"{name}: {outcome}; {'; '.join(said) or 'nothing said'}")
    print("\n".join(summary))
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "sm90"))
    parser.add_argument("--seconds", type=float, default=60, help="when to give up")
    asked = parser.parse_args()
    sys.exit(run(asked.part) if asked.part else sanitize(asked.seconds))
