"""Families through tree attention against each leaf alone in eager; wrong ones refused; generate(); bad calls."""

import copy
import inspect
import re
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from cases import NAMED, ancestor_mask, random_subtree_end, trie_subtree_end
from models import EXACT, TAUGHT, VOCAB, WRONG, tiny_config, tiny_model, tree_twin
from packaging.version import Version

import treegrpo_kernels as tk
from treegrpo import Trajectory, build_forest, hf, pack, recurrent, token_logprobs
from treegrpo.dropout import disable_dropout
from treegrpo.logprobs import chain_logprobs
from treegrpo_kernels import native

pytestmark = pytest.mark.usefixtures("one_thread")

# two trees with forks at several depths; the longest path is three windows long
FOREST = [*NAMED["two_trees"], list(range(1, 16)), [*range(1, 7), *range(20, 29)], [*range(1, 12), 40, 41]]


def packed_inputs(subtree_end, seed=1):
    """Keywords of model(...) and the leaves' paths (indices into the row)."""
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (plan.num_tokens,), generator=generator)
    mask = ancestor_mask(subtree_end)
    paths = [torch.from_numpy(np.flatnonzero(mask[t])) for t in range(len(subtree_end)) if subtree_end[t] == t + 1]
    inputs = {"input_ids": ids[None], "position_ids": plan.position[None].long(), "use_cache": False}
    return {**inputs, "attention_mask": None, "tree_plan": plan}, paths


@torch.no_grad()
def largest_difference(twin, model, inputs, paths):
    """Largest |log-prob difference| over all tokens of all leaves and all next tokens; and the largest |log-prob|."""
    packed = twin(**inputs).logits[0].log_softmax(-1)
    alone = [model(input_ids=inputs["input_ids"][:, path], use_cache=False).logits[0].log_softmax(-1) for path in paths]
    differences = [float((packed[path] - x).abs().max()) for path, x in zip(paths, alone, strict=True)]
    return max(differences), max(float(x.abs().max()) for x in alone)


@pytest.mark.parametrize("family", EXACT)
def test_packed_tree_equals_each_leaf_alone_in_eager(family):
    model = tiny_model(family)
    inputs, paths = packed_inputs(trie_subtree_end(FOREST))
    twin = tree_twin(model)
    difference, scale = largest_difference(twin, model, inputs, paths)
    # hybrids: recurrences run in float32 in transformers, deltas are taken of sums
    assert difference <= (3e-6 if family in TAUGHT else 1e-6) and scale > 5
    # the comparison can fail: siblings made visible
    causal = tk.TreePlan.build(torch.full_like(inputs["tree_plan"].subtree_end, len(inputs["input_ids"][0])))
    assert largest_difference(twin, model, {**inputs, "tree_plan": causal}, paths)[0] > 1e-2


# of the hybrids one or two for each kind of layer
IN_FLOAT32 = set(EXACT) - set(TAUGHT) | {"qwen3_next", "qwen3_5_text", "kimi_linear", "nemotron_h", "falcon_h1", "lfm2"}


@pytest.mark.parametrize("family", [name for name in EXACT if name in IN_FLOAT32])
def test_packed_tree_in_float32(family):
    model = tiny_model(family, dtype=torch.float32)
    inputs, paths = packed_inputs(random_subtree_end(60, seed=4))
    difference, scale = largest_difference(tree_twin(model), model, inputs, paths)
    assert difference <= 1e-6 * scale


def test_the_wide_heads_that_gemma4_has_by_default_are_refused():
    with pytest.raises(ValueError, match="head dim 512; supported are 1 to 256"):
        hf.use_tree_attention(tiny_model("gemma4_text", global_head_dim=None))


REFUSED = r"take another model|take a model|newer transformers|take transformers 5.17 or newer"


@pytest.mark.parametrize("family", WRONG)
def test_families_that_would_be_wrong_in_silence_are_refused(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=REFUSED):
        hf.use_tree_attention(model)
    # left as it was: token_logprobs would take a model with the name
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", WRONG)
def test_wrong_families_are_refused_when_the_config_names_the_attention(family):
    if family in ("falcon", "gptj"):
        # loud by themselves: transformers has no such class
        with pytest.raises(KeyError, match="treegrpo"):
            tiny_model(family, attention="treegrpo")
        return
    # bloom and mpt report the new name and compute eager attention
    model = tiny_model(family, attention="treegrpo")
    with pytest.raises(ValueError, match=REFUSED):
        hf.check_model(model)


