"""Small random Qwen3-shaped models for the benches that need one: no download, float32, tree or stock attention."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from treegrpo.hf import use_tree_attention

VOCAB = 4096


def config(*, layers: int, hidden: int, vocab: int = VOCAB) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def model(shape: Qwen3Config, device: torch.device, *, attention: str = "treegrpo") -> nn.Module:
    """The same weights for the same shape, whatever the attention."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").to(device, torch.float32).train()
    if attention == "treegrpo":
        # a model without layers has no attention to check
        use_tree_attention(made, check=shape.num_hidden_layers > 0)
    return made
