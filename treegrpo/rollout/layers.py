"""What the `hf` engine asks of a model: which layers it has, what they cache, and how its forward names things."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from treegrpo.rollout.kv import KVShape

LAYER_TYPES = ("full_attention", "sliding_attention")
HYBRIDS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "lfm2", "lfm2_moe", "lfm3", "granitemoehybrid"),
    *("bamba", "falcon_h1", "nemotron_h", "kimi_linear", "bailing_hybrid"),
)
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
    # a hybrid's layers are seen in what they cache
    foreign = [] if is_hybrid else sorted(set(types or ()) - set(LAYER_TYPES))
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
    limits = [limit for module in model.modules() if (limit := getattr(module, "time_step_limit", None))]
    if is_hybrid and any((low, high) != (0.0, math.inf) for low, high in limits):
        raise ValueError(
            f"{name} bounds the time steps of its Mamba layers ({limits[0]}), which transformers"
            f" {transformers.__version__} does in forwards of several tokens, but not in those of one: what is sampled"
            " would not have the log-probs it is trained with; use another engine"
        )
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
    """Computes one token to see what the model caches; ValueError where that is not equal keys and values in every
    layer, or in a hybrid model equal ones and equal states in the layers that have them."""
    name, config = type(model).__name__, _text_config(model)
    device = model.get_input_embeddings().weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    is_hybrid = _is_hybrid(model)
    cache = DynamicCache(config=model.config) if is_hybrid else DynamicCache()
    if is_hybrid and not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(f"{name} has no attention layer, by which its cache counts tokens: use another engine")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=token, position_ids=token, use_cache=True, **{keywords(model)[1]: cache})
    finally:
        for module in training:
            module.training = True
    has_keys = [getattr(layer, "keys", None) is not None for layer in cache.layers]
    pairs = [(layer.keys, layer.values) for layer, has in zip(cache.layers, has_keys, strict=True) if has]
    states = [_states(layer) for layer in cache.layers]
    plain = all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == 1 for pair in pairs for x in pair)
    kinds = {(k.shape, v.shape, k.dtype, v.dtype, k.device, v.device) for k, v in pairs} if plain else set()
    is_whole = len(cache.layers) == config.num_hidden_layers and (is_hybrid or all(has_keys))
    if not is_whole or len(kinds) != 1 or pairs[0][0].dtype != pairs[0][1].dtype:
        raise ValueError(
            f"{name} does not cache keys and values of one shape on one device in each of its"
            f" {len(pairs) if is_hybrid else config.num_hidden_layers} attention layers: use another model or another"
            " engine"
        )
    keys, values = pairs[0]
    distinct = set(states) - {()}
    if len(distinct) > 1 or any(place != keys.device for kind in distinct for *_, place in kind):
        raise ValueError(f"{name} does not keep states of one shape on one device: use another engine")
    key, value = ((x.shape[1], x.shape[3]) for x in (keys, values))
    sizes = tuple((size, dtype) for kind in distinct for size, dtype, _ in kind)
    caches = tuple(zip(has_keys, map(bool, states), strict=True)) if is_hybrid else ()
    return KVShape(len(pairs), key, value, keys.dtype, keys.device, caches, sizes)


def _is_hybrid(model: nn.Module) -> bool:
    # of the whole model: one with images has positions of its own
    return getattr(getattr(model, "config", None), "model_type", None) in HYBRIDS


def _states(layer: Any) -> tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]:
    """Shape of one sequence, dtype and device of each state of a cache's layer."""
    kinds = (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for kept in kinds for x in kept.values() if x is not None)
