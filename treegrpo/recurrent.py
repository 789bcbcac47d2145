"""Layers that carry a state along the path: transformers' functions of hybrid models, taught the tree.

Such a layer sees other tokens through a few functions of its modeling file alone: a short convolution and, behind it, a
recurrence (gated delta rule, Kimi delta attention, Mamba-2's scan). transformers hands them the keywords of
``model(...)``. ``teach`` puts functions in their place that compute the packed tree where ``tree_plan`` is given, and
call the old ones where it is not. All else in these layers looks at one token at a time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.activations import ACT2FN

import treegrpo_kernels as tk

MARKS = CONV, RECURRENCE = ("convolution", "recurrence")
"""What a layer leaves in the trace of a forward with a tree."""

SEES_BY = {"linear_attention": RECURRENCE, "hybrid": RECURRENCE, "conv": CONV}
"""Layer types that can be taught, and what of theirs sees other tokens last; "hybrid": attention and a recurrence."""

SINCE = Version("5.17")
"""The transformers that hands such layers the keywords of ``model(...)``."""

STATEFUL = frozenset({*SEES_BY, "mamba"})
"""What such layers are called; "mamba" before that transformers."""


def teach(model: nn.Module) -> None:
    """Teaches the tree to the functions of the files that define the model's modules; harmless twice."""
    for file in _files(model):
        for name, (_, packed) in _FUNCTIONS.items():
            function = getattr(file, name, None)
            if callable(function) and not _knows_trees(function):
                taught = functools.wraps(function)(_where_there_is_a_tree(packed, function))
                taught._treegrpo = True  # type: ignore[attr-defined]
                setattr(file, name, taught)


def teachable(model: nn.Module) -> set[str]:
    """The layer types among ``SEES_BY`` that the model's files have a function of."""
    files = _files(model)
    found = {mark for name, (mark, _) in _FUNCTIONS.items() for file in files if callable(getattr(file, name, None))}
    return {kind for kind, mark in SEES_BY.items() if mark in found}


def check_taught(module: nn.Module) -> None:
    """Raises ValueError where an attention layer is given a tree that the layers beside it would not see."""
    file = sys.modules[type(module).__module__]
    for name in _FUNCTIONS:
        function = getattr(file, name, None)
        if function is not None and not _knows_trees(function):
            raise ValueError(
                f"the other layers of {type(module).__name__}'s model do not know the tree and would mix siblings: call"
                " treegrpo.hf.check_model(model) (or use_tree_attention) before its first forward with tree_plan"
            )


def kinds_of(config: Any) -> frozenset[str]:
    """The layer types of a model's configuration that carry a state along the path."""
    return STATEFUL & set(getattr(config, "layer_types", None) or ())


def cure(kinds: set[str], otherwise: str = "") -> str:
    """What helps where layers of these types are not given the tree, as the end of a sentence."""
    if Version(transformers.__version__) < SINCE and kinds & STATEFUL:
        otherwise = (
            f"take transformers {SINCE} or newer, which hands most of them the tree (this is"
            f" {transformers.__version__}), or "
        )
    return f"{otherwise or 'take '}a model whose layers are all attention"


def _files(model: nn.Module) -> set[ModuleType]:
    return {sys.modules[type(module).__module__] for module in model.modules()}


def _knows_trees(function: Callable[..., Any]) -> bool:
    return getattr(function, "_treegrpo", False)


