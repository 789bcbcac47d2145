"""What TreeGRPOTrainer refuses by its arguments alone: before a model is loaded, and a server waited for."""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig

from treegrpo.advantages import PRESETS
from treegrpo.integrations.trl.config import TreeGRPOConfig

# what vLLM would make of trees under generation_kwargs that TRL hands on
UNFIT = {
    "seed": "vLLM would continue equal contexts, a prompt's chains and a step's branches, with the same tokens",
    "n": "a branch is one completion",
    "logprobs": "TRL would take the likeliest token's log-prob for the sampled one's",
}
HELD = ("structured_outputs", "response_format")


def check_arguments(args: GRPOConfig, rollout_func: Any) -> None:
    """Raises ``ValueError`` naming the setting and the cure."""
    size, group = args.per_device_train_batch_size, args.num_generations
    if size % group:
        raise ValueError(
            f"per_device_train_batch_size={size} tears groups of num_generations={group} apart, and what they share"
            " would be computed again: give a multiple, with gradient_accumulation_steps for the rest"
        )
    if noise := args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={noise} draws noise for every token of every completion, but a shared token is"
            " embedded once: leave it out"
        )
    if isinstance(args, TreeGRPOConfig) and rollout_func is None:
        if args.grows_trees:
            _check_branches(args)
        if not args.use_vllm:
            _check_recorded_logprobs(args)


def _check_branches(args: TreeGRPOConfig) -> None:
    if args.max_completion_length is None:
        raise ValueError("max_completion_length=None: give the length at which branches, like chains, are cut")
    if args.selection == "entropy" and not args.use_vllm:
        raise ValueError(
            "selection='entropy' needs the log-probs of what was sampled, which TRL's transformers back-end does"
            " not record: use 'uniform', use_vllm=True or treegrpo.integrations.trl.tree_rollouts"
        )
    given = (args.generation_kwargs or {}) if args.use_vllm else {}
    for name, why in UNFIT.items():
        if given.get(name) is not None:
            raise ValueError(f"generation_kwargs {name}={given[name]!r} with num_expansions: {why}; leave it out")
    held = [f"generation_kwargs {name}" for name in HELD if given.get(name)]
    if args.vllm_structured_outputs_regex is not None:
        held.append("vllm_structured_outputs_regex")
    if held and args.max_step_tokens is not None:
        raise ValueError(
            f"max_step_tokens={args.max_step_tokens} with {held[0]}: vLLM would hold the rest of a turn, which a branch"
            " samples, to the whole expression; leave one of them out"
        )


def _check_recorded_logprobs(args: TreeGRPOConfig) -> None:
    """An estimator that weighs steps by their entropy reads the log-probs of what was sampled."""
    estimator = args.estimator()
    if estimator is None:
        return
    name, options = estimator
    # else TRL computes them before the first update
    aligned = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0
    if aligned and options.get("value", PRESETS[name].grid.value) == "entropy_softmax":
        raise ValueError(
            f"advantage_estimator={name!r} weighs steps by the log-probs of what was sampled, which TRL's"
            " transformers back-end does not record: use use_vllm=True, treegrpo.integrations.trl.tree_rollouts, or"
            " advantage_options value=child_mean"
        )
