"""Builds the two shared objects of csrc where it can, and installs as pure Python and Triton where it cannot.

TREEGRPO_BUILD=auto   (default) what this machine can build; what is left out is said in one line, with the reason
TREEGRPO_BUILD=cpu    the CPU object or an error
TREEGRPO_BUILD=cuda   both objects or an error
TREEGRPO_BUILD=none   nothing

Both objects use the LibTorch stable ABI: one build serves torch >= 2.10, and the CUDA one needs nvcc but no GPU and no
CUDA build of torch. MAX_JOBS caps the parallel compilations; TORCH_CUDA_ARCH_LIST is not read, see CUDA_ARCHS.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    # it would blame the license field of pyproject.toml
    raise SystemExit(
        f"treegrpo: setuptools {setuptools.__version__} is too old to build this: "
        f"pip install -U 'setuptools>={OLDEST_SETUPTOOLS}' wheel, then install again"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# machine code for sm_80 (and 86, 89) and sm_90, and PTX from which a driver compiles for anything newer
CUDA_ARCHS = ("compute_80,code=[sm_80,compute_80]", "compute_90a,code=sm_90a")
TARGET = "0x020A000000000000"  # torch 2.10, the oldest ABI with parallel_for
GIGABYTES_PER_JOB = 2


def say(text: str) -> None:
    print(f"treegrpo: {text}", file=sys.stderr, flush=True)


def sources(kind: str) -> list[str]:
    """Paths of one object's sources, relative to this file, from csrc/sources.txt."""
    lines = (line.split() for line in (CSRC / "sources.txt").read_text().splitlines() if not line.startswith("#"))
    return [f"csrc/{path}" for object_, path in (line for line in lines if line) if object_ == kind]


def missing(kind: str) -> str | None:
    """Why the object cannot be built here; None if it can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}): install torch first and use --no-build-isolation"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler: install g++ (or set CXX)"
    if kind == "cuda":
        if not sources("cuda"):
            return "no CUDA sources"
        if cuda_home() is None:
            return "no CUDA toolkit (nvcc and its headers) found: install it, or set CUDA_HOME to it"
        return other_cuda()
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit with nvcc in it; torch's own search gives up when torch is a CPU build."""
    found = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(named)] if named else [Path(found).resolve().parent.parent] if found else []
    whole = ("bin/nvcc", "include/cuda_runtime.h")  # nvcc on the path may be a wrapper that lies elsewhere
    return next((home for home in [*homes, Path("/usr/local/cuda")] if all((home / x).exists() for x in whole)), None)


def other_cuda() -> str | None:
    """Why torch's BuildExtension would refuse this nvcc, and stop the CPU object with it; None if it would not."""
    import torch

    text = subprocess.run([cuda_home() / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.", text.stdout)
    if release is None:
        return f"nvcc of {cuda_home()} does not say its version"
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != release[1]:
        return (
            f"nvcc is of CUDA {release[1]} but torch of CUDA {torch.version.cuda}: set CUDA_HOME to a matching toolkit"
        )
    return None


def extension(kind: str) -> Extension:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import include_paths, library_paths

    common = dict(include_dirs=include_paths(), library_dirs=library_paths(), py_limited_api=True)
    defines = [f"-DTORCH_TARGET_VERSION={TARGET}", "-DPy_LIMITED_API=0x030A0000"]
    host = ["-std=c++17", "-O3", "-fvisibility=hidden", *defines]
    if kind == "cpu":
        return Extension(
            "treegrpo_kernels._C",
            sources("cpu"),
            libraries=["c10", "torch", "torch_cpu"],
            extra_compile_args={"cxx": host},
            **common,
        )
    archs = [f"-gencode=arch={arch}" for arch in CUDA_ARCHS]
    device = [
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        *(f"{d}ULL" if "TARGET" in d else d for d in defines),
        *archs,
        "-Xptxas=-v,-warn-spills",
    ]
    # over a compiler it does not know torch would stop both objects, nvcc only its own; the stable ABI needs no check
    os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    home = cuda_home()
    cpp_extension.CUDA_HOME = str(home)
    common["library_dirs"] += [str(home / "lib64"), str(home / "lib")]
    return Extension(
        "treegrpo_kernels._C_cuda",
        sources("cuda"),
        # the CUDA runtime goes inside: no version of it has to be found when the object is loaded
        libraries=["c10", "torch_cpu", "cudart_static", "rt", "dl", "pthread"],
        # the stream comes through libtorch, which a linker that sees only a CPU torch would drop as unneeded
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        extra_compile_args={"cxx": [*host, "-DUSE_CUDA"], "nvcc": device},
        **common,
    )


def forget_older_than_headers(objects: Path) -> None:
    """Delete objects older than a header: with a CPU torch, BuildExtension tells ninja of no header of a .cu file."""
    newest = max(path.stat().st_mtime for pattern in ("*.h", "*.cuh") for path in CSRC.rglob(pattern))
    for path in objects.rglob("*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


def wanted() -> list[Extension]:
    choice = os.environ.get("TREEGRPO_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"TREEGRPO_BUILD={choice!r}: use auto, cpu, cuda or none")
    if choice == "none":
        return []
    kinds = ["cpu"] if choice == "cpu" else ["cpu", "cuda"]
    extensions = []
    for kind in kinds:
        reason = missing(kind)
        if reason is None:
            extensions.append(extension(kind))
        elif choice == "auto":
            say(f"the {kind} kernel is not built: {reason}")
        else:
            raise SystemExit(f"treegrpo: TREEGRPO_BUILD={choice}, but the {kind} kernel cannot be built: {reason}")
    return extensions


def builder() -> type:
    """torch's BuildExtension, one object after the other, an error reported and survived under TREEGRPO_BUILD=auto."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
            os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory // GIGABYTES_PER_JOB))))
            forget_older_than_headers(Path(self.build_temp) / "csrc" / "cuda")
            try:
                super().build_extension(ext)
            except Exception as error:
                # any failure of a compiler: fatal if the object was asked for, said aloud if it was only tried
                if os.environ.get("TREEGRPO_BUILD", "auto") != "auto":
                    raise
                lines = str(error).strip().splitlines()[-12:]
                say(f"{ext.name} FAILED to build and is left out; treegrpo works without it, more slowly. The error:")
                say("\n    ".join(lines))
                self.failed.append(ext.name)

        def run(self) -> None:
            self.failed: list[str] = []
            super().run()

        def copy_extensions_to_source(self) -> None:
            self.extensions = [ext for ext in self.extensions if ext.name not in self.failed]
            super().copy_extensions_to_source()

    return Build.with_options(use_ninja=shutil.which("ninja") is not None)


extensions = wanted()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": builder()} if extensions else {},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
