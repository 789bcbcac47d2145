"""How attention on a GPU behaves from run to run: bits, memory, autograd, the deterministic switch."""

import cases
import pytest
import torch
from attention_checks import DEVICE, differences, excess, inputs, same_bits, through_op

import treegrpo_kernels as tk

gpu = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REASONS = tk.backends()
EPISODE = [380, 380, 380, 80]
FORESTS = {
    "search_agent": cases.nested_subtree_end(
        cases.searched(EPISODE, [1, 3], 200), cases.searched(EPISODE, [0, 2], 200)
    ),
    "random": cases.random_subtree_end(1777, 1, branch=0.02),
    "comb": cases.nested_subtree_end(cases.comb(50, 9, 14)),
}
# backend, head dim, dtype, options: the Hopper kernels, the plain ones in both ways to load, those of CUDA, which on
# sm_90 are again such for Hopper, and the portable ones
KERNELS = {
    "hopper_128": ("triton", 128, BF16, {}),
    "hopper_64": ("triton", 64, FP16, {}),
    "hopper_window": ("triton", 128, BF16, dict(window=100)),
    "hopper_256": ("triton", 256, BF16, {}),
    "hopper_padded": ("triton", 96, BF16, {}),
    "plain_128": ("triton", 128, BF16, dict(softcap=15.0)),
    "plain_window": ("triton", 64, BF16, dict(window=100, softcap=15.0)),
    "plain_fp32": ("triton", 64, FP32, {}),
    "cuda": ("cuda", 64, BF16, {}),
    "cuda_128": ("cuda", 128, BF16, {}),
    "cuda_portable": ("cuda", 64, BF16, dict(window=100)),
}


def of(names):
    """Parameters from the table, skipped with the reason where the backend does not run."""

    def param(name):
        reason = REASONS[KERNELS[name][0]]
        return pytest.param(*KERNELS[name], id=name, marks=pytest.mark.skipif(reason is not None, reason=f"{reason}"))

    return [param(name) for name in names]


def plan_of(subtree_end, window=0):
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end, device=DEVICE))
    # a longer one is none
    assert window < plan.longest_path
    return plan


def calls(backend, d, dtype, options, names, hq=8, hkv=2):
    """For each forest a function that runs forward and backward once."""

    def call(subtree_end, seed):
        args = inputs(len(subtree_end), hq, hkv, d, d, dtype, seed)[:4]
        plan = plan_of(subtree_end, options.get("window", 0))
        return lambda: through_op(backend, None, *args, plan=plan, scale=d**-0.5, **options)

    return [call(FORESTS[name], seed) for seed, name in enumerate(names)]


def changes(runs, rounds):
    """How many bits' worth of elements changed over ``rounds`` of ``runs`` in turn; the device is waited for once."""
    first = [run() for run in runs]
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(rounds):
        place = i % len(runs)
        for x, y in zip(first[place], runs[place](), strict=True):
            count += differences(x, y)
    return int(count)


@gpu
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "options"), of(["hopper_128", "hopper_64", "hopper_window", "hopper_256"])
)
def test_the_same_bits_a_thousand_times(backend, d, dtype, options):
    assert changes(calls(backend, d, dtype, options, FORESTS), 1000) == 0


@gpu
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "options"),
    of(["plain_128", "plain_window", "plain_fp32", "cuda", "cuda_128", "cuda_portable"]),
)
def test_the_same_bits_a_hundred_times(backend, d, dtype, options):
    assert changes(calls(backend, d, dtype, options, ["random", "comb"]), 100) == 0


def test_a_changed_bit_is_counted():
    x = torch.linspace(-1, 1, 8, device=DEVICE)
    results = iter([x, x.clone(), -x, x + torch.tensor(float("nan"))])
    assert changes([lambda: (next(results),)], 3) == 16
    assert same_bits(x, x.clone())


@gpu
@pytest.mark.parametrize(("backend", "d", "dtype", "options"), of(["hopper_128", "cuda_128"]))
def test_two_streams_at_once(backend, d, dtype, options):
    """Calls on two streams share no scratch memory."""
    runs = calls(backend, d, dtype, options, ["search_agent", "random"])
    want = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run())
        torch.cuda.synchronize()
        assert all(same_bits(x, y) for one, two in zip(got, want, strict=True) for x, y in zip(one, two, strict=True))


@gpu
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "options"), of(["hopper_128", "hopper_padded", "cuda_128", "cuda_portable"])
)
def test_inside_torch_compile(backend, d, dtype, options):
    """In one graph, once the plan has been used with these shapes: the same bits."""
    subtree_end = FORESTS["random"]
    *tensors, dout = inputs(len(subtree_end), 8, 2, d, d, dtype)[:4]
    leaves = [x.requires_grad_() for x in tensors]
    plan = plan_of(subtree_end, options.get("window", 0))

    def results(attend):
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def attend(q, k, v):
        return tk.tree_attention(q, k, v, plan, backend=backend, **options)

    want = results(attend)
    torch._dynamo.reset()
    got = results(torch.compile(attend, fullgraph=True, backend="aot_eager"))
    assert all(map(same_bits, got, want))


