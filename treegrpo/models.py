"""Models for training: from a local folder or a config file, float32, with tree attention, LoRA, a frozen reference."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from treegrpo.config import TrainConfig
from treegrpo.dropout import disable_dropout
from treegrpo.model_shape import decode_floats
from treegrpo.parallel import Parallel
from treegrpo.shards import SHARDS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


# families whose Mamba-2 layers may hand the weight of out_proj to a kernel, which would pass an adapter by
_OUT_PROJ_REFUSED = ("falcon_h1", "nemotron_h")


def read_model_config(path: str | Path) -> Any:
    """The transformers config of a model folder, a checkpoint folder, or a .json/.yaml file with `model_type`.

    Raises:
        ValueError: nothing readable there, adapters alone, an unknown model_type, or a value of the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    path = Path(path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"model {path} holds LoRA adapters alone (adapter_config.json): `treegrpo export {path} OUT` merges them"
            " into a folder that loads"
        )
    try:
        if path.is_dir():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        else:
            values = (
                yaml.safe_load(path.read_text(encoding="utf-8"))
                if path.suffix in (".yaml", ".yml")
                else json.loads(path.read_text(encoding="utf-8-sig"))
            )
            config = AutoConfig.for_model(**decode_floats(values))
    except (OSError, TypeError, KeyError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"model {path}: not a model folder or a config with model_type: {error}") from error
    except StrictDataclassError as error:
        file = path / "config.json" if path.is_dir() else path
        raise ValueError(f"model {file}: {' '.join(str(error).split())}; mend that value") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model {path}: transformers makes no causal LM of a {config.model_type}; give the folder of a language"
            " model"
        )
    return config


def vocabulary_size(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def left_out(config: Any, model: Any) -> str:
    """What the published `config` describes beside the language model that `model` is, in words; "" for nothing."""
    if config.model_type == model.config.model_type:
        return ""
    others = " and ".join(sorted(name for name in config.sub_configs if name != "text_config")) or "the rest"
    return f"the language model alone ({model.config.model_type}) is trained and saved, without what {others} describes"


def from_config(config: Any, path: str | Path, **options: Any) -> PreTrainedModel:
    """A causal LM with random weights, through tree attention. ValueError naming `path` where the values of its config
    make no model."""
    from transformers import AutoModelForCausalLM

    from treegrpo.hf import ATTENTION

    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, **options)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
    ) as error:
        raise ValueError(f"model {path}: its config makes no model ({error}); mend it") from error


def build_model(
    path: str | Path, seed: int, *, weights: bool = True, quantization: Any = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A float32 causal LM with tree attention, checked by `treegrpo.hf`; random weights depend on `seed` alone.

    Dropout, layer drop and router jitter are switched off: a token shared by many leaves would have one mask where
    chains have many.

    Args:
        path: a model folder, or a config file.
        seed: of random weights.
        weights: False leaves the weights of a folder random: others are put there.
        quantization: a transformers quantisation config, for a folder with weights.
        device: where quantised weights go; the others stay on the CPU.

    Raises:
        ValueError: weights that cannot be read, quantisation without weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from treegrpo.hf import ATTENTION, use_tree_attention

    config = read_model_config(path)
    options: dict[str, Any] = {"dtype": torch.float32}
    if Path(path).is_dir() and weights:
        if quantization is not None:
            check_bitsandbytes()
            options |= {"quantization_config": quantization, "device_map": {"": device or torch.device("cpu")}}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                attn_implementation=ATTENTION,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            cure = (
                "a sharded checkpoint: `treegrpo export` makes a folder that loads"
                if (Path(path) / SHARDS).is_dir()
                else "give a folder with whole .safetensors files"
            )
            raise ValueError(f"model {path}: cannot load its weights ({error}); {cure}") from error
    else:
        if quantization is not None:
            raise ValueError(f"load_in_4bit needs a folder with weights, model={str(path)!r} is a config file")
        with seeded(seed):
            model = from_config(config, path, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in a forward in eval mode, and have no gradients from then on
            module.support_avx512bf16_for_cpu = False
    return use_tree_attention(disable_dropout(model))


def build_policy(
    config: TrainConfig, checkpoint: Path | None, device: torch.device | None = None, *, dequantize: bool = False
) -> PreTrainedModel | PeftModel:
    """The model to train, from `config.model` or from a checkpoint of it; with LoRA adapters where asked.

    A sharded checkpoint gives the structure alone: its weights are read in place later (shards.py). `dequantize` turns
    a 4-bit base back into float32, of the values the 4 bits stand for.
    """
    if config.lora_r == 0:
        is_sharded = checkpoint is not None and (checkpoint / SHARDS).is_dir()
        model = build_model(checkpoint or config.model, config.seed, weights=not is_sharded)
    else:
        model = build_model(config.model, config.seed, quantization=_quantization(config), device=device)
        if config.load_in_4bit and dequantize:
            # before transformers 5 it takes no dtype, and gives the model's own
            takes_dtype = "dtype" in inspect.signature(model.dequantize).parameters
            model = model.dequantize(**({"dtype": torch.float32} if takes_dtype else {}))
        model = with_adapters(model, config, checkpoint)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora_r:
            model.enable_input_require_grads()
    return model.train()


def check_bitsandbytes() -> None:
    """ValueError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")


def _quantization(config: TrainConfig) -> Any:
    if not config.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if config.bf16 else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def with_adapters(model: PreTrainedModel, config: TrainConfig, checkpoint: Path | None) -> PeftModel:
    """`model` with LoRA adapters, new ones or a checkpoint's. ValueError where there are no such modules, or it has
    none."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint is not None:
        if not (checkpoint / "adapter_config.json").exists():
            raise ValueError(
                f"checkpoint {checkpoint} has no adapter, but lora_r={config.lora_r}; resume with the settings it was"
                " made with"
            )
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    modules = tuple(config.lora_target_modules)
    is_all = modules == ("all-linear",)
    # modules of a name that PEFT refuses there; without any it would warn
    unfit = ["out_proj"] if is_all and model.config.model_type in _OUT_PROJ_REFUSED else None
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if is_all else list(modules),
        exclude_modules=unfit,
        task_type="CAUSAL_LM",
    )
    with seeded(config.seed):
        return get_peft_model(model, lora)


class Reference:
    """The frozen initial model for the KL term: the policy with its adapters off, or a copy of its own, sharded as the
    policy is."""

    def __init__(self, config: TrainConfig, parallel: Parallel) -> None:
        self.model = None
        if config.lora_r == 0:
            model = build_model(config.model, config.seed).eval().requires_grad_(False)
            self.model = parallel.wrap_frozen(model)

    @contextlib.contextmanager
    def of(self, policy: PreTrainedModel | PeftModel) -> Iterator[torch.nn.Module]:
        """Yields the model to run; `policy` is the unwrapped one."""
        if self.model is not None:
            yield self.model
        else:
            trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            with policy.disable_adapter():
                # PEFT freezes the adapters meanwhile; FSDP2, set up in its first forward, must see what will be trained
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield policy


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, the outer stream untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
