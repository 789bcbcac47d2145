"""The settings of `treegrpo train`: one frozen dataclass with TRL's names, from flags and `--config file.yaml`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from treegrpo.advantages import ESTIMATORS, parse_options
from treegrpo.rollout import settings as rollouts
from treegrpo.rollout.settings import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RolloutConfig):
    """Train a model with the tree-grouped GRPO loss on logged or sampled rollouts, each shared prefix computed once."""

    rollouts: str = ""
    """Where rollouts come from: replay:FILE, a .jsonl or .jsonl.gz of token trajectories (make one with `treegrpo
    convert`), or an engine that samples trees: hf (in this process), vllm, or server:URL (vLLM, SGLang)."""
    model: str = ""
    """A local folder that from_pretrained reads, or a .json/.yaml model config (a dict with model_type) for random
    weights. Of a folder with a vision model beside it (Qwen3.5) the language model alone is trained and saved."""
    config: Path | None = None
    """A YAML file with any of these settings; flags on the command line win."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""
    output_dir: str = "runs/train"
    """Folder for config.yaml, metrics.jsonl and checkpoints."""
    overwrite_output_dir: bool = False
    """Start over in an output_dir that already holds a run (its metrics and checkpoints are removed)."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to continue from, or "latest" for the newest in output_dir."""

    samples: Literal["trajectory", "call"] = "trajectory"
    """Train each trajectory whole, or each assistant turn as a sample whose context is the prefix."""
    attention: Literal["tree", "chain"] = "tree"
    """tree: shared prefixes once, through the tree-attention kernel. chain: the flattened baseline, same loss."""
    backend: str = "auto"
    """Kernel backend for attention=tree: auto, reference, cpu, triton, cuda or gather (`treegrpo doctor` says which
    work here)."""
    row_token_budget: int | None = None
    """Unique tokens in one packed row; None puts all groups of a step in one row. Bounds memory, changes no result. A
    tree over it is cut between leaves, which then repeat what they share."""
    share_across_groups: bool = True
    """Let groups in one packed row share what they begin with (a common system prompt)."""

    groups_per_step: int = 4
    """Groups (prompts with all their trajectories) read at a time, over all processes."""
    gradient_accumulation_steps: int = 1
    """Reads of groups_per_step per optimiser step; the loss is normalised over all of them together."""
    max_steps: int = 100
    """Optimiser steps."""
    num_iterations: int = 1
    """Optimiser steps on the same groups (mu in GRPO); old log-probs are those from before the first."""
    shuffle: bool = True
    """Shuffle the groups each epoch."""
    seed: int = 42
    """Seed of random weights, LoRA weights and the order of groups."""

    advantage_estimator: str = "tree_grpo"
    """Who is compared with whom: tree_grpo (own tree plus prompt), grpo (prompt), intra, inter, treerl, treepo,
    siblings, spo, at2po, arpo_hard, arpo_soft, lambda_grpo, or grid with options (sources: treegrpo.advantages)."""
    advantage_options: tuple[str, ...] = ()
    """Options of the estimator as name=value, such as baseline=parent value=child_mean norm=none."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide centred rewards by the std of their own comparison set, of the whole step, or not at all."""
    loss_type: str = "dapo"
    """grpo, bnpo, dr_grpo, dapo or cispo, as in TRL."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or one per sequence (GSPO)."""
    shared_tokens: Literal["per_leaf", "mean", "once"] = "per_leaf"
    """How a token under several leaves counts: once per leaf as flattened chains do, or divided among them, or once."""
    epsilon: float = 0.2
    """Lower clip range of the ratio."""
    epsilon_high: float | None = None
    """Upper clip range; None means epsilon."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative (dual clip)."""
    beta: float = 0.0
    """Weight of the KL to the frozen initial model; 0 loads no reference."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio (TRL's default); false is the plain k3 of GRPO."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts; logits are divided by it."""
    max_completion_length: int = 512
    """The constant dr_grpo divides by, per sequence."""
    old_logprobs: Literal["computed", "recorded"] = "computed"
    """Old log-probs: computed before the first update on a group, or those recorded at sampling (all must be there)."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradient clipping norm; 0 turns it off."""
    lr_scheduler_type: str = "linear"
    """A schedule of transformers: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup or
    inverse_sqrt."""
    warmup_steps: int = 0
    """Linear warm-up steps."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights, log-probs and loss stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_r: int = 0
    """LoRA rank; 0 trains all weights."""
    lora_alpha: int = 16
    """LoRA scale numerator."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get adapters, or all-linear: all but the head (and, in Falcon-H1 and Nemotron-H, but
    out_proj, which PEFT refuses)."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (nf4, by bitsandbytes) under its adapters: QLoRA. Needs lora_r."""

    logging_steps: int = 1
    """Write metrics every so many steps, and with every evaluation."""
    save_steps: int = 500
    """Checkpoint every so many steps; 0 only at the end. Ctrl-C writes one too, as does an error outside an update."""
    save_strategy: Literal["steps", "no"] = "steps"
    """no writes no checkpoint at all."""
    save_total_limit: int | None = None
    """Keep only the newest so many checkpoints."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        kinds = {field.name: str(field.type) for field in dataclasses.fields(self)}
        for name, low in {**_AT_LEAST, **rollouts.AT_LEAST}.items():
            value, is_whole = getattr(self, name), kinds[name].startswith("int")
            kind, high = (numbers.Integral, 2**63 - 1) if is_whole else (numbers.Real, sys.float_info.max)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not (is_number and low <= value <= high) and not (value is None and "None" in kinds[name]):
                limit = " and below 2**63" if is_number and is_whole and value > high else ""
                raise ValueError(
                    f"{name}={value!r}: must be a {'whole' if is_whole else 'finite'} number >= {low}{limit}"
                )
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be below 1")
        if self.temperature == 0:
            raise ValueError(
                "temperature=0 has no log-probabilities: give the temperature the rollouts were sampled with"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError("load_in_4bit freezes the base: give lora_r, whose adapters are trained")
        self.estimator_options()
        if self.row_token_budget and self.max_context_length and self.row_token_budget < self.max_context_length:
            raise ValueError(
                f"row_token_budget={self.row_token_budget} is below max_context_length={self.max_context_length}: a"
                " trajectory would not fit into a packed row; raise the one or lower the other"
            )
        if self.top_p < 1 and self.rollouts and not self.is_replay:
            self._check_truncated()

    def _check_truncated(self) -> None:
        """An engine's log-probs are of the tokens top_p leaves, the trainer's of all tokens."""
        if self.vllm_importance_sampling_correction is None and self.corrects_sampling:
            raise ValueError(
                f"top_p={self.top_p} with the sampling correction, which is on for these rollouts: an engine's"
                " log-probs are of the tokens top_p leaves, so weights of trajectories fall towards 0 with their"
                " length; give top_p=1, or vllm_importance_sampling_correction=false (or true, to have it all the same)"
            )
        if self.old_logprobs == "recorded":
            raise ValueError(
                f"top_p={self.top_p} with old_logprobs=recorded: the recorded ones are of the tokens top_p leaves, so"
                " ratios would begin below 1; give top_p=1, or old_logprobs=computed"
            )

    def estimator_options(self) -> dict[str, Any]:
        """Keywords of `compute_advantages` beside the estimator."""
        # Only the z-score estimators know TRL's scale_rewards; its default is what the others do anyway.
        scale = () if self.scale_rewards == "group" else (f"scale_rewards={self.scale_rewards}",)
        return parse_options(self.advantage_estimator, (*scale, *self.advantage_options))

    def check_paths(self) -> None:
        """ValueError unless rollouts and model are given and exist; called before anything is loaded."""
        if self.is_replay:
            if not Path(self.rollouts_file).is_file():
                raise ValueError(f"rollouts: no such file: {self.rollouts_file}")
            if self.token_budget is not None:
                raise ValueError("token_budget bounds what is sampled for a prompt; packed rows have row_token_budget")
            for name in ("dataset", "eval_dataset", "eval_steps", "save_rollouts", "overlap_rollouts"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for rollouts that are sampled, and rollouts={self.rollouts}"
                        f" reads logged ones: leave {name} out, or give an engine"
                    )
        else:
            from treegrpo.rollout.build import check_settings

            check_settings(self)
        if not self.model or not Path(self.model).exists():
            raise ValueError(f"model={self.model!r}: no such folder or config file; models are read from disk only")

    @property
    def is_replay(self) -> bool:
        """Logged rollouts, rather than an engine that samples them."""
        return self.rollouts.startswith("replay:")

    @property
    def corrects_sampling(self) -> bool:
        """Whether the loss is weighted by trainer / sampler probability."""
        if self.vllm_importance_sampling_correction is not None:
            return self.vllm_importance_sampling_correction
        return not self.is_replay and (self.rollouts not in ("", "hf") or self.overlap_rollouts)

    def groups_from(self, step: int) -> int:
        """How many groups a run reads from `step` to its last."""
        reads = math.ceil((self.max_steps - step) / self.num_iterations)
        return reads * self.groups_per_step * self.gradient_accumulation_steps

    @property
    def rollouts_file(self) -> str:
        return self.rollouts.removeprefix("replay:")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml: the settings of the run, without those of how it was started."""
        values = dataclasses.asdict(self)
        # Kept, the last two would erase or resume the run that is started with this file.
        for name in ("config", "dry_run", "overwrite_output_dir", "resume_from_checkpoint"):
            values.pop(name)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


