"""The C++ CPU kernels, every instruction set this machine has, against the float64 oracle."""

import time

import cases
import numpy as np
import pytest
import torch

import treegrpo_kernels as tk
from treegrpo_kernels import native

# tensors this small lose more to threads waiting for each other than they gain
pytestmark = pytest.mark.usefixtures("one_thread")

if native.cpu_reason() is not None:
    pytest.skip(f"the CPU kernel is not usable: {native.cpu_reason()}", allow_module_level=True)

# sizes of csrc/cpu/layout.h: tests place branches around them. kTile; keys between two updates of the running maximum
TILE, STEP = 96, 384


def machine_isas() -> list[str]:
    found = []
    for name in ("avx512", "avx2", "portable"):
        try:
            native.set_isa(name)
        except (RuntimeError, ValueError):
            continue
        found.append(name)
    native.set_isa("")
    return found


ISAS = machine_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    yield request.param
    native.set_isa("")


def run(subtree_end, hq=2, hkv=1, d=16, dv=None, dtype=torch.float64, seed=0, sinks=False, **options):
    """(results, oracle, inputs): out, lse, dq, dk, dv (and dsinks) of the kernel and of the float64 oracle."""
    subtree_end = torch.as_tensor(subtree_end)
    plan = tk.TreePlan.build(subtree_end)
    gen = torch.Generator().manual_seed(seed)
    num_tokens = len(subtree_end)
    shapes = [(num_tokens, hq, d), (num_tokens, hkv, d), (num_tokens, hkv, dv or d), (num_tokens, hq, dv or d)]
    *inputs, dout = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)
    sink = torch.linspace(-1, 1, hq, dtype=dtype) if sinks else None
    if sinks:
        inputs.append(sink)

    def go(attend, cast):
        leaves = [x.to(cast).detach().clone().requires_grad_() for x in inputs]
        out, lse = attend(*leaves[:3], leaves[3] if sinks else None)
        return [out, lse, *torch.autograd.grad(out, leaves, dout.to(cast))]

    found = go(
        lambda q, k, v, s: tk.tree_attention(q, k, v, plan, sinks=s, backend="cpu", return_lse=True, **options), dtype
    )
    oracle = go(
        lambda q, k, v, s: tk.reference.tree_attention(q, k, v, subtree_end, sinks=s, return_lse=True, **options),
        torch.float64,
    )
    return found, oracle, (inputs, dout)


