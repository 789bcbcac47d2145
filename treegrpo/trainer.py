"""`treegrpo train`: logged trajectories -> forest -> packed rows -> log-probs -> advantages -> loss -> AdamW.

One process or many (accelerate): every process takes whole trees of each step, gradients are averaged, and the loss is
normalised by what all processes hold together, so the result does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import treegrpo_kernels
from treegrpo import checkpoint as checkpoints
from treegrpo import models, step
from treegrpo.config import TrainConfig
from treegrpo.loss import grpo_loss
from treegrpo.metrics import MetricsFile, StepMetrics
from treegrpo.report import progress_bar
from treegrpo.rollout.replay import Replay, check_recorded, check_vocabulary
from treegrpo.tree import Trajectory

# A resumed run reads the same groups in the same order only if these stay as they were.
_ORDER_SETTINGS = (
    "seed",
    "shuffle",
    "groups_per_step",
    "gradient_accumulation_steps",
    "num_iterations",
    "samples",
    "lora_r",
)


class Trainer:
    """Holds the model, the optimiser and the rollouts of one run; `train()` runs it. Nothing is written before
    `train()`.

    Args:
        config: the settings.
        trajectories: instead of those of `config.rollouts`.
        on_gradients: called as `on_gradients(step, model)` after backward and clipping, before the update.

    Raises:
        ValueError: bad settings, rollouts, model or checkpoint; each names the field, the index and the cure.
    """

    def __init__(
        self,
        config: TrainConfig,
        trajectories: list[Trajectory] | None = None,
        on_gradients: Callable[[int, torch.nn.Module], None] | None = None,
    ) -> None:
        from accelerate import Accelerator

        if trajectories is None:
            from treegrpo import load

            config.check_paths()
            trajectories = load(config.rollouts_file)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.on_gradients = on_gradients
        self.replay = Replay(trajectories, seed=config.seed, shuffle=config.shuffle)
        self._check_rollouts(trajectories)
        resume = config.resume_from_checkpoint
        self.checkpoint = checkpoints.find(config.output_dir, resume) if resume else None
        if not resume and not config.overwrite_output_dir and (self.output_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"output_dir {self.output_dir} already holds a run: give another, or --overwrite-output-dir, or"
                " --resume-from-checkpoint latest"
            )

        # bf16 is our own autocast in step.py: the frozen reference, which accelerate does not wrap, must compute alike.
        self.accelerator = Accelerator(mixed_precision="no")
        self._check_processes()
        self.device = self.accelerator.device
        model = models.build_policy(config, self.checkpoint)
        self.reference = models.Reference(config, self.device) if config.beta else None
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.policy = self.accelerator.unwrap_model(self.model)
        self.schedule = self._schedule(optimizer)
        self.data: step.StepData | None = None
        self.step = 0
        self.num_tokens = 0
        if self.checkpoint:
            self._restore(self.checkpoint, optimizer)

    def train(self) -> list[dict[str, Any]]:
        """Runs up to max_steps and returns the logged rows. ValueError on a loss that is not finite; the last
        checkpoint stays."""
        return [row for row in self.steps() if self._is_logged(row["step"])]

    def steps(self) -> Iterator[dict[str, Any]]:
        """The same run, one optimiser step and its metrics at a time; ends by itself at max_steps."""
        config, main = self.config, self.accelerator.is_main_process
        metrics_file = self._open_output() if main else None
        with progress_bar(
            config.attention, self.step, config.max_steps, enabled=main and not config.disable_tqdm
        ) as advance:
            while self.step < config.max_steps:
                started = time.perf_counter()
                self._next_data()
                row = self._update()
                row = {"step": self.step, **row, "step_time": time.perf_counter() - started}
                advance(row)
                if main and self._is_logged(self.step):
                    metrics_file.write(row)
                is_due = config.save_steps and self.step % config.save_steps == 0
                if config.save_strategy == "steps" and (is_due or self.step == config.max_steps):
                    self.save()
                yield row

    def _is_logged(self, step: int) -> bool:
        return step % self.config.logging_steps == 0 or step == self.config.max_steps

    def _next_data(self) -> None:
        """Groups, advantages and frozen log-probs, new ones every num_iterations steps."""
        number, iteration = divmod(self.step, self.config.num_iterations)
        if iteration == 0 or self.data is None:
            accelerator = self.accelerator
            self.data = step.read_step(
                self.replay, number, self.config, accelerator.process_index, accelerator.num_processes, self.device
            )
            step.count_flops(self.data, self.policy.config, self.config)
            step.freeze_logprobs(self.data, self.model, self.policy, self.reference, self.config)

    def _update(self) -> dict[str, float]:
        """One optimiser step over all rows; returns its metrics."""
        config, accelerator, rows = self.config, self.accelerator, self.data.rows
        metrics = StepMetrics()
        total = accelerator.reduce(step.normalizers(rows, config, self.device), "sum").clamp(min=1)
        # Gradients are averaged over processes, so each divides by its share of the whole.
        normalizer, entropy_normalizer = (total / accelerator.num_processes).unbind()
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        for i, row in enumerate(rows):
            is_last = i + 1 == len(rows)
            # Gradients travel between processes once a step, in the last backward.
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                loss = self._row_loss(row, normalizer, entropy_normalizer, metrics)
                accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm or math.inf)
        if not torch.isfinite(grad_norm):
            groups = ", ".join(dict.fromkeys(repr(tree.group) for tree in self.data.trees))
            raise ValueError(
                f"step {self.step + 1}: the gradient is {float(grad_norm)}, stopped before the update; its groups:"
                f" {groups}"
            )
        if self.on_gradients is not None:
            self.on_gradients(self.step, self.policy)
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        metrics.add("perf/fwd_bwd_s", time.perf_counter() - began, how="max")
        return self._summary(metrics, float(grad_norm), learning_rate)

    def _row_loss(
        self, row: step.Row, normalizer: torch.Tensor, entropy_normalizer: torch.Tensor, metrics: StepMetrics
    ) -> torch.Tensor:
        config, batch = self.config, row.batch
        logp, entropy = step.policy_logprobs(self.model, batch, config)
        old_logp = logp.detach() if row.old_logp is None else row.old_logp
        loss, loss_metrics = grpo_loss(
            logp,
            old_logp,
            row.advantages,
            batch.leaf_mask,
            batch.leaf_offsets,
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            ref_logp=row.ref_logp,
            use_bias_correction_kl=config.use_bias_correction_kl,
            importance_sampling_level=config.importance_sampling_level,
            shared_tokens=config.shared_tokens,
            multiplicity=batch.multiplicity,
            normalizer=normalizer,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            entropy_normalizer=entropy_normalizer,
            max_completion_length=config.max_completion_length,
        )
        if not torch.isfinite(loss):
            value, blamed = float(loss.detach()), step.blame(row, logp)
            raise ValueError(f"step {self.step + 1}: the loss is {value}, stopped before the update; {blamed}")
        mask = batch.leaf_mask
        trained = int(mask.sum())
        metrics.add_loss(loss_metrics, trained)
        metrics.add("loss", loss.detach() / self.accelerator.num_processes, how="sum")
        known = mask & batch.leaf_logp.isfinite()
        if known.any():
            difference = (old_logp - batch.leaf_logp)[known].abs()
            metrics.add("sampling/sampling_logp_difference/mean", difference.mean(), weight=int(known.sum()))
            metrics.add("sampling/sampling_logp_difference/max", difference.max(), how="max")
        metrics.add("tree/unique_tokens", batch.num_tokens, how="sum")
        metrics.add("tree/chain_tokens", batch.num_chain_tokens, how="sum")
        metrics.add("tree/pairs", batch.num_pairs, how="sum")
        metrics.add("tree/chain_pairs", batch.num_chain_pairs, how="sum")
        metrics.add("tree/rows", 1, how="sum")
        if row.cost is not None:
            metrics.add("tree/chain_flops", row.cost.chain.training, how="sum")
            metrics.add("tree/flops", row.cost.tree.training, how="sum")
        metrics.add("tree/trained_tokens", int(batch.trained.sum()), how="sum")
        return loss

    def _summary(self, metrics: StepMetrics, grad_norm: float, learning_rate: float) -> dict[str, float]:
        """The step's numbers under TRL's names, the same on every process."""
        is_chain = self.config.attention == "chain"
        longest = max(row.batch.num_chain_tokens if is_chain else row.batch.num_tokens for row in self.data.rows)
        metrics.add("batch/longest_row", longest, how="max")
        metrics.add("tree/depth_max", max(int(row.batch.position_ids.max()) + 1 for row in self.data.rows), how="max")
        metrics.add("tree/forks", sum(step.count_forks(row.batch) for row in self.data.rows), how="sum")
        values = metrics.reduced(self.accelerator)
        forwarded = values["tree/chain_tokens" if is_chain else "tree/unique_tokens"]
        self.num_tokens += int(values["tree/chain_tokens"])
        longest, trained = values.pop("batch/longest_row"), values.pop("tree/trained_tokens")
        return {
            "loss": values.pop("loss"),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **step.reward_summary(self.data.trees),
            **values,
            "num_tokens": self.num_tokens,
            **(
                {"tree/flop_ratio": values["tree/chain_flops"] / values["tree/flops"]} if "tree/flops" in values else {}
            ),
            "batch/packing_ratio": values["tree/chain_tokens"] / values["tree/unique_tokens"],
            "batch/row_imbalance": longest * values["tree/rows"] / forwarded,
            "batch/forwarded_tokens_per_step": forwarded,
            "batch/masked_token_frac": 1 - trained / values["tree/unique_tokens"],
            "perf/forwarded_tok_s_fwd_bwd": forwarded / values["perf/fwd_bwd_s"],
        }

    def save(self) -> Path:
        """Writes the checkpoint of the current step, whole or not at all."""
        path = checkpoints.path_of(self.output_dir, self.step)
        iteration = self.step % self.config.num_iterations
        old = [row.old_logp for row in self.data.rows] if iteration and self.config.old_logprobs == "computed" else []
        state = {"step": self.step, "num_tokens": self.num_tokens, "num_groups": len(self.replay.trees)}
        state |= {name: getattr(self.config, name) for name in _ORDER_SETTINGS} | {
            "num_processes": self.accelerator.num_processes
        }
        checkpoints.save(self.accelerator, self.model, self.optimizer, self.schedule.state_dict(), old, state, path)
        if self.accelerator.is_main_process:
            checkpoints.remove_old(self.output_dir, self.config.save_total_limit)
        return path

    def _restore(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        """Step, optimiser, schedule and, in the middle of num_iterations, the groups in use and their old log-probs."""
        state, saved, old = checkpoints.load_state(path, self.accelerator)
        now = {name: getattr(self.config, name) for name in _ORDER_SETTINGS} | {"num_groups": len(self.replay.trees)}
        now["num_processes"] = self.accelerator.num_processes
        for name, value in now.items():
            if state.get(name) != value:
                raise ValueError(
                    f"checkpoint {path} was made with {name}={state.get(name)}, this run has {value}; resume with the"
                    " same"
                )
        try:
            optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"checkpoint {path}: its optimiser does not fit this model ({error}); resume with the same settings"
            ) from error
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        if self.step >= self.config.max_steps:
            raise ValueError(
                f"checkpoint {path} is at step {self.step}, max_steps={self.config.max_steps}: nothing left; raise"
                " max_steps"
            )
        if self.step % self.config.num_iterations:
            self._next_data()
            for row, old_logp in zip(self.data.rows, old, strict=False):
                row.old_logp = old_logp.to(self.device)

    def _schedule(self, optimizer: torch.optim.Optimizer):
        from transformers import get_scheduler

        config = self.config
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )

    def _check_rollouts(self, trajectories: list[Trajectory]) -> None:
        config = self.config
        if config.old_logprobs == "recorded":
            check_recorded(trajectories)
        check_vocabulary(trajectories, models.vocabulary_size(models.read_model_config(config.model)), config.model)
        for tree in self.replay.trees:
            if config.token_budget is not None and tree.num_tokens > config.token_budget:
                raise ValueError(
                    f"group {tree.group!r}: its tree has {tree.num_tokens} unique tokens, over"
                    f" token_budget={config.token_budget}; raise the budget, or split or drop the group"
                )

    def _check_processes(self) -> None:
        from accelerate.utils import DistributedType

        config, accelerator = self.config, self.accelerator
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"{kind.value} shards the optimiser, which these checkpoints do not hold; launch with plain data"
                " parallelism"
            )
        if config.backend != "auto" and (reason := treegrpo_kernels.backends(accelerator.device)[config.backend]):
            raise ValueError(
                f"backend {config.backend!r} does not work here: {reason}; `treegrpo doctor` shows which do"
            )
        if config.groups_per_step % accelerator.num_processes:
            raise ValueError(
                f"groups_per_step={config.groups_per_step} does not divide among {accelerator.num_processes}"
                " processes; give a multiple"
            )

    def _open_output(self) -> MetricsFile:
        if self.config.overwrite_output_dir and not self.checkpoint:
            (self.output_dir / "metrics.jsonl").unlink(missing_ok=True)
            for path in checkpoints.listed(self.output_dir):
                shutil.rmtree(path)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        (self.output_dir / "config.yaml").write_text(text, encoding="utf-8")
        return MetricsFile(self.output_dir / "metrics.jsonl", self.step)
