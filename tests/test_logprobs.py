"""The chunked head against the model's own logits: values, gradients, families, wrappers, memory, bad input."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import NAMED
from models import HYBRID, VOCAB, tiny_model, tree_twin

import treegrpo
from treegrpo.head import ChunkedHead, HeadOptions, LogitTransform, Pairs, logit_transform
from treegrpo.logprobs import (
    chain_logprobs,
    chain_plan,
    output_head,
    row_logprobs,
    token_logprobs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(leaves, prompt=1, **options):
    trajectories = [
        treegrpo.Trajectory(ids, [int(i >= prompt) for i in range(len(ids))], reward=0.0, group="g") for ids in leaves
    ]
    [batch] = treegrpo.pack(treegrpo.build_forest(trajectories), **options)
    return batch


@pytest.fixture(scope="module")
def batch():
    return make_batch(NAMED["ragged_turns"] + NAMED["worked_example"] + NAMED["two_trees"])


@pytest.fixture(scope="module")
def model():
    return tree_twin(tiny_model("qwen3"))


def naive(model, batch, temperature=1.0):
    """(logp [T], entropy [T]) from the whole [T, V] logits, zero where not trained."""
    logits = model(**batch.model_inputs()).logits[0] / temperature
    all_logp = torch.log_softmax(logits, -1)
    rows = batch.prev.long().clamp(min=0)
    logp = all_logp[rows, batch.input_ids]
    entropy = -(all_logp.exp() * all_logp).sum(-1)[rows]
    return torch.where(batch.trained, logp, 0.0), torch.where(batch.trained, entropy, 0.0)


def gradients(model, value):
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_same_gradients(ours, theirs, atol=1e-10):
    assert len(ours) == len(theirs) > 0 and any(g.abs().max() > 1e-3 for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_whole_logits(model, batch, chunk_rows, temperature):
    logp, entropy = token_logprobs(model, batch, temperature=temperature, entropy=True, chunk_rows=chunk_rows)
    expected_logp, expected_entropy = naive(model, batch, temperature)
    torch.testing.assert_close(logp, expected_logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    assert (logp[~batch.trained] == 0).all() and (logp[batch.trained] < 0).all()
    weight = torch.linspace(-1, 1, batch.num_tokens, dtype=torch.float64)
    ours = gradients(model, ((logp + 0.3 * entropy) * weight).sum())
    assert_same_gradients(ours, gradients(model, ((expected_logp + 0.3 * expected_entropy) * weight).sum()))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "gpt2", "opt", "granitemoe", "phi3"])
def test_families_with_scaled_capped_tied_and_biased_heads(family, batch):
    model = tree_twin(tiny_model(family))
    logp = token_logprobs(model, batch, chunk_rows=4)
    expected, _ = naive(model, batch)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(model, logp.square().sum()), gradients(model, expected.square().sum()), atol=1e-9)


def test_head_bias_gets_its_gradient(batch):
    model = tree_twin(tiny_model("qwen3"))
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB, dtype=torch.float64))
    logp, expected = token_logprobs(model, batch, chunk_rows=5), naive(model, batch)[0]
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(model, logp.square().sum()), gradients(model, expected.square().sum()))


def test_tied_embeddings(batch):
    model = tree_twin(tiny_model("qwen3", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logp, expected = token_logprobs(model, batch), naive(model, batch)[0]
    assert_same_gradients(gradients(model, logp.square().sum()), gradients(model, expected.square().sum()))


def test_gradcheck_of_the_head():
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    row_of, labels = torch.tensor([4, 0, 0, 2, 4, 4, 1]), torch.tensor([1, 5, 0, 3, 2, 6, 5])
    options = HeadOptions(LogitTransform(0.7, 1.5), 0.8, torch.float64, entropy=True, chunk_rows=2)
    rest = labels, Pairs.of(row_of, 5), options
    assert torch.autograd.gradcheck(
        lambda h, w, b: ChunkedHead.apply(h, w, b, *rest), (random(5, 3), random(7, 3), random(7))
    )


def test_chain_equals_tree_on_the_leaf_stream(model, batch):
    tree, tree_entropy = token_logprobs(model, batch, entropy=True)
    chain, chain_entropy = chain_logprobs(model, batch, entropy=True)
    assert chain.shape == (batch.num_chain_tokens,) and chain_plan(batch).num_pairs == batch.num_chain_pairs
    trained = batch.leaf_mask
    for ours, theirs in ((tree, chain), (tree_entropy, chain_entropy)):
        torch.testing.assert_close(batch.expand(ours)[trained], theirs[trained], rtol=0, atol=1e-6)
        assert (theirs[~trained] == 0).all()
    weight = torch.linspace(-1, 1, batch.num_chain_tokens, dtype=torch.float64) * trained
    assert_same_gradients(
        gradients(model, (batch.expand(tree) * weight).sum()), gradients(model, (chain * weight).sum()), atol=1e-6
    )


def test_only_rows_of_trained_tokens_reach_the_head(model, batch):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    token_logprobs(model, batch)
    handle.remove()
    rows = len(set(batch.prev[batch.trained].tolist()))
    assert seen == [(1, rows, 32)] and rows < int(batch.trained.sum())


def test_no_trained_token_gives_zeros_and_zero_gradients(model):
    batch = make_batch([[1, 2, 3], [1, 4]], prompt=5)
    for logp in (token_logprobs(model, batch), chain_logprobs(model, batch)):
        assert (logp == 0).all()
        assert all((g == 0).all() for g in gradients(model, logp.sum()))


def test_the_head_forward_is_restored_even_after_an_error(model, batch):
    token_logprobs(model, batch)
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(ValueError, match="backend"):
        token_logprobs(model, batch, backend="none of them")
    assert "forward" not in vars(model.lm_head)


def test_threads_that_share_a_model_take_turns():
    shared = tree_twin(tiny_model("qwen3"))
    batches = [make_batch(NAMED[name]) for name in ("ragged_turns", "worked_example")]
    with torch.no_grad():
        expected = [token_logprobs(shared, one) for one in batches]
        alone = shared(**batches[0].model_inputs()).logits

    def score(one):
        with torch.no_grad():
            return [token_logprobs(shared, one) for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        for want, found in zip(expected, threads.map(score, batches), strict=True):
            assert all(torch.equal(x, want) for x in found)
    assert "forward" not in vars(shared.lm_head)
    with torch.no_grad():
        assert torch.equal(shared(**batches[0].model_inputs()).logits, alone)


def test_two_runs_give_the_same_bits(model, batch):
    logp, again = token_logprobs(model, batch, chunk_rows=3), token_logprobs(model, batch, chunk_rows=3)
    assert torch.equal(logp, again)
    for a, b in zip(gradients(model, logp.sum()), gradients(model, again.sum()), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_model_gives_float32_log_probs(batch):
    exact = tree_twin(tiny_model("qwen3"))
    low = copy.deepcopy(exact).to(torch.bfloat16)
    logp, entropy = token_logprobs(low, batch, entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    logits = low(**batch.model_inputs()).logits[0]
    assert logits.dtype == torch.bfloat16
    # from the same hidden rows, only the head differs: ours keeps the products in float32
    hidden = low.model(**batch.model_inputs()).last_hidden_state[0]
    wide = hidden.double() @ low.lm_head.weight.double().T
    rows = batch.prev.long().clamp(min=0)
    expected = torch.log_softmax(wide, -1)[rows, batch.input_ids]
    torch.testing.assert_close(logp[batch.trained].double(), expected[batch.trained], rtol=0, atol=2e-6)
    grads = gradients(low, logp.sum())
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)


def test_autocast_computes_forward_and_backward_in_one_dtype(batch):
    model = tree_twin(tiny_model("llama", dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = token_logprobs(model, batch)
        hidden = model.model(**batch.model_inputs()).last_hidden_state[0]
    assert logp.dtype == torch.float32
    weight = model.lm_head.weight.to(torch.bfloat16).double()
    expected = torch.log_softmax(hidden.to(torch.bfloat16).double() @ weight.T, -1)
    expected = expected[batch.prev.long().clamp(min=0), batch.input_ids]
    torch.testing.assert_close(logp[batch.trained].double(), expected[batch.trained], rtol=0, atol=2e-6)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model, logp.sum()))


@pytest.mark.parametrize("score", [token_logprobs, chain_logprobs])
def test_the_head_may_be_wider_than_autocast(score, batch):
    model = tree_twin(tiny_model("qwen3", dtype=torch.float32))
    rows = []
    model.model.register_forward_hook(lambda module, args, out: rows.append(out.last_hidden_state[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = score(model, batch, head_dtype=torch.float32)
    if score is token_logprobs:
        ids, prev = batch.input_ids[batch.trained], batch.prev[batch.trained].long()
        found = found[batch.trained]
    else:
        places = batch.leaf_mask.nonzero()[:, 0]
        ids, prev, found = batch.input_ids[batch.leaf_tokens[places]], places - 1, found[places]
    logits = torch.log_softmax(rows[0].float() @ model.lm_head.weight.t(), -1)
    torch.testing.assert_close(found, logits[prev].gather(1, ids[:, None])[:, 0], rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_rows_times_vocabulary():
    rows, vocab, hidden, chunk = 2048, 4096, 8, 64
    x = torch.randn(rows, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    labels = torch.arange(rows) % vocab

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    with Largest() as largest:
        options = HeadOptions(LogitTransform(1.0, 0.0), 1.0, torch.float32, entropy=True, chunk_rows=chunk)
        logp, _ = ChunkedHead.apply(x, weight, None, labels, Pairs.of(torch.arange(rows), rows), options)
        logp.sum().backward()
    assert largest.elements <= chunk * vocab < rows * vocab // 16


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_with_gradient_checkpointing(batch, reentrant):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    model = peft.get_peft_model(tree_twin(tiny_model("qwen3")), config).double()
    expected = gradients(model, naive(model, batch)[0].square().sum())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    logp = token_logprobs(model, batch)
    for parameter in model.parameters():
        parameter.grad = None
    logp.square().sum().backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert_same_gradients([p.grad for p in trainable], expected)
    with model.disable_adapter(), torch.no_grad():
        reference = token_logprobs(model, batch)
    torch.testing.assert_close(reference, token_logprobs(tree_twin(tiny_model("qwen3")), batch), rtol=0, atol=1e-9)


def test_lora_on_the_head_is_refused_and_modules_to_save_works(batch):
    peft = pytest.importorskip("peft")
    on_head = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="leave it out of target_modules"):
        token_logprobs(peft.get_peft_model(tree_twin(tiny_model("qwen3")), on_head), batch)
    whole = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tree_twin(tiny_model("qwen3")), whole).double()
    with torch.no_grad():
        output_head(model.get_base_model()).weight.mul_(1.5)
    logp, expected = token_logprobs(model, batch), naive(model, batch)[0]
    assert_same_gradients(gradients(model, logp.square().sum()), gradients(model, expected.square().sum()))
    with model.disable_adapter():
        torch.testing.assert_close(token_logprobs(model, batch), naive(model, batch)[0], rtol=0, atol=1e-10)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["ddp", "ddp_find_unused", "fsdp2"])
def test_distributed_wrappers_see_an_ordinary_step(batch, process_group, wrapper):
    plain = tree_twin(tiny_model("qwen3"))
    expected = gradients(plain, token_logprobs(plain, batch).square().sum())
    model = copy.deepcopy(plain)
    if wrapper == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model.lm_head, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=True)
        wrapped = model
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp_find_unused")
    for _ in range(2):
        wrapped.zero_grad()
        token_logprobs(wrapped, batch).square().sum().backward()
        got = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        assert_same_gradients(got, expected)


def test_a_wrapper_that_passes_for_what_it_wraps_is_seen_through(model, batch):
    class Engine(torch.nn.Module):
        """As DeepSpeed's: what the module has it has, but for a config of its own."""

        def __init__(self, module):
            super().__init__()
            self.module, self.config = module, {"stage": 3}

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    assert torch.equal(token_logprobs(Engine(model), batch), token_logprobs(model, batch))


