"""The matmuls of every family that the FLOP model knows, against those a tiny model of it really runs."""

import importlib
import json

import numpy as np
import pytest
import torch
from models import EXACT, EXPERTS, WRONG, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig

from treegrpo import Trajectory, build_tree, flops, model_shape

CLAIMED = {*model_shape.GATED_MLP, *model_shape.PLAIN_MLP, *model_shape.MOE}
# two value heads to a key head, and no two sizes alike
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
# a window in a layer, and none where a convolution is
LFM3 = {**CONV, "layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 5}
HYBRID = {
    "qwen3_next": {**SHARED, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**SHARED, **DELTA},
    "olmo_hybrid": DELTA,
    "lfm2": {**CONV, "block_multiple_of": 14, "block_ffn_dim_multiplier": 1.7},
    "lfm2_moe": {**EXPERTS, **CONV, "num_dense_layers": 1},
    "lfm3": LFM3,
}
EXTRA = {
    "olmo": {},
    "qwen2_moe": {**SHARED, "norm_topk_prob": True},
    **HYBRID,
}
KNOWN = [family for family in EXACT if family in CLAIMED - set(EXTRA)]
VARIANTS = {
    "wide heads": ("qwen3", {"head_dim": 16}),
    "no GQA": ("llama", {"num_key_value_heads": 4}),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "windows from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "window unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "gpt2 width": ("gpt2", {"n_inner": 40}),
    "a value head to a key head": ("qwen3_5_text", {**DELTA, "linear_num_value_heads": 2}),
    "head dim from hidden size": ("olmo_hybrid", {**DELTA, "head_dim": None}),
    "hybrid, dense layers": ("qwen3_next", {**SHARED, **DELTA, "mlp_only_layers": [1]}),
    "hybrid, sparse step": ("qwen3_next", {**SHARED, **DELTA, "decoder_sparse_step": 2}),
    "hybrid without experts": ("qwen3_next", {**SHARED, **DELTA, "num_experts": 0}),
    "lfm2 width as given": ("lfm2", {**CONV, "block_auto_adjust_ff_dim": False}),
    "longer convolution": ("lfm2_moe", {**EXPERTS, **CONV, "conv_L_cache": 6, "num_dense_layers": 0}),
    "no gate": ("lfm3", {**LFM3, "use_attention_gate": False}),
}


def family_case(family, overrides, name):
    """Families newer than the installed transformers are skipped."""
    missing = pytest.mark.skipif(family not in CONFIG_MAPPING, reason=f"this transformers has no {family}")
    return pytest.param(family, overrides, id=name, marks=missing)


def test_every_family_claimed_is_checked():
    assert {*KNOWN, *EXTRA} == CLAIMED
    assert set(HYBRID) == {*model_shape.GATED_DELTA, *model_shape.SHORT_CONV}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, {}, family) for family in KNOWN]
    + [family_case(family, overrides, family) for family, overrides in EXTRA.items()]
    + [family_case(family, overrides, name) for name, (family, overrides) in VARIANTS.items()],
)
def test_family_against_executed_matmuls(family, overrides):
    """Eager attention multiplies all T x T pairs, so the counter must show linear + 4 Hq D T^2 a layer + head.

    It also shows what is left out here: products of rotary angles, those of a delta rule in chunks (`recurrent` has a
    test of its own), and the outputs of a padded convolution that lie behind the last token.
    """
    model = tiny_model(family, dtype=torch.float32, **overrides)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    num_tokens = 11
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.arange(3, 3 + num_tokens)[None], use_cache=False)
    counts = counter.get_flop_counts()
    # lfm2_moe called it pos_emb
    angles = [by_op for name, by_op in counts.items() if name.endswith(("rotary_emb", "pos_emb"))]
    beside = sum(sum(by_op.values()) for by_op in angles)
    # the projections of a gated-delta layer are mm
    beside += sum(by_op.get(torch.ops.aten.bmm, 0) for name, by_op in counts.items() if name.endswith("linear_attn"))
    # padded by K - 1 on both sides, a convolution has K - 1 outputs more than there are tokens
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv1d)]
    beside += sum(2 * module.weight.numel() * (module.kernel_size[0] - 1) for module in convolutions)
    shape = model_shape.model_shape(model.config)
    expected = 2 * shape.linear_parameters * num_tokens + 2 * shape.head_parameters * num_tokens
    expected += 4 * shape.pair_width * num_tokens**2 * len(shape.windows)
    assert counter.get_total_flops() - beside == expected
    used = [m.sliding_window or 0 for m in model.modules() if hasattr(m, "sliding_window") and hasattr(m, "o_proj")]
    if used:
        assert shape.windows == tuple(used)


class StateProducts(TorchDispatchMode):
    """Counts the multiply-adds of products as large as a state [1, Hv, Dk, Dv]; its decay, a scalar a head, is none."""

    def __init__(self, state):
        super().__init__()
        self.state, self.multiply_adds = state, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mul.Tensor and result.shape == self.state:
            is_decay = any(factor.shape[-2:] == (1, 1) for factor in args)
            self.multiply_adds += 0 if is_decay else result.numel()
        return result


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, HYBRID[family], family) for family in model_shape.GATED_DELTA]
    + [family_case("qwen3_5_text", {**DELTA, "linear_num_value_heads": 2}, "a value head to a key head")],
)
def test_recurrent_against_the_rule_token_by_token(family, overrides, monkeypatch):
    """transformers' own recurrent rule in place of its chunks: the same logits, and its products are counted."""
    name = family.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    input_ids, counted = torch.arange(3, 14)[None], []

    def rule(query, key, value, **options):
        with StateProducts((1, value.shape[2], key.shape[3], value.shape[3])) as products:
            result = modeling.torch_recurrent_gated_delta_rule(query, key, value, **options)
        counted.append(products.multiply_adds)
        return result

    with torch.no_grad():
        expected = tiny_model(family, **overrides)(input_ids, use_cache=False).logits
        monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", rule)
        model = tiny_model(family, **overrides)
        torch.testing.assert_close(model(input_ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    result = flops.report(model.config, [build_tree([Trajectory(np.arange(11), [0] + [1] * 10, reward=0.0)])])
    assert len(counted) == 2 and result.chain.recurrent == 2 * sum(counted) > 0


@pytest.mark.parametrize("family", [*sorted(set(EXACT) - {*KNOWN, *EXTRA}), "minimax", "mamba2", "llama4_text"])
def test_unknown_families_are_refused(family):
    assert family in EXACT or family in WRONG
    with pytest.raises(ValueError, match=rf"model_type '{family}' are not known here; known are .*qwen3"):
        model_shape.model_shape(tiny_config(family))


@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_unknown_layer_type_is_refused(family):
    config = tiny_config(family)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=rf"of type \['linear_attention'\] are not known in {family}; known are \["):
        model_shape.model_shape(config)


@pytest.mark.parametrize(
    ("outer", "family", "overrides"),
    [
        ("qwen3_5", "qwen3_5_text", DELTA),
        ("qwen3_5_moe", "qwen3_5_moe_text", {**SHARED, **DELTA}),
        ("lfm2_vl", "lfm2", CONV),
    ],
)
def test_the_text_config_of_a_nested_one(outer, family, overrides, tmp_path):
    if outer not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {outer}")
    text = tiny_config(family, **overrides)
    config = AutoConfig.for_model(outer, text_config=text.to_dict())
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for given in (config, stored, tmp_path, str(tmp_path / "config.json")):
        assert model_shape.model_shape(given) == model_shape.model_shape(text)
