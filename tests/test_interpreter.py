"""What tests/interpreter.py puts in place of Triton's own gives the same, and finds an int32 that overflows."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="nothing is interpreted here")


@triton.jit
def add_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(a_ptr + at) + tl.load(b_ptr + at))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 8, 16])
def test_sums_are_torchs(size, dtype):
    a, b = torch.arange(2 * size).to(dtype).view(2, size)
    out = torch.empty_like(a)
    add_kernel[(1,)](a, b, out, size)
    assert torch.equal(out, a + b)


def test_overflow_is_found():
    largest, out = torch.full((8,), 2**31 - 1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    with pytest.raises(Exception, match="int32 overflows in add"):
        add_kernel[(1,)](largest, torch.ones_like(largest), out, 8)
    add_kernel[(1,)](largest, torch.zeros_like(largest), out, 8)
    assert torch.equal(out, largest)
