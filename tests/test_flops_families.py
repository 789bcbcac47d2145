"""The matmuls of every family that the FLOP model knows, against those a tiny model of it really runs."""

import functools
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import DEEPSEEK, EXACT, EXPERTS, WRONG, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig

from treegrpo import Trajectory, build_tree, flops, model_shape
from treegrpo.models import read_model_config

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
LATENT = {
    **DEEPSEEK,
    "num_hidden_layers": 3,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "v_head_dim": 10,
    "n_shared_experts": 2,
}
KIMI = {
    **LATENT,
    "layer_types": DELTA["layer_types"],
    "linear_num_heads": 3,
    "linear_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
MAMBA = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 10,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_expand": 3,
}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 7,
    "n_groups": 2,
    "conv_kernel": 3,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}
GEMMA4 = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
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
    "kimi_linear": KIMI,
    # its heads are those of attention, and as wide as head_dim says; a latent of queries it has since 5.24
    "bailing_hybrid": {**KIMI, "linear_num_heads": None, "linear_head_dim": None, "head_dim": 6, "q_lora_rank": None},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 40, "mamba_d_head": 10},
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": DELTA["layer_types"], "shared_intermediate_size": 24},
    "nemotron_h": NEMOTRON,
}
RECURRENT = (*model_shape.GATED_DELTA, *model_shape.KIMI_DELTA, *model_shape.MAMBA)
EXTRA = {
    "olmo": {},
    "qwen2_moe": {**SHARED, "norm_topk_prob": True},
    "deepseek_v3": LATENT,
    **HYBRID,
}
NEW = {*model_shape.LATENT, *model_shape.MAMBA, "gemma4_text"}
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
    "no latent of queries": ("kimi_linear", {**KIMI, "q_lora_rank": None}),
    "experts by layer": ("kimi_linear", {**KIMI, "mlp_layer_types": ["sparse", "dense", "dense"]}),
    "experts in all layers": ("deepseek_v3", {**LATENT, "first_k_dense_replace": 0}),
    "scans alone": ("granitemoehybrid", {**HYBRID["granitemoehybrid"], "layer_types": ["linear_attention"] * 3}),
    "shared experts alone": ("granitemoehybrid", {**HYBRID["granitemoehybrid"], "num_local_experts": 0}),
    "scans as wide as expanded": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96}),
    "latent experts": ("nemotron_h", {**NEMOTRON, "moe_latent_size": 12}),
    "shared expert of the MLP's width": ("nemotron_h", {**NEMOTRON, "moe_shared_expert_intermediate_size": 0}),
    "shared keys": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}),
    "wider MLPs at shared keys": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "keys as values": ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "experts beside an MLP": ("gemma4_text", {**EXPERTS, "enable_moe_block": True, "top_k_experts": 3}),
    "no per-layer inputs": ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    "no gate": ("lfm3", {**LFM3, "use_attention_gate": False}),
}


def family_case(family, overrides, name):
    """Families newer than the installed transformers are skipped, and those it does not hand the tree yet."""
    is_here = family in CONFIG_MAPPING and (family in EXACT or family not in NEW)
    missing = pytest.mark.skipif(not is_here, reason=f"this transformers has no {family} that runs on trees")
    return pytest.param(family, overrides, id=name, marks=missing)


