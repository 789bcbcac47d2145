"""One training step, forward + loss + backward, of a small Qwen3-shaped model on a CPU, and of a hybrid: tree against
chain.

Contenders: the packed tree; the best chain (padding-free, head on trained tokens only, through the same kernel); and
stock transformers, one leaf at a time through SDPA, logits of every token. Same weights, same loss (dapo).
The check: loss and the gradient of every parameter against stock transformers, which shares no code with the other two.
FLOPs are treegrpo.flops' training FLOPs, exact.
"""

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING

from bench import workloads
from bench.baselines import Request, fast_tree_backend
from bench.models import VOCAB, config, hybrid_config, model
from treegrpo import compute_advantages, flops, grpo_loss, pack, token_logprobs
from treegrpo.logprobs import chain_logprobs

HIDDEN, QUICK_HIDDEN, LAYERS = 128, 64, 2
# chain tokens from which a step is timed this often
ROUNDS = {0: 3, 15_000: 2, 30_000: 1}
NAMES = ("grpo_star", "search_agent", "binary", "branching", "tau_whole", "tau_calls")
MODELS = dict.fromkeys(NAMES, "qwen3") | {f"{name}, Qwen3.5": "qwen3_5" for name in ("grpo_star", "search_agent")}


@cache
def network(device, attention, quick, family):
    hidden = QUICK_HIDDEN if quick else HIDDEN
    shape = config(layers=LAYERS, hidden=hidden) if family == "qwen3" else hybrid_config(hidden=hidden)
    return model(shape, device, attention=attention)


def forest_of(case):
    return case.split(",")[0]


@cache
def problem(case, device, quick):
    """(batch, advantages [L], old log-probs [L]); the old ones differ from the policy's, so that clipping is active."""
    grown = workloads.trees(forest_of(case), quick)
    (batch,) = pack(grown, device=device)
    batch.input_ids.remainder_(VOCAB)
    advantages = batch.leaf_stream(compute_advantages(grown, "grpo"))
    with torch.no_grad():
        old = batch.expand(token_logprobs(network(device, "treegrpo", quick, MODELS[case]), batch))
    noise = 0.3 * torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0)).to(device)
    return batch, advantages, old + batch.expand(noise)


def tree(net, batch):
    return batch.expand(token_logprobs(net, batch))


def chain(net, batch):
    return chain_logprobs(net, batch)


def stock(net, batch):
    """Each leaf alone through transformers with SDPA."""
    parts = []
    for leaf in batch.leaf_tokens.split(batch.leaf_offsets.diff().tolist()):
        ids = batch.input_ids[leaf]
        logits = net(ids[None], use_cache=False).logits[0, :-1].float()
        logp = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
        parts += [logp.new_zeros(1), logp]
    return torch.cat(parts)


CONTENDERS = {"tree": (tree, "treegrpo"), "chain": (chain, "treegrpo"), "stock_transformers": (stock, "sdpa")}


def step(contender, case, device, quick):
    """(loss, gradients) of one step; what the optimiser then does is the same for all."""
    run, attention = CONTENDERS[contender]
    batch, advantages, old = problem(case, device, quick)
    net = network(device, attention, quick, MODELS[case])
    logp = run(net, batch)
    loss, _ = grpo_loss(logp, old, advantages, batch.leaf_mask, batch.leaf_offsets, loss_type="dapo", delta=3.0)
    return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))


@cache
def oracle(case, device, quick):
    return step("stock_transformers", case, device, quick)


def check(contender, case, device, quick):
    """Largest difference of a parameter's gradient, relative to the norm of that gradient."""
    expected_loss, expected = oracle(case, device, quick)
    if contender == "stock_transformers":
        return 0.0
    loss, gradients = step(contender, case, device, quick)
    difference = float((loss - expected_loss).abs())
    assert difference <= 1e-5, f"{contender}: the loss is off by {difference:.1e}"
    worst = 0.0
    names = (name for name, _ in network(device, "sdpa", quick, MODELS[case]).named_parameters())
    for name, got, want in zip(names, gradients, expected, strict=True):
        error = float((got - want).norm() / want.norm().clamp(min=1e-12))
        assert error <= 1e-3, f"{contender}: the gradient of {name} is off by {error:.1e}"
        worst = max(worst, error)
    return worst


def rounds_for(num_chain_tokens):
    return next(rounds for least, rounds in sorted(ROUNDS.items(), reverse=True) if num_chain_tokens >= least)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("workload", "case"), [(forest_of(case), case) for case in MODELS], ids=MODELS)
def test_step(workload, case, contender, meter, device, quick):
    if device.type == "cuda":
        pytest.skip("a small model says nothing of a GPU: test_real_step.py measures real ones there")
    if MODELS[case] != "qwen3" and "qwen3_5_text" not in CONFIG_MAPPING:
        pytest.skip("transformers has no Qwen3.5 before 5.17")
    usable = fast_tree_backend(Request(workloads.forest(workload, quick), device, True, quick))
    if isinstance(usable, str):
        pytest.skip(usable)
    batch, *_ = problem(case, device, quick)
    counted = flops.report(
        network(device, "sdpa", quick, MODELS[case]).config, workloads.trees(workload, quick), share_across_groups=True
    )
    cost = counted.tree if contender == "tree" else counted.chain
    meter.benchmark.group = f"training step {case}"
    meter.measure(
        lambda: step(contender, case, device, quick),
        check=lambda: check(contender, case, device, quick),
        baseline=(lambda: step("chain", case, device, quick)) if contender == "tree" else None,
        baseline_name="chain" if contender == "tree" else None,
        rounds=1 if contender == "stock_transformers" else rounds_for(counted.chain.tokens),
        suite="step",
        contender=contender,
        workload=case,
        tokens=cost.tokens,
        pairs=cost.pairs,
        head_rows=cost.head_rows,
        flops=cost.training,
        flop_ratio=counted.flop_ratio if contender == "tree" else None,
        token_ratio=batch.num_chain_tokens / batch.num_tokens,
    )
