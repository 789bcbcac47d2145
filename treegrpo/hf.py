"""Runs transformers models on packed trees: importing this module registers the attention name ``treegrpo``.

Shape legend: T packed tokens, H heads (Hq query, Hkv key/value), D head dim (Dv of values).

    model = use_tree_attention(AutoModelForCausalLM.from_pretrained(...))     # sets the attention, checks the model
    logits = model(**batch.model_inputs()).logits                             # one row of unique tokens

The plan travels as the keyword ``tree_plan`` of ``model(...)``, never as a global: gradient checkpointing calls the
layers again in backward and must see the same plan. Without a plan (``generate``) the model computes what it computes
with ``sdpa``, bit for bit. Works with transformers 4.57 and newer; a family that does not, ``check_model`` refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import treegrpo_kernels as tk
from treegrpo import recurrent
from treegrpo.dropout import check_dropout
from treegrpo.logprobs import is_blank, output_head, row_logprobs, unwrap
from treegrpo.rope import rope_kind, rope_settings

ATTENTION = "treegrpo"
# "attention" is what hybrids call the full one before transformers renamed it: Granite 4's without other layers
LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
POINTWISE_LAYERS = ("mlp", "moe")

# median over tokens of the relative error: below NOISE x what two attention kernels differ by on a chain, plus FLOOR
NOISE = 8.0
FLOOR = {torch.float64: 2e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

# the self-check's tree: leaves [0 1 2 3 4], [0 1 2 5], [0 6 7], [0 6 8 9] of packed indices
CHECK_SUBTREE_END = (10, 6, 6, 5, 5, 6, 10, 8, 10, 10)
CHECK_LEAVES = ((0, 1, 2, 3, 4), (0, 1, 2, 5), (0, 6, 7), (0, 6, 8, 9))
# the first packed token that stands behind another branch: only from here on can a wrong mask show
CHECK_FIRST_FORK = 5


class LazyMask:
    """What the mask function hands to the layers: the arguments of a mask that is built only if a layer needs one.

    A tree forward never needs it (O(T) instead of O(T^2)); without a tree it becomes the mask of ``sdpa`` or ``eager``.
    """

    # as the mask it stands for: a model that is handed one made already asks (transformers 5.24, static cache)
    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._built: dict[str, Tensor | None] = {}

    @property
    def window(self) -> int | None:
        """The sliding window of this mask in path tokens, None for a full one."""
        return self.arguments.get("local_size")

    @property
    def hides_tokens(self) -> bool:
        """Whether the model was given a padding mask that is not all ones (some models make one of ones themselves)."""
        padding = self.arguments.get("attention_mask")
        return padding is not None and not bool(padding.all())

    def build(self, kind: str) -> Tensor | None:
        """The mask as ``sdpa`` or ``eager`` would have got it; built once for all layers."""
        if kind not in self._built:
            self._built[kind] = ALL_MASK_ATTENTION_FUNCTIONS[kind](**self.arguments)
        return self._built[kind]

    def __getitem__(self, index: Any) -> Any:
        """Some models drop leading queries (``mask[:, :, -n:, :]``): a slice that keeps all of them stays lazy."""
        if isinstance(index, tuple) and all(part == slice(None) or part == slice(0, None) for part in index):
            return self
        return self.contiguous()[index]

    def contiguous(self) -> Tensor:
        """Asked for by ``generate`` with a static cache, which makes the masks before it calls the model."""
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**{**self.arguments, "allow_is_causal_skip": False}).contiguous()


def lazy_mask(**arguments: Any) -> LazyMask:
    """Mask function of the attention name ``treegrpo`` (transformers' AttentionMaskInterface)."""
    given = arguments.get("attention_mask")
    if isinstance(given, LazyMask):
        return given
    offset = arguments.get("q_offset")
    if isinstance(offset, Tensor):
        # a static cache counts in place, before a layer asks for the mask
        arguments["q_offset"] = offset.clone()
    return LazyMask(arguments)


def treegrpo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LazyMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    tree_plan: tk.TreePlan | None = None,
    tree_backend: str = "auto",
    tree_deterministic: bool = True,
    tree_trace: list[Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of the name ``treegrpo`` (transformers' AttentionInterface).

    Args:
        query: [1, Hq, T, D], already rotated with ``position_ids`` = depth in the tree.
        key, value: [1, Hkv, T, D], [1, Hkv, T, Dv].
        attention_mask: a ``LazyMask`` or None; with a tree, a mask that hides tokens is refused.
        tree_plan: the forest of the row; None: plain causal attention through ``sdpa`` (softcap, sinks: ``eager``).
        tree_backend, tree_deterministic: ``backend`` and ``deterministic`` of ``treegrpo_kernels.tree_attention``.
        tree_trace: list to which each call appends its module (``check_model`` counts the layers with it).

    Returns:
        (out [1, T, Hq, Dv], None); without a tree what ``sdpa`` or ``eager`` return.

    Raises:
        ValueError: dropout, a batch of several rows, a cache, a mask, a plan of another length; each with its cure.
    """
    for name in kwargs:
        # transformers passes unknown keywords on in silence: a misspelt plan would train on plain causal attention
        if name.startswith("tree"):
            raise ValueError(f"unknown keyword {name!r} of model(...): the tree goes in as tree_plan=")
    if tree_plan is None:
        return _attend_without_tree(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, s_aux, **kwargs
        )
    recurrent.check_taught(module)
    window = _check_call(module, query, key, attention_mask, dropout, sliding_window, kwargs)
    if tree_trace is not None:
        tree_trace.append(module)
    options = dict(scale=scaling, window=window, softcap=softcap, sinks=s_aux)
    return attend(query, key, value, tree_plan, **options, backend=tree_backend, deterministic=tree_deterministic), None


def attend(query: Tensor, key: Tensor, value: Tensor, plan: tk.TreePlan, **options: Any) -> Tensor:
    """``treegrpo_kernels.tree_attention`` on heads-first rows: query [1, Hq, T, D], key [1, Hkv, T, D] and value
    [1, Hkv, T, Dv] -> out [1, T, Hq, Dv], in autocast's dtype where that is on."""
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        # under autocast rotary embeddings leave q and k in float32 beside a v in low precision
        dtype = torch.get_autocast_dtype(device)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        return tk.tree_attention(q, k, v, plan, **options).unsqueeze(0)


def _check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | LazyMask | None,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> int | None:
    """Refuses what a packed tree cannot mean; returns the layer's window."""
    layer = type(module).__name__
    if dropout:
        raise ValueError(
            f"dropout is {dropout} in {layer}: a shared token has one dropout mask but a chain draws one per leaf;"
            " set attention_dropout = 0 in the model's config"
        )
    if query.shape[0] != 1:
        raise ValueError(f"input_ids has {query.shape[0]} rows: pack all trees into one row [1, T]")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{layer} sees {key.shape[2]} keys for {query.shape[2]} tokens: pass use_cache=False with a tree"
        )
    if isinstance(mask, Tensor) and not is_blank(mask):
        raise ValueError("attention_mask must be None with tree_plan: the plan is the mask")
    if isinstance(mask, LazyMask):
        if mask.hides_tokens:
            raise ValueError("attention_mask must be None with tree_plan: a packed row has no padding")
        # eager and sdpa take the window from the mask alone, flash kernels from the keyword: the mask decides
        if mask.window is not None and sliding_window is not None and mask.window != sliding_window:
            raise ValueError(f"{layer} asks for window {sliding_window} but its mask has {mask.window}")
        sliding_window = mask.window
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not available with tree_plan: attention weights are never built")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{layer} adds a position bias to its scores, which tree attention does not compute")
    # sparse attention: names of the selected keys, which sdpa finds in its mask instead
    if kwargs.get("indices") is not None or kwargs.get("block_indices") is not None:
        raise ValueError(f"{layer} selects the keys that it sees, tree attention sees all: take another model")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{layer} is not causal: a tree orders its tokens from the root down")
    return sliding_window


def _attend_without_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | LazyMask | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Plain causal attention, ``sdpa`` bit for bit; the model's own ``eager`` where sdpa lacks softcap or sinks."""
    kind = "sdpa" if softcap is None and s_aux is None else "eager"
    if isinstance(mask, LazyMask):
        mask = mask.build(kind)
    elif kind == "eager" and mask is not None and mask.dtype == torch.bool:
        # eager adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    for name, x in (("sliding_window", sliding_window), ("softcap", softcap), ("s_aux", s_aux)):
        if x is not None:
            kwargs[name] = x
    if kind == "sdpa":
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    else:
        attend = sys.modules[type(module).__module__].eager_attention_forward
    return attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def register() -> None:
    """Registers attention and mask function under the name ``treegrpo``; done on import, harmless twice."""
    AttentionInterface.register(ATTENTION, treegrpo_attention)
    AttentionMaskInterface.register(ATTENTION, lazy_mask)


register()


def use_tree_attention(model: nn.Module, *, check: bool = True) -> nn.Module:
    """Sets the attention of a transformers model (wrapped by PEFT or not) to ``treegrpo``, checks it, returns it.

    Call it before the model is wrapped by DDP or FSDP and never around a training forward: gradient checkpointing uses
    what is set at backward time. Raises ``ValueError`` for a model that does not run through tree attention, and leaves
    it the attention it had.
    """
    base = unwrap(model)
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"{type(adapter).__name__} puts virtual tokens before every row, which a packed tree has no place for: take"
            " an adapter that changes weights, such as LoRA"
        )
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(base).__name__} is not a transformers model: tree attention needs a PreTrainedModel")
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation(ATTENTION)
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{type(base).__name__} does not accept attention {ATTENTION!r}: {error}") from error
    if base.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"{type(base).__name__} keeps attention {base.config._attn_implementation!r}: its layers do not go through"
            " transformers' AttentionInterface; take another model"
        )
    recurrent.teach(base)
    if check:
        try:
            check_model(model)
        except BaseException:
            base.set_attn_implementation(before)
            raise
    return model


