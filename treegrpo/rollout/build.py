"""From settings to rollouts: the engine, the environment, the rewards and the source the trainer reads from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treegrpo import models
from treegrpo.rollout.engine import RolloutEngine
from treegrpo.rollout.search import SearchOptions

if TYPE_CHECKING:
    from treegrpo.config import TrainConfig
    from treegrpo.envs.base import Environment
    from treegrpo.rollout.online import OnlineRollouts, Sampler

ENGINES = ("hf", "vllm", "server:URL")
_DEFAULT_REWARDS = {"search": ("search_em",), "calculator": ("math_answer",)}


def is_engine(name: str) -> bool:
    """Whether it names one of ENGINES."""
    return name in ("hf", "vllm") or name.startswith(("server:http://", "server:https://"))


def check_engine(rollouts: str) -> None:
    """ValueError unless it names one of ENGINES."""
    if not is_engine(rollouts):
        raise ValueError(f"rollouts={rollouts!r}: give replay:FILE, or an engine: {', '.join(ENGINES)}")


def missing_package(rollouts: str) -> str | None:
    """What the engine needs and this machine has not; None where nothing is missing."""
    if rollouts == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here (pip install vllm)"
    if rollouts.startswith("server:") and not any(map(importlib.util.find_spec, ("httpx", "httpx2"))):
        return "no HTTP client is installed here (pip install httpx)"
    return None


def check_settings(config: TrainConfig) -> None:
    """ValueError unless `rollouts` is an engine and what it needs is given and exists; loads nothing."""
    check_engine(config.rollouts)
    if config.load_in_4bit and config.rollouts != "hf":
        raise ValueError(
            f"load_in_4bit with rollouts={config.rollouts!r}: other engines get adapters merged, and rounding to 4 bits"
            " would change more than they do; sample with rollouts=hf"
        )
    if (share := config.vllm_gpu_memory_utilization) is not None and (config.rollouts != "vllm" or not 0 < share <= 1):
        raise ValueError(
            f"vllm_gpu_memory_utilization={share} with rollouts={config.rollouts!r}: a share above 0, at most 1, of the"
            " GPU for rollouts=vllm; leave it out with other engines"
        )
    if not config.dataset or not Path(config.dataset).is_file():
        raise ValueError(f"dataset={config.dataset!r}: no such file; sampling needs a file of prompts")
    if config.eval_dataset is not None and not Path(config.eval_dataset).is_file():
        raise ValueError(f"eval_dataset={config.eval_dataset!r}: no such file")
    if config.eval_steps and config.eval_dataset is None:
        raise ValueError(f"eval_steps={config.eval_steps} needs eval_dataset, a file of prompts")
    if config.env == "search" and not config.retriever:
        raise ValueError("retriever is missing: env=search needs bm25:CORPUS.jsonl or http://HOST:PORT/retrieve")
    if config.reward_weights and len(config.reward_weights) != len(reward_names(config)):
        raise ValueError(
            f"reward_weights has {len(config.reward_weights)} entries for {len(reward_names(config))} reward functions"
        )


def reward_names(config: TrainConfig) -> tuple[str, ...]:
    return config.reward_funcs or _DEFAULT_REWARDS.get(config.env, ("environment",))


def search_options(config: TrainConfig) -> SearchOptions:
    return SearchOptions(
        num_trees=config.num_trees,
        num_expansions=config.num_expansions,
        num_rounds=config.num_rounds,
        selection=config.selection,
        root_eligible=config.root_eligible,
        with_replacement=config.with_replacement,
        max_turns=config.max_turns,
        max_tokens=config.max_step_tokens,
        max_context_length=config.max_context_length,
        temperature=config.temperature,
        top_p=config.top_p,
        token_budget=config.token_budget,
        max_concurrency=config.max_concurrency,
        tool_timeout=config.tool_timeout,
    )


def num_refills(config: TrainConfig) -> int:
    """How often groups without spread are replaced by other prompts."""
    return config.max_refills if config.zero_std_groups == "refill" else 0


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of the run, from disk. ValueError where there is none, or the model does not know its ids."""
    from transformers import AutoTokenizer

    folder = config.tokenizer or config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {folder!r} cannot be loaded ({error}): give --tokenizer FOLDER") from error
    size = models.vocabulary_size(models.read_model_config(config.model))
    if beyond := _beyond(tokenizer, size):
        token, index = beyond[0]
        raise ValueError(
            f"tokenizer {folder!r}: {token!r} has id {index}, but the model {config.model!r} has ids 0 to {size - 1}:"
            " give --tokenizer FOLDER, the one the model was trained with"
        )
    return tokenizer


