"""TreeGRPOTrainer: what of TRL's GRPOTrainer is replaced, method by method.

    _get_per_token_logps_and_entropies   the rows of a micro-batch become packed rows of unique tokens
    _prepare_inputs                      groups are shuffled, not their completions
    _generate                            trees grown through TRL's back-ends and tools (grow.py)
    _generate_single_turn                what is asked of a vLLM server (serve.py)
    _generate_and_score_completions      advantages by treegrpo's estimators (credit.py)
    _compute_loss                        shared_tokens (loss.py)

Loss, divergence, importance sampling, entropy, the router loss and all metrics stay TRL's and see the same numbers.
"""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context

from treegrpo.hf import ATTENTION, check_model, use_tree_attention
from treegrpo.integrations import credit
from treegrpo.integrations.trl import loss
from treegrpo.integrations.trl.checks import check_arguments
from treegrpo.integrations.trl.config import TreeGRPOConfig
from treegrpo.integrations.trl.grow import Grown, check_grown, grow
from treegrpo.integrations.trl.rows import check_router_loss, pack_rows, recorded_router_logits, router_loss
from treegrpo.integrations.trl.serve import Served
from treegrpo.logprobs import token_logprobs, unwrap
from treegrpo.packing import TreeBatch

# forward keywords of TRL's method that only vision models have
VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "mm_token_type_ids",
    "image_position_ids",
)


class TreeGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` on packed trees; the constructor is TRL's, ``args`` a `TreeGRPOConfig` or a plain `GRPOConfig`.

    A group's completions are kept in one micro-batch, where their prompt is forwarded once, so
    ``per_device_train_batch_size`` must be a multiple of ``num_generations``. Adds the metrics ``tree/unique_tokens``,
    ``tree/chain_tokens`` and ``batch/packing_ratio`` (their quotient), and ``tree/sampled_tokens`` where trees are
    grown. Evaluation samples chains and compares them as TRL does; its log-probs are packed as well.

    A ``rollout_func`` that samples trees itself returns two more keys beside TRL's: ``tree``, an int a completion, the
    number of its tree in its group, and (optional) ``steps``, where its agent steps begin in ``completion_ids``.

    Raises ``ValueError`` for a batch size that tears groups apart, for models tree attention does not suit
    (``treegrpo.hf.check_model``), router losses that cannot be computed on packed rows, vision inputs, and trees whose
    branches could start nowhere.
    """

    # TRL's
    rollout_func: Any
    _buffered_inputs: list[dict[str, Any]] | None
    _last_loaded_step: int

    _last_scored: tuple[Tensor, Tensor | None] | None = None
    """What the loss is computed of: log-probs and entropies."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("args") is not None:
            check_arguments(given["args"], given.get("rollout_func"))
        super().__init__(*args, **kwargs)
        check_arguments(self.args, self.rollout_func)
        if self.aux_loss_enabled:
            check_router_loss(self.accelerator.unwrap_model(self.model))
        self._base = unwrap(self.accelerator.unwrap_model(self.model))
        self._own_attention = self._base.config._attn_implementation
        """What the model came with, and samples with."""
        plugin = self.accelerator.state.deepspeed_plugin
        self._is_unchecked = plugin is not None and plugin.zero_stage == 3
        """Whether the self-check waits for a forward that gathers the weights."""
        use_tree_attention(self.accelerator.unwrap_model(self.model), check=not self._is_unchecked)
        if self.ref_model is not None:
            use_tree_attention(self.accelerator.unwrap_model(self.ref_model), check=not self._is_unchecked)
        self._tree_args = self.args if isinstance(self.args, TreeGRPOConfig) else None
        self._estimator = self._tree_args.estimator() if self._tree_args else None
        self._shared_tokens = self._tree_args.shared_tokens if self._tree_args else "per_leaf"
        self._token_budget = self._tree_args.token_budget if self._tree_args else None
        self._grows_trees = self._tree_args is not None and self._tree_args.grows_trees
        self._grown: Grown | None = None
        """The trees of the generation batch being scored."""
        if self._grows_trees and self.rollout_func is None and not self.tools and self.args.max_step_tokens is None:
            raise ValueError(
                f"num_expansions={self.args.num_expansions} without tools: a completion is one step, and branches could"
                " only start at the prompt; set max_step_tokens to cut completions into steps, or give tools,"
                " environment_factory or a rollout_func that samples trees"
            )
        self._served = Served(self) if self.use_vllm and self.vllm_mode == "server" else None
        if self.rollout_func is not None:
            self.rollout_func = self._keeping_trees(self.rollout_func)

    # Log-probs

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probs [B, C], entropies [B, C] or None, router loss or None); 0 where a completion has ended.

        ``batch_size`` rows make a packed row, as they make a forward in TRL, or several under ``token_budget``.
        """
        given = [name for name in VISION if inputs.get(name) is not None]
        if given:
            raise ValueError(f"trees of text only: {', '.join(given)} cannot be packed")
        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        losses: list[Tensor] = []
        for ids, mask in zip(
            *(x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask)), strict=True
        ):
            scored, aux_loss = self._scored(model, ids, mask, logits_to_keep, compute_entropy, compute_aux_loss)
            logps.append(scored[0])
            entropies.append(scored[-1])
            if aux_loss is not None:
                losses.append(aux_loss)
        found = torch.cat(logps), torch.cat(entropies) if compute_entropy else None
        if self._shared_tokens != "per_leaf":
            self._last_scored = found
        return *found, torch.stack(losses).mean() if compute_aux_loss else None

    def _scored(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        entropy: bool,
        aux_loss: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Log-probs [B, C], and entropies if asked for, of rows forwarded together; their router loss."""
        parts = pack_rows(
            input_ids,
            attention_mask,
            logits_to_keep,
            group_size=self.num_generations,
            token_budget=self._token_budget,
        )
        batches = [batch for _, batch in parts]
        missing = self._missing_forwards(len(parts))
        with recorded_router_logits(model) if aux_loss else nullcontext() as router_logits:
            streams = [self._forward(model, batch, entropy) for batch in batches]
            idle = [self._forward(model, batches[0], entropy) for _ in range(missing)]
        # in the graph for their collectives' sake, at gradient zero
        nothing = sum((0 * x.sum() for streams_of in idle for x in streams_of), start=0.0)
        order = torch.cat([rows for rows, _ in parts]).to(input_ids.device)
        kept = attention_mask[order].bool()
        found = []
        for stream in zip(*streams, strict=True):
            # the rows' tokens in their order are the stream of the leaves
            values = torch.cat(stream) + nothing
            rows = values.new_zeros(kept.shape).masked_scatter(kept, values)
            found.append(rows[order.argsort()][:, -logits_to_keep:])
        metrics = self._metrics["train" if self.model.training else "eval"]
        for batch in batches:
            metrics["tree/unique_tokens"].append(batch.num_tokens)
            metrics["tree/chain_tokens"].append(batch.num_chain_tokens)
            metrics["batch/packing_ratio"].append(batch.token_ratio)
        return found, None if router_logits is None else router_loss(model, router_logits[: len(parts)], batches)

    def _forward(self, model: torch.nn.Module, batch: TreeBatch, entropy: bool) -> list[Tensor]:
        if self._is_unchecked:
            check_model(model)
            self._is_unchecked = False
        with self.accelerator.autocast():
            scored = token_logprobs(
                model,
                batch,
                temperature=self.temperature,
                entropy=entropy,
                head_dtype=torch.float32 if self.args.cast_lm_head_to_fp32 else None,
            )
        return [batch.expand(x) for x in (scored if isinstance(scored, tuple) else (scored,))]

    def _missing_forwards(self, number: int) -> int:
        """How many fewer packed rows this process has than another: in each forward FSDP gathers weights and DDP sends
        buffers, which all processes do together."""
        if self._token_budget is None or self.accelerator.num_processes == 1:
            return 0
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max()) - number

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's schedule of generations and micro-batches, but groups are shuffled, not their completions."""
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (steps * self.num_iterations) == 0:
            scored = self._generate_and_score_completions(generation_batch)
            groups = torch.randperm(len(scored["prompt_ids"]) // self.num_generations)
            order = (groups[:, None] * self.num_generations + torch.arange(self.num_generations)).flatten()
            self._buffered_inputs = [take(scored, part) for part in order.chunk(steps)]
        return self._buffered_inputs[self._step % steps]

    # Rollouts

    def _keeping_trees(self, rollout_func: Any) -> Any:
        """``rollout_func`` whose ``tree`` and ``steps`` are kept here and do not reach the reward functions."""

        def kept(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
            output = dict(rollout_func(prompts, trainer))
            trees, steps = output.pop("tree", None), output.pop("steps", None)
            if self._grows_trees and self.model.training and trees is None:
                raise ValueError(
                    f"rollout_func returned no 'tree', but num_expansions={self.args.num_expansions} asks for"
                    " trees: return the number of each completion's tree, or set num_expansions=0"
                )
            if trees is not None:
                self._grown = check_grown(trees, steps, output)
            return output

        return kept

    def _generate(self, prompts: list) -> tuple:
        if not (self._grows_trees and self.model.training and self.rollout_func is None):
            return super()._generate(prompts)
        # TRL's own bookkeeping of a batch, on completions that are there already
        self._grown = grow(self, prompts, self._generate_single_turn, super()._tool_call_loop, self._finish_turns)
        self._metrics["train"]["tree/sampled_tokens"].append(self._grown.num_sampled)
        return super()._generate(prompts)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool | None = None,
        *,
        limits: list[int] | None = None,
    ) -> tuple[list, list | None]:
        """TRL's, and of a vLLM server no more than ``limits`` tokens for each context. ``has_tool_images`` is None
        where no tools have answered yet."""
        if self._grown is not None and self._grown.turns is not None:
            return self._grown.turns[0], self._grown.logprobs
        if self._served is not None and images is None:
            if self.state.global_step != self._last_loaded_step:
                with profiling_context(self, "sync_weights"):
                    self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            answered = has_tool_images is not None
            return self._served.generate(prompt_ids, num_generations, limits, may_be_full=answered)
        whole = (prompt_ids, images, multimodal_fields, num_generations, bool(has_tool_images))
        if self.use_vllm:
            return super()._generate_single_turn(*whole)
        # continuous batching refuses attentions that are not transformers' own
        self._base.set_attn_implementation(self._own_attention)
        try:
            return super()._generate_single_turn(*whole)
        finally:
            self._base.set_attn_implementation(ATTENTION)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> tuple:
        if self._grown is None or self._grown.turns is None:
            done = super()._tool_call_loop(*args, **kwargs)
            self._finish_turns()
            return done
        return self._grown.turns[1]

    def _finish_turns(self) -> None:
        """Agents of other processes may have turns left, which reach a server through this process too."""
        if self._served is not None:
            self._served.finish()

    # Advantages

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._last_rewards = rewards, completion_ids_list
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._grown = None
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training or (self._estimator is None and self._shared_tokens == "per_leaf"):
            return output
        device, columns = output["completion_ids"].device, output["completion_ids"].shape[1]
        prompt_lengths = output["prompt_mask"].sum(1).tolist()
        leaves = self._leaves(output)
        if self._estimator is not None:
            name, options = self._estimator
            everyone = gather_object(leaves) if self._looks_at_all(name, options) else []
            own = {leaf.group for leaf in leaves}
            others = [leaf for leaf in everyone if leaf.group not in own]
            steps = credit.step_advantages(leaves, name, options, others)
            output["advantages"] = credit.on_tokens(leaves, steps, prompt_lengths, columns).to(device)
            self._log_advantages(steps)
        if self._shared_tokens != "per_leaf":
            shares = credit.token_shares(leaves, prompt_lengths, columns).to(device)
            output["token_shares"] = shares
            if self._shared_tokens == "once":
                output["num_items_in_batch"] = self.accelerator.gather(shares.sum()).sum()
        return output

    def _looks_at_all(self, estimator: str, options: dict[str, Any]) -> bool:
        """Whether groups of other processes count in a norm."""
        over_all = options.get("scale_rewards") == "batch" or options.get("norm") in ("std_batch", "whiten")
        return self.accelerator.num_processes > 1 and (over_all or estimator == "treepo")

    def _leaves(self, output: dict[str, Any]) -> list:
        per_function, completion_ids = self._last_rewards
        process, number = self.accelerator.process_index, len(completion_ids)
        local = per_function[process * number : (process + 1) * number]
        rewards = (local * self.reward_weights.to(local.device)).nansum(1)
        rewards[torch.isnan(local).all(1)] = torch.nan
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        recorded = output.get("sampling_per_token_logps", output.get("old_per_token_logps"))
        rows = zip(output["prompt_ids"].tolist(), output["prompt_mask"].tolist(), strict=True)
        lengths = [len(ids) for ids in completion_ids]
        cut = lambda values: [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]  # noqa: E731
        return credit.leaves_of(
            [[token for token, kept in zip(*row, strict=True) if kept] for row in rows],
            completion_ids,
            cut(mask),
            rewards.tolist(),
            group_size=self.num_generations,
            name=str(process),
            trees=self._grown.trees if self._grown else None,
            steps=self._grown.steps if self._grown else None,
            logprobs=None if recorded is None or torch.isnan(recorded).any() else cut(recorded),
        )

    def _log_advantages(self, steps: list) -> None:
        """The mean over its steps as a completion's advantage in TRL's table of completions."""
        means = gather_object([float(own.mean()) if own.size else 0.0 for own in steps])
        logged = self._logs["advantages"]
        for _ in range(min(len(means), len(logged))):
            logged.pop()
        logged.extend(means)

    # Loss

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        shares = inputs.get("token_shares")
        if shares is None:
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        weights = loss.token_weights(shares, mask, self._shared_tokens, self.loss_type)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        total = super()._compute_loss(model, inputs | {"advantages": advantages * weights})
        assert self._last_scored is not None
        logps, entropies = self._last_scored
        self._last_scored = None
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.beta != 0.0:
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            reduce = loss.Reduction(
                loss_type=self.loss_type,
                mask=mask,
                accumulation=accumulation,
                num_items=items * accumulation / self.args.steps_per_generation,
                max_completion_length=self.max_completion_length,
            )
            kl = loss.divergence(
                logps,
                inputs["ref_per_token_logps"],
                inputs["old_per_token_logps"] if "old_per_token_logps" in inputs else logps.detach(),
                mask,
                level=self.importance_sampling_level,
                bias_correction=self.args.use_bias_correction_kl,
            )
            total = total + self.beta * reduce((weights - 1) * kl)
        if self.entropy_coef != 0.0 and entropies is not None:
            change = loss.entropy_change(entropies, shares, mask, self._shared_tokens)
            total = total - self.entropy_coef * change / accumulation
        return total


def take(scored: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The given rows of everything TRL keeps per completion; what is not per completion stays as it is."""
    number = len(scored["prompt_ids"])

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == number:
            return value[rows.to(value.device)]
        if isinstance(value, list) and len(value) == number:
            return [value[i] for i in rows.tolist()]
        return value

    return {name: part(value) for name, value in scored.items()}