def check_model(model: nn.Module, *, numeric: bool = True) -> None:
    """Raises ``ValueError``, with reason and cure, for a model that would not compute a packed tree exactly.

    Checks the configuration, counts the attention calls of one forward over ten tokens, and (``numeric``) compares that
    forward with each of its four leaves run alone without a tree, and the log-prob head with the model's own logits.
    Dropout and other draws of training are refused; no gradients, training flags restored. The paths are five tokens
    long: a longer window is not exercised here.
    """
    base = unwrap(model)
    name = type(base).__name__
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    attention = getattr(config, "_attn_implementation", None)
    if attention != ATTENTION:
        raise ValueError(
            f"{name} runs attention {attention!r}, not {ATTENTION!r}: load it with attn_implementation={ATTENTION!r}"
            " or call treegrpo.hf.use_tree_attention(model)"
        )
    recurrent.teach(base)
    known = {*LAYER_TYPES, *POINTWISE_LAYERS, *recurrent.teachable(base)}
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if foreign:
        raise ValueError(
            f"{name} has layers of type {', '.join(foreign)}, which read the packed row as one sequence and would"
            f" mix siblings (and chains packed in one row, too): {recurrent.cure(set(foreign))}"
        )
    if getattr(config, "attn_temperature_tuning", False):
        raise ValueError(
            f"{name} has attn_temperature_tuning: it scales queries by their place in the row, which is not that on"
            " their path; take another model"
        )
    if any("dynamic" in rope_kind(settings) for settings in rope_settings(config)):
        raise ValueError(
            f"{name} has rope_type dynamic: its rotation depends on the longest row seen so far, so a leaf alone and in"
            " a row differ; give the config another rope_type (yarn, linear) or take another model"
        )
    check_dropout(base)
    with _quiet(model):
        logits, plan, ids = _dry_forward(model, base, config)
        if numeric:
            _compare_with_leaves(model, name, logits, ids)
            _compare_head(model, logits, plan, ids)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """No gradients, every module in eval mode, flags restored one by one."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _dry_forward(model: nn.Module, base: PreTrainedModel, config: Any) -> tuple[Tensor, tk.TreePlan, Tensor]:
    """logits [10, vocab] of the self-check's tree, after counting the layers that ran through tree attention."""
    name = type(base).__name__
    embedding = base.get_input_embeddings()
    # not of the weight, which may be sharded
    device, num_tokens = embedding.weight.device, getattr(embedding, "num_embeddings", len(embedding.weight))
    plan = tk.TreePlan.build(torch.tensor(CHECK_SUBTREE_END), device=device)
    ids = torch.linspace(1, num_tokens - 2, plan.num_tokens, device=device).long()
    inputs = {"input_ids": ids[None], "position_ids": plan.position[None].long()}
    calls: list[Any] = []
    try:
        out = model(**inputs, attention_mask=None, use_cache=False, tree_plan=plan, tree_trace=calls)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} does not hand keywords and masks of model(...) through to its attention ({error}): take a newer"
            " transformers or another model"
        ) from error
    kinds = list(getattr(config, "layer_types", None) or ())
    for mark in recurrent.MARKS:
        expected = sum(recurrent.SEES_BY.get(kind) == mark for kind in kinds)
        # a layer with a recurrence has a convolution, too
        if expected and calls.count(mark) < expected:
            raise ValueError(
                f"{calls.count(mark)} of {name}'s {expected} layers with a {mark} were given the tree: the others would"
                f" mix siblings; {recurrent.cure(set(kinds), 'leave out what replaces their forward, or take ')}"
            )
    layers = config.num_hidden_layers - sum(kind not in (*LAYER_TYPES, "hybrid") for kind in kinds)
    attended = [call for call in calls if isinstance(call, nn.Module)]
    if len({id(module) for module in attended}) != layers or len(attended) != layers:
        raise ValueError(
            f"{len(attended)} of {name}'s {layers} layers ran through tree attention: the others ignore the tree and"
            " would mix siblings; take a model all of whose layers go through transformers' AttentionInterface"
        )
    return out.logits[0], plan, ids