_AT_LEAST = {
    **dict.fromkeys(
        (
            "row_token_budget",
            "groups_per_step",
            "gradient_accumulation_steps",
            "max_steps",
            "num_iterations",
            "logging_steps",
        ),
        1,
    ),
    **dict.fromkeys(("save_total_limit", "max_completion_length"), 1),
    **dict.fromkeys(
        ("epsilon", "epsilon_high", "delta", "beta", "temperature", "learning_rate", "weight_decay", "max_grad_norm"), 0
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "lora_r", "lora_alpha", "save_steps", "seed"), 0
    ),
}
_CHOICES = {
    **{name: get_args(kind) for name, kind in get_type_hints(TrainConfig).items() if get_origin(kind) is Literal},
    "backend": ("auto", "reference", "cpu", "triton", "cuda", "gather"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
    "lr_scheduler_type": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ),
    "advantage_estimator": ESTIMATORS,
}


def read_config(path: str | Path) -> TrainConfig:
    """A TrainConfig from a YAML file of its fields.

    Raises:
        ValueError: no such file, not a mapping, an unknown setting (the nearest name is suggested) or a value of the
            wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config {path}: not valid YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: must be a mapping of settings, not {type(values).__name__}")
    return TrainConfig(**{name: _typed(path, name, value) for name, value in values.items()})


def _typed(path: Path, name: str, value: Any) -> Any:
    """YAML reads 1e-6 as text and a list where a tuple is meant; everything else must fit the field's default."""
    import difflib

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    if name == "config":
        raise ValueError(f"config {path}: config={value!r} is a flag only: leave it out of the file")
    if name not in fields:
        near = difflib.get_close_matches(str(name), fields, n=1)
        raise ValueError(f"config {path}: unknown setting {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    kind = str(fields[name].type)
    try:
        if value is None and "None" in kind:
            return None
        if kind.startswith("tuple"):
            cast = float if "float" in kind else str
            return tuple(cast(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
        if kind.startswith("bool"):
            if not isinstance(value, bool):
                raise TypeError("write true or false")
            return value
        for prefix in ("int", "float"):
            if kind.startswith(prefix):
                if isinstance(value, bool) or (prefix == "int" and float(value) != int(float(value))):
                    raise TypeError(f"not of type {prefix}")
                return int(value) if prefix == "int" else float(value)
        if isinstance(value, bool):
            raise TypeError("YAML reads a bare no, off, yes or on as true or false: put it into quotes")
        if not isinstance(value, str):
            raise TypeError(f"write text, not {type(value).__name__}")
        return value
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"config {path}: {name}={value!r}: {error} (expected {kind})") from error
