"""The matmuls of transformers decoders, family by family, from their configs. Letters as in treegrpo.flops."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Families whose layers are known here; each is checked in the tests against the matmuls a tiny model of it really runs.
GATED_MLP = (
    "bamba", "cohere", "cohere2", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm4", "granite",
    "lfm2", "lfm3", "llama", "mistral", "olmo", "olmo2", "olmo3", "olmo_hybrid", "phi3", "qwen2", "qwen3",
    "qwen3_5_text", "smollm3",
)  # fmt: skip
PLAIN_MLP = ("gpt2", "gpt_neox", "opt", "starcoder2")
MOE = (
    "bailing_hybrid", "deepseek_v3", "gpt_oss", "granitemoe", "granitemoehybrid", "kimi_linear", "lfm2_moe", "mixtral",
    "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
)  # fmt: skip
# Their experts are intermediate_size wide, and but for olmoe's num_local_experts many.
LIKE_MIXTRAL = ("gpt_oss", "granitemoe", "granitemoehybrid", "mixtral", "olmoe")
# Their shared expert is gated.
GATED_SHARED_EXPERT = ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
# These know no grouped queries, whatever their config says.
MULTI_HEAD = ("gpt2", "gpt_neox", "opt")
# Their query projection is twice as wide: the other half gates the output of attention.
GATED_QUERY = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
# Their attention is multi-head latent attention: keys and values are expanded from one latent per token.
LATENT = ("bailing_hybrid", "deepseek_v3", "kimi_linear")
# Their layers of type linear_attention have, behind a short convolution, in place of attention
# a gated delta rule,
GATED_DELTA = ("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
# Kimi delta attention, whose decay is one of every channel of the keys,
KIMI_DELTA = ("bailing_hybrid", "kimi_linear")
# a scan of Mamba-2; those of type hybrid, falcon_h1's, have it beside attention.
MAMBA = ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h")
# Their layers of type conv have a short convolution in place of attention.
SHORT_CONV = ("lfm2", "lfm2_moe", "lfm3")

_ATTENTION = ("full_attention", "sliding_attention", "hybrid")


@dataclass(frozen=True)
class ModelShape:
    """The matmuls of one model: everything the FLOP count needs."""

    name: str
    linear_parameters: int
    """Matmul parameters one token passes through, all layers, LM head excluded."""
    pair_widths: tuple[int, ...]
    """Per attention layer: Hq * (Dk + Dv), multiply-adds of q k^T and p v per visible pair."""
    windows: tuple[int, ...]
    """Per attention layer: window in tokens, 0 for full attention."""
    head_parameters: int
    """h * V."""
    state_products: int = 0
    """Multiply-adds of the products of one token with the states of all layers."""


def decode_floats(value: Any) -> Any:
    """Stored values of a config, with infinities for what transformers writes in their place, as JSON has none."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: decode_floats(item) for name, item in value.items()}
    return [decode_floats(item) for item in value] if isinstance(value, list) else value