def _compare_with_leaves(model: nn.Module, name: str, logits: Tensor, ids: Tensor) -> None:
    """The packed forward against each leaf alone without a tree; the yardstick is a chain through both attentions."""
    errors = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
    for leaf in CHECK_LEAVES:
        rows = torch.tensor(leaf, device=ids.device)
        errors[list(leaf)] = _relative_error(logits[rows], _forward_alone(model, ids[rows]))
    longest = torch.tensor(CHECK_LEAVES[0], device=ids.device)
    chain = tk.TreePlan.build(torch.full((len(longest),), len(longest)), device=ids.device)
    alone, chained = _forward_alone(model, ids[longest]), _forward_alone(model, ids[longest], tree_plan=chain)
    noise = float(_relative_error(chained, alone).median())
    # not that of the logits alone: a head in float32 makes the layers no more precise
    floor = max(FLOOR[x.dtype] for x in (logits, *model.parameters()) if x.dtype in FLOOR)
    # float32 products on a GPU may run in TF32
    if floor == FLOOR[torch.float32] and logits.is_cuda:
        floor = 1e-3
    if noise > 10 * floor:
        raise ValueError(
            f"{name} computes a plain chain differently through {ATTENTION!r} than through sdpa (relative error"
            f" {noise:.1e}): it hands its attention an argument that tree attention does not know; take another model"
        )
    # the median, for in low precision one token may be routed to another expert without anything being wrong
    error = float(errors[CHECK_FIRST_FORK:].median())
    if not error <= NOISE * noise + floor:
        raise ValueError(
            f"{name} computes a packed tree differently from its leaves alone (relative error {error:.1e}, rounding"
            f" {noise:.1e}): some layer mixes siblings; take a model whose layers are all attention"
        )


