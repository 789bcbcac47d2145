"""Models for training: from a local folder or a config file, float32, with tree attention, LoRA, a frozen reference."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from treegrpo.config import TrainConfig


def read_model_config(path: str | Path) -> Any:
    """The transformers config of a model folder, a checkpoint folder, or a .json/.yaml file with `model_type`.

    Raises:
        ValueError: nothing readable there, or an unknown model_type.
    """
    from transformers import AutoConfig

    path = Path(path)
    try:
        if path.is_dir():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        values = (
            yaml.safe_load(path.read_text(encoding="utf-8"))
            if path.suffix in (".yaml", ".yml")
            else json.loads(path.read_text())
        )
        return AutoConfig.for_model(**values)
    except (OSError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"model {path}: not a model folder or a config with model_type: {error}") from error


def vocabulary_size(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def build_model(path: str | Path, seed: int) -> torch.nn.Module:
    """A float32 causal LM with tree attention, checked by `treegrpo.hf`; random weights depend on `seed` alone.

    Dropout is switched off: a token shared by many leaves would have one mask where chains have many.
    """
    from transformers import AutoModelForCausalLM

    from treegrpo.hf import ATTENTION, use_tree_attention

    config = read_model_config(path)
    for name in (
        "attention_dropout",
        "attn_pdrop",
        "attn_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout",
        "dropout",
    ):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    options = {"attn_implementation": ATTENTION, "dtype": torch.float32}
    if Path(path).is_dir():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"model {path}: cannot load its weights ({error}); give a folder with whole .safetensors files"
            ) from error
    else:
        with seeded(seed):
            model = AutoModelForCausalLM.from_config(config, **options)
    return use_tree_attention(model)


def build_policy(config: TrainConfig, checkpoint: Path | None) -> torch.nn.Module:
    """The model to train, from `config.model` or from a checkpoint of it; with LoRA adapters where asked."""
    if config.lora_r == 0:
        model = build_model(checkpoint or config.model, config.seed)
    else:
        model = build_model(config.model, config.seed)
        model = _with_adapters(model, config, checkpoint)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora_r:
            model.enable_input_require_grads()
    return model.train()


def _with_adapters(model: torch.nn.Module, config: TrainConfig, checkpoint: Path | None) -> torch.nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint is not None:
        if not (checkpoint / "adapter_config.json").exists():
            raise ValueError(
                f"checkpoint {checkpoint} has no adapter, but lora_r={config.lora_r}; resume with the settings it was"
                " made with"
            )
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    modules = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if modules == ("all-linear",) else list(modules),
        task_type="CAUSAL_LM",
    )
    with seeded(config.seed):
        return get_peft_model(model, lora)


class Reference:
    """The frozen initial model for the KL term: the policy with its adapters off, or a copy of its own."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.model = None
        if config.lora_r == 0:
            self.model = build_model(config.model, config.seed).to(device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def of(self, policy: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Yields the model to run; `policy` is the unwrapped one."""
        if self.model is not None:
            yield self.model
        else:
            with policy.disable_adapter():
                yield policy


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, the outer stream untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