def _load_config(config: Any) -> Any:
    """A transformers decoder config from a config object, a dict, or the path of a config.json or its folder."""
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"config: there is no file {path}; give the path of a config.json or of its folder")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config: {path} is not JSON ({error})") from error
    if isinstance(config, Mapping):
        values = decode_floats(config)
        model_type = values.pop("model_type", None)
        if model_type is None:
            raise ValueError("config: 'model_type' is missing, so the family's formula is not known; add e.g. 'qwen2'")
        from transformers import CONFIG_MAPPING, AutoConfig

        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"config: model_type {model_type!r} is not known to the installed transformers")
        config = AutoConfig.for_model(model_type, **values)
    if not hasattr(config, "model_type"):
        raise ValueError(f"config is a {type(config).__name__}: give a transformers config, a dict, or a path")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_types(config: Any) -> list[str]:
    """What each layer mixes tokens with; a config that does not say has attention, in its window if it has one."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        return ["sliding_attention" if _window(config) else "full_attention"] * config.num_hidden_layers
    family = config.model_type
    known = {"full_attention", "sliding_attention"}
    if family == "falcon_h1":
        known = {"hybrid"}
    elif family in GATED_DELTA + KIMI_DELTA + MAMBA:
        known.add("linear_attention")
    elif family in SHORT_CONV:
        known.add("conv")
    if family == "nemotron_h":
        known |= {"mlp", "moe"}
    unknown = sorted(set(types) - known)
    if unknown:
        raise ValueError(f"config: layers of type {unknown} are not known in {family}; known are {sorted(known)}")
    return list(types)


def _window(config: Any) -> int:
    is_used = getattr(config, "use_sliding_window", True) is not False
    return (getattr(config, "sliding_window", None) or 0) if is_used else 0


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(config: Any, layer: int) -> tuple[int, int]:
    """(matmul parameters, pair width) of attention with separate or fused projections, gates of its output included."""
    family = config.model_type
    if family in LATENT:
        return _latent_attention(config)
    if family == "gemma4_text":
        return _gemma4_attention(config, layer)
    h, heads, head_dim = config.hidden_size, config.num_attention_heads, _head_dim(config)
    kv_heads = heads if family in MULTI_HEAD else getattr(config, "num_key_value_heads", None) or heads
    queries = 2 * heads if family in GATED_QUERY else heads
    parameters = h * head_dim * (queries + 2 * kv_heads) + heads * head_dim * h
    if family == "lfm3" and config.use_attention_gate:
        parameters += h * heads
    return parameters, 2 * heads * head_dim


def _latent_attention(config: Any) -> tuple[int, int]:
    h, heads, rope = config.hidden_size, config.num_attention_heads, config.qk_rope_head_dim
    key_dim, value_dim = config.qk_nope_head_dim + rope, config.v_head_dim
    rank = getattr(config, "q_lora_rank", None)
    parameters = h * heads * key_dim if rank is None else rank * (h + heads * key_dim)
    # one rotated key serves all heads
    parameters += h * (config.kv_lora_rank + rope)
    parameters += config.kv_lora_rank * heads * (config.qk_nope_head_dim + value_dim) + heads * value_dim * h
    if config.model_type == "bailing_hybrid":
        # a gate of the output
        parameters += h * heads
    return parameters, heads * (key_dim + value_dim)


def _shares_keys(config: Any, layer: int) -> bool:
    """Whether a layer of gemma4 reads the keys and values of one before."""
    return layer >= config.num_hidden_layers - config.num_kv_shared_layers


def _gemma4_attention(config: Any, layer: int) -> tuple[int, int]:
    own = config.per_layer_config[layer]
    queries, keys = config.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
    if _shares_keys(config, layer):
        keys_and_values = 0
    elif config.attention_k_eq_v and config.layer_types[layer] == "full_attention":
        keys_and_values = keys
    else:
        keys_and_values = 2 * keys
    return config.hidden_size * (2 * queries + keys_and_values), 2 * queries


def _short_conv(config: Any) -> int:
    h = config.hidden_size
    # in: the channels, and a gate before the convolution and one after it
    return h * 3 * h + config.conv_L_cache * h + h * h


def _gated_delta(config: Any) -> tuple[int, int]:
    """(matmul parameters, products with its states) of one layer, like those below."""
    h, value_heads, key_dim = config.hidden_size, config.linear_num_value_heads, config.linear_key_head_dim
    keys, values = config.linear_num_key_heads * key_dim, value_heads * config.linear_value_head_dim
    # in: q, k, v, a gate as wide as v, and for each value head its decay and its beta
    parameters = h * (2 * keys + 2 * values + 2 * value_heads) + values * h
    return parameters + config.linear_conv_kernel_dim * (2 * keys + values), 3 * key_dim * values


def _kimi_delta(config: Any) -> tuple[int, int]:
    h, heads, head_dim = config.hidden_size, config.linear_num_heads, config.linear_head_dim
    width = heads * head_dim
    # the decay, and a gate of the output, both as wide as q, k and v; kimi_linear's have the rank of a head
    gate = h * width if config.model_type == "bailing_hybrid" else head_dim * (h + width)
    parameters = 3 * h * width + 2 * gate + h * heads + width * h
    return parameters + config.linear_conv_kernel_dim * 3 * width, 3 * head_dim * width


def _mamba(config: Any) -> tuple[int, int]:
    if config.model_type == "nemotron_h":
        heads, head_dim, taps = config.mamba_num_heads, config.mamba_head_dim, config.conv_kernel
        groups, state = config.n_groups, config.ssm_state_size
    else:
        heads, head_dim, taps = config.mamba_n_heads, config.mamba_d_head, config.mamba_d_conv
        groups, state = config.mamba_n_groups, config.mamba_d_state
    h, width = config.hidden_size, heads * head_dim
    # x, B and C pass the convolution; a gate and the step sizes of the heads do not
    channels = width + 2 * groups * state
    return h * (width + channels + heads) + taps * channels + width * h, 2 * width * state


def _mlp_width(config: Any) -> int:
    """The width of an MLP without experts."""
    family = config.model_type
    # gpt2 leaves n_inner None for 4 h
    width = getattr(config, {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size"))
    width = width or 4 * config.hidden_size
    if family == "lfm2" and config.block_auto_adjust_ff_dim:
        # the config's is that of an MLP without gate
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def _has_experts(config: Any) -> list[bool]:
    """Of every layer."""
    family, layers = config.model_type, range(config.num_hidden_layers)
    if family in KIMI_DELTA:
        return [kind == "sparse" for kind in config.mlp_layer_types]
    if family in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        dense, step = config.mlp_only_layers or [], config.decoder_sparse_step
        return [config.num_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in layers]
    if family in ("deepseek_v3", "lfm2_moe"):
        first = config.num_dense_layers if family == "lfm2_moe" else config.first_k_dense_replace
        return [layer >= first for layer in layers]
    return [family in MOE] * len(layers)


def _experts(config: Any) -> int:
    """Router, active experts and shared experts of one layer."""
    h, family = config.hidden_size, config.model_type
    if family in LIKE_MIXTRAL:
        num_experts, width = config.num_experts if family == "olmoe" else config.num_local_experts, _mlp_width(config)
    else:
        num_experts = config.n_routed_experts if family in ("deepseek_v3", "nemotron_h") else config.num_experts
        width = config.moe_intermediate_size
    # nemotron_h's have no gate, and may read and write a latent that all share
    matrices, latent = (2, config.moe_latent_size) if family == "nemotron_h" else (3, None)
    shared_width = 0
    if family in GATED_SHARED_EXPERT:
        shared_width = config.shared_expert_intermediate_size
    elif family in LATENT:
        shared_width = config.n_shared_experts * width
    elif family == "granitemoehybrid":
        shared_width = config.shared_intermediate_size
    elif family == "nemotron_h":
        shared_width = config.moe_shared_expert_intermediate_size or config.intermediate_size
    parameters = h * num_experts + matrices * h * shared_width + (h if family in GATED_SHARED_EXPERT else 0)
    if num_experts:
        parameters += config.num_experts_per_tok * matrices * (latent or h) * width + 2 * h * (latent or 0)
    return parameters


def _mlp(config: Any, kind: str, has_experts: bool, layer: int) -> int:
    """Matmul parameters beside what mixes tokens: an MLP or experts; gemma4's experts and per-layer inputs too."""
    h, family = config.hidden_size, config.model_type
    if family == "nemotron_h":
        # each of its layers is one thing alone
        return _experts(config) if kind == "moe" else 2 * h * _mlp_width(config) if kind == "mlp" else 0
    if has_experts:
        return _experts(config)
    parameters = (2 if family in PLAIN_MLP else 3) * h * _mlp_width(config)
    if family == "gemma4_text":
        if config.use_double_wide_mlp and _shares_keys(config, layer):
            parameters *= 2
        if config.enable_moe_block:
            parameters += h * config.num_experts + config.top_k_experts * 3 * h * config.moe_intermediate_size
        # from the embedding, and in the layer a gate and back
        parameters += 3 * h * (config.hidden_size_per_layer_input or 0)
    return parameters