def _where_there_is_a_tree(packed: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def function(
        *args: Any,
        tree_plan: tk.TreePlan | None = None,
        tree_backend: str = "auto",
        tree_trace: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        # as it was called: packages behind such a function, which older models keep, name their arguments otherwise
        if tree_plan is None:
            return plain(*args, **kwargs)
        tree = dict(tree_plan=tree_plan, tree_backend=tree_backend, tree_trace=tree_trace)
        return packed(*args, plain=plain, **tree, **kwargs)

    return function


def _enter(mark: str, plan: tk.TreePlan, shape: tuple[int, int], cached: bool, trace: list[Any] | None) -> None:
    """Refuses what a packed tree cannot mean, and leaves a trace; ``shape``: rows and tokens, ``cached``: whether it
    begins with a state, or is to return one."""
    if shape[0] != 1:
        raise ValueError(f"a {mark} was given {shape[0]} rows: pack all trees into one row [1, T]")
    if cached or shape[1] != plan.num_tokens:
        raise ValueError(
            f"a {mark} is given a cache, or {shape[1]} tokens for the plan's {plan.num_tokens}: pass use_cache=False"
            " with a tree"
        )
    if trace is not None:
        trace.append(mark)


def _way(tree_backend: str) -> str:
    return "reference" if tree_backend == "reference" else "auto"


def _conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    plain: Callable[..., Tensor],
    tree_plan: tk.TreePlan,
    tree_trace: list[Any] | None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states [1, C, T], weight [C, K] -> [1, C, T]."""
    _enter(CONV, tree_plan, (hidden_states.shape[0], hidden_states.shape[2]), False, tree_trace)
    out = tk.tree_conv1d(
        hidden_states[0].T,
        weight,
        bias,
        tree_plan,
        activation=None if activation is None else ACT2FN[activation],
        row_conv=lambda row: plain(row, weight, bias, activation=activation),
    )
    return out.T[None]


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    tree_plan: tk.TreePlan,
    tree_backend: str,
    tree_trace: list[Any] | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query and key [1, T, Hk, D], value [1, T, Hv, Dv], g [1, T, Hv] or [1, T, Hv, D], beta [1, T, Hv] ->
    ([1, T, Hv, Dv], no state)."""
    cached = initial_state is not None or output_final_state
    _enter(RECURRENCE, tree_plan, (query.shape[0], query.shape[1]), cached, tree_trace)
    q, k, v, g, beta = (x[0] for x in (query, key, value, g, beta))
    normalize, way = use_qk_l2norm_in_kernel, _way(tree_backend)
    return tk.tree_gated_delta_rule(q, k, v, g, beta, tree_plan, normalize=normalize, way=way)[None], None


def _mamba_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *args: Any,
    tree_plan: tk.TreePlan,
    tree_backend: str,
    tree_trace: list[Any] | None,
    **kwargs: Any,
) -> Any:
    """hidden_states [1, T, H, P], dt [1, T, H], A [H], B and C [1, T, G, N] -> [1, T, H, P]."""
    cached = kwargs.get("initial_states") is not None or kwargs.get("return_final_states", False)
    _enter(RECURRENCE, tree_plan, (dt.shape[0], dt.shape[1]), cached, tree_trace)
    bias, bounds = kwargs.get("dt_bias"), kwargs.get("dt_limit", (0.0, float("inf")))
    # as mamba-ssm's kernels have it: all in float32 where the model is in low precision
    wide = tk.reference.compute_dtype(hidden_states.dtype)
    x, q, k, step = (y[0].to(wide) for y in (hidden_states, C, B, dt))
    step = step if bias is None else step + bias.to(wide)
    step = (F.softplus(step) if kwargs.get("dt_softplus") else step).clamp(*bounds)
    out = tk.tree_gated_linear_attention(
        q, k, x * step[..., None], A.to(wide) * step, tree_plan, scale=1.0, way=_way(tree_backend)
    )
    if kwargs.get("D") is not None:
        out = out + kwargs["D"].to(wide)[:, None] * x
    return out[None]


def _fused_mamba(*args: Any, **kwargs: Any) -> None:
    """None, as where the fused kernel is missing: the layer goes on with convolution and scan."""


# every function of transformers through which such layers see other tokens
_FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "causal_conv1d_fn": (CONV, _conv),
    "torch_chunk_gated_delta_rule": (RECURRENCE, _delta_rule),
    "chunk_kimi_delta_attention": (RECURRENCE, _delta_rule),
    "mamba2_chunk_scan": (RECURRENCE, _mamba_scan),
    "mamba2_split_conv1d_scan_combined": (RECURRENCE, _fused_mamba),
}
