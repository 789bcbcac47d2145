"""A tiny model on disk, verl's engines over it and the batches they are given; one process or two, over gloo."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

import tokenizers
import torch
import verl_cpu  # noqa: F401
from models import HYBRID, tiny_config
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

# isort: split
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine.base import EngineRegistry

VOCAB, GROUP = 61, 4


def write_model(folder: Any, family: str | None = None, **changes: Any) -> None:
    """Qwen2, or a hybrid ``family`` of models.py."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.2)
    options = dict(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **changes)
    config = Qwen2Config(**options) if family is None else tiny_config(family, **HYBRID[family], **options)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def join(rank: int = 0, world: int = 1, port: int | None = None) -> int:
    """Joins a gloo group; the port."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    return port


def engine(folder: Any, *, tree: bool, strategy: str = "fsdp2", model: dict | None = None, **changes: Any) -> Any:
    """verl's engine of a registered vendor: ours, or verl's own on padded rows with transformers' SDPA."""
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    os.environ["VERL_ENGINE_VENDOR"] = "treegrpo" if tree else "nvidia"
    options = dict(
        path=str(folder),
        override_config=dict(attn_implementation="treegrpo" if tree else "sdpa"),
        use_remove_padding=tree,
        enable_gradient_checkpointing=False,
    )
    settings = dict(
        strategy=strategy,
        mixed_precision=dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32"),
        use_torch_compile=False,
        use_dynamic_bsz=True,
    )
    made = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(**options | (model or {})),
        engine_config=FSDPEngineConfig(**settings | changes),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, weight_decay=0.0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


def rows(num_groups: int = 3, seed: int = 0) -> list[tuple[str, list[int], list[int]]]:
    """(uid, prompt, response) of GROUP responses a prompt, which begin alike two and two."""
    draw = random.Random(seed)
    word = lambda: draw.randrange(2, VOCAB)  # noqa: E731
    found = []
    for group in range(num_groups):
        prompt = [word() for _ in range(5 + group)]
        halves = [[word() for _ in range(4)] for _ in range(2)]
        for number in range(GROUP):
            found.append((f"u{group}", prompt, halves[number // 2] + [word() for _ in range(draw.randrange(1, 6))]))
    return found


def batch(samples: list[tuple[str, list[int], list[int]]], **settings: Any) -> TensorDict:
    """What verl's workers hand an engine: jagged rows, and settings that are no tensors."""
    draw = torch.Generator().manual_seed(1)
    jagged = lambda xs: torch.nested.as_nested_tensor(xs, layout=torch.jagged)  # noqa: E731
    whole = [torch.tensor(prompt + response) for _, prompt, response in samples]
    lengths = [len(response) for *_, response in samples]
    fields = dict(
        input_ids=jagged(whole),
        position_ids=jagged([torch.arange(len(x)) for x in whole]),
        prompts=jagged([torch.tensor(prompt) for _, prompt, _ in samples]),
        responses=jagged([torch.tensor(response) for *_, response in samples]),
        response_mask=jagged([torch.ones(n, dtype=torch.int64) for n in lengths]),
        loss_mask=jagged([torch.ones(n, dtype=torch.int64) for n in lengths]),
        old_log_probs=jagged([-2 - torch.rand(n, generator=draw) for n in lengths]),
        advantages=jagged([torch.randn(1, generator=draw).expand(n).clone() for n in lengths]),
    )
    data = TensorDict(fields, batch_size=len(samples))
    # rows of text come with an empty dict each
    tu.assign_non_tensor(data, uid=[uid for uid, *_ in samples], multi_modal_inputs=[{} for _ in samples])
    base = dict(
        use_dynamic_bsz=True,
        max_token_len_per_gpu=4096,
        calculate_entropy=True,
        temperature=1.0,
        global_batch_size=len(samples),
        pad_token_id=0,
        use_remove_padding=False,
    )
    tu.assign_non_tensor(data, **base | settings)
    return data


def actor_config(**changes: Any) -> FSDPActorConfig:
    """Of the loss: PPO with an entropy bonus."""
    sizes = dict(rollout_n=GROUP, ppo_mini_batch_size=GROUP, ppo_micro_batch_size_per_gpu=GROUP)
    return FSDPActorConfig(**dict(strategy="fsdp2", entropy_coeff=0.01, **sizes) | changes)


def parameters(made: Any, grad: bool = False) -> dict[str, torch.Tensor]:
    """Whole parameters (or their gradients), by name."""
    found = {}
    for name, p in made.module.named_parameters():
        x = p.grad if grad else p
        if x is None:
            # frozen under LoRA
            continue
        found[name] = (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
    return found


def assert_same_step(got: dict[str, Any], want: dict[str, Any]) -> None:
    """``loss`` (float), ``grads`` and ``parameters`` after the optimiser's first step agree to 1e-5."""
    assert abs(got["loss"] - want["loss"]) < 1e-5
    assert got["grads"].keys() == want["grads"].keys()
    assert max(float(value.abs().max()) for value in want["grads"].values()) > 1e-3
    for key, value in want["grads"].items():
        torch.testing.assert_close(got["grads"][key], value, rtol=0, atol=1e-5, msg=key)
    for key, value in want["parameters"].items():
        difference = (got["parameters"][key] - value).abs()
        if key in want["grads"]:
            # Adam's first step is the gradient's sign: where that is nearly zero it is anybody's
            difference = difference.masked_fill(want["grads"][key].abs() < 1e-5, 0)
        assert float(difference.max()) < 1e-5, key
