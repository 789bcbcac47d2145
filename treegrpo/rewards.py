"""Rewards, with TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

Every function gets lists of n, one entry per completion: `prompts` and `completions` (text, or chat messages),
`completion_ids` and each dataset column; further the keywords trainer_state, log_extra, log_metric and, where there are
any, environments. It returns n numbers, or None where it does not apply. It may be `async def`.

A completion is everything behind the prompt, observations included. The prompt is never read: it quotes the tags. What
treegrpo sampled itself comes with `own_texts`, what the policy wrote of each completion: answers count there alone.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treegrpo import formula
from treegrpo.answers import equal, exact_match, extract_result, f1_score, gold_answers, normalize_answer
from treegrpo.envs.tags import Tags, format_valid, last_answer
from treegrpo.plugin import load_attribute

__all__ = [
    "VARIANTS",
    "combine",
    "completion_text",
    "environment_reward",
    "exact_match",
    "f1_score",
    "format_reward",
    "format_valid",
    "gold_answers",
    "group_id",
    "math_answer",
    "normalize_answer",
    "resolve_rewards",
    "reward_name",
    "score",
    "search_em",
    "search_f1",
]

VARIANTS = ("monotone", "paper", "official")
"""How score and format make a reward; see `search_em`."""


def combine(
    score: float, valid: bool, answered: bool, variant: str, *, metric: str = "em", weight: float = 0.2
) -> float:
    """The reward of a score in [0, 1] and a format, in one of three ways.

    monotone    (1 - weight) score + weight [valid]. In [0, 1]; at equal format a better score earns more, at equal
                score a valid format earns more.
    paper       score - weight [not valid] (arXiv 2509.21240, Eq. 13).
    official    the released code (AMAP-ML/Tree-GRPO 90b1709, verl/utils/reward_score). EM (qa_em_format.py:231-282):
                correct 1 or 0.8, wrong 0.2 or 0.1, no answer 0.2 or 0. F1 (qa_f1_format.py:306-328): above 0, F1 or
                F1 - 0.2; at 0, 0.2 or 0. Not monotone: a valid F1 of 0.1 earns less than a valid F1 of 0. Its weights
                are fixed.
    """
    if variant == "monotone":
        return (1 - weight) * score + weight * valid
    if variant == "paper":
        return score - weight * (not valid)
    if variant != "official":
        raise ValueError(f"variant {variant!r}: give one of {', '.join(VARIANTS)}")
    if score > 0:
        return score if valid else score - 0.2
    if valid:
        return 0.2
    return 0.1 if metric == "em" and answered else 0.0


def search_em(
    prompts: list,
    completions: list,
    completion_ids: list | None = None,
    *,
    variant: str = "monotone",
    tags: Tags | None = None,
    weight: float = 0.2,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Exact match of the last answer block with the row's aliases, and the format, put together by `combine`.

    Aliases are the column `answers`, `golden_answers` or `answer`, or `reward_model["ground_truth"]["target"]`; None
    where a row has none of them. ValueError where no column is there.
    """
    return _search(exact_match, "em", completions, columns, variant, tags, weight, log_metric)