def worst(found, oracle) -> float:
    """Largest error over all results, relative to the largest value of each (or to 0.1 where that is smaller)."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)).item() if a.numel() else 0.0
        for a, b in zip(found, oracle, strict=True)
    )


@pytest.mark.parametrize("name", cases.NAMED)
def test_named_forests(isa, name):
    found, oracle, _ = run(cases.named_subtree_end(name))
    assert worst(found, oracle) < 1e-12


@pytest.mark.parametrize("residue", range(TILE))
def test_branch_start_at_every_residue_of_the_tile(residue):
    found, oracle, _ = run(cases.residue_subtree_end(residue, TILE), d=4, hq=1, window=None)
    assert worst(found, oracle) < 1e-12


@pytest.mark.parametrize("residue", range(0, STEP, 97))
def test_branch_start_around_the_key_step(isa, residue):
    found, oracle, _ = run(cases.residue_subtree_end(residue, STEP), d=4, hq=1)
    assert worst(found, oracle) < 1e-12


@pytest.mark.parametrize(
    ("hq", "hkv", "d", "dv"),
    [(4, 1, 3, 5), (8, 2, 64, 64), (4, 4, 96, 32), (8, 1, 100, 36), (4, 2, 128, 128), (2, 1, 256, 256), (3, 3, 1, 1)],
)
def test_heads_and_dims(isa, hq, hkv, d, dv):
    found, oracle, _ = run(cases.random_subtree_end(203, d), hq=hq, hkv=hkv, d=d, dv=dv, scale=d**-0.5)
    assert worst(found, oracle) < 1e-11


@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=7),
        dict(window=70),
        dict(window=10_000),
        dict(softcap=1.5),
        dict(softcap=30.0, scale=2.0),
        dict(sinks=True),
        dict(window=20, softcap=2.0, sinks=True, scale=-0.7),
        dict(scale=0.0),
    ],
    ids=str,
)
def test_options(isa, options):
    for seed, branch in enumerate((0.0, 0.02, 0.3)):
        found, oracle, _ = run(cases.random_subtree_end(211, seed, branch), hq=4, hkv=2, d=20, **options)
        assert worst(found, oracle) < 1e-11


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 95, 96, 97, 191, 192, 193, 383, 384, 385, 500])
def test_lengths_around_the_tiles(isa, num_tokens):
    found, oracle, _ = run(cases.random_subtree_end(num_tokens, num_tokens))
    assert worst(found, oracle) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(window=40, softcap=5.0, sinks=True)], ids=["plain", "all"])
def test_low_precision_errs_at_most_twice_as_much_as_torch(isa, dtype, options):
    """FlashAttention's rule: at most twice the error of the same formula in the same dtype, plus rounding."""
    subtree_end = torch.from_numpy(cases.random_subtree_end(400, 1, branch=0.03))
    found, oracle, (inputs, dout) = run(subtree_end, hq=4, hkv=2, d=64, dtype=dtype, **options)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in leaves[:3])
    scores = torch.einsum("ihd,jhd->hij", q, k) * 64**-0.5
    if options:
        scores = 5.0 * torch.tanh(scores / 5.0)
    mask = tk.reference.dense_mask(subtree_end, options.get("window"))
    scores = scores.masked_fill(~mask, float("-inf"))
    if options:
        scores = torch.cat([scores, leaves[3][:, None, None].expand(-1, 400, 1)], -1)
    low = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1)[..., :400], v)
    lows = [low, *torch.autograd.grad(low, leaves, dout)]
    for name, ours, theirs, exact in zip(
        ("out", "dq", "dk", "dv", "dsinks"), [found[0], *found[2:]], lows, [oracle[0], *oracle[2:]], strict=False
    ):
        allowed = 2 * (theirs.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed, name


def test_large_scores_do_not_overflow(isa):
    subtree_end = torch.from_numpy(cases.random_subtree_end(150, 0))
    found, oracle, _ = run(subtree_end, dtype=torch.float32, scale=200.0)
    assert all(x.isfinite().all() for x in found)
    assert worst(found[:2], oracle[:2]) < 1e-3


def test_strided_inputs(isa):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("ragged_turns")))
    wide = torch.randn(3, 4, plan.num_tokens, 32, dtype=torch.float64)
    strided = [x.transpose(0, 1)[..., ::2] for x in wide]
    assert not strided[0].is_contiguous()
    expected = tk.tree_attention(*(x.contiguous() for x in strided), plan, backend="cpu")
    assert torch.equal(tk.tree_attention(*strided, plan, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bitwise_repeatable_and_independent_of_threads(isa, dtype):
    subtree_end = cases.random_subtree_end(1500, 5, branch=0.01)
    threads = torch.get_num_threads()
    try:
        results = []
        for num in (1, 2, 2, 5):
            torch.set_num_threads(num)
            results.append(run_kernel(subtree_end, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def run_kernel(subtree_end, dtype):
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end))
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(plan.num_tokens, 2, 32, generator=gen).to(dtype).requires_grad_()
    k, v = (torch.randn(plan.num_tokens, 1, 32, generator=gen).to(dtype).requires_grad_() for _ in range(2))
    out = tk.tree_attention(q, k, v, plan, backend="cpu")
    return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def test_a_plain_causal_mask_would_fail():
    """The comparison can fail: with siblings visible to each other the kernel is far from the oracle of the tree."""
    subtree_end = torch.from_numpy(cases.residue_subtree_end(10, TILE))
    causal, *_ = run(torch.full_like(subtree_end, len(subtree_end)))
    _, oracle, _ = run(subtree_end)
    assert worst(causal, oracle) > 1e-2


def test_unknown_isa_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="sse9"):
        native.set_isa("sse9")
    assert "threads" in native.cpu_info()

    def refuse(name):
        raise RuntimeError(f"{name} is unknown")

    monkeypatch.setattr(torch.ops.treegrpo_native, "set_isa", refuse)
    with pytest.raises(ValueError, match="sse9 is unknown"):
        native.set_isa("sse9")


def test_time_grows_with_the_pairs_not_with_the_square():
    """Sixteen times the trees of one size cost about sixteen times as much; a T^2 kernel would cost 256 times."""
    tree = cases.balanced_subtree_end(64, 3, 2, 32)

    def seconds(copies):
        row = np.concatenate([tree + i * len(tree) for i in range(copies)])
        plan = tk.TreePlan.build(torch.from_numpy(row))
        q, k, v = (torch.randn(plan.num_tokens, 2, 32) for _ in range(3))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            tk.tree_attention(q, k, v, plan, backend="cpu")
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(64) < 64 * seconds(4)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, -1, 0x7FC00000])
@pytest.mark.parametrize("where", [0, 1])
def test_any_nan_reaches_the_output(bits, where):
    """CUDA's NaN has all mantissa bits set, others few: none may be carried into a number."""
    plan = tk.TreePlan.build(torch.tensor([3, 2, 3]))
    q, k, v = (torch.randn(3, 1, 8) for _ in range(3))
    (q, k)[where][0] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    out, lse = tk.tree_attention(q, k, v, plan, backend="cpu", return_lse=True)
    seen = slice(None) if where else 0
    assert out[seen].isnan().all() and lse[seen].isnan().all()


def test_the_operator_checks_what_it_is_given():
    native.load()
    end, position = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    q = torch.zeros(1, 1, 4096)
    with pytest.raises(RuntimeError, match="head dims must be 1 to 256"):
        torch.ops.treegrpo_native.attn_fwd(q, q, q, None, end, position, 1.0, 0, 0.0)
    q = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match="window must be 0"):
        torch.ops.treegrpo_native.attn_fwd(q, q, q, None, end, position, 1.0, -1, 0.0)