def test_every_family_claimed_is_checked():
    assert {*KNOWN, *EXTRA} == CLAIMED
    assert set(HYBRID) == {*RECURRENT, *model_shape.SHORT_CONV}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, {}, family) for family in KNOWN]
    + [family_case(family, overrides, family) for family, overrides in EXTRA.items()]
    + [family_case(family, overrides, name) for name, (family, overrides) in VARIANTS.items()],
)
def test_family_against_executed_matmuls(family, overrides):
    """Eager attention multiplies all T x T pairs: the counter must show linear + 2 Hq (Dk + Dv) T^2 a layer + head.

    It also shows what is left out here: products of rotary angles, those of a recurrence in chunks (`recurrent` has a
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
    for name, module in model.named_modules():
        for convolution in (child for child in module.children() if isinstance(child, torch.nn.Conv1d)):
            # the projections of a layer with a recurrence are mm
            beside += counts[f"{type(model).__name__}.{name}"].get(torch.ops.aten.bmm, 0)
            # padded by K - 1 on both sides, a convolution has K - 1 outputs more than there are tokens
            beside += 2 * convolution.weight.numel() * (convolution.kernel_size[0] - 1)
    shape = model_shape.model_shape(model.config)
    expected = 2 * shape.linear_parameters * num_tokens + 2 * shape.head_parameters * num_tokens
    expected += 2 * sum(shape.pair_widths) * num_tokens**2
    assert counter.get_total_flops() - beside == expected and len(shape.pair_widths) == len(shape.windows)
    used = [m.sliding_window or 0 for m in model.modules() if hasattr(m, "sliding_window") and hasattr(m, "o_proj")]
    if used:
        assert shape.windows == tuple(used)


class StateProducts(TorchDispatchMode):
    """Counts the multiply-adds of products as large as a state; its decay, a product with an exponential, is none."""

    def __init__(self, state):
        super().__init__()
        self.state, self.multiply_adds, self.exponentials = state, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.exp.default:
            self.exponentials.append(result)
        if function is torch.ops.aten.mul.Tensor and result.shape == self.state:
            decays = {tensor.untyped_storage().data_ptr() for tensor in self.exponentials}
            is_decay = any(factor.untyped_storage().data_ptr() in decays for factor in args)
            self.multiply_adds += 0 if is_decay else result.numel()
        if function is torch.ops.aten.bmm.default:
            self.multiply_adds += args[0].numel() * args[1].shape[-1]
        return result


def token_by_token(modeling, family, counted):
    """transformers' own rule for one token as its rule in chunks is called, and that one's name."""

    def delta(query, key, value, **options):
        with StateProducts((1, value.shape[2], key.shape[3], value.shape[3])) as products:
            result = getattr(modeling, rule)(query, key, value, **options)
        counted.append(products.multiply_adds)
        return result

    def scan(hidden_states, dt, A, B, C, D, dt_bias, dt_limit, **options):
        # a step size per head, not one per channel as while sampling: else scaling B with it were as large as a state
        dt = torch.nn.functional.softplus(dt + dt_bias).clamp(*dt_limit)[..., None]
        state = hidden_states.new_zeros(1, *hidden_states.shape[2:], B.shape[-1])
        with StateProducts(state.shape) as products:
            update = functools.partial(modeling.mamba2_selective_state_update, state, A=A[:, None, None], D=D[:, None])
            tokens = zip(hidden_states[0], dt[0], B[0], C[0], strict=True)
            outputs = [update(x[None], dt=step[None], B=b[None], C=c[None]) for x, step, b, c in tokens]
        counted.append(products.multiply_adds)
        return torch.stack(outputs, 1)

    if family in model_shape.MAMBA:
        return "mamba2_chunk_scan", scan
    if family in model_shape.KIMI_DELTA:
        rule = "recurrent_kimi_delta_attention"
        return "chunk_kimi_delta_attention", delta
    rule = "torch_recurrent_gated_delta_rule"
    return "torch_chunk_gated_delta_rule", delta


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, HYBRID[family], family) for family in RECURRENT]
    + [family_case("qwen3_5_text", {**DELTA, "linear_num_value_heads": 2}, "a value head to a key head")],
)
def test_recurrent_against_the_rule_token_by_token(family, overrides, monkeypatch):
    """transformers' own recurrent rule in place of its chunks: the same logits, and its products are counted."""
    name = family.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    input_ids, counted = torch.arange(3, 14)[None], []
    with torch.no_grad():
        expected = tiny_model(family, **overrides)(input_ids, use_cache=False).logits
        monkeypatch.setattr(modeling, *token_by_token(modeling, family, counted))
        model = tiny_model(family, **overrides)
        torch.testing.assert_close(model(input_ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    result = flops.report(model.config, [build_tree([Trajectory(np.arange(11), [0] + [1] * 10, reward=0.0)])])
    assert len(counted) == (3 if family == "falcon_h1" else 2) and result.chain.recurrent == 2 * sum(counted) > 0


@pytest.mark.parametrize("family", [*sorted(set(EXACT) - {*KNOWN, *EXTRA}), "deepseek_v32", "minimax", "mamba2"])
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
    ("given", "message"),
    [
        # what releases before 5.17 call them
        ({"model_type": "bamba", "layers_block_type": ["mamba", "attention"]}, r"\['attention', 'mamba'\] are not"),
        ({"model_type": "gemma4_text"}, "gemma4_text are known by their per_layer_config"),
        ({"model_type": "llama", "is_heterogeneous": True}, "per_layer_config is not known in llama"),
    ],
)
def test_configs_of_other_layers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        model_shape.model_shape(SimpleNamespace(hidden_size=32, **given))


def test_layers_that_differ_one_by_one_are_refused():
    config = tiny_config("llama", per_layer_config={1: {"num_key_value_heads": 1}})
    if not hasattr(config, "is_heterogeneous"):
        pytest.skip("this transformers knows no per_layer_config")
    with pytest.raises(ValueError, match="per_layer_config is not known in llama"):
        model_shape.model_shape(config)


def test_attention_of_two_head_dims_and_a_window():
    """gemma4's layer with a window has heads of another dim than the one without: each has its own pairs."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no gemma4_text")
    tree = build_tree([Trajectory(np.arange(7), [0] + [1] * 6, reward=0.0)])
    result = flops.report(tiny_config("gemma4_text"), [tree])
    in_window, pairs = 5 * 6 // 2 + 2 * 5, 7 * 8 // 2
    assert result.chain.attention == result.tree.attention == 2 * 4 * (2 * 8 * in_window + 2 * 16 * pairs)


@pytest.mark.parametrize(
    ("family", "overrides"), [family_case(family, EXTRA.get(family, {}), family) for family in sorted(NEW)]
)
def test_stored_configs_count_alike(family, overrides, tmp_path):
    config = tiny_config(family, **overrides)
    config.save_pretrained(tmp_path)
    expected = model_shape.model_shape(config)
    # infinite limits of step sizes are stored as what JSON has
    for given in (tmp_path, read_model_config(tmp_path / "config.json")):
        assert model_shape.model_shape(given) == expected


@pytest.mark.parametrize(
    ("outer", "family", "overrides"),
    [
        ("qwen3_5", "qwen3_5_text", DELTA),
        ("qwen3_5_moe", "qwen3_5_moe_text", {**SHARED, **DELTA}),
        ("lfm2_vl", "lfm2", CONV),
        ("gemma4", "gemma4_text", GEMMA4),
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
