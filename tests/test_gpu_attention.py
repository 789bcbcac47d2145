"""Attention on a GPU through the public op: forests, lengths, options, layouts, long rows, against the float64 oracle.

Which kernels run: backend="triton" on sm_90 takes the Hopper kernels for bf16 and fp16 with D = Dv in {64, 128} and no
softcap, else the plain ones. Every combination of shape, dtype and options is compiled once, for seconds: one test runs
all its forests and lengths through one combination.
"""

import cases
import numpy as np
import pytest
import torch
from attention_checks import DEVICE, NAMES, check_op, differences, excess, inputs, same_bits, through_op

import treegrpo_kernels as tk

gpu = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REASONS = tk.backends()


def needs(backend, *values, id=None):
    """A parameter that is skipped, with the reason, where ``backend`` does not run."""
    skip = pytest.mark.skipif(REASONS[backend] is not None, reason=f"{backend}: {REASONS[backend]}")
    return pytest.param(backend, *values, marks=skip, id=id or backend)


def random_row(num_tokens, seed=0, branch=0.01):
    return cases.random_subtree_end(num_tokens, seed, branch=branch, root=0.002)


EPISODE = [380, 380, 380, 80]
FORESTS = {
    "chain": cases.nested_subtree_end((1500, [])),
    "star_64": cases.nested_subtree_end((300, [(13 + 5 * (i % 9), []) for i in range(64)])),
    "comb_50": cases.nested_subtree_end(cases.comb(50, 9, 27)),
    "binary": cases.balanced_subtree_end(31, 2, 6, 17),
    "small_trees": cases.nested_subtree_end(*((1 + i % 11, [(1 + i % 5, []), (1 + i % 3, [])]) for i in range(300))),
    "roots_alone": np.concatenate([np.arange(1, 200), 199 + cases.balanced_subtree_end(150, 3, 2, 40)]).astype(
        np.int32
    ),
    "search_agent": cases.nested_subtree_end(
        cases.searched(EPISODE, [1, 3], 200), cases.searched(EPISODE, [0, 2], 200)
    ),
    "random": random_row(2777),
}


def check_forest(backend, subtree_end, d, dv=None, dtype=BF16, heads=(4, 1), sinks=False, **options):
    hq, hkv = heads
    *args, sink = inputs(len(subtree_end), hq, hkv, d, dv or d, dtype)
    check_op(backend, subtree_end, *args, sink if sinks else None, **{"scale": None, **options})


def check_roughly(backend, subtree_end, d, dv, dtype, heads, sinks=False, **options):
    """For rows that see one key: their scores' gradients are exactly 0 in plain torch, but a kernel subtracts from one
    product another that it read back rounded, so that the rule cannot apply."""
    *args, sink = inputs(len(subtree_end), *heads, d, dv, dtype)
    args = [*args, sink if sinks else None]
    exact = through_op("reference", subtree_end, *(None if x is None else x.double() for x in args), **options)
    for name, x, y in zip(NAMES, through_op(backend, subtree_end, *args, **options), exact, strict=False):
        assert (x.double() - y).abs().amax() <= 0.04 * y.abs().amax().clamp(min=1), name


@pytest.mark.skipif(REASONS["cpu"] is not None or DEVICE != "cpu", reason="the native kernel runs on CPU tensors")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, dict(window=9, softcap=2.0, sinks=True)], ids=["plain", "all"])
def test_the_checks_themselves_on_the_cpu(dtype, options, one_thread):
    """The native kernel passes what the GPU's must pass, and a wrong result does not."""
    for subtree_end in (cases.residues_subtree_end(8), random_row(301, branch=0.05)):
        check_forest("cpu", subtree_end, 16, 24, dtype, **options)
    *args, _ = inputs(301, dtype=dtype)
    causal = np.full(301, 301)
    over = excess(through_op("cpu", causal, *args), subtree_end, *args)
    assert min(over.values()) > 1e-3, over
    results = through_op("cpu", subtree_end, *args)
    for spoilt in range(5):
        got = [x.clone() for x in results]
        got[spoilt][150, 0] = float("nan")
        assert excess(got, subtree_end, *args)[NAMES[spoilt]] == float("inf")
        got[spoilt][150, 0] = results[spoilt][150, 0] + 0.1
        over = excess(got, subtree_end, *args)
        assert [name for name in NAMES if over[name] > 0] == [NAMES[spoilt]]


