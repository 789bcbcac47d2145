"""Registers and stack of every kernel in the built `_C_cuda`, as ptxas recorded them; fails on any stack.

    python csrc/cuda/check_spills.py [OBJECT]

A spilled register lives on the stack, and so does an array the compiler could not keep in registers: both are slow, and
neither changes a result, so nothing else would notice. Needs cuobjdump: of the CUDA toolkit, or the one inside triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OBJECTS = Path(__file__).resolve().parents[2] / "kernels" / "treegrpo_kernels"
LINE = re.compile(r"Function (?P<name>\S+?):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")


def cuobjdump() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = importlib.util.find_spec("triton")
    inside = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, [*os.get_exec_path(), Path(home, "bin"), *inside])))


def usage(tool: str, object_: Path) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel's name as mangled, registers, bytes of stack and local memory) of every kernel."""
    text = subprocess.run([tool, "-res-usage", str(object_)], capture_output=True, text=True, check=True).stdout
    found = []
    for part in text.split("arch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        found += [(arch, m["name"], int(m["reg"]), int(m["stack"]) + int(m["local"])) for m in LINE.finditer(part)]
    return found


def readable(name: str) -> str:
    """`forward_kernel<4, float>` of a mangled template instance; other names as they are."""
    match = re.search(r"([a-z]+_kernel)ILi(\d+)E\d*(\w+?)EEv", name)
    return f"{match[1]}<{match[2]}, {dict(f='float', d='double').get(match[3], match[3])}>" if match else name


def main() -> int:
    objects = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(OBJECTS.glob("_C_cuda.*so"))
    tool = cuobjdump()
    if not objects or tool is None:
        print("nothing to check: " + ("no cuobjdump found" if objects else "_C_cuda is not built (make cuda)"))
        return 2
    kernels = usage(tool, objects[0])
    for arch, name, registers, stack in kernels:
        mark = "   SPILLS" if stack else ""
        print(f"{arch:8} {readable(name):32} {registers:4} registers {stack:5} bytes of stack{mark}")
    bad = sum(stack > 0 for *_, stack in kernels)
    print(f"{len(kernels)} kernels in {objects[0].name}, {bad} use the stack")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