def search_f1(
    prompts: list,
    completions: list,
    completion_ids: list | None = None,
    *,
    variant: str = "monotone",
    tags: Tags | None = None,
    weight: float = 0.2,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """As `search_em`, with the word F1."""
    return _search(f1_score, "f1", completions, columns, variant, tags, weight, log_metric)


def _search(measure, metric, completions, columns, variant, tags, weight, log_metric) -> list[float | None]:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: give one of {', '.join(VARIANTS)}")
    rewards: list[float | None] = []
    scores, valids = [], []
    all_golds = gold_answers(columns, len(completions))
    for completion, own, golds in zip(completions, _own_texts(completions, columns), all_golds, strict=True):
        if not golds:
            rewards.append(None)
            continue
        answer = last_answer(own, tags)
        score = measure(answer, golds)
        valid = format_valid(completion_text(completion), tags)
        scores.append(score)
        valids.append(valid)
        rewards.append(combine(score, valid, answer is not None, variant, metric=metric, weight=weight))
    if log_metric is not None and scores:
        log_metric(metric, float(np.mean(scores)))
        log_metric("format_valid", float(np.mean(valids)))
    return rewards


def math_answer(
    prompts: list,
    completions: list,
    completion_ids: list | None = None,
    *,
    tags: Tags | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where a completion's result (`answers.extract_result`) equals one of the row's answers, else 0.0; None where
    the row has none. Columns as for `search_em`; GSM8K's `answer` counts from its last `####` on."""
    rewards: list[float | None] = []
    for own, golds in zip(_own_texts(completions, columns), gold_answers(columns, len(completions)), strict=True):
        result = extract_result(own, tags)
        golds = [gold.rpartition("####")[2].strip() for gold in golds]
        rewards.append(float(any(equal(result, gold) for gold in golds)) if golds else None)
    return rewards


def format_reward(
    prompts: list, completions: list, completion_ids: list | None = None, *, tags: Tags | None = None, **columns: Any
) -> list[float]:
    """1.0 where the format is valid, else 0.0."""
    return [float(format_valid(completion_text(completion), tags)) for completion in completions]


async def environment_reward(
    prompts: list,
    completions: list,
    completion_ids: list | None = None,
    *,
    environments: list | None = None,
    **columns: Any,
) -> list[float | None]:
    """What each environment's own `get_reward()` says; None for one without. ValueError without environments."""
    if environments is None:
        raise ValueError("the environment reward needs environments, and none were passed: choose another reward")
    rewards: list[float | None] = []
    for environment in environments:
        ask = getattr(environment, "get_reward", None)
        value = ask() if ask is not None else None
        rewards.append(await value if inspect.isawaitable(value) else value)
    return rewards


def _own_texts(completions: list, columns: dict[str, Any]) -> list[str]:
    given = columns.get("own_texts")
    return [completion_text(completion, own=True) for completion in completions] if given is None else given


def completion_text(completion: str | list[dict[str, Any]], *, own: bool = False) -> str:
    """The text of a completion; of chat messages their contents in order, with `own` only the assistant's."""
    if isinstance(completion, str):
        return completion
    return "".join(
        message["content"]
        for message in completion
        if isinstance(message.get("content"), str) and (not own or message.get("role") == "assistant")
    )


def group_id(row: dict[str, Any], index: int, source: str) -> str:
    """Name of a prompt's group, different for every (file or dataset `source`, the row's own `source`, index): rows
    of mixed datasets that carry the same index never share a baseline.

    >>> group_id({"source": "nq"}, 7, "data/train.jsonl"), group_id({}, 7, "a:b")
    ('data/train.jsonl:nq:7', 'a%3Ab::7')
    """
    parts = (str(source), str(row.get("source") or ""), str(index))
    return ":".join(urllib.parse.quote(part, safe="/") for part in parts)


def resolve_rewards(names: Sequence[str]) -> list[Callable]:
    """Functions of their names: search_em, search_f1, math_answer, format, environment, or `module:function` of the
    user's own. `search_em/official` chooses a variant.

    ValueError naming what is unknown or cannot be imported.
    """
    return [_resolve(name) for name in names]


def _resolve(name: str) -> Callable:
    ours: dict[str, Callable] = {
        "search_em": search_em,
        "search_f1": search_f1,
        "math_answer": math_answer,
        "format": format_reward,
        "environment": environment_reward,
    }
    if ":" in name:
        function = load_attribute(name, "reward_funcs")
        if not callable(function):
            raise ValueError(f"reward_funcs={name!r} is of type {type(function).__name__}: give a function")
        return function
    base, _, variant = name.partition("/")
    if base not in ours:
        raise ValueError(f"reward {name!r}: give {', '.join(ours)} or module:function")
    function = ours[base]
    if function is math_answer and not formula.is_installed():
        # else the first answer that is no plain number would end the run
        raise ValueError(f"reward {name!r} needs math-verify: pip install 'treegrpo[math]', or choose another reward")
    if variant and (function not in (search_em, search_f1) or variant not in VARIANTS):
        raise ValueError(
            f"reward {name!r}: {base} has no variant {variant!r}; those of search_* are {', '.join(VARIANTS)}"
        )
    options = {"variant": variant} if variant else {}

    def bound(prompts: list, completions: list, completion_ids: list | None = None, **columns: Any) -> Any:
        # a dataset may have columns of these names
        columns = {name: values for name, values in columns.items() if name not in ("variant", "tags", "weight")}
        return function(prompts, completions, completion_ids, **columns, **options)

    bound.__name__ = name
    return bound


def score(
    reward_funcs: Sequence[Callable],
    weights: Sequence[float] | None,
    *,
    prompts: list,
    completions: list,
    completion_ids: list,
    columns: dict[str, list] | None = None,
    environments: list | None = None,
    trainer_state: Any = None,
    log_extra: Callable | None = None,
    log_metric: Callable | None = None,
    places: Sequence[str] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs all reward functions on n completions, the async ones together, and adds them up.

    Returns `(rewards, per_function)`: rewards float64 [n], the sum of weight times value over the functions that
    apply; per_function by name, float64 [n], NaN where a function gave None. `weights` None: all 1. `places` says of
    every completion where it comes from, for errors.
    Raises ValueError naming the function and the index where a value is missing, not finite or no number, and naming
    the completion for which every function gave None.
    """
    num = len(completions)
    reward_funcs = list(reward_funcs)
    if not reward_funcs:
        raise ValueError("reward_funcs is empty: give at least one reward")
    weights = [1.0] * len(reward_funcs) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(reward_funcs) or not all(map(math.isfinite, weights)):
        raise ValueError(f"reward_weights {weights}: give one finite number for each of {len(reward_funcs)} rewards")
    given = {"prompts": prompts, "completion_ids": completion_ids, **(columns or {})}
    if environments is not None:
        given["environments"] = environments
    for name, column in given.items():
        if len(column) != num:
            raise ValueError(f"{name} has {len(column)} entries for {num} completions: give one each")
    reserved = ("prompt", "completion", "completion_ids", "prompts", "completions")
    keywords: dict[str, Any] = {name: values for name, values in (columns or {}).items() if name not in reserved}
    # TRL's are always there to be called
    keywords |= {"log_extra": log_extra or _dropped, "log_metric": log_metric or _dropped}
    keywords |= {"trainer_state": trainer_state}
    if environments is not None:
        # a reward written for TRL expects the objects of its own class
        keywords["environments"] = [getattr(environment, "wrapped", environment) for environment in environments]
    keywords |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    outputs: list[Any] = [function(**keywords) for function in reward_funcs]
    waiting = [index for index, output in enumerate(outputs) if inspect.isawaitable(output)]
    if waiting:
        for index, output in zip(waiting, _run_together([outputs[i] for i in waiting]), strict=True):
            outputs[index] = output
    names = _unique([reward_name(function) for function in reward_funcs])
    called = [f"completion {i}" for i in range(num)]
    if places is not None:
        called = [f"{name} ({place})" for name, place in zip(called, places, strict=True)]
    values = np.stack([_checked(name, output, called) for name, output in zip(names, outputs, strict=True)])
    missing = np.isnan(values).all(0)
    if missing.any():
        raise ValueError(
            f"every reward gave None for {called[int(missing.argmax())]}: add a reward that applies to it, or leave "
            "its row out of the data"
        )
    total = np.nansum(values * np.array(weights)[:, None], axis=0)
    return total, dict(zip(names, values, strict=True))


def _dropped(name: str, value: Any) -> None:
    """What is logged where nobody keeps it."""


def reward_name(function: Callable) -> str:
    """What metrics call it."""
    return getattr(function, "__name__", type(function).__name__)


def _checked(name: str, output: Any, called: list[str]) -> np.ndarray:
    num = len(called)
    if isinstance(output, (str, dict)) or not hasattr(output, "__len__") or len(output) != num:
        size = len(output) if hasattr(output, "__len__") else type(output).__name__
        raise ValueError(f"reward {name} returned {size} values for {num} completions: return a list with one each")
    values = np.full(num, np.nan)
    for index, value in enumerate(output):
        if value is None:
            continue
        try:
            values[index] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"reward {name} gave {value!r:.80} for {called[index]}: return numbers or None") from error
        if not math.isfinite(values[index]):
            raise ValueError(f"reward {name} gave {value!r} for {called[index]}: return finite numbers, or None")
    return values


def _unique(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _run_together(awaitables: list[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    # a loop is already running in this thread, which could not wait for itself
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["values"] = asyncio.run(gather())
        except BaseException as error:  # handed to the caller below
            box["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["values"]
