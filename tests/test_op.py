"""The operator and the public op: oracle, autograd, compile, FLOPs, choice of backend, refusals."""

import contextlib
import logging
import subprocess
import sys

import cases
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import treegrpo_kernels as tk
from treegrpo_kernels import api, flops, op

# tensors this small lose more to threads waiting for each other than they gain
pytestmark = pytest.mark.usefixtures("one_thread")

HERE = [name for name in ("reference", "cpu", "triton") if tk.backends("cpu")[name] is None]
KERNELS = [name for name in HERE if name != "reference"]


def on_gpu(backend, **kind):
    """A backend, a device and what :func:`tensors` makes there."""
    reason = tk.backends()[backend] if torch.cuda.is_available() else "needs a CUDA device"
    marks = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")]
    return pytest.param(backend, dict(kind, device="cuda"), marks=marks, id=f"{backend}-cuda-{kind['d']}")


# the last two: the Hopper kernels and the plain ones
CALLS = [pytest.param(name, dict(dtype=torch.float32), id=name) for name in KERNELS] + [
    on_gpu("cuda", dtype=torch.float32, d=8),
    on_gpu("triton", dtype=torch.bfloat16, d=64),
    on_gpu("triton", dtype=torch.float32, d=64),
]


def tensors(num_tokens, hq=4, hkv=2, d=8, dv=None, dtype=torch.float64, seed=0, grad=False, device="cpu"):
    gen = torch.Generator(device).manual_seed(seed)
    shapes = [(num_tokens, hq, d), (num_tokens, hkv, d), (num_tokens, hkv, dv or d)]
    return [torch.randn(s, generator=gen, dtype=dtype, device=device).requires_grad_(grad) for s in shapes]


def plan_of(subtree_end, device="cpu", **_):
    return tk.TreePlan.build(torch.as_tensor(subtree_end), device=device)


def paths(subtree_end):
    """For every token the packed indices of its path, root first."""
    mask = cases.ancestor_mask(subtree_end)
    return [mask[t].nonzero()[0] for t in range(len(mask))]


