"""Tiny random models of many families, for tests and benches: two layers, hidden 32, vocabulary 96, no download."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCAB = 96

# what most families call their sizes
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS["moe_intermediate_size"] = 16
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
WINDOW = 5
DEEPSEEK: dict[str, Any] = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KIMI: dict[str, Any] = {
    **DEEPSEEK,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_heads": 4,
    "linear_head_dim": 8,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
}

# every family that computes a packed tree exactly, with what its config needs beyond COMMON
EXACT: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
    },
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt2": GPT2,
    "gpt_neox": {"hidden_dropout": 0.0},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "mixtral": {**EXPERTS, "sliding_window": WINDOW},
    "olmoe": EXPERTS,
    "granitemoe": {**EXPERTS, "logits_scaling": 3.0},
    "gpt_oss": {**EXPERTS, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": DEEPSEEK,
}

# families that would train on something else in silence: check_model must refuse them
WRONG: dict[str, dict[str, Any]] = {
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "head_dim": None},
    "stablelm": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    # selects keys, of more than the check's paths have, whatever its layers are called
    "deepseek_v32": {**DEEPSEEK, "index_n_heads": 2, "index_head_dim": 8},
    "llama4_text": {**EXPERTS, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 48},
}

if Version(transformers.__version__) >= Version("5.18"):
    WRONG["deepseek_v32"]["layer_types"] = ["full_attention"] * 2
# its attention became replaceable in 5.24
(EXACT if Version(transformers.__version__) >= Version("5.24") else WRONG)["gptj"] = {**GPT2, "rotary_dim": 4}


# layers that carry a state along the path: transformers hands them the tree since 5.17
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": {**EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": DELTA_NET,
    "kimi_linear": KIMI,
    "bailing_hybrid": KIMI,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 16,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {
        **MAMBA,
        "mamba_rms_norm": True,
        "ssm_multipliers": [0.9, 0.8, 0.7, 1.5, 0.6],
        "ssm_out_multiplier": 0.5,
        "key_multiplier": 0.5,
        "lm_head_multiplier": 0.3,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
}
# not those of newer releases
HYBRID, WRONG = ({name: x for name, x in kind.items() if name in CONFIG_MAPPING} for kind in (HYBRID, WRONG))
TAUGHT = tuple(HYBRID) if Version(transformers.__version__) >= Version("5.17") else ()
EXACT |= {name: HYBRID[name] for name in TAUGHT}
if not TAUGHT and "qwen3_next" in HYBRID:
    WRONG["qwen3_next"] = HYBRID["qwen3_next"]


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of two layers, hidden 32. Dropout is off."""
    options = {**COMMON, **EXACT.get(family, WRONG.get(family, {})), "attention_dropout": 0.0, **overrides}
    return AutoConfig.for_model(family, **{name: value for name, value in options.items() if value is not None})


def tiny_model(
    family: str = "qwen3",
    *,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A tiny causal LM with weights large enough that attention matters, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation=attention)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        # the grouped product of experts has no float64
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # biases, norms and sinks too: at their initial zeros and ones half the model would go untested
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def tree_twin(model: nn.Module) -> nn.Module:
    """A copy with the same weights that runs tree attention."""
    from treegrpo.hf import use_tree_attention

    return use_tree_attention(copy.deepcopy(model))
