"""`treegrpo train`: rollouts -> forest -> packed rows -> log-probs -> advantages -> loss -> AdamW, and again.

Rollouts are read from a file or sampled by an engine (treegrpo/rollout). One process or many (accelerate, DDP or
FSDP2; parallel.py): every process takes whole trees of each step, gradients are averaged, and the loss is normalised by
what all processes hold together, so the result does not depend on how many there are.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from treegrpo import checkpoint as checkpoints
from treegrpo import models, startup, step
from treegrpo.config import TrainConfig
from treegrpo.files import held, write_whole
from treegrpo.interrupt import uninterrupted
from treegrpo.metrics import MetricsFile, StepMetrics
from treegrpo.parallel import Parallel, copy_weights
from treegrpo.report import RunProgress, progress_bar
from treegrpo.rollout import build
from treegrpo.rollout.engine import EngineError
from treegrpo.rollout.replay import Replay
from treegrpo.summary import step_summary
from treegrpo.tree import RolloutTree, Trajectory, load, save

if TYPE_CHECKING:
    from treegrpo.rollout.online import OnlineRollouts, StepRollouts

# A resumed run samples the same trees only if these stay as they were.
_ONLINE_SETTINGS = (
    "env",
    "num_trees",
    "num_expansions",
    "num_rounds",
    "selection",
    "temperature",
    "top_p",
    "overlap_rollouts",
)
# A resumed run reads the same groups in the same order only if these stay as they were; its adapters are those of the
# checkpoint, scale and places included.
_ORDER_SETTINGS = (
    "seed",
    "shuffle",
    "groups_per_step",
    "gradient_accumulation_steps",
    "num_iterations",
    "samples",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
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
        if trajectories is None:
            config.check_paths()
            if config.is_replay:
                trajectories = load(config.rollouts_file)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.on_gradients = on_gradients
        self.replay: Replay | None = None
        if trajectories is not None:
            self.replay = Replay(trajectories, seed=config.seed, shuffle=config.shuffle)
            startup.check_logged(config, trajectories, self.replay.trees)
        self.checkpoint = startup.find_checkpoint(config)

        self.parallel = Parallel(bf16=config.bf16)
        self.accelerator = self.parallel.accelerator
        self.device = self.parallel.device
        startup.check_backend(config.backend, self.device)
        startup.check_engine(config)
        self.policy = models.build_policy(config, self.checkpoint, self.device)
        self.model = self.parallel.wrap(self.policy)
        self.reference = models.Reference(config, self.parallel) if config.beta else None
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            # one pass over weights, gradients and moments, where torch's own choice makes several
            fused=True,
        )
        self.schedule = startup.schedule(config, self.optimizer)
        self.whole_policy = self.policy
        """What engines sample from: under FSDP2 a copy, which `_sampling_policy` brings up to date."""
        self.tokenizer: Any = None
        self.online: OnlineRollouts | None = None
        if self.replay is None:
            self.tokenizer = build.load_tokenizer(config)
            if self.parallel.sharding is not None:
                self.whole_policy = models.build_policy(config, self.checkpoint, self.device).to(self.device)
            self.online = build.make_online(config, self.whole_policy, self.tokenizer, self.accelerator)
        self.data: step.StepData | None = None
        self.sampled: StepRollouts | None = None
        self.step = 0
        self.num_tokens = 0
        self.generated_tokens = 0
        self.best_reward: float | None = None
        self.num_read = 0
        self.evaluations: list[dict[str, Any]] = []
        if self.checkpoint:
            self._restore(self.checkpoint)
        if self.online is not None:
            is_shown = self.accelerator.is_main_process and not config.disable_tqdm
            self.online.check_prompts(config.groups_from(self.step), is_shown)

    def train(self) -> list[dict[str, Any]]:
        """Runs to the end and returns the logged rows. ValueError on a loss that is not finite; the last checkpoint
        stays. On Ctrl-C, and on whatever is raised outside an update (an engine that gives up, a reward function), a
        checkpoint of the last whole step is written first."""
        try:
            return [row for row in self.steps() if self._is_logged(row)]
        finally:
            self.close()

    def close(self) -> None:
        """Lets the rollout engine go; `train` does it itself."""
        if self.online is not None:
            self.online.close()

    def steps(self) -> Iterator[dict[str, Any]]:
        """The same run, one optimiser step and its metrics at a time; ends by itself."""
        # another process may still be looking whether output_dir holds a run
        self.accelerator.wait_for_everyone()
        with held(self.output_dir, "output_dir") if self.accelerator.is_main_process else nullcontext():
            yield from self._steps()

    def _steps(self) -> Iterator[dict[str, Any]]:
        config, main = self.config, self.accelerator.is_main_process
        metrics_file = self._open_output() if main else None
        with progress_bar(
            config.attention, self.step, config.max_steps, enabled=main and not config.disable_tqdm
        ) as progress:
            is_updating = False
            try:
                if self.step == 0 and (row := self._evaluate(progress)) and metrics_file is not None:
                    metrics_file.write({"step": 0, **row})
                while not self._is_done():
                    started = time.perf_counter()
                    data = self._next_data(progress)
                    is_updating, row = True, {}
                    metrics, grad_norm = self._gradients(data)
                    try:
                        # a Ctrl-C waits until the step is counted and has its row
                        with uninterrupted():
                            values = self._update(data, metrics, grad_norm)
                            is_updating = False
                            row = {"step": self.step, **values, "step_time": time.perf_counter() - started}
                        progress.advance(row)
                        row |= self._evaluate(progress)
                    finally:
                        if metrics_file is not None and row and self._is_logged(row):
                            metrics_file.write(row)
                    is_due = config.save_steps and self.step % config.save_steps == 0
                    if config.save_strategy == "steps" and (is_due or self._is_done()):
                        self.save()
                    yield row
            except (KeyboardInterrupt, Exception) as error:
                # Ctrl-C never comes in the middle of an update; whatever else fails inside one may have damaged it.
                if not is_updating or isinstance(error, KeyboardInterrupt):
                    self._leave(error)
                raise

    def _is_logged(self, row: dict[str, Any]) -> bool:
        is_due = row["step"] % self.config.logging_steps == 0 or self._is_done()
        # nothing else keeps an evaluation
        return is_due or "eval_reward" in row

    def _is_done(self) -> bool:
        limit = self.config.max_generated_tokens
        return self.step >= self.config.max_steps or (limit is not None and self.generated_tokens >= limit)

    def _next_data(self, progress: RunProgress) -> step.StepData:
        """Groups, advantages and frozen log-probs, new ones every num_iterations steps."""
        number, iteration = divmod(self.step, self.config.num_iterations)
        if iteration and self.data is not None:
            return self.data
        accelerator = self.accelerator
        place = accelerator.process_index, accelerator.num_processes, self.device
        data = self.data = step.pack_step(self._read(number, progress), self.config, *place, self.policy.config)
        if accelerator.num_processes > 1:
            counts = accelerator.gather(torch.tensor([len(data.rows)], device=self.device))
            step.fill_up(data, int(counts.max()), self.device)
        step.count_flops(data, self.policy.config)
        step.freeze_logprobs(data, self.model, self.policy, self.reference, self.config)
        return data

    def _read(self, number: int, progress: RunProgress) -> list[list[RolloutTree]]:
        """The groups of step data `number`, `[read][group]`, logged or sampled from the weights of now."""
        shape = (self.config.gradient_accumulation_steps, self.config.groups_per_step)
        if self.replay is not None:
            return self.replay.step_trees(number, *shape)
        assert self.online is not None
        policy, state = self._sampling_policy(), self._reward_state()
        self.sampled = self.online.step_rollouts(*shape, policy, progress.sampling, state)
        self.generated_tokens += self.sampled.generated_tokens
        self.num_read = number + 1
        if self.step + self.config.num_iterations < self.config.max_steps:
            self.online.start_next(*shape, policy, state)
        is_new = self.step % self.config.num_iterations == 0
        if self.config.save_rollouts and is_new and self.accelerator.is_main_process:
            folder = self.output_dir / "rollouts"
            folder.mkdir(exist_ok=True)
            save(folder / f"step-{self.step + 1}.jsonl.gz", self.sampled.trajectories())
        return self.sampled.trees

    def _reward_state(self) -> Any:
        """What reward functions get as trainer_state: the updates that what is sampled has seen, and of how many."""
        from transformers import TrainerState

        return TrainerState(global_step=self.step, max_steps=self.config.max_steps)

    def _sampling_policy(self) -> torch.nn.Module:
        if self.whole_policy is not self.policy:
            copy_weights(self.policy, self.whole_policy)
        return self.whole_policy

    def _evaluate(self, progress: RunProgress) -> dict[str, float]:
        """Numbers of the held-out rows where it is time for them; the best weights so far are kept."""
        config = self.config
        if self.online is None or not config.eval_steps or (self.step % config.eval_steps and not self._is_done()):
            return {}
        result = self.online.evaluate(self._sampling_policy(), progress.sampling, state=self._reward_state())
        self.evaluations.append({"step": self.step, **result})
        result = {name: value for name, value in result.items() if name != "eval_rewards"}
        if self.best_reward is None or result["eval_reward"] > self.best_reward:
            self.best_reward = result["eval_reward"]
            if config.save_strategy == "steps":
                self._write_checkpoint(self.output_dir / "best")
        return result

    def _gradients(self, data: step.StepData) -> tuple[StepMetrics, float]:
        """Those of all rows, clipped; returns what was measured, and their norm."""
        config, accelerator, rows = self.config, self.accelerator, data.rows
        metrics = StepMetrics()
        total = accelerator.reduce(step.normalizers(rows, config, self.device), "sum").clamp(min=1)
        # Gradients are averaged over processes, so each divides by its share of the whole.
        normalizer, entropy_normalizer = (total / accelerator.num_processes).unbind()
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        losses, logps = [], []
        for i, row in enumerate(rows):
            with self.parallel.accumulation(self.model, is_last=i + 1 == len(rows)):
                loss, logp = step.row_loss(self.model, row, config, normalizer, entropy_normalizer, metrics)
                metrics.add("loss", loss.detach() / accelerator.num_processes, how="sum")
                losses.append(loss.detach())
                logps.append(logp.detach())
                loss.backward()
        step.check_finite(rows, losses, logps, f"step {self.step + 1}")
        grad_norm = float(self.parallel.clip_grad_norm(self.policy.parameters(), config.max_grad_norm))
        if not math.isfinite(grad_norm):
            groups = ", ".join(dict.fromkeys(repr(tree.group) for tree in data.trees))
            raise ValueError(
                f"step {self.step + 1}: the gradient is {grad_norm}, stopped before the update; its groups: {groups}"
            )
        if self.on_gradients is not None:
            self.on_gradients(self.step, self.policy)
        metrics.add("perf/fwd_bwd_s", time.perf_counter() - began, how="max")
        return metrics, grad_norm

    def _update(self, data: step.StepData, metrics: StepMetrics, grad_norm: float) -> dict[str, float]:
        """The optimiser's step; returns its numbers."""
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        values = step_summary(data, metrics, self.accelerator, is_chain=self.config.attention == "chain")
        self.num_tokens += int(values["tree/chain_tokens"])
        return {
            "loss": values.pop("loss"),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **values,
            **self._sampled_metrics(),
            "num_tokens": self.num_tokens,
        }

    def _sampled_metrics(self) -> dict[str, float]:
        if self.sampled is None:
            return {}
        return {**self.sampled.metrics, "rollout/total_generated_tokens": self.generated_tokens}

    def save(self) -> Path:
        """Writes the checkpoint of the current step, whole or not at all."""
        path = checkpoints.path_of(self.output_dir, self.step)
        self._write_checkpoint(path)
        if self.accelerator.is_main_process:
            checkpoints.remove_old(self.output_dir, self.config.save_total_limit)
        return path

    def _write_checkpoint(self, path: Path) -> None:
        iteration, data = self.step % self.config.num_iterations, self.data
        old = step.old_logprobs(data) if iteration and data and self.config.old_logprobs == "computed" else {}
        state = {"step": self.step, "num_tokens": self.num_tokens, **self._order_state()}
        # Trees that were sampled but not yet trained to the end belong to the state, and are read again from it.
        is_open = self.online is not None and (iteration > 0 or self.num_read > self.step // self.config.num_iterations)
        current = self.sampled if is_open else None
        state["generated_tokens"] = self.generated_tokens - (current.generated_tokens if current else 0)
        state["best_reward"] = self.best_reward

        def write_more(folder: Path) -> None:
            if self.online is not None:
                self.tokenizer.save_pretrained(folder)
                state["online"] = self.online.save_state(folder, current)

        with uninterrupted():
            checkpoints.save(
                self.parallel, self.policy, self.optimizer, self.schedule.state_dict(), old, state, path, write_more
            )

    def _order_state(self) -> dict[str, Any]:
        """What decides the order of the data; a resumed run must have the same."""
        names = _ORDER_SETTINGS if self.online is None else (*_ORDER_SETTINGS, *_ONLINE_SETTINGS)
        # lists, as JSON gives them back
        values = ((name, getattr(self.config, name)) for name in names)
        state = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
        return state | {"num_groups": self._num_groups()}

    def _num_groups(self) -> int:
        if self.replay is not None:
            return len(self.replay.trees)
        assert self.online is not None
        return len(self.online.rows)

    def _leave(self, error: BaseException) -> None:
        """Before a run ends early: a checkpoint of the last whole step, and what the engine still delivered."""
        if self.config.save_strategy == "no":
            return
        if self.online is not None:
            self.online.abandon()
            if isinstance(error, EngineError) and (unfinished := error.trajectories):
                rank = self.accelerator.process_index
                path = self.output_dir / f"unfinished-step-{self.step + 1}{f'-{rank}' if rank else ''}.jsonl.gz"
                save(path, unfinished)
                print(f"{len(unfinished)} trajectories of the unfinished step are in {path}", file=sys.stderr)
        # Other processes may be anywhere, so only one alone can write what all must agree on.
        if self.step and self.accelerator.num_processes == 1:
            print(f"step {self.step}: checkpoint written to {self.save()}", file=sys.stderr)

    def _restore(self, path: Path) -> None:
        """Step, optimiser, schedule, what was sampled and, in the middle of num_iterations, the old log-probs of the
        groups in use."""
        state, saved, old = checkpoints.load_state(path)
        for name, value in self._order_state().items():
            # Checkpoints from before these two were recorded lack them.
            if name not in state and name in ("lora_alpha", "lora_target_modules"):
                continue
            if state.get(name) != value:
                raise ValueError(
                    f"checkpoint {path} was made with {name}={state.get(name)}, this run has {value}; resume with the"
                    " same"
                )
        checkpoints.load_optimizer(path, self.policy, self.optimizer, saved["optimizer"])
        self._set_optimizer(saved["schedule"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        # Checkpoints from before rollouts were sampled have neither.
        self.generated_tokens, self.best_reward = state.get("generated_tokens", 0), state.get("best_reward")
        self.num_read = self.step // self.config.num_iterations
        if self._is_done():
            raise ValueError(
                f"checkpoint {path} is at step {self.step}, max_steps={self.config.max_steps}: nothing left; raise"
                " max_steps or max_generated_tokens"
            )
        if self.online is not None:
            self.online.restore(state["online"], path)
        if self.step % self.config.num_iterations:
            data = self._next_data(RunProgress())
            if self.config.old_logprobs == "computed":
                step.restore_old_logprobs(data, old)

    def _set_optimizer(self, schedule: dict[str, Any]) -> None:
        """Goes on in the `schedule` of a checkpoint, but with this run's settings of the optimiser."""
        config, groups = self.config, self.optimizer.param_groups
        rates = [config.learning_rate * factor(schedule["last_epoch"]) for factor in self.schedule.lr_lambdas]
        base = [config.learning_rate] * len(groups)
        self.schedule.load_state_dict({**schedule, "base_lrs": base, "_last_lr": rates})
        for group, rate in zip(groups, rates, strict=True):
            group |= dict(
                lr=rate,
                initial_lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )

    def _open_output(self) -> MetricsFile:
        if note := models.left_out(models.read_model_config(self.config.model), self.policy):
            print(f"model {self.config.model}: {note}", file=sys.stderr)
        if self.config.overwrite_output_dir:
            checkpoints.remove_run(self.output_dir)
        elif self.checkpoint is None or not checkpoints.is_own(self.checkpoint, self.output_dir):
            startup.check_unused(self.config.output_dir)
        else:
            for path in checkpoints.set_aside(self.output_dir, self.step):
                print(f"resuming at step {self.step}: a later checkpoint is now {path}", file=sys.stderr)
        write_whole(self.output_dir / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        return MetricsFile(self.output_dir / "metrics.jsonl", self.step)