@pytest.mark.parametrize("name", cases.NAMED)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (3, None, False), (None, 2.0, True), (2, 1.5, True)]
)
def test_oracle_is_attention_of_each_path_alone(name, window, softcap, sinks):
    """The oracle itself against the definition: every token attends along its own path, nothing else exists."""
    subtree_end = cases.named_subtree_end(name)
    q, k, v = tensors(len(subtree_end), d=6, dv=5)
    sink = torch.linspace(-1, 2, 4, dtype=torch.float64) if sinks else None
    out, lse = tk.reference.tree_attention(
        q, k, v, torch.from_numpy(subtree_end), scale=0.3, window=window, softcap=softcap, sinks=sink, return_lse=True
    )
    for t, path in enumerate(paths(subtree_end)):
        path = path[-window:] if window else path
        for h in range(4):
            score = 0.3 * k[path, h // 2] @ q[t, h]
            score = softcap * torch.tanh(score / softcap) if softcap else score
            terms = torch.cat([score, sink[h : h + 1]]) if sinks else score
            torch.testing.assert_close(lse[t, h], torch.logsumexp(terms, 0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                out[t, h], torch.exp(score - lse[t, h]) @ v[path, h // 2], rtol=1e-12, atol=1e-12
            )


def test_oracle_blocks_do_not_show(monkeypatch):
    subtree_end = torch.from_numpy(cases.random_subtree_end(75, 3))
    q, k, v = tensors(75, grad=True)
    whole = tk.reference.tree_attention(q, k, v, subtree_end)
    grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(tk.reference, "_BLOCK_SCORES", 4 * 75 * 7)
    blocks = tk.reference.tree_attention(q, k, v, subtree_end)
    torch.testing.assert_close(whole, blocks, rtol=1e-13, atol=1e-13)
    for a, b in zip(grads, torch.autograd.grad(blocks.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_plain_causal_mask_would_be_noticed():
    """If siblings saw each other the oracle must say so: the comparison every test rests on can fail."""
    for name in cases.NAMED:
        subtree_end = torch.from_numpy(cases.named_subtree_end(name))
        q, k, v = tensors(len(subtree_end))
        tree = tk.reference.tree_attention(q, k, v, subtree_end)
        causal = tk.reference.tree_attention(q, k, v, torch.full_like(subtree_end, len(subtree_end)))
        assert (tree - causal).abs().max() > 1e-3, name


@pytest.mark.parametrize("backend", [name for name in HERE if name != "triton"])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradcheck(backend, sinks):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("two_trees")))
    q, k, v = tensors(12, hq=2, hkv=1, d=3, dv=2, grad=True)
    sink = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True) if sinks else None

    def f(q, k, v, sink):
        return tk.tree_attention(q, k, v, plan, window=3, softcap=2.0, sinks=sink, backend=backend)

    assert torch.autograd.gradcheck(f, (q, k, v, sink))


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, d=4, dtype=torch.float32, grad=True)
    tiles = []
    if backend == "triton":
        from treegrpo_kernels import triton

        tiles = triton.tile_tensors(plan, q, v, 0)
    args = (q, k, v, None, plan.subtree_end, plan.position, tiles, 0.5, 0, 0.0, plan.num_pairs, backend, True)
    torch.library.opcheck(torch.ops.treegrpo.tree_attention, args)
    sinks = torch.zeros(4, requires_grad=True)
    torch.library.opcheck(torch.ops.treegrpo.tree_attention, (q, k, v, sinks, *args[4:]))


@pytest.mark.parametrize(("backend", "kind"), CALLS)
def test_compile_fullgraph_dynamic_across_plans(backend, kind):
    def step(q, k, v, plan):
        return tk.tree_attention(q * 2, k, v, plan, backend=backend).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3, fail_on_recompile_limit_hit=True):
        for seed, num_tokens in enumerate((20, 33, 47, 61, 80, 91)):
            plan = plan_of(cases.random_subtree_end(num_tokens, seed), **kind)
            q, k, v = tensors(num_tokens, **kind, seed=seed, grad=True)
            expected = step(q, k, v, plan)
            grads = torch.autograd.grad(expected.sum(), (q, k, v))
            found = compiled(q, k, v, plan)
            torch.testing.assert_close(found, expected)
            for a, b in zip(torch.autograd.grad(found.sum(), (q, k, v)), grads, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", KERNELS)
def test_flop_counter_counts_visible_pairs(backend):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("ragged_turns")))
    q, k, v = tensors(plan.num_tokens, d=8, dv=6, dtype=torch.float32, grad=True)
    for window in (None, 5):
        with FlopCounterMode(display=False) as counter:
            tk.tree_attention(q, k, v, plan, window=window, backend=backend).sum().backward()
        pairs = plan.count_pairs(window)
        counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "treegrpo" in str(op)}
        assert counts == {
            "treegrpo.tree_attention": 2 * 4 * pairs * (8 + 6),
            "treegrpo.tree_attention_backward": 2 * 4 * pairs * (3 * 8 + 2 * 6),
        }
    assert flops.attention_forward(10, 4, 8) == 4 * 8 * 4 * 10
    assert flops.attention_backward(10, 4, 8) == 10 * 8 * 4 * 10


