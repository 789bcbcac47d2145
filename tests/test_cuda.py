"""The portable CUDA kernels: their arithmetic on the host, what nvcc made of them, and on a GPU against the oracle."""

import shutil
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

import treegrpo_kernels as tk
from treegrpo_kernels import native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
BUILT = sorted((ROOT / "kernels" / "treegrpo_kernels").glob("_C_cuda.*so"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_object = pytest.mark.skipif(not BUILT, reason="_C_cuda is not built here (make cuda, needs nvcc)")


# ---- without a GPU


@needs_compiler
def test_rows_on_the_host(tmp_path):
    """Every row algorithm, run by one lane and by an imitated warp, equals attention written out pair by pair."""
    program = tmp_path / "test_rows"
    source = CSRC / "test" / "test_rows.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O2", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "runs ok" in result.stdout


@needs_object
def test_no_kernel_spills():
    check = [sys.executable, str(CSRC / "cuda" / "check_spills.py"), str(BUILT[0])]
    result = subprocess.run(check, capture_output=True, text=True)
    if result.returncode == 2:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    for arch in ("sm_80", "sm_90a"):
        # three kernels, four input types, three row sizes
        assert sum(line.startswith(arch) and " sm90 " not in line for line in lines) == 36
    # for Hopper seven kernels, two types, two head dims
    hopper = [line for line in lines if " sm90 " in line]
    assert len(hopper) == 28 and sum("HGMMA" in line and "UTMALDG" in line for line in hopper) == 16


def test_what_a_hopper_kernel_lacks_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(CSRC / "cuda"))
    from check_spills import Kernel

    name = "_ZN8treegrpo4sm9010dkv_kernelILi128ELNS0_4HalfE0ELb1EEEvNS0_13KeyGradParamsI14CUtensorMap_stEE"
    counts = {"HGMMA": 64, "UTMALDG": 64, "USETMAXREG": 2, "WARPGROUP.DEPBAR": 10}
    assert Kernel("sm_90a", name, 168, 0, counts).faults == []
    assert Kernel("sm_90a", name, 168, 0, counts).readable == "sm90 dkv_kernel<128, bf16, dq>"
    assert Kernel("sm_90a", name, 168, 8, counts).faults == ["SPILLS"]
    assert Kernel("sm_90a", name, 128, 0, counts).faults == ["not 168 registers"]
    assert Kernel("sm_90a", name, 168, 0, counts | {"HGMMA": 0}).faults == ["no HGMMA"]
    assert "40 waits" in Kernel("sm_90a", name, 168, 0, counts | {"WARPGROUP.DEPBAR": 40}).faults[0]


@needs_object
@needs_compiler
@pytest.mark.skipif(native.cpu_reason() is not None, reason="_C, which holds the schema, is not built")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the symbol itself")
def test_object_loads_and_registers(tmp_path):
    """A CPU torch lacks one symbol of those needed; with a stand-in the object loads and its ops register."""
    source, stand_in = tmp_path / "stream.cpp", tmp_path / "libstream.so"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = 0, 0; }\n'
    )
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(stand_in)], check=True)
    script = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "from treegrpo_kernels import native\n"
        "assert native._failure('_C') is None and native._failure('_C_cuda') is None, native._failure('_C_cuda')\n"
        "for op in ('attn_fwd', 'attn_bwd', 'sm90_fwd', 'sm90_bwd'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'treegrpo_native::{op}', 'CUDA'), op\n"
    )
    env = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr


def test_refused_on_cpu_tensors():
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q = torch.randn(plan.num_tokens, 1, 8)
    with pytest.raises(ValueError, match="CUDA"):
        tk.tree_attention(q, q, q, plan, backend="cuda")


# ---- on a GPU

gpu = pytest.mark.gpu


def run(subtree_end, hq=2, hkv=1, d=16, dv=None, dtype=torch.float64, seed=0, sinks=False, **options):
    """out, lse, dq, dk, dv (and dsinks) of the kernel, of the float64 oracle, and of the oracle in ``dtype``."""
    subtree_end = torch.as_tensor(subtree_end).cuda()
    plan = tk.TreePlan.build(subtree_end)
    gen = torch.Generator().manual_seed(seed)
    num_tokens = len(subtree_end)
    shapes = [(num_tokens, hq, d), (num_tokens, hkv, d), (num_tokens, hkv, dv or d), (num_tokens, hq, dv or d)]
    *inputs, dout = (torch.randn(s, generator=gen, dtype=torch.float64).cuda().to(dtype) for s in shapes)
    if sinks:
        inputs.append(torch.linspace(-1, 1, hq, dtype=dtype, device="cuda"))

    def go(attend, cast):
        leaves = [x.to(cast).detach().clone().requires_grad_() for x in inputs]
        out, lse = attend(*leaves[:3], leaves[3] if sinks else None)
        return [out, lse, *torch.autograd.grad(out, leaves, dout.to(cast))]

    def kernel(q, k, v, s):
        return tk.tree_attention(q, k, v, plan, sinks=s, backend="cuda", return_lse=True, **options)

    def oracle(q, k, v, s):
        return tk.reference.tree_attention(q, k, v, subtree_end, sinks=s, return_lse=True, **options)

    return go(kernel, dtype), go(oracle, torch.float64), go(oracle, dtype)


