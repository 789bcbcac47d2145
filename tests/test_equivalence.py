"""The heart: a packed tree against each of its leaves run alone, through the same model with plain eager attention.

Everything on the right-hand side is written out here, leaf by leaf, without any of the project's code: attention by
matrix products, log-probs from whole logits, the loss of each sequence from its formula. Compared are log-probs, losses
and the gradient of every parameter. gpt2 computes wholly in float64 and must agree to 1e-10; in other families
transformers computes norms, rotations and softmax in float32 even so: 1e-6.
"""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import NAMED, ancestor_mask, random_subtree_end
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TAUGHT, VOCAB, tiny_model, tree_twin

import treegrpo
import treegrpo_kernels as tk
from treegrpo.logprobs import chain_logprobs, token_logprobs
from treegrpo.loss import grpo_loss, loss_normalizer

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")
EPSILON, EPSILON_HIGH, MAX_LENGTH = 0.2, 0.28, 32


@dataclass
class Leaf:
    """One sequence and what belongs to it; arrays [n], a value per token."""

    tokens: list[int]
    mask: torch.Tensor
    advantage: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    group: str
    copies: torch.Tensor  # leaves of the group that train this very token (same prefix)


def make_leaves(model, groups, seed=0, trained=0.7):
    """Leaves of every group with random masks, advantages of both signs in two steps, and log-probs 0.4 nat away."""
    rng = torch.Generator().manual_seed(seed)
    leaves = []
    for name, token_lists in groups.items():
        mine = []
        for index, tokens in enumerate(token_lists):
            n = len(tokens)
            mask = torch.rand(n, generator=rng) < trained
            mask[0] = False
            advantage = torch.randn(2, generator=rng, dtype=torch.float64) + (-1) ** index
            steps = advantage.float().double().repeat_interleave(torch.tensor([n - n // 2, n // 2]))
            logp, _ = naive_logprobs(model, tokens)
            old, ref = (logp.detach().double() + 0.4 * torch.randn(n, generator=rng, dtype=torch.float64) for _ in "ab")
            mine.append(Leaf(tokens, mask, steps, old, ref, name, torch.ones(n)))
        for leaf in mine:
            for i in range(len(leaf.tokens)):
                prefix = leaf.tokens[: i + 1]
                leaf.copies[i] = max(1, sum(o.tokens[: i + 1] == prefix and bool(o.mask[i]) for o in mine))
        leaves += mine
    return leaves


def naive_logprobs(model, tokens, temperature=1.0):
    """(log-prob, entropy) [n] of one sequence alone; the first token has neither."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] / temperature
    table = torch.log_softmax(logits, dim=-1)
    blank = torch.zeros(1, dtype=table.dtype)
    logp = torch.stack([table[i - 1, tokens[i]] for i in range(1, len(tokens))]) if len(tokens) > 1 else blank[:0]
    entropy = -(table.exp() * table).sum(-1)[:-1]
    return torch.cat([blank, logp]), torch.cat([blank, entropy])


def naive_loss(
    outputs, leaves, loss_type, level="token", delta=None, beta=0.0, entropy_coef=0.0, shared_tokens="per_leaf"
):
    """The objective from its definition, one sequence at a time (TRL 1.16's normalisers)."""
    sums, weighted_sizes, entropies = [], [], []
    for (logp, entropy), leaf in zip(outputs, leaves, strict=True):
        keep = leaf.mask
        logp, entropy, old, ref, advantage = (x[keep] for x in (logp, entropy, leaf.old, leaf.ref, leaf.advantage))
        weight = torch.ones_like(old) if shared_tokens == "per_leaf" else 1 / leaf.copies[keep].double()
        log_ratio = logp - old
        if level == "sequence":
            log_ratio = log_ratio.sum().div(max(1, len(log_ratio))).expand(len(log_ratio))
        ratio = log_ratio.exp()
        if loss_type == "cispo":
            objective = ratio.detach().clamp(max=EPSILON_HIGH + 1) * advantage * logp
        else:
            raw = ratio if delta is None else ratio.clamp(max=delta)
            clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
            objective = torch.minimum(raw * advantage, clipped * advantage)
        divergence = (ref - logp).exp() - (ref - logp) - 1
        sums.append(((-objective + beta * divergence * ratio) * weight).sum())
        entropies.append((entropy * weight).sum())
        weighted_sizes.append(weight.sum() if shared_tokens == "once" else weight.new_tensor(float(keep.sum())))
    sums, sizes = torch.stack(sums), torch.stack(weighted_sizes)
    if loss_type == "grpo":
        loss = (sums / torch.where(sizes > 0, sizes, 1.0)).mean()
    elif loss_type == "dr_grpo":
        loss = sums.sum() / (len(leaves) * MAX_LENGTH)
    else:
        loss = sums.sum() / sizes.sum().clamp(min=1)
    return loss - entropy_coef * torch.stack(entropies).sum() / sizes.sum().clamp(min=1)


def loss_options(loss_type, level="token", delta=None, beta=0.0, entropy_coef=0.0, shared_tokens="per_leaf"):
    """The same objective in the words of ``grpo_loss``."""
    return {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon": EPSILON,
        "epsilon_high": EPSILON_HIGH + 1 if loss_type == "cispo" else EPSILON_HIGH,
        "delta": delta,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "shared_tokens": shared_tokens,
        "max_completion_length": MAX_LENGTH,
    }


def pack_leaves(leaves, **options):
    trajectories = [
        treegrpo.Trajectory(leaf.tokens, leaf.mask.numpy(), group=leaf.group, steps=None) for leaf in leaves
    ]
    return treegrpo.pack(treegrpo.build_forest(trajectories), **options)


def leaf_streams(batch, leaves):
    """The leaves' own values in the order of the batch's stream (groups may be spread over batches)."""
    index_of = {id(t): None for tree in batch.trees for t in tree.trajectories}
    assert len(index_of) == batch.num_leaves
    groups = [tree.group for tree in batch.trees]
    mine = [leaf for group in groups for leaf in leaves if leaf.group == group]
    assert batch.input_ids[batch.leaf_tokens].tolist() == [token for leaf in mine for token in leaf.tokens]
    return {
        "old_logp": torch.cat([leaf.old for leaf in mine]).to(batch.input_ids.device),
        "ref_logp": torch.cat([leaf.ref for leaf in mine]).to(batch.input_ids.device),
        "advantages": torch.cat([leaf.advantage for leaf in mine]).to(batch.input_ids.device),
    }


def packed_loss(model, batch, leaves, *, chain=False, **options):
    """(loss, log-probs [L], metrics) of one packed pass; ``chain``: the flattened baseline instead of the tree."""
    if chain:
        logp, entropy = chain_logprobs(model, batch, entropy=True, chunk_rows=5)
    else:
        logp, entropy = (batch.expand(x) for x in token_logprobs(model, batch, entropy=True, chunk_rows=5))
    loss, metrics = grpo_loss(
        logp,
        mask=batch.leaf_mask,
        leaf_offsets=batch.leaf_offsets,
        multiplicity=batch.multiplicity,
        entropy=entropy,
        **leaf_streams(batch, leaves),
        **options,
    )
    return loss, logp, metrics


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


def backward(model, loss):
    """Gradients through ``loss.backward()``, which reentrant checkpointing needs."""
    model.zero_grad()
    loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def gradient_error(ours, theirs):
    """Largest difference over all parameters, relative to the largest gradient; and the parameter it is in."""
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    worst = max(theirs, key=lambda n: float((ours[n] - theirs[n]).abs().max()))
    return float((ours[worst] - theirs[worst]).abs().max()) / max(scale, 1e-30), worst


def norm_error(ours, theirs):
    """Norm of the difference of all gradients over the norm of all gradients."""
    difference = sum(float((ours[n].double() - theirs[n]).square().sum()) for n in theirs)
    return (difference / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5


def assert_equal_to_leaves_alone(eager, tree, leaves, bound, *, chains=(False,), pack_options=None, **kind):
    """The metrics of the last pass; ``chains``: of the flattened baseline or of the tree, one pass each."""
    outputs = [naive_logprobs(eager, leaf.tokens) for leaf in leaves]
    expected = naive_loss(outputs, leaves, **kind)
    [batch] = pack_leaves(leaves, **(pack_options or {}))
    theirs = torch.cat([x for x, _ in outputs])
    mask = torch.cat([leaf.mask for leaf in leaves])
    assert torch.equal(mask, batch.leaf_mask)
    wanted = gradients(eager, expected) if mask.any() else {}
    for chain in chains:
        loss, logp, metrics = packed_loss(tree, batch, leaves, chain=chain, **loss_options(**kind))
        assert float((logp - theirs).detach()[mask].abs().max() if mask.any() else 0.0) <= bound * 10
        assert abs(float(loss.detach() - expected.detach())) <= bound * max(1.0, abs(float(expected.detach())))
        if mask.any():
            error, where = gradient_error(gradients(tree, loss), wanted)
            assert error <= bound, f"gradient of {where} is off by {error:.1e} of the largest"
    return metrics


@pytest.fixture(scope="module")
def exact():
    """A model that computes wholly in float64, eager and tree."""
    model = tiny_model("gpt2")
    return model, tree_twin(model)


TWO_GROUPS = {"a": NAMED["ragged_turns"], "b": [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4, 5], [1, 7, 8], [1, 2, 3]]}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shared_tokens", ["per_leaf", "mean", "once"])
def test_every_loss_to_1e_10(exact, loss_type, level, shared_tokens):
    leaves = make_leaves(exact[0], TWO_GROUPS)
    kind = {"loss_type": loss_type, "level": level, "shared_tokens": shared_tokens}
    metrics = assert_equal_to_leaves_alone(*exact, leaves, 1e-10, **kind, delta=1.6, beta=0.05, entropy_coef=0.01)
    plain = assert_equal_to_leaves_alone(*exact, leaves, 1e-10, **kind)
    for clips in (metrics, plain):
        if loss_type == "cispo":
            assert 0 < clips["cispo_clip_ratio"] < 1 or level == "sequence"
        elif level == "token":
            # clipping is active on both signs of the advantage
            assert clips["clip_ratio/low_mean"] > 0.05 and clips["clip_ratio/high_mean"] > 0.05


@pytest.mark.parametrize("name", [name for name in NAMED if name != "fork_at_first_token"])
def test_every_named_forest_to_1e_10(exact, name):
    leaves = make_leaves(exact[0], {"a": NAMED[name]}, seed=1)
    assert_equal_to_leaves_alone(*exact, leaves, 1e-10, loss_type="dapo", beta=0.04)


token_lists = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=9), min_size=1, max_size=5)


@settings(max_examples=30)
@given(first=token_lists, second=token_lists, seed=st.integers(0, 2**16), loss_type=st.sampled_from(LOSS_TYPES))
def test_random_forests_to_1e_10(exact, first, second, seed, loss_type):
    leaves = make_leaves(exact[0], {"a": first, "b": second}, seed=seed, trained=0.5)
    level = LEVELS[seed % 2]
    assert_equal_to_leaves_alone(*exact, leaves, 1e-10, loss_type=loss_type, level=level, beta=0.1, entropy_coef=0.02)


# a loss sees log-probs alone: each with one family of every kind of layer, and every hybrid with the first
@pytest.mark.parametrize(
    ("family", "loss_type"),
    [(name, loss) for name in ("gpt_oss", "qwen3", "gemma2", "deepseek_v3") for loss in ("grpo", "cispo")]
    + [(name, "grpo") for name in TAUGHT]
    + [(name, "cispo") for name in ("qwen3_5_text", "nemotron_h", "lfm2") if name in TAUGHT],
)
def test_families_with_sinks_windows_softcap_experts_recurrences(family, loss_type):
    model = tiny_model(family)
    leaves = make_leaves(model, TWO_GROUPS, seed=2)
    assert_equal_to_leaves_alone(model, tree_twin(model), leaves, 1e-6, loss_type=loss_type, beta=0.05)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_float32_model_to_1e_6(family, loss_type):
    """Log-probs and loss; gradients against the float64 model: leaves alone in float32 are off by 4e-7 to 9e-7."""
    eager = tiny_model(family, dtype=torch.float32)
    tree, wide = tree_twin(eager), copy.deepcopy(eager).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")
    leaves = make_leaves(eager, TWO_GROUPS, seed=3)
    [batch] = pack_leaves(leaves)
    loss, logp, _ = packed_loss(tree, batch, leaves, **loss_options(loss_type, beta=0.05))
    outputs, exact = ([naive_logprobs(model, leaf.tokens) for leaf in leaves] for model in (eager, wide))
    alone, expected = (naive_loss(x, leaves, loss_type, beta=0.05) for x in (outputs, exact))
    assert logp.dtype == torch.float32
    assert abs(float((loss - alone).detach())) <= 1e-6
    theirs = torch.cat([x for x, _ in outputs])[batch.leaf_mask].detach()
    assert float((logp[batch.leaf_mask].detach() - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    truth = gradients(wide, expected)
    rounding = norm_error(gradients(eager, alone), truth)
    assert rounding < 2e-6
    assert norm_error(gradients(tree, loss), truth) <= max(1e-6, 2 * rounding)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "family", ["qwen3", "gpt_oss", "gemma2", *(name for name in ("qwen3_5_text",) if name in TAUGHT)]
)
def test_float32_tree_on_a_device_against_float64_leaves_on_the_cpu(family, device):
    """A whole model through the kernels of the device; matrix products there may round otherwise than on the CPU."""
    eager = tiny_model(family, dtype=torch.float32)
    tree, wide = tree_twin(eager).to(device), copy.deepcopy(eager).double()
    for model in (tree, wide):
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
    leaves = make_leaves(eager, TWO_GROUPS, seed=3)
    [batch] = pack_leaves(leaves, device=device)
    loss, logp, _ = packed_loss(tree, batch, leaves, **loss_options("grpo", beta=0.05))
    exact = [naive_logprobs(wide, leaf.tokens) for leaf in leaves]
    expected = naive_loss(exact, leaves, "grpo", beta=0.05)
    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-5
    theirs = torch.cat([x for x, _ in exact]).detach()
    assert float((logp.detach().cpu() - theirs)[batch.leaf_mask.cpu()].abs().max()) <= 1e-5 * float(theirs.abs().max())
    ours = {name: grad.cpu() for name, grad in gradients(tree, loss).items()}
    assert norm_error(ours, gradients(wide, expected)) <= 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_flattened_baseline_is_the_same_loss(exact, loss_type):
    leaves = make_leaves(exact[0], TWO_GROUPS, seed=4)
    assert_equal_to_leaves_alone(
        *exact, leaves, 1e-10, chains=(True,), loss_type=loss_type, beta=0.05, entropy_coef=0.01
    )


def test_groups_packed_side_by_side(exact):
    leaves = make_leaves(exact[0], TWO_GROUPS, seed=5)
    options = {"share_across_groups": False}
    assert_equal_to_leaves_alone(*exact, leaves, 1e-10, pack_options=options, loss_type="grpo")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_step_over_several_batches(exact, loss_type):
    eager, tree = exact
    leaves = make_leaves(eager, {**TWO_GROUPS, "c": NAMED["worked_example"]}, seed=6)
    expected = naive_loss([naive_logprobs(eager, leaf.tokens) for leaf in leaves], leaves, loss_type)
    batches = pack_leaves(leaves, token_budget=60)
    assert len(batches) > 1
    normalizer = sum(
        loss_normalizer(loss_type, b.leaf_mask, b.leaf_offsets, max_completion_length=MAX_LENGTH) for b in batches
    )
    loss = sum(packed_loss(tree, b, leaves, normalizer=normalizer, **loss_options(loss_type))[0] for b in batches)
    assert abs(float((loss - expected).detach())) <= 1e-10
    error, where = gradient_error(gradients(tree, loss), gradients(eager, expected))
    assert error <= 1e-10, where


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(exact, reentrant):
    eager, tree = exact[0], copy.deepcopy(exact[1])
    leaves = make_leaves(eager, TWO_GROUPS, seed=7)
    expected = naive_loss([naive_logprobs(eager, leaf.tokens) for leaf in leaves], leaves, "grpo", beta=0.05)
    tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tree.train()
    [batch] = pack_leaves(leaves)
    loss, _, _ = packed_loss(tree, batch, leaves, **loss_options("grpo", beta=0.05))
    # another batch goes through the model before backward: the recomputation must still see this one's plan
    [other] = pack_leaves(make_leaves(eager, {"z": NAMED["binary_depth_4"]}))
    with torch.no_grad():
        token_logprobs(tree, other)
    error, where = gradient_error(backward(tree, loss), gradients(eager, expected))
    assert error <= 1e-10, where


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_lora(exact, reentrant):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    eager, tree = copy.deepcopy(exact[0]), copy.deepcopy(exact[1])
    adapted = []
    for model in (eager, tree):
        torch.manual_seed(11)
        adapted.append(peft.get_peft_model(model, config).double())
    eager, tree = adapted
    leaves = make_leaves(eager, TWO_GROUPS, seed=8)
    expected = naive_loss([naive_logprobs(eager, leaf.tokens) for leaf in leaves], leaves, "dapo", beta=0.05)
    if reentrant is not None:
        tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        tree.enable_input_require_grads()
        tree.train()
    [batch] = pack_leaves(leaves)
    loss, _, _ = packed_loss(tree, batch, leaves, **loss_options("dapo", beta=0.05))
    theirs = gradients(eager, expected)
    assert len(theirs) == 12 and all("lora" in name and g.abs().max() > 0 for name, g in theirs.items())
    error, where = gradient_error(backward(tree, loss), theirs)
    assert error <= 1e-10, where


def test_five_optimiser_steps_stay_together(exact):
    eager, tree = copy.deepcopy(exact[0]), copy.deepcopy(exact[1])
    leaves = make_leaves(eager, TWO_GROUPS, seed=9)
    [batch] = pack_leaves(leaves)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (eager, tree)]
    for _ in range(5):
        losses = (
            naive_loss([naive_logprobs(eager, leaf.tokens) for leaf in leaves], leaves, "grpo"),
            packed_loss(tree, batch, leaves, **loss_options("grpo"))[0],
        )
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert abs(float((losses[0] - losses[1]).detach())) <= 1e-8
    for a, b in zip(eager.parameters(), tree.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def causal(batch):
    batch.subtree_end = torch.full_like(batch.subtree_end, batch.num_tokens)


def one_sibling_too_many(batch):
    # the first branch of the prompt stays open until its parent closes
    end = batch.subtree_end.tolist()
    t = next(t for t in range(1, len(end)) if end[t] < end[batch.prev[t]])
    batch.subtree_end[t] = end[batch.prev[t]]
    return t


def shifted_labels(batch):
    batch.prev = torch.arange(-1, batch.num_tokens - 1, dtype=torch.int32)


@pytest.mark.parametrize("mutant", [causal, one_sibling_too_many, shifted_labels])
def test_a_wrong_plan_fails(exact, mutant, monkeypatch):
    leaves = make_leaves(exact[0], TWO_GROUPS, seed=10, trained=1.0)
    packed = pack_leaves

    def mutated(leaves, **options):
        [batch] = packed(leaves, **options)
        mutant(batch)
        return [batch]

    monkeypatch.setitem(globals(), "pack_leaves", mutated)
    with pytest.raises(AssertionError):
        assert_equal_to_leaves_alone(*exact, leaves, 1e-3, loss_type="dapo")


def attention_alone(q, k, v):
    """Causal softmax attention of one leaf [n, H, D], written out."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", range(6))
def test_the_op_on_a_forest_is_the_op_on_its_leaves_to_1e_10(backend, seed):
    the_op_on_a_forest_is_the_op_on_its_leaves(backend, seed, torch.device("cpu"), torch.float64, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("cuda", torch.float64, 1e-10), ("triton", torch.float32, 1e-4)]
)
def test_the_op_on_a_forest_is_the_op_on_its_leaves_on_a_gpu(backend, dtype, bound):
    for seed in range(6):
        the_op_on_a_forest_is_the_op_on_its_leaves(backend, seed, torch.device("cuda"), dtype, bound)


def the_op_on_a_forest_is_the_op_on_its_leaves(backend, seed, device, dtype, bound):
    reason = tk.backends(device)[backend]
    if reason is not None:
        pytest.skip(reason)
    end = random_subtree_end(70, seed=seed, branch=0.25)
    mask = ancestor_mask(end)
    leaves = [torch.from_numpy(np.flatnonzero(mask[t])).to(device) for t in range(len(end)) if end[t] == t + 1]
    assert len(leaves) > 5
    kind = dict(generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)
    q, k, v = (torch.randn(70, heads, dim, requires_grad=True, **kind) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    weights = [torch.randn(len(leaf), 4, 6, **kind) for leaf in leaves]
    plan = tk.TreePlan.build(torch.from_numpy(end), device=device)
    out = tk.tree_attention(q, k, v, plan, backend=backend)
    alone = [attention_alone(q[leaf], k[leaf], v[leaf]) for leaf in leaves]
    for leaf, x in zip(leaves, alone, strict=True):
        torch.testing.assert_close(out[leaf], x, rtol=0, atol=bound)
    ours = sum((out[leaf] * w).sum() for leaf, w in zip(leaves, weights, strict=True))
    theirs = sum((x * w).sum() for x, w in zip(alone, weights, strict=True))
    for a, b in zip(torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(theirs, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_the_vocabulary_covers_the_forests():
    assert max(max(leaf) for leaves in NAMED.values() for leaf in leaves) < VOCAB