def test_layers_that_a_newer_transformers_hands_the_tree(monkeypatch):
    monkeypatch.setattr(recurrent, "SINCE", Version("99"))
    with pytest.raises(ValueError, match=rf"take transformers 99 or newer.*this is {transformers.__version__}"):
        hf.use_tree_attention(tiny_model("minimax"))


hybrids = pytest.mark.skipif(not TAUGHT, reason="transformers hands them the tree since 5.17")


@hybrids
def test_a_forward_that_keeps_the_tree_to_itself_is_found(monkeypatch):
    """As verl puts in the place of Qwen3.5's."""
    model = tiny_model("qwen3_5_text")
    layer = type(model.model.layers[0])
    forward = layer.forward

    def kept(self, *args, **keywords):
        if self.block_type == "linear_attention":
            keywords = {name: value for name, value in keywords.items() if not name.startswith("tree")}
        return forward(self, *args, **keywords)

    monkeypatch.setattr(layer, "forward", kept)
    with pytest.raises(ValueError, match=r"0 of Qwen3_5ForCausalLM's 1 layers .* replaces their forward"):
        hf.use_tree_attention(model)


@hybrids
def test_hybrids_are_taught_the_tree_where_they_are_not_checked(monkeypatch):
    """verl's processes that hold no weights yet, for one."""
    model = tiny_model("lfm2")
    inputs, _ = packed_inputs(trie_subtree_end(FOREST))
    want = tree_twin(model)(**inputs).logits
    file = sys.modules[type(model).__module__]
    monkeypatch.setattr(file, "causal_conv1d_fn", file.causal_conv1d_fn.__wrapped__)
    assert torch.equal(hf.use_tree_attention(model, check=False)(**inputs).logits, want)


def test_taught_functions_are_called_as_they_were_without_a_tree(monkeypatch):
    """Packages name their arguments as they like, and the layers of an older transformers call them by these."""
    older = types.ModuleType("older")
    for name in recurrent._FUNCTIONS:
        setattr(older, name, lambda *args, **keywords: (args, keywords))
    monkeypatch.setitem(sys.modules, "older", older)
    recurrent.teach(type("Older", (torch.nn.Module,), {"__module__": "older"})())
    for name in recurrent._FUNCTIONS:
        function = getattr(older, name)
        assert recurrent._knows_trees(function)
        assert function(1, x=2, seq_idx=None) == ((1,), dict(x=2, seq_idx=None))


def test_check_names_what_is_missing():
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match=r"runs attention 'eager'.*use_tree_attention\(model\)"):
        hf.check_model(model)
    assert hf.use_tree_attention(model) is model
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="2 of Qwen3ForCausalLM's 3 layers ran"):
        hf.check_model(model)
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        hf.use_tree_attention(torch.nn.Linear(2, 2))


def test_full_attention_under_its_older_name():
    model = tree_twin(tiny_model("llama"))
    model.config.layer_types = ["attention"] * 2
    hf.check_model(model)