def test_transform_reads_the_config():
    assert logit_transform(tiny_model("gemma2").config) == LogitTransform(1.0, 3.0)
    assert logit_transform(tiny_model("cohere").config) == LogitTransform(0.5, 0.0)
    assert logit_transform(tiny_model("granite").config) == LogitTransform(1 / 3, 0.0)
    assert logit_transform(tiny_model("qwen3").config) == LogitTransform(1.0, 0.0)
    if "falcon_h1" in HYBRID:
        assert logit_transform(tiny_model("falcon_h1").config) == LogitTransform(0.3, 0.0)


def test_bad_input(model, batch):
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        token_logprobs(model, batch, temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive, got nan"):
        token_logprobs(model, batch, temperature=float("nan"))
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        token_logprobs(model, batch, chunk_rows=0)
    with pytest.raises(ValueError, match="no output head: load it as AutoModelForCausalLM"):
        token_logprobs(model.model, batch)
    with pytest.raises(ValueError, match=r"'eager', which ignores trees: call treegrpo.hf.use_tree_attention"):
        token_logprobs(tiny_model("qwen3"), batch)
    with pytest.raises(ValueError, match="first token of a trajectory cannot be trained"):
        row_logprobs(model, batch.input_ids, batch.plan, torch.tensor([-1, 0]), torch.tensor([1, 2]))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite"])
def test_the_second_pass_over_a_batch_asks_for_no_values(family, batch):
    """On a GPU each value read on the host would wait for the device."""
    model = tree_twin(tiny_model(family))
    first = token_logprobs(model, batch)

    class Asked(torch.utils._python_dispatch.TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(name in function.name() for name in ("_local_scalar_dense", "nonzero", "unique", "equal")):
                self.names = (*self.names, function.name())
            return function(*args, **(kwargs or {}))

    with Asked() as asked:
        second = token_logprobs(model, batch)
    assert asked.names == ()
    torch.testing.assert_close(first, second)


def test_what_was_prepared_for_a_batch_is_prepared_again_when_it_is_changed(model):
    batch = make_batch(NAMED["ragged_turns"])
    token_logprobs(model, batch)
    batch.trained[-3:] = False
    torch.testing.assert_close(token_logprobs(model, batch), naive(model, batch)[0])


@pytest.mark.parametrize("score", [token_logprobs, chain_logprobs])
def test_scored_in_inference_mode_first_a_batch_still_trains(model, score):
    batch = make_batch(NAMED["ragged_turns"])
    with torch.inference_mode():
        old = score(model, batch)
    logp = score(model, batch)
    torch.testing.assert_close(logp, old)
    fresh = score(model, make_batch(NAMED["ragged_turns"]))
    assert_same_gradients(gradients(model, logp.square().sum()), gradients(model, fresh.square().sum()), atol=0)


@pytest.mark.parametrize("score", [token_logprobs, chain_logprobs])
def test_a_batch_packed_in_inference_mode_is_scored_and_its_changes_are_seen(model, score):
    """Tensors made there count no versions, so a change in place could not be told."""
    expected = score(model, make_batch(NAMED["ragged_turns"]))
    with torch.inference_mode():
        batch = make_batch(NAMED["ragged_turns"])
        torch.testing.assert_close(score(model, batch), expected)
        batch.trained[-3:] = False
        batch.leaf_mask[-3:] = 0
        assert not score(model, batch)[-3:].any()
