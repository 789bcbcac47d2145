"""The log-prob head on a CPU: forward + backward, hidden rows to a log-prob per trained token, vocabulary 8,192.

A model without layers (embedding, norm, head) leaves the head alone. Contenders: the packed tree's chunked head, the
same on flattened leaves, and the usual way, logits of every token at once and a log-softmax over them.
The check: log-probs and the head's gradient against float64 logits.
"""

from functools import cache

import pytest
import torch

from bench import workloads
from bench.models import config, model
from treegrpo import pack, token_logprobs
from treegrpo.logprobs import chain_logprobs

HIDDEN, VOCAB, QUICK_VOCAB = 128, 8192, 512
NAMES = ("grpo_star", "branching", "tau_calls")
MAX_FULL_LOGITS = 2**28


@cache
def headless(device, quick):
    return model(config(layers=0, hidden=HIDDEN, vocab=QUICK_VOCAB if quick else VOCAB), device)


@cache
def batch_of(workload, device, quick):
    vocab = QUICK_VOCAB if quick else VOCAB
    (batch,) = pack(workloads.trees(workload, quick), device=device)
    # the trie is built; only the labels must fit the vocabulary
    batch.input_ids.remainder_(vocab)
    return batch


def tree(network, batch):
    return torch.where(batch.leaf_mask, batch.expand(token_logprobs(network, batch)), 0)


def chain(network, batch):
    return chain_logprobs(network, batch)


def full_logits(network, batch):
    """Every token's logits, float32, as a plain trainer computes them; on the leaf stream."""
    ids = batch.input_ids[batch.leaf_tokens]
    logits = network.lm_head(network.model.norm(network.model.embed_tokens(ids)))
    logp = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0]
    return torch.where(batch.leaf_mask, torch.cat([logp.new_zeros(1), logp]), 0)


CONTENDERS = {"tree_head": tree, "chain_head": chain, "chain_full_logits": full_logits}


def gradient(run, network, batch):
    weight = network.lm_head.weight
    return torch.autograd.grad(run(network, batch).sum(), weight)[0]


@cache
def oracle(workload, device, quick):
    """Log-probs of the leaf stream and the head's gradient, float64, a thousand rows at a time."""
    network, batch = headless(device, quick), batch_of(workload, device, quick)
    with torch.no_grad():
        hidden = network.model.norm(network.model.embed_tokens(batch.input_ids)).double()
    weight = network.lm_head.weight.detach().double().requires_grad_()
    places = batch.leaf_mask.nonzero().squeeze(1)
    logp = torch.zeros(batch.num_chain_tokens, dtype=torch.float64, device=device)
    total = torch.zeros_like(weight)
    for part in places.split(1024):
        rows, labels = batch.leaf_tokens[part - 1], batch.input_ids[batch.leaf_tokens[part]]
        picked = torch.log_softmax(hidden[rows] @ weight.t(), dim=-1).gather(1, labels[:, None])[:, 0]
        total += torch.autograd.grad(picked.sum(), weight)[0]
        logp[part] = picked.detach()
    return logp, total


def check(run, workload, device, quick):
    network, batch = headless(device, quick), batch_of(workload, device, quick)
    logp, dweight = oracle(workload, device, quick)
    with torch.no_grad():
        error = float((run(network, batch).double() - logp).abs().max())
    assert error <= 1e-5, f"log-probs are off by {error:.1e}"
    got = gradient(run, network, batch).double()
    relative = float((got - dweight).abs().max() / dweight.abs().max())
    assert relative <= 1e-4, f"the head's gradient is off by {relative:.1e}"
    return max(error, relative)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", NAMES)
def test_head(workload, contender, meter, device, quick):
    if device.type == "cuda":
        pytest.skip("a small vocabulary says nothing of a GPU: test_head.py measures a real one there")
    network, batch, run = headless(device, quick), batch_of(workload, device, quick), CONTENDERS[contender]
    is_tree = contender == "tree_head"
    if contender == "chain_full_logits" and batch.num_chain_tokens * network.config.vocab_size > MAX_FULL_LOGITS:
        reason = f"logits of {batch.num_chain_tokens} tokens do not fit: {4 * MAX_FULL_LOGITS >> 30} GiB is the limit"
        pytest.skip(reason)
    rows = int(batch.trained.sum() if is_tree else batch.leaf_mask.sum())
    meter.benchmark.group = f"log-prob head {workload}"
    meter.measure(
        lambda: gradient(run, network, batch),
        check=lambda: check(run, workload, device, quick),
        baseline=(lambda: gradient(chain, network, batch)) if is_tree else None,
        baseline_name="chain_head" if is_tree else None,
        suite="head",
        contender=contender,
        workload=workload,
        tokens=batch.num_tokens if is_tree else batch.num_chain_tokens,
        head_rows=rows,
        flops=3 * 2 * HIDDEN * network.config.vocab_size * rows,
    )