def test_numeric_check_finds_a_layer_that_mixes_siblings():
    model = tree_twin(tiny_model("qwen3"))
    mixer = model.model.layers[1].mlp
    plain = mixer.forward
    # a token shift, as short convolutions do: reads the row's neighbour, not the path's
    mixer.forward = lambda x: plain(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    with pytest.raises(ValueError, match="differently from its leaves alone"):
        hf.check_model(model)
    hf.check_model(model, numeric=False)


def test_numeric_check_finds_an_unknown_logit_transform():
    model = tree_twin(tiny_model("cohere"))
    hf.check_model(model)
    model.logit_scale = 0.7
    with pytest.raises(ValueError, match="transforms its logits in a way"):
        hf.check_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_passes_in_low_precision(dtype):
    for family in ("qwen3", "gemma2", "mixtral"):
        hf.check_model(tree_twin(tiny_model(family)).to(dtype))


def test_check_passes_with_a_head_in_float32():
    model = tree_twin(tiny_model("qwen3")).to(torch.bfloat16)
    head = model.lm_head.float()
    head.forward = lambda x: torch.nn.functional.linear(x.float(), head.weight)
    hf.check_model(model)


def test_check_restores_modes_and_leaves_random_state():
    model = tree_twin(tiny_model("gpt2"))
    model.train()
    model.lm_head.eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    hf.check_model(model)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3_text", "gemma4_text", "qwen3_moe"])
def test_without_a_tree_the_model_is_sdpa_bit_for_bit(family):
    twin = tree_twin(tiny_model(family, dtype=torch.float32))
    plain = copy.deepcopy(twin)
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        for mask in (torch.ones_like(ids), padded):
            ours, theirs = (m.generate(ids, attention_mask=mask, **options) for m in (twin, plain))
            assert torch.equal(ours.sequences, theirs.sequences)
            assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
        # padding-free packing by position_ids, transformers' own convention
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        ours, theirs = (m(ids[:1], position_ids=positions, use_cache=False).logits for m in (twin, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_without_a_tree_softcap_and_sinks_go_through_eager(family):
    twin = tree_twin(tiny_model(family, dtype=torch.float32))
    plain = copy.deepcopy(twin)
    plain.set_attn_implementation("eager")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    ours, theirs = (m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (twin, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_a_static_cache_gets_its_masks(family):
    twin = tree_twin(tiny_model(family, dtype=torch.float32))
    plain = copy.deepcopy(twin)
    plain.set_attn_implementation("eager")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation="static")
    options |= dict(return_dict_in_generate=True, output_logits=True)
    ours, theirs = (m.generate(ids, disable_compile=True, **options) for m in (twin, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits, theirs.logits)


@torch.no_grad()
def test_a_static_cache_without_generate():
    """The cache counts its tokens in place: a mask made late must not count those of its own call."""
    twin = tree_twin(tiny_model("llama", dtype=torch.float32))
    plain = copy.deepcopy(twin)
    plain.set_attn_implementation("eager")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    name = "cache" if "cache" in inspect.signature(twin.forward).parameters else "past_key_values"
    caches = [transformers.StaticCache(config=plain.config, max_cache_len=12) for _ in range(2)]
    for part in (ids[:, :5], ids[:, 5:7], ids[:, 7:8]):
        ours, theirs = (m(part, **{name: cache}).logits for m, cache in zip((twin, plain), caches, strict=True))
        torch.testing.assert_close(ours, theirs)


def test_a_tree_forward_builds_no_mask(monkeypatch):
    def build(self, kind):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(hf.LazyMask, "build", build)
    inputs, _ = packed_inputs(trie_subtree_end(FOREST))
    hf.use_tree_attention(tiny_model("gemma3_text"), check=False)(**inputs)


@torch.no_grad()
def test_compiles_into_one_graph_for_all_lengths():
    if native.cpu_reason() is not None:
        pytest.skip(native.cpu_reason())
    torch.compiler.reset()
    model = tree_twin(tiny_model("qwen3", dtype=torch.float32, num_hidden_layers=1, layer_types=["full_attention"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 50, 60):
        inputs, _ = packed_inputs(random_subtree_end(length, seed=length))
        with torch.compiler.set_stance("fail_on_recompile" if length == 60 else "default"):
            logits = compiled(**inputs, tree_backend="cpu").logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree_plna": 1}, "unknown keyword 'tree_plna'"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "attention_mask must be None"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "attention_mask must be None"),
        ({"output_attentions": True}, "output_attentions"),
        ({"tree_backend": "fastest"}, "backend 'fastest' is unknown"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.long), "position_ids": torch.arange(5)[None]}, "5 tokens"),
        ({"input_ids": torch.ones(2, 6, dtype=torch.long)}, "2 rows: pack all trees into one row"),
    ],
)
def test_bad_calls(change, message):
    model = tree_twin(tiny_model("qwen3"))
    inputs, _ = packed_inputs(trie_subtree_end(NAMED["worked_example"]))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**{**inputs, **change})


def test_cache_and_dropout_are_refused():
    model = tree_twin(tiny_model("qwen3"))
    inputs, _ = packed_inputs(trie_subtree_end(NAMED["worked_example"]))
    cache = model(inputs["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**{**inputs, "use_cache": True, "past_key_values": cache})
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(**inputs)
    model.train()
    with pytest.raises(ValueError, match="attention_dropout = 0"):
        model(**inputs)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt2", {"resid_pdrop": 0.5}, "transformer.h.0.attn.resid_dropout=0.5, "),
        ("starcoder2", {"residual_dropout": 0.1}, "model.layers.0.self_attn.residual_dropout=0.1, "),
        ("opt", {"layerdrop": 0.2}, "model.decoder.layerdrop=0.2"),
        ("mixtral", {"router_jitter_noise": 0.01}, "model.layers.0.mlp.jitter_noise=0.01"),
    ],
)
def test_what_training_draws_is_refused_and_can_be_switched_off(family, changes, named):
    model = tiny_model(family, dtype=torch.float32, **changes)
    with pytest.raises(ValueError, match=re.escape(named)):
        hf.use_tree_attention(model)
    hf.use_tree_attention(disable_dropout(model)).train()
    inputs, _ = packed_inputs(trie_subtree_end(NAMED["worked_example"]))
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert all(getattr(model.config, name) == 0 for name in changes)


def test_the_jitter_of_phimoe_is_part_of_the_model():
    """It bounds which experts count outside training too, so that switching it off would make another model."""
    model = tiny_model("phimoe", dtype=torch.float32, router_jitter_noise=0.01, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.router\.router_jitter_noise=0\.01"):
        hf.use_tree_attention(model)
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.01 .*set it to 0 in the config"):
        disable_dropout(model)
    assert model.config.router_jitter_noise == 0.01 and model.config.attention_dropout == 0.1
    model = tiny_model("phimoe", dtype=torch.float32, router_jitter_noise=0.0, attention_dropout=0.1)
    hf.use_tree_attention(disable_dropout(model))


def test_rotations_that_depend_on_the_longest_path_of_the_row():
    with pytest.raises(ValueError, match="rope_type dynamic"):
        hf.use_tree_attention(tiny_model("qwen2", rope_scaling={"rope_type": "dynamic", "factor": 4.0}))
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    sizes = dict(max_position_embeddings=64, original_max_position_embeddings=16)
    model = hf.use_tree_attention(tiny_model("phi3", rope_scaling=scaling, **sizes))
    short, long = (
        [Trajectory([3] * n, [0] + [1] * (n - 1), reward=0.0, group=str(n)) for n in sizes]
        for sizes in ([9, 16], [17, 31])
    )
    for leaves in (short, long):
        (batch,) = pack(build_forest(leaves))
        assert torch.allclose(batch.expand(token_logprobs(model, batch)), chain_logprobs(model, batch))
    (batch,) = pack(build_forest(short + long))
    for logprobs in (token_logprobs, chain_logprobs):
        with pytest.raises(ValueError, match=r"leaf 2 of the row has 17 tokens.*original_max_position_embeddings=16"):
            logprobs(model, batch)


def test_queries_scaled_by_their_place_in_the_row_are_refused():
    """llama4 without chunks: from its floor_scale of 8,192 tokens on, far beyond the check's."""
    options = dict(layer_types=["full_attention"] * 2, no_rope_layers=[1, 0])
    with pytest.raises(ValueError, match="attn_temperature_tuning"):
        hf.use_tree_attention(tiny_model("llama4_text", **options))
    hf.use_tree_attention(tiny_model("llama4_text", attn_temperature_tuning=False, **options))


def test_lazy_mask_slices_like_the_mask_it_stands_for():
    mask = hf.lazy_mask(
        batch_size=1,
        q_length=4,
        kv_length=4,
        mask_function=transformers.masking_utils.causal_mask_function,
        attention_mask=None,
        allow_is_causal_skip=True,
        dtype=torch.float32,
        config=tiny_config("qwen3"),
    )
    assert mask[:, :, :, :] is mask and mask.window is None and not mask.hides_tokens
    assert mask[:, :, -2:, :].tolist() == [[[[True, True, True, False], [True, True, True, True]]]]


def test_saved_models_name_no_attention(tmp_path):
    model = tree_twin(tiny_model("qwen3", dtype=torch.float32))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="treegrpo")
    hf.check_model(again)
