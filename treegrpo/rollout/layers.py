"""What the `hf` engine asks of a model: which layers it has, what they cache, and how its forward names things."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from treegrpo.rollout.kv import KVShape

LAYER_TYPES = ("full_attention", "sliding_attention")
STATE_LAYER_TYPES = ("linear_attention", "conv")
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "lfm2", "lfm2_moe")
"""Families whose layers go on from a state with several tokens at once. Others call their layers the same, but take one
token at a time, keep several states or a cache of their own."""
HYBRIDS_SINCE = "5.17"
"""The version of transformers from which on they do."""


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: give a transformers causal model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module, wanted: int | None) -> int:
    known: Any = getattr(_text_config(model), "max_position_embeddings", None)
    if wanted is None and known is None:
        raise ValueError(f"{type(model).__name__} does not say its context length: give max_context_length")
    if wanted is not None and not 2 <= wanted <= (known or wanted):
        raise ValueError(f"max_context_length={wanted}: give a number from 2 to the model's {known} positions")
    return known if wanted is None else wanted


def check_layers(model: nn.Module, max_context_length: int) -> int | None:
    """The sliding window, None where no layer has one. ValueError for layers the engine cannot serve."""
    name, config = type(model).__name__, _text_config(model)
    types = getattr(config, "layer_types", None)
    is_hybrid = _is_hybrid(model)
    known = LAYER_TYPES + STATE_LAYER_TYPES if is_hybrid else LAYER_TYPES
    foreign = sorted(set(types or ()) - set(known))
    is_stateful = getattr(model, "_is_stateful", False) and not is_hybrid
    if foreign or is_stateful or getattr(config, "is_encoder_decoder", False):
        what = f"has layers of type {', '.join(foreign)}" if foreign else "is not a plain attention decoder"
        raise ValueError(
            f"{name} {what}: branches continue from keys and values of single tokens, or from the states of the hybrid"
            f" models {', '.join(HYBRIDS)}; use one of these, a model whose layers are all attention, or another engine"
        )
    if is_hybrid and Version(transformers.__version__) < Version(HYBRIDS_SINCE):
        raise ValueError(
            f"{name} is a hybrid model, whose layers cannot go on from a kept state in transformers"
            f" {transformers.__version__}: install {HYBRIDS_SINCE} or newer, or use another engine"
        )
    if is_hybrid and not set(types or LAYER_TYPES) & set(LAYER_TYPES):
        raise ValueError(f"{name} has no attention layer, by which its cache counts tokens: use another engine")
    window = getattr(config, "sliding_window", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        return None
    if window < max_context_length:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens, shorter than max_context_length={max_context_length}:"
            " windows count columns of the padded batch; lower max_context_length to the window or use another engine"
        )
    return window


def keywords(model: nn.Module) -> tuple[dict[str, int], str]:
    """What has logits of the last position alone computed, where the model takes it; and the name of its cache.

    transformers 5.24 calls the cache ``cache`` and means to drop ``past_key_values`` in 5.40.
    """
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        raise ValueError(
            f"{type(model).__name__} takes no position_ids, which left-padded rows need: use another engine"
        )
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return keep, "cache" if "cache" in parameters else "past_key_values"


def probe_shape(model: PreTrainedModel) -> KVShape:
    """Computes one token to see what the model caches; ValueError where that is not equal keys and values per attention
    layer, and equal states in the other layers of a hybrid model."""
    name, config = type(model).__name__, _text_config(model)
    device = model.get_input_embeddings().weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config) if _is_hybrid(model) else DynamicCache()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=token, position_ids=token, use_cache=True, **{keywords(model)[1]: cache})
    finally:
        for module in training:
            module.training = True
    is_state = tuple(hasattr(layer, "conv_states") for layer in cache.layers)
    states = {_states(layer) for layer, has_state in zip(cache.layers, is_state, strict=True) if has_state}
    attention = [layer for layer, has_state in zip(cache.layers, is_state, strict=True) if not has_state]
    pairs = [(layer.keys, layer.values) for layer in attention]
    plain = all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == 1 for pair in pairs for x in pair)
    kinds = {(k.shape, v.shape, k.dtype, v.dtype, k.device, v.device) for k, v in pairs} if plain else set()
    if len(is_state) != config.num_hidden_layers or len(kinds) != 1 or pairs[0][0].dtype != pairs[0][1].dtype:
        raise ValueError(
            f"{name} does not cache keys and values of one shape on one device in each of its"
            f" {len(attention) if any(is_state) else config.num_hidden_layers} attention layers: use another model or"
            " another engine"
        )
    keys, values = pairs[0]
    if len(states) > 1 or any(place != keys.device for kind in states for *_, place in kind):
        raise ValueError(f"{name} does not keep states of one shape on one device: use another engine")
    key, value = ((x.shape[1], x.shape[3]) for x in (keys, values))
    sizes = tuple((size, dtype) for kind in states for size, dtype, _ in kind)
    return KVShape(len(pairs), key, value, keys.dtype, keys.device, is_state if states else (), sizes)


def _is_hybrid(model: nn.Module) -> bool:
    # of the whole model: one with images has positions of its own
    return getattr(getattr(model, "config", None), "model_type", None) in HYBRIDS


def _states(layer: Any) -> tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]:
    """Shape of one sequence, dtype and device of each state of a cache's layer."""
    states = [*layer.conv_states.values(), *(x for x in layer.recurrent_states.values() if x is not None)]
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in states)
