"""Small random Qwen3-shaped models for the benches that need one: no download, float32, tree or stock attention.

And hybrids: Qwen3.5, three layers of four with a recurrence in place of attention.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

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


def hybrid_config(*, hidden: int, vocab: int = VOCAB) -> PretrainedConfig:
    """Four layers; ValueError where transformers knows no Qwen3.5."""
    shared = config(layers=4, hidden=hidden, vocab=vocab)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    heads = {"linear_num_key_heads": hidden // 64, "linear_num_value_heads": hidden // 32}
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return AutoConfig.for_model("qwen3_5_text", **{name: getattr(shared, name) for name in names}, **heads, **sizes)


def model(shape: PretrainedConfig, device: torch.device, *, attention: str = "treegrpo") -> nn.Module:
    """The same weights for the same shape, whatever the attention."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").to(device, torch.float32).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("A_log"):
                # as drawn, a state lasts a token or two, and the gradient of its decay is rounding alone
                parameter.fill_(-3.0)
    if attention == "treegrpo":
        # a model without layers has no attention to check
        use_tree_attention(made, check=shape.num_hidden_layers > 0)
    return made
