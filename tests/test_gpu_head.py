"""The fused head at a real vocabulary on a GPU: accuracy, bits, memory, no waiting for the device."""

import pytest
import torch

from treegrpo import Trajectory, build_forest, grpo_loss, pack, token_logprobs
from treegrpo.head import ChunkedHead, HeadOptions, LogitTransform, Pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB, HIDDEN, ROWS = 151_936, 1536, 3000


def problem(dtype=torch.bfloat16):
    gen = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=gen, device="cuda").to(dtype)
    weight = (0.03 * torch.randn(VOCAB, HIDDEN, generator=gen, device="cuda")).to(dtype)
    row_of = torch.arange(ROWS, device="cuda").repeat_interleave(2)[:-3]
    labels = torch.randint(VOCAB, row_of.shape, generator=gen, device="cuda")
    return x, weight, row_of, labels


def run(x, weight, row_of, labels, *, fused, entropy=True):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    options = HeadOptions(LogitTransform(1.0, 0.0), 0.9, x.dtype, entropy=entropy, fused=fused)
    logp, h = ChunkedHead.apply(*leaves, None, labels, Pairs.of(row_of, ROWS), options)
    total = (logp * torch.sin(torch.arange(len(logp), device="cuda"))).sum()
    if entropy:
        total = total + 0.1 * h.sum()
    return [logp.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_as_accurate_as_the_plain_head(dtype):
    args = problem(dtype)
    want = run(*(x.double() if x.is_floating_point() else x for x in args), fused=False)
    plain, found = run(*args, fused=False), run(*args, fused=True)
    for name, a, b, c in zip(("logp", "dhidden", "dweight"), found, plain, want, strict=True):
        error, allowed = (a.double() - c).norm() / c.norm(), (b.double() - c).norm() / c.norm()
        # fp32: 16 units in the last place, as for attention
        assert error <= 2 * allowed + 2**-19, (name, float(error), float(allowed))


def test_the_same_bits_twice():
    args = problem()
    assert all(torch.equal(a, b) for a, b in zip(run(*args, fused=True), run(*args, fused=True), strict=True))


def test_memory_is_that_of_a_chunk():
    x, weight, _, labels = problem()
    rows = 4 * ROWS
    big = x.repeat(4, 1)
    leaves = [big.requires_grad_(), weight.requires_grad_()]
    options = HeadOptions(LogitTransform(1.0, 0.0), 1.0, x.dtype, fused=True)
    pairs = Pairs.of(torch.arange(rows, device="cuda"), rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, _ = ChunkedHead.apply(*leaves, None, labels.repeat(3)[:rows], pairs, options)
    torch.autograd.grad(logp.sum(), leaves)
    used = torch.cuda.max_memory_allocated() - before
    # a chunk's logits and their gradient, three copies of the weight in float32 at most, the hidden rows
    assert used < 3 * 2**30 + 3 * 4 * VOCAB * HIDDEN + 16 * rows * HIDDEN < 4 * rows * VOCAB


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_a_step_on_a_prepared_batch_never_waits_for_the_device(loss_type):
    transformers = pytest.importorskip("transformers")
    from treegrpo.hf import use_tree_attention

    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = use_tree_attention(model.train(), check=False)
    leaves = [[1, 2, 3, *range(10, 200)], [1, 2, 3, *range(300, 400)], [1, 2, 9, 9, 9]]
    rows = [Trajectory(ids, [0, 0] + [1] * (len(ids) - 2), reward=0.0, group="g") for ids in leaves]
    (batch,) = pack(build_forest(rows), device="cuda")

    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    old = torch.full((batch.num_chain_tokens,), -6.0, device="cuda")
    advantages = torch.linspace(-1, 1, batch.num_chain_tokens, device="cuda")

    def step():
        optimiser.zero_grad(set_to_none=True)
        logp, entropy = (batch.expand(x) for x in token_logprobs(model, batch, entropy=True))
        options = dict(loss_type=loss_type, beta=0.1, ref_logp=old, entropy=entropy, entropy_coef=0.01)
        loss, _ = grpo_loss(logp, old, advantages, batch.leaf_mask, batch.leaf_offsets, **options)
        loss.backward()
        optimiser.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
