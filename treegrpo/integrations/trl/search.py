"""A rollout_func for TRL's trainer over treegrpo.rollout: its engines, its environments, its tree search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from treegrpo.envs.base import Environment
from treegrpo.integrations.trl.config import TreeGRPOConfig
from treegrpo.rollout.engine import RolloutEngine
from treegrpo.rollout.hf import HFEngine
from treegrpo.rollout.search import search

if TYPE_CHECKING:
    from trl import GRPOTrainer

# settings of TRL's generation that would change what is sampled, and what they are where they change nothing
UNREAD = dict(top_k=0, min_p=None, repetition_penalty=1.0, generation_kwargs=None, chat_template_kwargs=None)


def tree_rollouts(
    make_env: Callable[[], Environment],
    *,
    make_engine: Callable[[GRPOTrainer], RolloutEngine] | None = None,
    max_turns: int = 4,
    max_step_tokens: int | None = None,
    tool_timeout: float = 30.0,
) -> Callable[[list, GRPOTrainer], dict[str, list]]:
    """``TreeGRPOTrainer(..., rollout_func=tree_rollouts(make_env))``: trees by the trainer's `TreeGRPOConfig`.

    For agents that write tags, as Search-R1's do (`treegrpo.envs.SearchEnv`), and for engines that continue a branch
    from its parent's keys and values. An environment is reset with the row ``{"prompt": prompt}``; rewards are TRL's,
    with the dataset's columns. Log-probs are recorded as sampled. Evaluation samples one chain a row.

    Args:
        make_env: makes an environment that was not reset.
        make_engine: called once with the trainer; default: `HFEngine` over the model being trained.
        max_turns: agent steps that may use tools; one more, without, must answer.
        max_step_tokens: sampled tokens of one step; default: that of `TreeGRPOConfig`, or 256. The whole completion is
            bounded by ``max_completion_length``.
        tool_timeout: seconds one step of the environment may take.

    The function raises ``ValueError`` for a trainer without `TreeGRPOConfig`, for settings of sampling other than
    ``temperature`` and ``top_p``, and without ``make_engine`` for sharded models.
    """
    engines: dict[str, RolloutEngine] = {}

    def rollout(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        args = trainer.args
        if not isinstance(args, TreeGRPOConfig):
            raise ValueError(f"tree_rollouts reads the trees' shape from TreeGRPOConfig, not {type(args).__name__}")
        if not engines:
            _check_sampling(args)
            engines["own"] = make_engine(trainer) if make_engine is not None else _engine(trainer)
        engine = engines["own"]
        most = (args.max_step_tokens or 256) if max_step_tokens is None else max_step_tokens
        options = replace(args.search_options(), max_turns=max_turns, max_tokens=most, tool_timeout=tool_timeout)
        size = options.num_leaves
        if not trainer.model.training:
            options, size = replace(options, num_trees=1, num_expansions=0), 1
        model = trainer.accelerator.unwrap_model(trainer.model)
        engine.sync_weights(model)
        # an optimiser step may take several generation batches
        place = (trainer.state.global_step, trainer._step, trainer.accelerator.process_index)
        rows = [{"prompt": prompt} for prompt in prompts[::size]]
        groups = search(
            engine,
            make_env,
            rows,
            groups=[str(i) for i in range(len(rows))],
            options=options,
            seeds=[hash((args.seed, *place, i)) for i in range(len(rows))],
        )
        return _output([leaf for group in groups for leaf in group.trajectories], groups, args.max_completion_length)

    return rollout


def _check_sampling(args: TreeGRPOConfig) -> None:
    """ValueError for a setting of TRL's back-ends that the engines here do not have."""
    for name, blank in UNREAD.items():
        if (value := getattr(args, name)) and value != blank:
            raise ValueError(
                f"{name}={value!r}: tree_rollouts reads temperature and top_p alone of how TRL samples; leave it at"
                f" {blank!r}, or let TRL generate"
            )
    if args.max_completion_length is None:
        raise ValueError("max_completion_length=None: tree_rollouts cuts completions there, give a number of tokens")


def _engine(trainer: GRPOTrainer) -> HFEngine:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("tree_rollouts cannot sample from a sharded model in this process: give make_engine")
    return HFEngine(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)


def _output(leaves: list, groups: list, max_completion_length: int) -> dict[str, list]:
    """TRL's lists of a rollout_func, and the trees'."""
    output: dict[str, list] = {
        name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "tree", "steps")
    }
    completions = [ids for group in groups for ids in group.completion_ids]
    for leaf, completion in zip(leaves, completions, strict=True):
        prompt, end = leaf.num_tokens - len(completion), min(len(completion), max_completion_length)
        mask = leaf.loss_mask[prompt : prompt + end]
        logprobs = leaf.logprobs[prompt : prompt + end]
        output["prompt_ids"].append(leaf.token_ids[:prompt].tolist())
        output["completion_ids"].append(completion[:end])
        output["env_mask"].append(mask.astype(int).tolist())
        output["logprobs"].append([float(lp) if m else 0.0 for lp, m in zip(logprobs, mask, strict=True)])
        output["tree"].append(leaf.tree)
        output["steps"].append([start - prompt for start in leaf.steps.tolist() if start - prompt < end])
    return output