def test_every_residue_starts_a_branch():
    for block in (8, 128):
        end = cases.residues_subtree_end(block)
        begins = np.flatnonzero(end[1:] != end[:-1]) + 1
        inside = np.maximum.accumulate(end)[begins - 1] > begins
        assert set(begins[inside] % block) == set(range(block))
        for most in (1, 100, 10_000):
            cuts = cases.stretches(end, most)
            assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]] and cuts[-1][1] == len(end)
            assert all((end[start:stop] <= stop).all() for start, stop in cuts)


# head dim, dtype, (Hq, Hkv): every pair of two of them; on sm_90 the Hopper kernels, of Triton or CUDA
PLAIN_CALLS = [
    (64, BF16, (4, 4)),
    (64, FP16, (8, 2)),
    (64, BF16, (8, 1)),
    (128, FP16, (4, 4)),
    (128, BF16, (4, 1)),
    (128, FP16, (8, 1)),
    (256, BF16, (4, 2)),
    (96, FP16, (4, 1)),
]


@gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "heads"),
    [needs("triton", *call, id=f"triton-{i}") for i, call in enumerate(PLAIN_CALLS)]
    + [needs("cuda", *call, id=f"cuda-{i}") for i, call in enumerate(PLAIN_CALLS)],
)
class TestPlainCalls:
    """No window, cap or sinks."""

    def test_forests(self, backend, d, dtype, heads):
        for name, subtree_end in FORESTS.items():
            try:
                check_forest(backend, subtree_end, d, dtype=dtype, heads=heads)
            except AssertionError as error:
                raise AssertionError(f"forest {name}: {error}") from error

    def test_branches_at_every_residue(self, backend, d, dtype, heads):
        check_forest(backend, cases.residues_subtree_end(128), d, dtype=dtype, heads=heads)

    def test_lengths(self, backend, d, dtype, heads):
        """Lengths of every kind modulo the tiles; short rows too, in which the rule has no other rows to go by."""
        for num_tokens in (*range(33, 400, 13), 127, 128, 129, 255, 256, 257, 383, 384, 385):
            check_forest(backend, random_row(num_tokens, num_tokens, 0.05), d, dtype=dtype, heads=heads)
        for num_tokens in (1, 2, 3, 7, 15, 16, 17, 31):
            subtree_end = random_row(num_tokens, num_tokens, 0.2)
            check_roughly(backend, subtree_end, d, d, dtype, heads, scale=d**-0.5)


# head dim, value dim, dtype, (Hq, Hkv), window, softcap, sinks: what Triton's Hopper kernels serve, then every pair of
# two of them
OPTIONS = [
    (64, 64, BF16, (8, 1), True, False, True),
    (64, 64, FP16, (4, 4), True, False, False),
    (64, 64, BF16, (8, 2), False, False, True),
    (128, 128, BF16, (8, 1), True, False, False),
    (128, 128, FP16, (4, 4), True, False, True),
    (128, 128, BF16, (8, 2), False, False, True),
    (256, 256, BF16, (8, 1), True, False, False),
    (256, 256, FP16, (4, 4), True, False, True),
    (192, 128, BF16, (4, 4), False, False, False),
    (80, 80, FP16, (8, 1), True, False, False),
    (64, 64, BF16, (8, 1), True, True, True),
    (64, 64, FP16, (8, 2), True, False, True),
    (64, 64, FP32, (4, 4), False, False, False),
    (64, 128, BF16, (4, 4), True, False, False),
    (64, 128, FP16, (8, 1), False, True, False),
    (64, 128, FP32, (8, 2), False, True, True),
    (96, 96, BF16, (8, 2), False, False, True),
    (96, 96, FP16, (8, 1), True, True, False),
    (96, 96, FP32, (4, 4), False, False, True),
    (128, 40, BF16, (8, 1), True, False, False),
    (128, 40, FP16, (8, 2), False, True, False),
    (128, 40, FP32, (4, 4), True, False, True),
    (128, 128, BF16, (8, 2), False, True, True),
    (128, 128, FP16, (4, 4), True, True, False),
    (128, 128, FP32, (8, 1), False, False, True),
    (256, 256, BF16, (8, 1), False, True, True),
    (256, 256, FP16, (8, 2), True, False, True),
    (256, 256, FP32, (4, 4), False, True, False),
]