def _layer(config: Any, kind: str, has_experts: bool, layer: int) -> tuple[int, int, int]:
    """(matmul parameters, pair width, products with its states) of one layer."""
    parameters, pair_width, state_products = _mlp(config, kind, has_experts, layer), 0, 0
    if kind in _ATTENTION:
        projections, pair_width = _attention(config, layer)
        parameters += projections
    if kind in ("linear_attention", "hybrid"):
        family = config.model_type
        recurrent = _gated_delta if family in GATED_DELTA else _kimi_delta if family in KIMI_DELTA else _mamba
        projections, state_products = recurrent(config)
        parameters += projections
    if kind == "conv":
        parameters += _short_conv(config)
    return parameters, pair_width, state_products


def model_shape(config: Any) -> ModelShape:
    """The matmuls of a transformers decoder config (object, dict, or path of a config.json).

    Raises ValueError for a family or a variant whose layers are not known here, naming it.
    """
    config = _load_config(config)
    family = config.model_type
    if family not in GATED_MLP + PLAIN_MLP + MOE:
        known = ", ".join(sorted(GATED_MLP + PLAIN_MLP + MOE))
        raise ValueError(f"config: the layers of model_type {family!r} are not known here; known are {known}")
    h = config.hidden_size
    if family == "opt" and config.word_embed_proj_dim != h:
        raise ValueError("config: opt with word_embed_proj_dim != hidden_size projects its embeddings; not known here")
    if family == "gemma4_text":
        if not hasattr(config, "per_layer_config"):
            raise ValueError("config: the layers of gemma4_text are known by their per_layer_config; here is none")
    elif getattr(config, "is_heterogeneous", False):
        raise ValueError(f"config: per_layer_config is not known in {family}")
    types = _layer_types(config)
    # layers alike are counted once; gemma4's may differ one by one
    alike = [
        (kind, has_experts, layer if family == "gemma4_text" else 0)
        for layer, (kind, has_experts) in enumerate(zip(types, _has_experts(config), strict=True))
    ]
    costs = {key: _layer(config, *key) for key in set(alike)}
    parameters, pair_widths, state_products = zip(*(costs[key] for key in alike), strict=True)
    window = _window(config)
    return ModelShape(
        name=getattr(config, "name_or_path", "") or family,
        linear_parameters=sum(parameters),
        pair_widths=tuple(width for width in pair_widths if width),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types if kind in _ATTENTION),
        head_parameters=h * config.vocab_size,
        state_products=sum(state_products),
    )
