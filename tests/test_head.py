"""The fused passes of the log-prob head, through Triton's interpreter, and the head built on them, against float64."""

import pytest
import torch

pytest.importorskip("triton")

import treegrpo_kernels.head as passes
from treegrpo.head import ChunkedHead, HeadOptions, LogitTransform, Pairs, use_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reason = passes.reason(torch.device(DEVICE), torch.float32)
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=f"Triton: {reason}"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

TRANSFORMS = {
    "plain": (LogitTransform(1.0, 0.0), 1.0),
    "temperature": (LogitTransform(1.0, 0.0), 0.7),
    "scale": (LogitTransform(0.25, 0.0), 1.3),
    "softcap": (LogitTransform(1.5, 4.0), 0.9),
}


def draw(num_rows, vocab, hidden, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, hidden, generator=gen).to(DEVICE, dtype) for n in (num_rows, vocab))
    # row 0 twice with one label, row 1 with three, the last without any
    row_of = torch.tensor([0, 1, 0, 1, 1, *range(2, num_rows - 1)], device=DEVICE)
    labels = torch.randint(vocab, (len(row_of),), generator=gen).to(DEVICE)
    labels[2] = labels[0]
    return x, weight, row_of, labels


def expected(x, weight, row_of, labels, transform, temperature):
    """(logp [P], entropy [R]) in float64, from all logits."""
    z = x.double() @ weight.double().t() * transform.scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp[row_of, labels], -(logp.exp() * logp).sum(-1)


