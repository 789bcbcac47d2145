"""What the `hf` engine asks of a model: which layers it has, what they cache, and how its forward names things."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from treegrpo.rollout.kv import KVShape

LAYER_TYPES = ("full_attention", "sliding_attention")


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
    foreign = sorted(set(types or ()) - set(LAYER_TYPES))
    if foreign or getattr(model, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False):
        what = f"has layers of type {', '.join(foreign)}" if foreign else "is not a plain attention decoder"
        raise ValueError(
            f"{name} {what}: branches continue from keys and values of single tokens, which a recurrent or chunked"
            " state is not; use a model whose layers are all attention, or another engine"
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
    """Computes one token to see what the model caches; ValueError where that is not equal keys and values per layer."""
    name, config = type(model).__name__, _text_config(model)
    device = model.get_input_embeddings().weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = DynamicCache()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=token, position_ids=token, use_cache=True, **{keywords(model)[1]: cache})
    finally:
        for module in training:
            module.training = True
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    plain = all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == 1 for pair in pairs for x in pair)
    kinds = {(k.shape, v.shape, k.dtype, v.dtype, k.device, v.device) for k, v in pairs} if plain else set()
    if len(pairs) != config.num_hidden_layers or len(kinds) != 1 or pairs[0][0].dtype != pairs[0][1].dtype:
        raise ValueError(
            f"{name} does not cache keys and values of one shape on one device in each of its"
            f" {config.num_hidden_layers} layers: use another model or another engine"
        )
    keys, values = pairs[0]
    key, value = ((x.shape[1], x.shape[3]) for x in (keys, values))
    return KVShape(len(pairs), key, value, keys.dtype, keys.device)
