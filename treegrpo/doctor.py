"""What this machine can run, and one cure per problem. Reports, never fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

_PACKAGES = {
    "torch": "pip install torch",
    "triton": "pip install triton (Linux; needed for the triton backend only)",
    "transformers": "pip install 'treegrpo[hf]'",
    "accelerate": "pip install 'treegrpo[train]'",
    "peft": "pip install 'treegrpo[train]' (needed for LoRA only)",
    "numpy": "pip install numpy",
    "bm25s": "pip install 'treegrpo[search]' (needed for retriever=bm25: only)",
    "math-verify": "pip install 'treegrpo[math]' (needed for math_answer only)",
}
_NEEDS_GPU = ("triton", "cuda", "gather")
_BUILD = "pip install --no-build-isolation . (editable: -e .) in treegrpo's folder, with"
_CURES = {
    "cpu": f"{_BUILD} a C++17 compiler (g++ or clang++)",
    "cuda": f"{_BUILD} a C++17 compiler and a CUDA toolkit (nvcc)",
    "triton": "pip install triton (Linux), on a GPU of compute capability 8.0 or newer",
    "gather": "pip install torch>=2.11 with CUDA; flash-attn is used when installed (pip install 'treegrpo[flash]')",
    "reference": "pip install torch",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `cure` is None where nothing is wrong."""

    part: str
    state: str
    cure: str | None = None


def examine() -> list[Finding]:
    """Every finding, in the order they are printed."""
    return [_python(), *_packages(), *_compilers(), *_devices(), *_backends(), *_recurrence(), _engines()]


def print_report(console) -> None:
    """Prints the findings as a table, then a cure for each problem, to a rich Console."""
    from rich.table import Table

    findings = examine()
    table = Table(title="treegrpo doctor", title_justify="left")
    table.add_column("part", no_wrap=True)
    table.add_column("state", overflow="fold")
    for finding in findings:
        state = _escape(finding.state)
        table.add_row(finding.part, state if finding.cure is None else f"[yellow]{state}[/yellow]")
    console.print(table)
    problems = [finding for finding in findings if finding.cure]
    for finding in problems:
        console.print(f"[yellow]{finding.part}[/yellow]: {_escape(finding.cure)}", soft_wrap=True)
    usable = [
        finding.part.split()[-1] for finding in findings if finding.part.startswith("backend") and finding.cure is None
    ]
    console.print(
        f"Usable here: {', '.join(usable) or 'nothing'}. Backends listed above as missing are optional.", soft_wrap=True
    )


def _escape(text: str | None) -> str:
    from rich.markup import escape

    return escape(text or "")


def _python() -> Finding:
    return Finding(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )


def _packages() -> list[Finding]:
    findings = []
    for name, cure in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
            importlib.import_module(name.replace("-", "_"))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", cure))
        except ImportError as error:
            findings.append(Finding(name, f"{version}, but importing it fails: {error}", f"reinstall: {cure}"))
        else:
            findings.append(Finding(name, version))
    return findings


def _engines() -> Finding:
    """What `treegrpo train --rollouts` can sample with here."""
    has = lambda *names: any(importlib.util.find_spec(name) for name in names)  # noqa: E731
    states = {
        "hf": "ready" if has("transformers") else "needs transformers",
        "server:URL": "ready" if has("httpx", "httpx2") else "needs httpx (pip install 'treegrpo[server]')",
        "vllm": "installed" if has("vllm") else "not installed",
    }
    return Finding("rollouts", "; ".join(f"{name} {state}" for name, state in states.items()))


def _compilers() -> list[Finding]:
    findings = []
    for part, names, cure in (
        (
            "C++ compiler",
            (os.environ.get("CXX"), "g++", "clang++"),
            "apt install g++ (needed to build the cpu backend)",
        ),
        (
            "nvcc",
            (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"),
            "install a CUDA toolkit (cuda backend only)",
        ),
    ):
        path = next((found for name in names if name and (found := shutil.which(name))), None)
        if path is None:
            findings.append(Finding(part, "not found", cure))
            continue
        lines = (
            subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
            .stdout.strip()
            .splitlines()
        )
        # nvcc's first line is its name; the release is on a later one.
        line = next((line for line in lines if "release" in line), lines[0] if lines else "prints no version")
        findings.append(Finding(part, f"{line.strip()} ({path})"))
    return findings


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("GPU", "none seen by torch")]
    return [
        Finding(
            f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        )
        for i in range(torch.cuda.device_count())
    ]


def _backends() -> list[Finding]:
    try:
        import treegrpo_kernels
    except ImportError as error:
        return [
            Finding(
                "backends", f"treegrpo_kernels does not import: {error}", "pip install -e . in the repository's root"
            )
        ]
    import torch

    findings = []
    for name, reason in treegrpo_kernels.backends().items():
        if name == "cpu":
            # where there is a GPU, backends() tells of its tensors
            reason = _cpu_reason()
        if reason is None:
            findings.append(Finding(f"backend {name}", _usable(name)))
        elif name in _NEEDS_GPU and not torch.cuda.is_available():
            findings.append(Finding(f"backend {name}", reason, "run on a machine with an NVIDIA GPU"))
        else:
            findings.append(Finding(f"backend {name}", reason, _CURES.get(name, "see the reason")))
    return findings


def _recurrence() -> list[Finding]:
    """What recurrent layers of hybrid models are computed with; nothing where the backends' finding says why."""
    try:
        import torch

        from treegrpo_kernels.recurrence import fla_reason
    except ImportError:
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = fla_reason(device, torch.bfloat16)
    if reason is None:
        return [Finding("recurrent layers", "flash-linear-attention, else torch")]
    return [Finding("recurrent layers", f"torch ({reason})", reason if device.type == "cuda" else None)]


def _usable(name: str) -> str:
    match name:
        case "cpu":
            return f"usable on CPU tensors, {_cpu_info()}"
        case "triton":
            import torch

            if not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
                return "usable"
            from treegrpo_kernels.triton import hopper

            unknown = hopper.unknown_release()
            return "usable, " + (
                f"but without its Hopper kernels, which do not serve {unknown}: install one of those releases"
                if unknown
                else "with Hopper kernels for bf16 and fp16 heads of 33 to 256"
            )
        case "cuda":
            import torch

            from treegrpo_kernels.hopper_cuda import NOTE

            is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
            asked = f"; asked for by name, bf16 and fp16 heads of 64 and 128 take {NOTE}" if is_hopper else ""
            return f"usable; auto takes it for what triton does not (float64){asked}"
        case _:
            return "usable"


def _cpu_reason() -> str | None:
    from treegrpo_kernels import native

    return native.cpu_reason()


def _cpu_info() -> str:
    from treegrpo_kernels import native

    return native.cpu_info()
