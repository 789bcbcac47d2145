"""What racecheck may report of the Hopper kernels and what it may not: sanitize.py."""

import os
import time
from pathlib import Path

import sanitize

TRITON = Path(sanitize.__file__).resolve().parent.parent / "kernels" / "treegrpo_kernels" / "triton"


def place(name, text):
    """``file:line`` of the first line that holds ``text``."""
    lines = (TRITON / name).read_text().splitlines()
    return f"{name}:{1 + next(i for i, line in enumerate(lines) if text in line)}"


def report(*accesses):
    (kind, where), *rest = accesses
    lines = [f"========= Error: Race reported between {kind} access at kernel+0x10 in {where}"]
    return "\n".join(
        [*lines, *(f"=========     and {kind} access at kernel+0x20 in {where} [64 hazards]" for kind, where in rest)]
    )


DKV, WIDE, WALK, FWD = "hopper_backward_dkv.py", "hopper_dkv_wide.py", "hopper_dkv_walk.py", "hopper_forward.py"


def test_values_handed_over_by_a_barrier_pass():
    text = ""
    for reader in (DKV, WIDE):
        text += report(
            ("Write", place(WALK, "s_lse.index(slot).store")), ("Read", place(reader, "s_lse.index(slot).load"))
        )
        text += "\n"
    text += report(
        ("Read", place(FWD, "def tree_attention_fwd")),
        ("Write", place(FWD, "gl.warp_specialize(")),
        ("Write", place(FWD, "def tree_attention_fwd")),
    )
    assert sanitize.hazards(text) == (4, [])


def test_any_other_pair_fails():
    stored, loaded = place(WALK, "s_lse.index(slot).store"), place(DKV, "s_delta.index(slot).load")
    other = place(DKV, "mbarrier.arrive")
    for pair in ((stored, loaded), (stored, stored), (other, loaded), ("elsewhere.py:3", loaded)):
        explained, others = sanitize.hazards(report(("Write", pair[0]), ("Read", pair[1])))
        assert explained == 0 and len(others) == 1


def test_what_never_ends_is_ended_with_its_children(tmp_path, monkeypatch, capsys):
    """A kernel that hangs would go on using the GPU, and the next measurement would suffer."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\n[ "$1" = --help ] && exit\nsleep 600 &\necho $! >> {tmp_path}/children\nwait\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sanitize.sanitize(2) != 0
    assert capsys.readouterr().out.count("not done after") == len(sanitize.PARTS) * len(sanitize.TOOLS)
    children = (tmp_path / "children").read_text().split()
    assert len(children) == len(sanitize.PARTS) * len(sanitize.TOOLS)
    for _ in range(100):
        alive = [pid for pid in children if is_alive(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def is_alive(pid):
    try:
        # a zombie, whom nobody has waited for yet, has ended
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
