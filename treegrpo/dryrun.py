"""`treegrpo train --dry-run`: reads and checks everything a run needs, loads no weights, prints what it would do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from treegrpo import models, startup
from treegrpo.advantages import compute_advantages
from treegrpo.config import TrainConfig
from treegrpo.dropout import disable_dropout
from treegrpo.rollout import build
from treegrpo.tree import Trajectory, build_forest, load

# A model up to here is built as it is to be checked, a larger one as a copy of few layers and a small vocabulary.
_SMALL, _LARGEST = 20_000_000, 400_000_000


def run_plan(config: TrainConfig) -> list[tuple[str, str]]:
    """`(what, value)` rows of the plan.

    Raises:
        ValueError: whatever would stop the run at its start: a missing file, a bad row, an unknown name.
    """
    config.check_paths()
    model_config = models.read_model_config(config.model)
    # An unknown estimator would otherwise show only after the first step was sampled.
    compute_advantages(_two_leaves(), config.advantage_estimator, **config.estimator_options())
    startup.find_checkpoint(config)
    startup.check_backend(config.backend)
    startup.schedule(config, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate))
    structure, trained = _structure(config, model_config)
    num_parameters = sum(parameter.numel() for parameter in structure.parameters())
    weights = "from the folder" if Path(config.model).is_dir() else f"random, seed {config.seed}"
    rows = [
        ("model", f"{model_config.model_type}, {num_parameters:,} parameters, weights {weights}"),
        ("model family", _check_family(config, model_config, num_parameters)),
        ("trained", "; ".join(filter(None, (trained, models.left_out(model_config, structure))))),
        # a plan may be made on another machine than the run
        ("rollouts", "; ".join(filter(None, (config.rollouts, build.missing_package(config.rollouts))))),
    ]
    rows += _logged(config) if config.is_replay else _sampled(config, structure)
    per_step = config.groups_per_step * config.gradient_accumulation_steps
    rows += [
        ("optimiser step", f"{per_step} groups, whole trees, used {config.num_iterations}x"),
        ("loss", f"{config.loss_type}, {config.advantage_estimator}, shared tokens {config.shared_tokens}"),
        ("KL to the initial model", f"{config.beta:g}" if config.beta else "none"),
        (
            "optimiser",
            f"AdamW, peak {config.learning_rate:g}, {config.lr_scheduler_type}, warm-up {config.warmup_steps} of"
            f" {config.max_steps} steps",
        ),
        ("precision", "bf16 compute, float32 weights and loss" if config.bf16 else "float32"),
        ("output", config.output_dir),
    ]
    return rows


def _logged(config: TrainConfig) -> list[tuple[str, str]]:
    from treegrpo.rollout.replay import check_rewards

    trajectories = load(config.rollouts_file)
    check_rewards(trajectories)
    trees = build_forest(trajectories)
    startup.check_logged(config, trajectories, trees)
    chain, unique = sum(tree.num_chain_tokens for tree in trees), sum(tree.num_tokens for tree in trees)
    return [
        ("groups", f"{len(trees):,}, {len(trajectories):,} trajectories"),
        ("tokens", f"{chain:,} in chains, {unique:,} unique ({chain / unique:.2f}x)"),
        ("epochs", _epochs(config, len(trees))),
    ]


def _sampled(config: TrainConfig, structure: torch.nn.Module) -> list[tuple[str, str]]:
    from treegrpo.envs.data import read_rows
    from treegrpo.rollout.layers import context_length
    from treegrpo.rollout.order import EpochOrder
    from treegrpo.rollout.prompts import check_prompts

    dataset = read_rows(config.dataset)
    held_out = read_rows(config.eval_dataset)[: config.eval_rows] if config.eval_dataset else []
    tokenizer = build.load_tokenizer(config)
    make_env, _ = build.make_environment(config, tokenizer)
    # only an engine that is there says what else it would take
    limit = config.max_context_length if config.rollouts != "hf" else None
    limit = limit or context_length(structure, config.max_context_length)
    order = EpochOrder(len(dataset), seed=config.seed, shuffle=config.shuffle)
    chosen = order.upcoming(0, config.groups_from(0) * (build.num_refills(config) + 1))
    datasets = {"dataset": (dataset, chosen), "eval_dataset": (held_out, range(len(held_out)))}
    check_prompts(datasets, make_env, tokenizer, limit, show=not config.disable_tqdm)
    options = build.search_options(config)
    per_step = config.groups_per_step * config.gradient_accumulation_steps
    shape = f"M={options.num_trees} trees, N={options.num_expansions} branches, L={options.num_rounds} rounds"
    rows = [
        ("prompts", f"{len(dataset):,} in {config.dataset}; {_epochs(config, len(dataset))}"),
        ("tokenizer", f"{len(tokenizer):,} tokens"),
        ("environment", f"{config.env}, {config.retriever or 'no retriever'}, top {config.topk}"),
        ("rewards", ", ".join(build.reward_names(config))),
        ("a prompt", f"{options.num_leaves} leaves: {shape}, selection {config.selection}"),
        ("a step", f"{per_step * options.num_leaves:,} leaves, {config.max_turns} turns of {config.max_step_tokens}"),
    ]
    if config.token_budget:
        rows.append(("token budget", f"{config.token_budget:,} sampled tokens a prompt"))
    if config.overlap_rollouts:
        rows.append(("overlap", "rollouts one step ahead, importance-weighted"))
    if config.eval_steps:
        rows.append(("evaluation", f"{len(held_out):,} prompts every {config.eval_steps} steps, best kept"))
    return rows


def _epochs(config: TrainConfig, num_groups: int) -> str:
    return f"{config.groups_from(0) / num_groups:.2f} epochs in {config.max_steps:,} steps"


def _structure(config: TrainConfig, model_config: Any) -> tuple[torch.nn.Module, str]:
    """The model without weights, and what is trained of it, for which the adapters of the run are tried on it."""
    folder = Path(config.model)
    is_read = bool(config.lora_r or config.beta or not config.resume_from_checkpoint)
    if is_read and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model {folder}: no .safetensors file; give a folder with weights, or a config file")
    if config.load_in_4bit:
        models.check_bitsandbytes()
        if not folder.is_dir():
            raise ValueError(f"load_in_4bit needs a folder with weights, model={config.model!r} is a config file")
    with torch.device("meta"):
        model, trained = models.from_config(model_config, folder), "all weights"
        if config.lora_r:
            # on a copy: adapters change the modules they go to, and are none of the parameters counted
            adapted = models.with_adapters(copy.deepcopy(model), config, None)
            places = {name.partition(".lora_A.")[0] for name, p in adapted.named_parameters() if ".lora_A." in name}
            names = sorted({place.removesuffix(".base_layer").rpartition(".")[2] for place in places})
            trained = f"LoRA rank {config.lora_r} on {', '.join(names)}"
    return model, trained


def _check_family(config: TrainConfig, model_config: Any, num_parameters: int) -> str:
    """What was checked, in words. ValueError where tree attention would not compute what chains compute."""
    from treegrpo.hf import use_tree_attention

    if num_parameters <= _SMALL:
        small, checked = model_config, "the self-check passes on random weights"
    else:
        checked = "the self-check passes on a random copy of few layers"
        for begin, end in _ranges(model_config):
            small = _small_copy(model_config, begin, end)
            try:
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in models.from_config(small, config.model).parameters())
            except ValueError as error:
                return f"not checked: no small copy of it can be built ({error})"
            if size <= _LARGEST:
                break
        else:
            return f"not checked: {end - begin} layers of it have {size:,} parameters; the run checks it at its start"
    with models.seeded(config.seed):
        model = models.from_config(small, config.model, dtype=torch.float32)
    try:
        use_tree_attention(disable_dropout(model))
    except (LookupError, RuntimeError, TypeError) as error:
        if small is not model_config:
            return f"not checked: a small copy of it does not run ({error})"
        raise ValueError(f"model {config.model}: its self-check failed ({error}); take another model") from error
    return checked


def _ranges(model_config: Any) -> list[tuple[int, int]]:
    """Layers in which every kind occurs, as `(begin, end)`: the first ones, and, where those are more, the fewest."""
    text = model_config.get_text_config()
    num_layers, kinds = text.num_hidden_layers, list(getattr(text, "layer_types", None) or ())
    first = min(num_layers, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    begins = [begin for begin in range(first - 1) if set(kinds[begin:first]) == set(kinds)]
    fewest = [(begin, first) for begin in begins[-1:] if begin]
    # some configs hold no list of kinds, but the places of their layers of attention, which a cut would shift
    return [(0, first), *(fewest if kinds in vars(text).values() else ())]


def _small_copy(model_config: Any, begin: int, end: int) -> Any:
    """The config with the layers from `begin` to `end` alone, few experts, all of them narrow, and few tokens."""
    small = copy.deepcopy(model_config)
    text = small.get_text_config()
    num_layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            setattr(text, name, value[begin:end])
        elif name.endswith("intermediate_size") and isinstance(value, int):
            setattr(text, name, min(value, 64))
        elif name in ("num_experts", "num_local_experts", "n_routed_experts") and isinstance(value, int):
            setattr(text, name, min(value, 32))
    text.num_hidden_layers = end - begin
    text.vocab_size = min(text.vocab_size, 512)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small


def _two_leaves() -> list:
    leaves = [
        Trajectory([1, 2, i], [0, 1, 1], reward=float(i), logprobs=[float("nan"), -1.0, -1.0], steps=[1])
        for i in (0, 1)
    ]
    return build_forest(leaves)


def table(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    result = Table(title="Plan (nothing was loaded, sampled or written)", title_justify="left", show_header=False)
    result.add_column(style="bold")
    result.add_column()
    for row in rows:
        result.add_row(*row)
    return result