def worst(found, oracle) -> float:
    """Largest error over all results, relative to the largest value of each (or to 1e-3 where that is smaller)."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() if a.numel() else 0.0
        for a, b in zip(found, oracle, strict=True)
    )


@gpu
@pytest.mark.parametrize("name", cases.NAMED)
def test_named_forests(name):
    found, oracle, _ = run(cases.named_subtree_end(name))
    assert worst(found, oracle) < 1e-12


@gpu
@pytest.mark.parametrize(("hq", "hkv"), [(4, 4), (4, 1), (8, 2)])
@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (3, 5), (64, 64), (65, 32), (100, 36), (128, 128), (129, 17), (17, 255), (256, 256)]
)
def test_heads_and_dims(hq, hkv, d, dv):
    found, oracle, _ = run(cases.random_subtree_end(203, d), hq=hq, hkv=hkv, d=d, dv=dv)
    assert worst(found, oracle) < 1e-11


@gpu
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
def test_options(options):
    for seed, branch in enumerate((0.0, 0.02, 0.3)):
        found, oracle, _ = run(cases.random_subtree_end(331, seed, branch), hq=4, hkv=2, d=20, **options)
        assert worst(found, oracle) < 1e-11


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 31, 33, 257, 2000])
def test_lengths(num_tokens):
    found, oracle, _ = run(cases.random_subtree_end(num_tokens, num_tokens))
    assert worst(found, oracle) < 1e-11


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(window=40, softcap=5.0, sinks=True)], ids=["plain", "all"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_low_precision_errs_at_most_twice_as_much_as_the_same_oracle(dtype, options, d):
    """The oracle in the inputs' dtype computes in float32 and rounds its results, as the kernel does."""
    found, oracle, low = run(cases.random_subtree_end(400, 1, branch=0.03), hq=4, hkv=2, d=d, dtype=dtype, **options)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, ours, theirs, exact in zip(names, found, low, oracle, strict=False):
        eps = torch.finfo(ours.dtype).eps
        allowed = 2 * (theirs.double() - exact).abs().max() + 4 * eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed, name


@gpu
def test_large_scores_do_not_overflow():
    found, oracle, _ = run(cases.random_subtree_end(150, 0), dtype=torch.float32, scale=200.0)
    assert all(x.isfinite().all() for x in found)
    assert worst(found[:2], oracle[:2]) < 1e-3


@gpu
def test_strided_inputs():
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("ragged_turns")).cuda())
    # heads first is read as it lies; a gap inside rows is copied away
    wide = torch.randn(3, 4, plan.num_tokens, 32, device="cuda")
    for strided in ([x.transpose(0, 1) for x in wide], [x.transpose(0, 1)[..., ::2] for x in wide]):
        assert not strided[0].is_contiguous()
        expected = tk.tree_attention(*(x.contiguous() for x in strided), plan, backend="cuda")
        assert torch.equal(tk.tree_attention(*strided, plan, backend="cuda"), expected)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitwise_repeatable(dtype):
    subtree_end = cases.random_subtree_end(1500, 5, branch=0.01)
    first, second = (run(subtree_end, dtype=dtype, hq=4, hkv=2, d=64)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
def test_every_output_is_written():
    # the allocator hands freed memory out again: fill it with NaN first
    junk = [torch.full((1 << 16,), float("nan"), dtype=torch.float64, device="cuda") for _ in range(64)]
    del junk
    found, oracle, _ = run(cases.random_subtree_end(300, 3), hq=4, hkv=2, d=33, dv=47, sinks=True, window=9)
    assert worst(found, oracle) < 1e-11


@gpu
def test_runs_on_the_current_stream():
    subtree_end = torch.from_numpy(cases.random_subtree_end(600, 2)).cuda()
    plan = tk.TreePlan.build(subtree_end)
    x = torch.randn(3, plan.num_tokens, 2, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # the inputs change on the side stream: a kernel on another one would read the old values
        late = x * 3 - 1
        out = tk.tree_attention(*late, plan, backend="cuda")
    side.synchronize()
    assert torch.equal(out, tk.tree_attention(*(x * 3 - 1), plan, backend="cuda"))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    subtree_end = cases.random_subtree_end(200, 2)
    results = []
    for device in ("cuda:0", "cuda:1"):
        plan = tk.TreePlan.build(torch.from_numpy(subtree_end), device=device)
        q = torch.linspace(-1, 1, 200 * 64, device=device).view(200, 2, 32)
        results.append(tk.tree_attention(q, q, q, plan, backend="cuda").cpu())
    assert torch.equal(*results)


@gpu
def test_empty_row():
    plan = tk.TreePlan.build(torch.zeros(0, dtype=torch.int32, device="cuda"))
    q = torch.zeros(0, 2, 8, device="cuda", requires_grad=True)
    out = tk.tree_attention(q, q, q, plan, backend="cuda")
    out.sum().backward()
    assert out.shape == (0, 2, 8) and q.grad.shape == q.shape


@gpu
def test_deep_and_wide_forest_agrees_with_triton():
    """Too long for the dense oracle: 20,000 tokens, checked against the other kernel."""
    row = np.concatenate([cases.balanced_subtree_end(512, 3, 3, 128) + i * 5504 for i in range(4)])
    plan = tk.TreePlan.build(torch.from_numpy(row).cuda())
    q, k, v = (torch.randn(plan.num_tokens, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    ours, theirs = (tk.tree_attention(q, k, v, plan, backend=b).float() for b in ("cuda", "triton"))
    assert (ours - theirs).abs().max() < 0.02


@gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(subtree_end="cpu"), "CUDA device"),
        (dict(dim=257), "256"),
        (dict(dtype=torch.int32), "float16"),
    ],
    ids=str,
)
def test_the_operator_itself_refuses(change, message):
    native.load()
    end = torch.arange(1, 9, dtype=torch.int32, device=change.get("subtree_end", "cuda"))
    q = torch.zeros(8, 1, change.get("dim", 16), device="cuda", dtype=change.get("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.treegrpo_native.attn_fwd(q, q, q, None, end, torch.zeros_like(end), 1.0, 0, 0.0)