def results(run, x, weight, seed=1):
    """logp, entropy and the gradients of a weighted sum of both."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    logp, entropy = run(*leaves)
    gen = torch.Generator().manual_seed(seed)
    weights = [torch.randn(len(y), generator=gen, dtype=torch.float64).to(DEVICE, y.dtype) for y in (logp, entropy)]
    total = (logp * weights[0]).sum() + (entropy * weights[1]).sum()
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)]


def fused(row_of, labels, transform, temperature, dtype, chunk_rows=None):
    options = HeadOptions(transform, temperature, dtype, entropy=True, fused=True, chunk_rows=chunk_rows)

    def run(x, weight):
        return ChunkedHead.apply(x, weight, None, labels, Pairs.of(row_of, len(x)), options)

    return run


def worst(found, want):
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_gradients_are_those_of_all_logits(name, poisoned_empty):
    transform, temperature = TRANSFORMS[name]
    x, weight, row_of, labels = draw(9, 45, 12, torch.float32)
    want = results(lambda x, w: expected(x, w, row_of, labels, transform, temperature), x.double(), weight.double())
    for chunk_rows in (None, 1, 4):
        found = results(fused(row_of, labels, transform, temperature, torch.float32, chunk_rows), x, weight)
        assert worst(found, want) < 1e-5, chunk_rows


@pytest.mark.parametrize("vocab", [1, 2, *range(15, 34)])
def test_any_vocabulary(vocab, poisoned_empty):
    """The interpreter's blocks hold 16 columns: every remainder is met."""
    x, weight, row_of, labels = draw(4, vocab, 8, torch.float32)
    args = row_of, labels, *TRANSFORMS["softcap"]
    want = results(lambda x, w: expected(x, w, *args), x.double(), weight.double())
    got = results(fused(*args, torch.float32), x, weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_log_probs_alone_and_no_pairs_at_all(poisoned_empty):
    x, weight, row_of, labels = draw(5, 20, 8, torch.float32)
    options = HeadOptions(LogitTransform(1.0, 0.0), 1.0, torch.float32, fused=True)
    for rows, ids in ((row_of, labels), (row_of[:0], labels[:0])):
        leaf = x.detach().requires_grad_()
        logp, entropy = ChunkedHead.apply(leaf, weight, None, ids, Pairs.of(rows, len(x)), options)
        assert entropy is None
        want = expected(x, weight, rows, ids, *TRANSFORMS["plain"])[0]
        torch.testing.assert_close(logp.double(), want, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(logp.sum(), leaf)
        assert torch.isfinite(grad).all() and not grad[-1].any()


def test_large_logits_do_not_overflow(poisoned_empty):
    x, weight, row_of, labels = draw(4, 40, 8, torch.float32)
    args = row_of, labels, LogitTransform(1.0, 30.0), 0.5
    want = results(lambda x, w: expected(x, w, *args), 1e3 * x.double(), weight.double())
    for a, b in zip(results(fused(*args, torch.float32), 1e3 * x, weight), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("bad", [-1, -100, 20, 10**6])
def test_a_label_outside_the_vocabulary_scores_nan(bad, is_fused, poisoned_empty):
    """Its place is in another row's memory or in none, and a device cannot raise: the loss must see it."""
    x, weight, row_of, labels = draw(4, 20, 8, torch.float32)
    leaf = x.double().requires_grad_()
    want = expected(leaf, weight, row_of, labels, *TRANSFORMS["plain"])[0]
    (want_grad,) = torch.autograd.grad(want[1:].sum(), leaf)
    options = HeadOptions(*TRANSFORMS["plain"], torch.float32, fused=is_fused)
    wrong = labels.clone()
    wrong[0] = bad
    leaf = x.clone().requires_grad_()
    logp = ChunkedHead.apply(leaf, weight, None, wrong, Pairs.of(row_of, len(x)), options)[0]
    assert logp[0].isnan()
    torch.testing.assert_close(logp[1:].double(), want[1:], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logp[1:].sum(), leaf)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_second_derivative_is_refused(is_fused, entropy):
    x, weight, row_of, labels = draw(4, 20, 8, torch.float32)
    options = HeadOptions(*TRANSFORMS["plain"], torch.float32, entropy, is_fused)
    leaf = x.requires_grad_()
    logp, _ = ChunkedHead.apply(leaf, weight, None, labels, Pairs.of(row_of, len(x)), options)
    (grad,) = torch.autograd.grad(logp.sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_plain_and_fused_agree_in_low_precision():
    x, weight, row_of, labels = draw(40, 333, 64, torch.bfloat16)
    x = x * 0.3
    transform, temperature = TRANSFORMS["temperature"]
    want = results(lambda x, w: expected(x, w, row_of, labels, transform, temperature), x.double(), weight.double())
    run = fused(row_of, labels, transform, temperature, torch.bfloat16)
    found = results(run, x, weight)
    options = HeadOptions(transform, temperature, torch.bfloat16, entropy=True)
    pairs = Pairs.of(row_of, len(x))
    plain = results(lambda x, w: ChunkedHead.apply(x, w, None, labels, pairs, options), x, weight)
    assert worst(found, want) <= 2 * worst(plain, want)
    assert all(torch.equal(a, b) for a, b in zip(found, results(run, x, weight), strict=True))


def test_chunks_are_of_even_size():
    options = HeadOptions(LogitTransform(1.0, 0.0), 1.0, torch.bfloat16, fused=True)
    for num_rows in (0, 1, 3000, 3600, 8344, 16_384):
        starts = options.starts(num_rows, 151_936)
        sizes = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert sum(sizes) == num_rows and max(sizes, default=0) * 151_936 <= 2**29
        assert len(sizes) < 2 or min(sizes) > 0.8 * max(sizes)


def test_says_why_it_is_not_fused():
    linear, biased = torch.nn.Linear(4, 9, bias=False), torch.nn.Linear(4, 9)
    assert use_fused("fused", linear.to(DEVICE), torch.float32)
    assert not use_fused("plain", linear, torch.float32)
    assert use_fused("auto", linear, torch.float32) == (DEVICE == "cuda")
    with pytest.raises(ValueError, match="bias"):
        use_fused("fused", biased.to(DEVICE), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        use_fused("fused", linear, torch.float64)
    with pytest.raises(ValueError, match="'auto', 'fused', 'plain'"):
        use_fused("liger", linear, torch.float32)