def _beyond(tokenizer: Any, vocab_size: int) -> list[tuple[str, int]]:
    """`(token, id)` outside `[0, vocab_size)`, ascending."""
    # Gemma's tokenizer has a special token for images that its models of text alone do not know
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    template = str(tokenizer.chat_template or "")
    unused = {token for token in special if token not in template} - {tokenizer.bos_token, tokenizer.eos_token}
    found = [(token, i) for token, i in tokenizer.get_vocab().items() if i >= vocab_size and token not in unused]
    return sorted(found, key=lambda pair: pair[1])


def make_engine(config: TrainConfig, policy: torch.nn.Module, tokenizer: Any) -> RolloutEngine:
    """The engine of `config.rollouts`; `policy` is the unwrapped model that is trained."""
    kind, _, rest = config.rollouts.partition(":")
    # of the model, which may have more ids than its tokenizer has words: they can be sampled
    vocab_size = models.vocabulary_size(policy.config)
    if kind == "vllm":
        from treegrpo.rollout.vllm import VLLMEngine

        share = config.vllm_gpu_memory_utilization
        return VLLMEngine(
            config.model,
            tokenizer,
            max_context_length=config.max_context_length,
            gpu_memory_utilization=0.4 if share is None else share,
            # as the trainer computes
            dtype="bfloat16" if config.bf16 else "float32",
            seed=config.seed,
            vocab_size=vocab_size,
        )
    if kind == "server":
        from treegrpo.rollout.server import ServerEngine

        return ServerEngine(
            rest,
            tokenizer,
            max_context_length=config.max_context_length,
            vocab_size=vocab_size,
            sync_dir=Path(config.output_dir) / "weights",
        )
    from treegrpo.rollout.hf import HFEngine

    return HFEngine(
        policy,
        tokenizer,
        max_context_length=config.max_context_length,
        max_batch=config.max_concurrency,
        copy_weights=config.overlap_rollouts,
    )


def make_environment(
    config: TrainConfig, tokenizer: Any
) -> tuple[Callable[[], Environment], Sequence[Callable[..., Any]]]:
    """What makes environments, and the reward functions."""
    from treegrpo.envs.retrievers import make_retriever
    from treegrpo.envs.tools import make_env_factory
    from treegrpo.rewards import resolve_rewards

    retriever = make_retriever(config.retriever, topk=config.topk) if config.retriever else None
    names = ("prompt_template", "observation_template", "document_template")
    options = {name: value for name in names if (value := getattr(config, name)) is not None}
    make_env = make_env_factory(config.env, tokenizer=tokenizer, retriever=retriever, options=options)
    return make_env, resolve_rewards(reward_names(config))


def make_sampler(config: TrainConfig, policy: torch.nn.Module, tokenizer: Any) -> Sampler:
    """Engine, environment and rewards of the settings."""
    from treegrpo.rollout.online import Sampler

    make_env, reward_funcs = make_environment(config, tokenizer)
    return Sampler(
        engine=make_engine(config, policy, tokenizer),
        make_env=make_env,
        reward_funcs=reward_funcs,
        reward_weights=config.reward_weights or (1.0,) * len(reward_funcs),
    )


def make_online(config: TrainConfig, policy: torch.nn.Module, tokenizer: Any, accelerator: Any) -> OnlineRollouts:
    """The trainer's source of sampled trees."""
    from treegrpo.envs.data import read_rows
    from treegrpo.parallel import gather_apart
    from treegrpo.rollout.online import OnlineRollouts

    return OnlineRollouts(
        make_sampler(config, policy, tokenizer),
        read_rows(config.dataset),
        search_options(config),
        seed=config.seed,
        shuffle=config.shuffle,
        refills=num_refills(config),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=gather_apart() if accelerator.num_processes > 1 else None,
        one_engine=config.rollouts.startswith("server:"),
        overlap=config.overlap_rollouts,
        eval_rows=read_rows(config.eval_dataset)[: config.eval_rows] if config.eval_dataset else (),
        eval_temperature=config.eval_temperature,
        source=Path(config.dataset).name,
    )
