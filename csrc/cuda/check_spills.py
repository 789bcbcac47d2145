"""What ptxas made of every kernel in the built `_C_cuda`: fails on any stack, and on Hopper kernels without what they
are written for.

    python csrc/cuda/check_spills.py [OBJECT]

A spilled register lives on the stack, and so does an array the compiler could not keep in registers: both are slow,
and neither changes a result, so nothing else would notice. Kernels of csrc/cuda/sm90 must multiply by wgmma (HGMMA),
load by TMA (UTMALDG), share out registers (USETMAXREG), and wait for products (WARPGROUP.DEPBAR) as often as their
source says: where ptxas cannot follow, it waits after every product. Needs cuobjdump: of the CUDA toolkit, or the one
inside triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

OBJECTS = Path(__file__).resolve().parents[2] / "kernels" / "treegrpo_kernels"
LINE = re.compile(r"Function (?P<name>\S+?):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")
# cuobjdump reads several architectures: parts open with this
ARCH = re.compile(r"arch = (\S+)")
INSTRUCTIONS = ("HGMMA", "UTMALDG", "USETMAXREG", "WARPGROUP.DEPBAR")
# a thread's registers at the start, of which 384 threads fill a multiprocessor's file before setmaxnreg shares them out
REGISTERS = 168
# waits for products that the source of a Hopper kernel has, each place where it is inlined counted
WAITS = {"forward": 7, "dq": 10, "dkv": 6, "dkv, dq": 12}


@dataclass
class Kernel:
    """One kernel for one architecture."""

    arch: str
    name: str
    registers: int
    stack: int
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def hopper(self) -> str | None:
        """Which of the kernels of csrc/cuda/sm90 this is, where they are not empty."""
        match = re.search(r"4sm90\d+(forward|dq|dkv)_kernel\w*?(Lb1E)?EEv", self.name)
        return (match[1] + (", dq" if match[2] else "")) if match and self.arch == "sm_90a" else None

    @property
    def readable(self) -> str:
        """`forward_kernel<4, float>` of a mangled template instance; other names as they are."""
        match = re.search(r"\d([a-z_]+_kernel)ILi(\d+)ELNS0_4HalfE(\d)E(Lb1E)?", self.name)
        if match:
            return f"sm90 {match[1]}<{match[2]}, {('bf16', 'fp16')[int(match[3])]}{', dq' if match[4] else ''}>"
        match = re.search(r"([a-z]+_kernel)ILi(\d+)E\d*(\w+?)EEv", self.name)
        return f"{match[1]}<{match[2]}, {dict(f='float', d='double').get(match[3], match[3])}>" if match else self.name

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in a few words each."""
        found = ["SPILLS"] if self.stack else []
        if self.hopper:
            found += [f"no {name}" for name in INSTRUCTIONS if not self.counts[name]]
            if self.registers != REGISTERS:
                found.append(f"not {REGISTERS} registers")
            waits = self.counts["WARPGROUP.DEPBAR"]
            if waits > WAITS[self.hopper]:
                found.append(f"{waits} waits for products, not {WAITS[self.hopper]}")
        return found


def cuobjdump() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = importlib.util.find_spec("triton")
    inside = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, [*os.get_exec_path(), Path(home, "bin"), *inside])))


def kernels(tool: str, object_: Path) -> list[Kernel]:
    """Every kernel of the object; those for Hopper with the instructions they consist of."""
    text = subprocess.run([tool, "-res-usage", str(object_)], capture_output=True, text=True, check=True).stdout
    found = []
    for part in text.split("arch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for match in LINE.finditer(part):
            # those of csrc/cuda/sm90 are empty for other architectures
            if arch == "sm_90a" or "4sm90" not in match["name"]:
                stack = int(match["stack"]) + int(match["local"])
                found.append(Kernel(arch, match["name"], int(match["reg"]), stack))
    wanted = {kernel.name: kernel for kernel in found if kernel.hopper}
    text = subprocess.run(
        [tool, "-sass", "-arch", "sm_90a", str(object_)], capture_output=True, text=True, check=True
    ).stdout
    for part in text.split("Function : ")[1:]:
        kernel = wanted.get(part.split(maxsplit=1)[0])
        if kernel:
            kernel.counts = {name: part.count(name) for name in INSTRUCTIONS}
    return found


def main() -> int:
    objects = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(OBJECTS.glob("_C_cuda.*so"))
    tool = cuobjdump()
    if not objects or tool is None:
        print("nothing to check: " + ("no cuobjdump found" if objects else "_C_cuda is not built (make cuda)"))
        return 2
    found = kernels(tool, objects[0])
    for kernel in found:
        made = " ".join(f"{count} {name}" for name, count in kernel.counts.items())
        print(
            f"{kernel.arch:8} {kernel.readable:36} {kernel.registers:4} registers {kernel.stack:5} bytes of stack"
            f" {made} {', '.join(kernel.faults)}".rstrip()
        )
    bad = sum(bool(kernel.faults) for kernel in found)
    print(f"{len(found)} kernels in {objects[0].name}, {bad} not as they should be")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    sys.exit(main())