@gpu
@pytest.mark.parametrize(
    ("backend", "d", "dtype", "options"),
    of(["hopper_128", "hopper_window", "plain_window", "cuda_128", "cuda_portable"]),
)
def test_peak_memory_grows_with_tokens(backend, d, dtype, options):
    """Inputs, outputs and gradients once, two float32 rows of scratch a head, and no more: nothing of T^2.

    The pieces of long key tiles, of which there are at most a few a multiprocessor, have partials in float32.
    """
    hq, hkv = 8, 2
    per_token = []
    tree = cases.balanced(428, 3, 3, 96)
    for copies in (7, 14, 28):
        # a chain that grows with the rest, and trees of 4,172 tokens
        subtree_end = cases.nested_subtree_end((4172 * copies // 7, []), *[tree] * copies)
        num_tokens, plan = len(subtree_end), plan_of(subtree_end, options.get("window", 0))
        args = inputs(num_tokens, hq, hkv, d, d, dtype)[:4]
        run = dict(plan=plan, scale=d**-0.5, **options)
        through_op(backend, None, *args, **run)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = through_op(backend, None, *args, **run)
        peak = torch.cuda.max_memory_allocated() - before
        sizes = sum(x.numel() * x.element_size() for x in results)
        scratch = 2 * 4 * hq * num_tokens
        pieces = 2**26 if backend == "cuda" and not options else 0
        assert sizes <= peak <= 1.05 * (sizes + scratch) + 2**23 + pieces, (num_tokens, peak, sizes)
        per_token.append(max(peak - pieces, sizes) / num_tokens)
        del results
    assert max(per_token) <= 1.1 * min(per_token), per_token


@gpu
@pytest.mark.parametrize(("backend", "d", "dtype", "options"), of(KERNELS))
def test_any_order_is_as_exact(backend, d, dtype, options):
    subtree_end = FORESTS["random"]
    args, plan = inputs(len(subtree_end), 8, 2, d, d, dtype)[:4], plan_of(subtree_end, options.get("window", 0))
    got = through_op(backend, None, *args, plan=plan, scale=d**-0.5, deterministic=False, **options)
    over = excess(got, subtree_end, *args, scale=d**-0.5, **options)
    assert max(over.values()) <= 0, over


class Call:
    """One call of the op whose inputs want gradients as asked."""

    def __init__(self, backend, d, dtype, options, wanted="qkv", sinks=False):
        subtree_end = FORESTS["comb"][:300].clip(max=300)
        *tensors, self.dout, sink = inputs(300, 4, 2, d, d, dtype)
        self.inputs = [x.detach().requires_grad_(n in wanted) for n, x in zip("qkv", tensors, strict=True)]
        self.sinks = sink.requires_grad_() if sinks else None
        self.out, self.lse = tk.tree_attention(
            *self.inputs,
            plan_of(subtree_end, options.get("window", 0)),
            sinks=self.sinks,
            backend=backend,
            return_lse=True,
            **options,
        )

    def wanted(self):
        return [x for x in (*self.inputs, self.sinks) if x is not None and x.requires_grad]

    def grads(self, **how):
        return torch.autograd.grad(self.out, self.wanted(), self.dout, **how)


ON_CPU = pytest.param("cpu", 16, FP32, {}, id="cpu_tensors", marks=pytest.mark.skipif(DEVICE != "cpu", reason="no CPU"))
on_gpu = [pytest.param(*p.values, id=p.id, marks=[*p.marks, gpu]) for p in of(["hopper_128", "plain_128", "cuda"])]


@pytest.mark.parametrize(("backend", "d", "dtype", "options"), [ON_CPU, *on_gpu])
class TestAutograd:
    def test_only_some_inputs_want_gradients(self, backend, d, dtype, options):
        whole = dict(zip("qkv", Call(backend, d, dtype, options).grads(), strict=True))
        for wanted in ("q", "k", "v", "kv", "qv"):
            for name, x in zip(wanted, Call(backend, d, dtype, options, wanted).grads(), strict=True):
                assert same_bits(x, whole[name]), (wanted, name)
        frozen = Call(backend, d, dtype, options, wanted="")
        assert not frozen.out.requires_grad
        if dtype == FP32 or options:
            only_sinks = Call(backend, d, dtype, options, wanted="", sinks=True).grads()
            assert same_bits(only_sinks[0], Call(backend, d, dtype, options, sinks=True).grads()[3])

    def test_backward_twice(self, backend, d, dtype, options):
        call = Call(backend, d, dtype, options)
        first = call.grads(retain_graph=True)
        assert all(map(same_bits, first, call.grads()))
        with pytest.raises(RuntimeError, match="second time"):
            call.grads()

    def test_gradients_add_up_in_leaves(self, backend, d, dtype, options):
        call = Call(backend, d, dtype, options)
        once = call.grads(retain_graph=True)
        for _ in range(2):
            call.out.backward(call.dout, retain_graph=True)
        for x, g in zip(call.inputs, once, strict=True):
            torch.testing.assert_close(x.grad, 2 * g, rtol=0, atol=0)

    def test_lse_has_no_gradient(self, backend, d, dtype, options):
        call = Call(backend, d, dtype, options)
        assert call.lse.dtype == FP32 and not call.lse.requires_grad and call.out.dtype == dtype
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(call.lse.sum(), call.inputs)

    @pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
    def test_no_second_derivative(self, backend, d, dtype, options):
        call = Call(backend, d, dtype, options)
        grads = call.grads(create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grads[0].sum(), call.inputs)

    def test_a_mean_as_loss(self, backend, d, dtype, options):
        """Its gradient is one expanded number: strides of 0."""
        call = Call(backend, d, dtype, options)
        got = torch.autograd.grad(call.out.mean(), call.wanted(), retain_graph=True)
        call.dout = torch.full_like(call.dout, 1 / call.dout.numel())
        assert all(map(same_bits, got, call.grads()))
