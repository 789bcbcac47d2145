"""The matmuls of transformers decoders, family by family, from their configs. Letters as in treegrpo.flops."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Families whose layer is attention with separate or fused q, k, v, o projections and one MLP; each is checked in the
# tests against the matmuls a tiny model of it really runs.
GATED_MLP = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "lfm2", "lfm3", "llama", "mistral",
    "olmo", "olmo2", "olmo3", "olmo_hybrid", "phi3", "qwen2", "qwen3", "qwen3_5_text", "smollm3",
)  # fmt: skip
PLAIN_MLP = ("gpt2", "gpt_neox", "opt", "starcoder2")
# These know no grouped queries, whatever their config says.
MULTI_HEAD = ("gpt2", "gpt_neox", "opt")
MOE = (
    "gpt_oss", "granitemoe", "lfm2_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
)  # fmt: skip
SHARED_EXPERT = ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
# Their layers of type linear_attention have a gated delta rule, behind a short convolution, in place of attention.
GATED_DELTA = ("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
# Their layers of type conv have a short convolution in place of attention.
SHORT_CONV = ("lfm2", "lfm2_moe", "lfm3")
# Their query projection is twice as wide: the other half gates the output of attention.
GATED_QUERY = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")


@dataclass(frozen=True)
class ModelShape:
    """The matmuls of one model: everything the FLOP count needs."""

    name: str
    linear_parameters: int
    """Matmul parameters one token passes through, all layers, LM head excluded."""
    pair_width: int
    """Hq * D: multiply-adds of q k^T (and of p v) per visible pair and attention layer."""
    windows: tuple[int, ...]
    """Per attention layer: window in tokens, 0 for full attention."""
    head_parameters: int
    """h * V."""
    state_elements: int = 0
    """Hv * Dk * Dv, all gated-delta layers: multiply-adds of each of a token's three products with their states."""


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


def _moe_parameters(config: Any, layer: int) -> int:
    """Router and active experts of one layer; dense layers and shared experts included."""
    h, kind = config.hidden_size, config.model_type
    if kind in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        is_dense = layer in (config.mlp_only_layers or []) or (layer + 1) % config.decoder_sparse_step
    else:
        is_dense = kind == "lfm2_moe" and layer < config.num_dense_layers
    is_narrow = kind in (*SHARED_EXPERT, "lfm2_moe", "qwen3_moe")
    num_experts = config.num_experts if is_narrow or kind == "olmoe" else config.num_local_experts
    if is_dense or not num_experts:
        return 3 * h * config.intermediate_size
    width = config.moe_intermediate_size if is_narrow else config.intermediate_size
    parameters = h * num_experts + config.num_experts_per_tok * 3 * h * width
    if kind in SHARED_EXPERT:
        parameters += 3 * h * config.shared_expert_intermediate_size + h
    return parameters


def _mlp_width(config: Any) -> int:
    """The width of every layer's MLP, where there are no experts."""
    kind = config.model_type
    # gpt2 leaves n_inner None for 4 h
    width = getattr(config, {"gpt2": "n_inner", "opt": "ffn_dim"}.get(kind, "intermediate_size"))
    width = width or 4 * config.hidden_size
    if kind == "lfm2" and config.block_auto_adjust_ff_dim:
        # the config's is that of an MLP without gate
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention_parameters(config: Any) -> int:
    """Projections of one attention layer, gates of its output included."""
    h, heads, head_dim, kind = config.hidden_size, config.num_attention_heads, _head_dim(config), config.model_type
    kv_heads = heads if kind in MULTI_HEAD else getattr(config, "num_key_value_heads", None) or heads
    queries = 2 * heads if kind in GATED_QUERY else heads
    parameters = h * head_dim * (queries + 2 * kv_heads) + heads * head_dim * h
    if kind == "lfm3" and config.use_attention_gate:
        parameters += h * heads
    return parameters


def _other_mixer(config: Any) -> tuple[int, int]:
    """What one layer has in place of attention: (matmul parameters, elements of its states)."""
    h = config.hidden_size
    if config.model_type in SHORT_CONV:
        # in: the channels, and a gate before the convolution and one after it
        return h * 3 * h + config.conv_L_cache * h + h * h, 0
    value_heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
    keys, values = config.linear_num_key_heads * key_dim, value_heads * config.linear_value_head_dim
    # in: q, k, v, a gate as wide as v, and for each value head its decay and its beta
    parameters = h * (2 * keys + 2 * values + 2 * value_heads) + values * h
    return parameters + config.linear_conv_kernel_dim * (2 * keys + values), key_dim * values


def _windows(config: Any) -> tuple[int, ...]:
    """Window per attention layer, 0 for full; a config without layer_types that has a window applies it to all."""
    window = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    attention, family = {"full_attention", "sliding_attention"}, config.model_type
    other = {"linear_attention"} if family in GATED_DELTA else {"conv"} if family in SHORT_CONV else set()
    unknown, known = sorted(set(kinds) - attention - other), sorted(attention | other)
    if unknown:
        raise ValueError(f"config: layers of type {unknown} are not known in {family}; known are {known}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds if kind in attention)


def model_shape(config: Any) -> ModelShape:
    """The matmuls of a transformers decoder config (object, dict, or path of a config.json).

    Raises ValueError for a family whose layers are not known here (other linear attention, MLA, ...), naming it.
    """
    config = _load_config(config)
    kind = config.model_type
    if kind not in GATED_MLP + PLAIN_MLP + MOE:
        known = ", ".join(sorted(GATED_MLP + PLAIN_MLP + MOE))
        raise ValueError(f"config: the layers of model_type {kind!r} are not known here; known are {known}")
    h, layers, windows = config.hidden_size, config.num_hidden_layers, _windows(config)
    if kind == "opt" and config.word_embed_proj_dim != h:
        raise ValueError("config: opt with word_embed_proj_dim != hidden_size projects its embeddings; not known here")
    if kind in MOE:
        mlp = sum(_moe_parameters(config, layer) for layer in range(layers))
    else:
        mlp = layers * (3 if kind in GATED_MLP else 2) * h * _mlp_width(config)
    others = layers - len(windows)
    other_parameters, state_elements = _other_mixer(config) if others else (0, 0)
    return ModelShape(
        name=getattr(config, "name_or_path", "") or kind,
        linear_parameters=len(windows) * _attention_parameters(config) + others * other_parameters + mlp,
        pair_width=config.num_attention_heads * _head_dim(config),
        windows=windows,
        head_parameters=h * config.vocab_size,
        state_elements=others * state_elements,
    )
