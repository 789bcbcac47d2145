"""What racecheck may report of the Hopper kernels and what it may not: sanitize.py."""

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


DKV, FWD = "hopper_backward_dkv.py", "hopper_forward.py"


def test_values_handed_over_by_a_barrier_pass():
    text = report(("Write", place(DKV, "s_lse.index(slot).store")), ("Read", place(DKV, "s_lse.index(slot).load")))
    text += "\n" + report(
        ("Read", place(FWD, "def tree_attention_fwd")),
        ("Write", place(FWD, "gl.warp_specialize(")),
        ("Write", place(FWD, "def tree_attention_fwd")),
    )
    assert sanitize.hazards(text) == (3, [])


def test_any_other_pair_fails():
    stored, loaded = place(DKV, "s_lse.index(slot).store"), place(DKV, "s_delta.index(slot).load")
    other = place(DKV, "mbarrier.arrive")
    for pair in ((stored, loaded), (stored, stored), (other, loaded), ("elsewhere.py:3", loaded)):
        explained, others = sanitize.hazards(report(("Write", pair[0]), ("Read", pair[1])))
        assert explained == 0 and len(others) == 1