def _forward_alone(model: nn.Module, ids: Tensor, **tree: Any) -> Tensor:
    positions = torch.arange(len(ids), device=ids.device)[None]
    return model(input_ids=ids[None], position_ids=positions, attention_mask=None, use_cache=False, **tree).logits[0]


def _relative_error(x: Tensor, reference: Tensor) -> Tensor:
    """Per row: root mean square of the difference over that of the reference, both centred; float64 on the CPU."""
    x, reference = x.double().cpu(), reference.double().cpu()
    reference = reference - reference.mean(-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)
    return (x - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)


def _compare_head(model: nn.Module, logits: Tensor, plan: tk.TreePlan, ids: Tensor) -> None:
    """The chunked log-prob head against the model's own logits: finds a logit transform that it does not know."""
    rows = torch.arange(len(ids), device=ids.device)
    ours = row_logprobs(model, ids, plan, rows, ids)
    wide = logits.to(torch.float64)
    theirs = torch.log_softmax(wide, -1)[rows, ids]
    # logits of a low-precision model carry one rounding each, of the size of the logits, whatever they are cast to
    dtypes = {logits.dtype, output_head(unwrap(model)).weight.dtype}
    bound = float(wide.abs().max()) * 2 * max(torch.finfo(dtype).eps for dtype in dtypes) + 1e-5
    error = float((ours.double() - theirs).abs().max())
    if not error <= bound:
        raise ValueError(
            f"{type(unwrap(model)).__name__} transforms its logits in a way the log-prob head does not know (log-probs"
            f" off by {error:.1e}): teach treegrpo.logprobs.logit_transform its config, or take another model"
        )