class Recorder(TorchDispatchMode):
    """Names of the project's operators, as a mode sees them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "treegrpo":
            self.seen.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


OPERATORS = ["tree_attention", "tree_attention_backward"]


@pytest.mark.parametrize(("backend", "kind"), CALLS)
def test_plain_calls_go_past_the_operator_with_its_bits(backend, kind, monkeypatch):
    plan = plan_of(cases.named_subtree_end("ragged_turns"), **kind)
    inputs = tensors(plan.num_tokens, **kind, grad=True)
    # the Hopper kernels take none
    half = kind["dtype"] == torch.bfloat16
    sinks = None if half else torch.linspace(-1, 1, 4, device=plan.device).requires_grad_()
    wanted = inputs if half else [*inputs, sinks]

    def run():
        out, lse = tk.tree_attention(*inputs, plan, sinks=sinks, backend=backend, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.square().sum(), wanted)]

    with Recorder() as recorder:
        expected = run()
    assert recorder.seen == OPERATORS
    with monkeypatch.context() as patch:
        # raises where it is called: the plain path must not need it
        patch.setattr(api.op.torch.ops, "treegrpo", None)
        found = run()
        with torch.no_grad():
            assert torch.equal(tk.tree_attention(*inputs, plan, sinks=sinks, backend=backend), expected[0])
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
def test_whoever_watches_sees_the_operator(backend):
    plan = tk.TreePlan.build(torch.tensor([4, 4, 3, 4]))
    inputs = tensors(4, dtype=torch.float32, grad=True)
    with torch.profiler.profile() as profile:
        tk.tree_attention(*inputs, plan, backend=backend).sum().backward()
    assert {f"treegrpo::{name}" for name in OPERATORS} <= {event.name for event in profile.events()}
    out = tk.tree_attention(*inputs, plan, backend=backend)
    with Recorder() as recorder:
        out.sum().backward()
    assert recorder.seen == OPERATORS[1:]


@pytest.mark.parametrize(("backend", "kind"), CALLS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients(backend, kind, use_reentrant):
    plan = plan_of(cases.named_subtree_end("two_trees"), **kind)
    inputs = tensors(plan.num_tokens, **kind, grad=True)

    def layer(q, k, v):
        return tk.tree_attention(q.sin(), k, v, plan, backend=backend).square()

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for x in inputs:
        x.grad = None
    checkpoint(layer, *inputs, use_reentrant=use_reentrant).sum().backward()
    for x, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, gradient)


def test_arguments_are_checked_again_when_they_change():
    plan = tk.TreePlan.build(torch.tensor([2, 2]))
    q, k, v = tensors(2, dtype=torch.float32)
    first = tk.tree_attention(q, k, v, plan)
    assert torch.equal(tk.tree_attention(q, k, v, plan), first)
    assert not torch.equal(tk.tree_attention(q, k, v, plan, scale=2.0), first)
    with pytest.raises(ValueError, match="v has dtype"):
        tk.tree_attention(q, k, v.double(), plan)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tk.tree_attention(q, k, v, plan, window=0)
    with pytest.raises(ValueError, match=r"sinks must be \[4\]"):
        tk.tree_attention(q, k, v, plan, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="q has 2 tokens but the plan is for 3"):
        tk.tree_attention(q, k, v, tk.TreePlan.build(torch.tensor([3, 3, 3])))


@pytest.mark.parametrize("backend", HERE)
def test_no_tokens(backend):
    plan = tk.TreePlan.build(torch.zeros(0, dtype=torch.int32))
    q, k, v = tensors(0, dv=5, dtype=torch.float32, grad=True)
    sinks = torch.tensor([0.5, float("inf"), float("-inf"), 2.0], dtype=torch.float64, requires_grad=True)
    out, lse = tk.tree_attention(q, k, v, plan, sinks=sinks, backend=backend, return_lse=True)
    assert (out.shape, out.dtype, lse.shape) == ((0, 4, 5), torch.float32, (0, 4))
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert sinks.grad.tolist() == [0] * 4


@pytest.mark.parametrize("backend", HERE)
def test_unused_output_has_no_gradient(backend):
    plan = tk.TreePlan.build(torch.tensor([2, 2]))
    q, k, v = tensors(2, dtype=torch.float32, grad=True)
    out, lse = tk.tree_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_auto_takes_the_native_kernel_and_says_so(caplog):
    if tk.backends("cpu")["cpu"] is not None:
        pytest.skip(f"no native kernel here: {tk.backends('cpu')['cpu']}")
    api._announced.clear()
    plan = tk.TreePlan.build(torch.tensor([2, 2]))
    q, k, v = tensors(2, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="treegrpo_kernels"):
        first = tk.tree_attention(q, k, v, plan)
        tk.tree_attention(q, k, v, plan)
    assert [r.getMessage() for r in caplog.records] == [
        "tree_attention on cpu torch.float32 uses backend cpu (the fastest for cpu tensors)"
    ]
    assert torch.equal(first, tk.tree_attention(q, k, v, plan, backend="cpu"))
    with caplog.at_level(logging.INFO, logger="treegrpo_kernels"):
        tk.tree_attention(*tensors(2, dtype=torch.float16), plan)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "reference" in caplog.records[-1].getMessage()


def test_backends_names_every_kernel_with_a_reason():
    report = tk.backends("cpu")
    assert set(report) == {"reference", "cpu", "triton", "cuda", "gather"}
    assert report["reference"] is None
    assert "cpu" in report["cuda"]
    assert report["gather"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backend="flash"), "backend 'flash' is unknown: use one of auto, reference, cpu, triton, cuda, gather"),
        (dict(backend=["auto"]), "backend is a list: give one of auto, reference"),
        (dict(backend="cuda"), "backend 'cuda': runs on CUDA tensors"),
        (dict(backend="gather"), "backend 'gather': "),
        (dict(window=0), "window must be at least 1"),
        (dict(window=2.5), "window must be at least 1 .a token sees itself. and whole, got 2.5"),
        (dict(softcap=-1.0), "softcap must be positive"),
        (dict(softcap=float("nan")), "softcap must be positive and finite"),
        (dict(softcap=float("inf")), "softcap must be positive and finite"),
        (dict(scale=float("nan")), "scale must be finite"),
        (dict(sinks=torch.zeros(4, dtype=torch.complex64)), "sinks has dtype torch.complex64"),
        (dict(plan=torch.zeros(6, dtype=torch.int32)), "plan is a Tensor: give a TreePlan"),
        (dict(sinks=torch.zeros(3)), r"sinks must be \[4\]"),
        (dict(q=torch.zeros(1, 6, 4, 8)), "q must be"),
        (dict(q=torch.zeros(7, 4, 8)), "q has 7 tokens but the plan is for 6"),
        (dict(q=torch.zeros(6, 5, 8)), "q has 5 heads, k 2, v 2"),
        (dict(q=torch.zeros(6, 0, 8)), "q has 0 heads, k 2, v 2"),
        (dict(k=torch.zeros(6, 2, 9)), "q has head dim 8 but k 9"),
        (dict(v=torch.zeros(6, 2, 8, dtype=torch.float64)), "v has dtype torch.float64"),
        (dict(q=torch.zeros(6, 4, 8, dtype=torch.int32)), "q has dtype torch.int32"),
        (dict(q=torch.zeros(6, 4, 300), k=torch.zeros(6, 2, 300)), "q has head dim 300; supported are 1 to 256"),
        (dict(q=torch.zeros(6, 4, 8, device="meta")), "q is on meta but the plan on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        tk.tree_attention(**{"q": q, "k": k, "v": v, "plan": plan, **change})


def test_oracle_holds_sixteen_thousand_tokens():
    """Blockwise: the scores alone of 16k tokens would be 1 GB; the process must stay far below."""
    code = """