def option_id(d, dv, dtype, heads, window, softcap, sinks):
    names = [name for name, on in (("window", window), ("softcap", softcap), ("sinks", sinks)) if on]
    return "-".join([f"{d}x{dv}", str(dtype).removeprefix("torch."), f"{heads[0]}by{heads[1]}", *names])


@gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("backend", "d", "dv", "dtype", "heads", "window", "softcap", "sinks"),
    [needs(backend, *row, id=f"{backend}-{option_id(*row)}") for backend in ("triton", "cuda") for row in OPTIONS],
)
def test_options(backend, d, dv, dtype, heads, window, softcap, sinks):
    rest = dict(softcap=15.0 if softcap else 0.0, sinks=sinks)
    for subtree_end, sizes in ((random_row(1301, 4), (2, 63, 64, 129, 200)), (random_row(93, 5, 0.1), (2, 17, 40))):
        if window:
            # longer ones are none
            assert tk.TreePlan.build(torch.as_tensor(subtree_end)).longest_path > max(sizes)
            check_roughly(backend, subtree_end, d, dv, dtype, heads, window=1, scale=d**-0.5, **rest)
        for size in sizes if window else (0,):
            check_forest(backend, subtree_end, d, dv, dtype, heads, window=size, **rest)
    if dtype != FP32 and backend == "triton" and d in (64, 128, 256):
        check_forest(backend, cases.residues_subtree_end(128), d, dv, dtype, heads, window=100 * window, **rest)


@gpu
@pytest.mark.parametrize("backend", [needs("triton"), needs("cuda")])
def test_scales_of_either_sign_and_none(backend):
    """A scale of 0 or below is beyond the Hopper kernels."""
    for scale in (0.5, -0.4, 0.0):
        check_forest(backend, FORESTS["comb_50"], 64, heads=(4, 4), scale=scale)


@gpu
@pytest.mark.parametrize(("d", "dtype", "window"), [(64, BF16, 0), (128, FP16, 0), (64, FP16, 100)])
@pytest.mark.skipif(REASONS["gather"] is not None, reason=f"gather: {REASONS['gather']}")
def test_gather(d, dtype, window):
    """Of the gradients of keys only the size of the error is asked: gather adds them up in the inputs' dtype."""
    subtree_end = FORESTS["search_agent"]
    args = inputs(len(subtree_end), 8, 2, d, d, dtype)[:4]
    options = dict(scale=d**-0.5, window=window)
    got = through_op("gather", subtree_end, *args, **options)
    over = excess(got, subtree_end, *args, **options)
    assert max(over[name] for name in ("out", "lse", "dq")) <= 0, over
    exact = through_op("reference", subtree_end, *(x.double() for x in args), **options)
    for x, y in zip(got[3:], exact[3:], strict=True):
        assert (x.double() - y).norm() <= 0.02 * y.norm()
    assert all(map(same_bits, got, through_op("gather", subtree_end, *args, **options)))


def layouts(q, k, v, dout):
    """The same values as they may lie in memory."""
    hq, hkv, d = q.shape[1], k.shape[1], q.shape[2]
    yield "fused_qkv", *torch.cat([q, k, v], 1).split([hq, hkv, hkv], 1), dout
    # a row of fused projections that begins off a 16 byte boundary
    shifted = torch.cat([q[:, 0, :3], q.flatten(1), k.flatten(1), v.flatten(1)], 1)[:, 3:]
    parts = shifted.split([hq * d, hkv * d, hkv * d], 1)
    yield "shifted_rows", *(x.unflatten(1, (-1, d)) for x in parts), dout
    yield "heads_first", *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout))
    yield "dim_first", *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    yield "every_other_head", *(x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v, dout))
    yield "dout_inside_a_wider_row", q, k, v, torch.cat([dout, dout], 2)[..., : dout.shape[2]]


@gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("backend", "d", "options"),
    [
        needs("triton", 64, {}, id="triton-64"),
        needs("triton", 128, {}, id="triton-128"),
        needs("triton", 128, dict(window=100), id="triton-128-window"),
        needs("triton", 256, {}, id="triton-256"),
        needs("triton", 96, {}, id="triton-96"),
        needs("triton", 128, dict(window=100, softcap=15.0), id="triton-128-plain"),
        needs("cuda", 64, {}, id="cuda-64"),
        needs("cuda", 128, {}, id="cuda-128"),
        needs("cuda", 64, dict(window=100), id="cuda-64-window"),
    ],
)
def test_layouts(backend, d, options):
    subtree_end = FORESTS["random"]
    plain = inputs(len(subtree_end), 4, 1, d, d, BF16)[:4]
    options = dict(scale=d**-0.5, **options)
    want = through_op(backend, subtree_end, *plain, **options)
    assert max(excess(want, subtree_end, *plain, **options).values()) <= 0
    for name, *args in layouts(*plain):
        assert all(torch.equal(x, y) for x, y in zip(args, plain, strict=True))
        got = through_op(backend, subtree_end, *args, **options)
        # the plain kernels load through descriptors or pointers as the layout allows, and may then add otherwise
        if backend == "cuda" or "softcap" not in options:
            assert all(map(same_bits, got, want)), name
        assert max(excess(got, subtree_end, *plain, **options).values()) <= 0, name
    expanded = plain[3][:1].expand_as(plain[3])
    got = through_op(backend, subtree_end, *plain[:3], expanded, **options)
    assert all(map(same_bits, got, through_op(backend, subtree_end, *plain[:3], expanded.contiguous(), **options)))


@gpu
@pytest.mark.parametrize(("d", "softcap"), [(64, 0.0), (128, 0.0), (128, 15.0), (96, 0.0), (256, 0.0)])
@pytest.mark.skipif(REASONS["triton"] is not None, reason=f"triton: {REASONS['triton']}")
def test_poison_reaches_what_the_kernels_write(d, softcap, poisoned_empty, monkeypatch):
    from treegrpo_kernels.triton import backward, forward, hopper

    args = inputs(300, 4, 1, d, d, BF16)[:4]
    for module in (hopper, forward, backward):
        monkeypatch.setattr(module, "launch", lambda *args: None)
    for name, x in zip(NAMES, through_op("triton", random_row(300), *args, softcap=softcap), strict=True):
        assert x.isnan().all(), name


@gpu
@pytest.mark.parametrize("backend", [needs("triton"), needs("cuda")])
def test_one_token_of_any_stride(backend):
    """The stride of a dimension of size 1 means nothing: a contiguous tensor may have any there."""
    args = inputs(1, 4, 4, 64, 64, BF16)[:4]
    odd = [x.as_strided(x.shape, (1, 64, 1)) for x in args]
    assert odd[0].is_contiguous()
    end = np.ones(1, dtype=np.int32)
    assert all(map(same_bits, through_op(backend, end, *odd), through_op(backend, end, *args)))


