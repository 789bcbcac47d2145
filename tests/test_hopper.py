"""What the Hopper kernels take, and how their inputs reach them; their numerics need a GPU: test_gpu_attention.py."""

import pytest
import torch

pytest.importorskip("triton")

from treegrpo_kernels.triton import hopper

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs(d=128, dv=128, dtype=BF16):
    """q and v."""
    return [torch.zeros(4, heads, dim, dtype=dtype) for heads, dim in ((2, d), (1, dv))]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_takes_what_most_models_ask_for(d, dtype):
    assert hopper.refusal(*inputs(d, d, dtype), 0.0, d**-0.5, 90) is None
    assert hopper.config(d) is hopper.config(d)


def test_other_head_dims_are_padded_where_half_the_work_is_of_use():
    served = {
        (96, 96): 128,
        (80, 80): 128,
        (33, 33): 64,
        (129, 129): 256,
        (192, 128): 256,
        (128, 40): 128,
        (40, 30): 64,
    }
    for dims, padded in served.items():
        assert hopper.padded_head_dim(*dims) == padded, dims
        assert hopper.config(*dims) is hopper.config(padded)
        assert hopper.refusal(*inputs(*dims), 0.0, 0.1, 90) is None
    for dims in ((32, 32), (16, 16), (100, 28), (28, 100), (200, 56)):
        assert hopper.refusal(*inputs(*dims), 0.0, 0.1, 90) is not None, dims


@pytest.mark.parametrize(
    ("shapes", "options", "arch", "why"),
    [
        (dict(), dict(), 80, "compute capability 8.0"),
        (dict(), dict(), 100, "compute capability 10.0"),
        (dict(dtype=FP32), dict(), 90, "float32"),
        (dict(d=32, dv=32), dict(), 90, "head dims 32 and 32"),
        (dict(dv=16, d=100), dict(), 90, "head dims 100 and 16"),
        (dict(), dict(softcap=3.0), 90, "softcap"),
        (dict(), dict(scale=0.0), 90, "scale 0.0"),
        (dict(), dict(scale=-1.0), 90, "scale -1.0"),
    ],
)
def test_says_what_it_leaves_to_the_plain_kernels(shapes, options, arch, why):
    asked = dict(softcap=0.0, scale=0.1) | options
    assert why in hopper.refusal(*inputs(**shapes), *asked.values(), arch)


def test_a_triton_they_were_never_compiled_with_gets_the_plain_kernels(monkeypatch):
    arguments = (*inputs(), 0.0, 0.1, 90)
    for release, known in {"3.6.0": True, "3.9.1": True, "3.10.0": False, "4.0.0": False, "3.5.1": False}.items():
        monkeypatch.setattr(hopper.triton, "__version__", release)
        assert (hopper.refusal(*arguments) is None) == known, release
    assert hopper.refusal(*arguments) == "Triton 3.5.1 (they know 3.6.x to 3.9.x)"


def test_inputs_are_copied_only_where_tma_cannot_read_them():
    row = torch.zeros(5, 12, 64, dtype=BF16)
    q, k, v = row.split([8, 2, 2], dim=1)
    for x in (row, q, k, v, row[1:], row[:, :1], row[:, 1:2]):
        assert hopper._packed(x, 64) is x
    heads_first = torch.zeros(8, 5, 64, dtype=BF16).transpose(0, 1)
    every_other = row[:, ::2]
    shifted = torch.zeros(5 * 64 + 1, dtype=BF16)[1:].view(5, 1, 64)
    odd_step = torch.zeros(5, 68, dtype=BF16)[:, :64].unflatten(1, (1, 64))
    repeated = row[:1].expand(5, 12, 64)
    one_token = torch.zeros(128, dtype=BF16).as_strided((1, 1, 64), (1, 64, 1))
    for x in (heads_first, every_other, shifted, odd_step, repeated, one_token):
        copy = hopper._packed(x, 64)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, x)
        assert copy.data_ptr() != x.data_ptr() and copy.stride(0) == x.shape[1] * 64