import resource, sys
sys.path[:0] = ["kernels", "tests"]
import cases, torch, treegrpo_kernels as tk
end = torch.from_numpy(cases.balanced_subtree_end(1024, 3, 3, 384))
q, k, v = (torch.randn(len(end), 1, 4, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tk.reference.tree_attention(q, k, v, end).sum().backward()
print(len(end), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    root = api.__file__.rsplit("/kernels/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    num_tokens, megabytes = map(int, done.stdout.split())
    assert num_tokens == 16000
    assert megabytes < 900


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of", ["q", "sinks"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_second_derivative_is_refused(of, watched):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, grad=True)
    sinks = torch.zeros(4, dtype=q.dtype, requires_grad=True)
    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        out = tk.tree_attention(q, k, v, plan, sinks=sinks)
    wanted = {"q": q, "sinks": sinks}[of]
    penalty = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)[0].square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        penalty.backward()


@pytest.mark.parametrize("backend", HERE)
def test_forward_mode_is_refused_or_right(backend):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, dtype=torch.float32)
    dq = torch.ones_like(q)

    def attend(q):
        return tk.tree_attention(q, k, v, plan, backend=backend)

    if backend == "reference":
        tangent = torch.func.jvp(attend, (q,), (dq,))[1]
        assert torch.allclose(tangent, (attend(q + 1e-2 * dq) - attend(q - 1e-2 * dq)) / 2e-2, atol=1e-3)
        return
    for transformed in (
        lambda: torch.func.jvp(attend, (q,), (dq,)),
        lambda: torch.func.grad(lambda q: attend(q).sum())(q),
    ):
        with pytest.raises(RuntimeError, match="under no transform"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        attend(forward_ad.make_dual(q, dq))
    with forward_ad.dual_level():
        assert torch.equal(attend(q), attend(q.clone()))
    assert tk.tree_attention(q, k, v, plan, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, low):
    plan = tk.TreePlan.build(torch.from_numpy(cases.random_subtree_end(60, 2)))
    # products beyond what float16 holds
    q, k, v = (300 * x for x in tensors(60, dtype=torch.float32))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def results(watch):
        with watch:
            out, lse = tk.tree_attention(q, k, v, plan, backend=backend, return_lse=True)
        # not under autocast, which torch leaves for the forward
        return out, lse, *torch.autograd.grad(out.square().sum(), leaves)

    expected, found = results(contextlib.nullcontext()), results(torch.autocast("cpu", low))
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_default_device_does_not_watch():
    q, k, v = tensors(2, dtype=torch.float32)
    with torch.device("cpu"):
        assert op.is_plain(q, k, v)
        with BaseTorchFunctionMode():
            assert not op.is_plain(q, k, v)


def test_the_gradient_of_sinks_is_the_same_in_blocks_of_rows(monkeypatch):
    plan = tk.TreePlan.build(torch.from_numpy(cases.random_subtree_end(50, 3)))
    q, k, v = tensors(50, grad=True)
    sinks = torch.linspace(-1, 1, 4, dtype=q.dtype, requires_grad=True)

    def grad():
        return torch.autograd.grad(tk.tree_attention(q, k, v, plan, sinks=sinks).square().sum(), sinks)[0]

    whole = grad()
    monkeypatch.setattr(op, "SINK_ROWS", 7)
    torch.testing.assert_close(grad(), whole, rtol=1e-12, atol=1e-12)


def test_frozen_sinks_cost_no_gradient(monkeypatch):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, grad=True)
    monkeypatch.setattr(op, "_sinks_grad", None)
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with mode:
            tk.tree_attention(q, k, v, plan, sinks=torch.zeros(4, dtype=q.dtype)).sum().backward()


@pytest.mark.parametrize("window", [4, 6, 2**31, 2**32 + 5, 2**63 - 1])
def test_a_window_as_long_as_the_longest_path_is_none(window):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, dtype=torch.float32)
    taken = [api._prepare(q, k, v, plan, None, size, None, None, "auto").window for size in (window, 3)]
    assert plan.longest_path == 4 and taken == [0, 3]
    assert torch.equal(tk.tree_attention(q, k, v, plan, window=window), tk.tree_attention(q, k, v, plan))


def test_a_plan_that_knows_a_call_checks_another_dtype_all_the_same():
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("worked_example")))
    q, k, v = tensors(6, dtype=torch.float32)
    tk.tree_attention(q, k, v, plan, window=2, sinks=torch.zeros(4))
    with pytest.raises(ValueError, match=r"window must be at least 1 .* and whole, got 2\.0"):
        tk.tree_attention(q, k, v, plan, window=2.0, sinks=torch.zeros(4))
    with pytest.raises(ValueError, match=r"sinks has dtype torch\.int64"):
        tk.tree_attention(q, k, v, plan, window=2, sinks=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("watched_first", [False, True])
def test_a_checkpoint_may_be_watched_in_one_of_its_passes(watched_first):
    plan = tk.TreePlan.build(torch.from_numpy(cases.named_subtree_end("two_trees")))
    inputs = tensors(plan.num_tokens, grad=True)

    def layer(q, k, v):
        return tk.tree_attention(q.sin(), k, v, plan).square()

    watched, unwatched = FlopCounterMode(display=False), contextlib.nullcontext()
    with watched if watched_first else unwatched:
        out = checkpoint(layer, *inputs, use_reentrant=False).sum()
    with unwatched if watched_first else watched:
        out.backward()
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(inputs, expected, strict=True))


def test_an_empty_row_has_gradients():
    q, k, v = tensors(0, grad=True)
    out = tk.reference.tree_attention(q, k, v, torch.zeros(0, dtype=torch.int32))
    assert [g.shape[0] for g in torch.autograd.grad(out.sum(), (q, k, v))] == [0, 0, 0]