def exact_samples(end, q, k, v, dout, lse, delta, rows, keys, scale, window, dtype):
    """(out, dq) of the query ``rows`` and (dk, dv) of ``keys``, computed in ``dtype`` from everyone's lse and delta."""
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    group = q.shape[1] // k.shape[1]
    position = tk.reference.positions(end)

    def weights(i, j):
        k_j, v_j = (x[j].repeat_interleave(group, 1) for x in (k, v))
        scores = (scale * torch.einsum("ihd,jhd->hij", q[i], k_j)).double()
        seen = (j <= i[:, None]) & (i[:, None] < end[j])
        seen &= position[i][:, None] - position[j] < (window or len(end))
        p = torch.exp(scores - lse[i].T[..., None]).masked_fill(~seen, 0).to(dtype)
        dp = torch.einsum("ihd,jhd->hij", dout[i], v_j)
        return p, (p.double() * (dp.double() - delta[i].T[..., None])).to(dtype), k_j, v_j

    every = torch.arange(len(end), device=q.device)
    p, ds, k_j, v_j = weights(rows, every)
    out, dq = torch.einsum("hij,jhd->ihd", p, v_j), scale * torch.einsum("hij,jhd->ihd", ds, k_j)
    del p, ds, k_j, v_j
    p, ds, *_ = weights(every, keys)
    dk, dv = scale * torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, dout)
    return out, dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def check_long_row(backend, subtree_end, d, dtype, window=0, samples=64):
    """The forward everywhere; gradients where branches begin and end, and at random rows, from exact lse and delta."""
    end = torch.as_tensor(subtree_end, device=DEVICE)
    args = q, k, v, dout = inputs(len(end), 2, 1, d, d, dtype)[:4]
    scale = d**-0.5
    out, lse, dq, dk, dv = through_op(backend, end, *args, scale=scale, window=window)
    exact = [x.double() for x in (q, k, v)]
    with torch.no_grad():
        options = dict(scale=scale, window=window or None, return_lse=True)
        want, want_lse = tk.reference.tree_attention(*exact, end, **options)
    assert (lse - want_lse).abs().amax() < 1e-4
    # an output is a mean of values with weights rounded to the dtype, rounded once more
    assert (out.double() - want).abs().amax() <= 4 * torch.finfo(dtype).eps * v.abs().amax()
    begins = torch.nonzero(end.diff()).squeeze(1)
    gen = torch.Generator().manual_seed(0)
    picked = torch.cat(
        [
            torch.tensor([0, 1, 127, 128, len(end) - 1]),
            begins[torch.randperm(len(begins), generator=gen)[: samples // 4]].cpu(),
            1 + begins[torch.randperm(len(begins), generator=gen)[: samples // 4]].cpu(),
            torch.randint(len(end), (samples // 2,), generator=gen),
        ]
    ).to(DEVICE)
    delta = (want * dout.double()).sum(-1)
    samples = end.long(), *args, want_lse, delta, picked, picked, scale, window
    low, want = (exact_samples(*samples, kind) for kind in (dtype, torch.float64))
    got = out[picked], dq[picked], dk[picked], dv[picked]
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), got, low, want, strict=True):
        error, allowed = (x.double() - z).abs().amax(), 2 * (y.double() - z).abs().amax()
        assert error <= allowed + 2**-8 * z.abs().amax(), (name, float(error), float(allowed))


def test_long_rows_are_checked_rightly_on_the_cpu(one_thread):
    if DEVICE == "cpu" and REASONS["cpu"] is None:
        for window in (0, 40):
            check_long_row("cpu", FORESTS["search_agent"][:1500].clip(max=1500), 16, BF16, window, samples=40)


@gpu
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "window"),
    [
        needs(backend, d, dtype, window, id=f"{backend}-{d}-{window}")
        for backend, d, dtype, window in (
            ("triton", 128, BF16, 0),
            ("triton", 64, FP16, 0),
            ("triton", 128, BF16, 3000),
            ("triton", 256, BF16, 0),
            ("cuda", 128, BF16, 0),
        )
    ],
)
def test_128k_tokens(backend, d, dtype, window, poisoned_empty):
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the plain CUDA kernels, one warp a row, take minutes for as many pairs")
    long = cases.nested_subtree_end(
        (20_000, [cases.balanced(9001, 3, 2, 1777), (15_003, [])]), *[cases.searched(EPISODE, [1, 2, 3], 333)] * 21
    )
    assert 100_000 < len(long) < 131_072
    filled = np.concatenate([long, np.full(131_072 - len(long), 131_072, dtype=np.int32)])
    check_long_row(backend, filled, d, dtype, window)


@gpu
def test_differences_count_bits():
    x = torch.tensor([0.0, 1.0, float("nan")], device=DEVICE)
    assert differences(x, x.clone()) == 0 and differences(x, -x) >= 2
