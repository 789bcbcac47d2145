"""Honest FLOPs: what training on flattened chains costs, and on the packed tree, from a model's config.

Letters: T forwarded tokens, h hidden size, Hq and Hkv query and key/value heads, D head dim, f MLP width, V vocabulary,
W window; K taps of a short convolution; Hv value heads of a gated-delta layer, each with a state S of Dk x Dv. One
definition (DEFINITION below) is printed with every number; matmuls only, as every MFU convention does. The baseline is
the best chain: padding-free, LM head on trained tokens only. So the ratio contains no padding gains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from treegrpo.packing import TreeBatch
    from treegrpo.tree import RolloutTree

DEFINITION = """\
forward FLOPs = linear + recurrent + attention + head
training = 3 x forward (model FLOPs: no recompute, no masked tile elements)
  linear     2 x matmul parameters per forwarded token, all layers; no embedding, no norms; MoE: router, active experts;
             the K weights a short convolution has for each channel are parameters too
  recurrent  6 x Dk x Dv x Hv per forwarded token and gated-delta layer: reading S k, adding k v^T, reading S q, however
             a kernel chunks them; the decay of S is no product
  attention  4 x D x Hq per visible (query, key) pair and attention layer, pairs exact: chain sum n(n+1)/2, tree sum of
             depth+1; in a sliding layer of window W a query sees at most W tokens of its path, itself included
  head       2 x h x V per projected row; a row is a trained token (of every leaf: chain, or unique: tree)
chain = every leaf on its own, padding-free, head on trained tokens only"""

# Families whose layer is attention with separate or fused q, k, v, o projections and one MLP; each is checked in the
# tests against the matmuls a tiny model of it really runs.
GATED_MLP = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "lfm2", "lfm3", "llama", "mistral",
    "olmo", "olmo2", "olmo3", "olmo_hybrid", "phi3", "qwen2", "qwen3", "qwen3_5_text", "smollm3",
)  # fmt: skip
PLAIN_MLP = ("gpt2", "gpt_neox", "opt", "starcoder2")
# These know no grouped queries, whatever their config says.
MULTI_HEAD = ("gpt2", "gpt_neox", "opt")
MOE = (
    "gpt_oss", "granitemoe", "lfm2_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
)  # fmt: skip
SHARED_EXPERT = ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
# Their layers of type linear_attention have a gated delta rule, behind a short convolution, in place of attention.
GATED_DELTA = ("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
# Their layers of type conv have a short convolution in place of attention.
SHORT_CONV = ("lfm2", "lfm2_moe", "lfm3")
# Their query projection is twice as wide: the other half gates the output of attention.
GATED_QUERY = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")


@dataclass(frozen=True)
class ModelShape:
    """The matmuls of one model: everything the FLOP count needs."""

    name: str
    linear_parameters: int
    """Matmul parameters one token passes through, all layers, LM head excluded."""
    pair_width: int
    """Hq * D: multiply-adds of q k^T (and of p v) per visible pair and attention layer."""
    windows: tuple[int, ...]
    """Per attention layer: window in tokens, 0 for full attention."""
    head_parameters: int
    """h * V."""
    state_elements: int = 0
    """Hv * Dk * Dv, all gated-delta layers: multiply-adds of each of a token's three products with their states."""


@dataclass(frozen=True)
class Cost:
    """Forward cost of one way to lay the rollouts out. `pairs` are visible pairs under full attention."""

    tokens: int
    pairs: int
    head_rows: int
    linear: int
    attention: int
    head: int
    recurrent: int = 0

    @property
    def forward(self) -> int:
        return self.linear + self.recurrent + self.attention + self.head

    @property
    def training(self) -> int:
        return 3 * self.forward


@dataclass(frozen=True)
class ChainVsTree:
    """What `report` returns: both costs, their ratios (chain over tree), and the definition they follow."""

    model: str
    num_trees: int
    num_leaves: int
    share_across_groups: bool
    """Whether tokens that several groups begin with were counted once (all groups packed into one batch)."""
    chain: Cost
    tree: Cost
    definition: str = DEFINITION

    @property
    def token_ratio(self) -> float:
        return self.chain.tokens / self.tree.tokens

    @property
    def pair_ratio(self) -> float:
        return self.chain.pairs / self.tree.pairs

    @property
    def flop_ratio(self) -> float:
        return self.chain.forward / self.tree.forward

    def _rows(self) -> list[tuple[str, int, int]]:
        recurrent = ("recurrent",) if self.chain.recurrent else ()
        names = ("tokens", "pairs", "head_rows", "linear", *recurrent, "attention", "head", "forward", "training")
        return [(name, getattr(self.chain, name), getattr(self.tree, name)) for name in names]

    def table(self) -> str:
        """Plain text: one line per part, chain, tree, chain / tree; then the definition."""
        shared = "shared across groups" if self.share_across_groups else "each group on its own"
        lines = [
            f"{self.model}: {self.num_trees} groups, {self.num_leaves} leaves, {shared}",
            f"{'':<18}{'chain':>14}{'tree':>14}{'chain / tree':>14}",
        ]
        for name, chain, tree in self._rows():
            is_flops = name not in ("tokens", "pairs", "head_rows")
            label = f"{name} FLOPs" if is_flops else name.replace("_", " ")
            ratio = f"{chain / tree:.2f}x" if tree else "-"
            lines.append(f"{label:<18}{_number(chain, is_flops):>14}{_number(tree, is_flops):>14}{ratio:>14}")
        return "\n".join([*lines, "", self.definition])

    def to_dict(self) -> dict[str, Any]:
        """Every field, the totals `forward` and `training` of both costs, and the three ratios, as plain values."""

        def cost(side: Cost) -> dict[str, int]:
            return asdict(side) | {"forward": side.forward, "training": side.training}

        ratios = {"token_ratio": self.token_ratio, "pair_ratio": self.pair_ratio, "flop_ratio": self.flop_ratio}
        return asdict(self) | {"chain": cost(self.chain), "tree": cost(self.tree)} | ratios

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _number(value: int, is_flops: bool) -> str:
    if not is_flops:
        return f"{value:,}"
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return str(value)


def _load_config(config: Any) -> Any:
    """A transformers decoder config from a config object, a dict, or the path of a config.json or its folder."""
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"config: there is no file {path}; give the path of a config.json or of its folder")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config: {path} is not JSON ({error})") from error
    if isinstance(config, Mapping):
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type is None:
            raise ValueError("config: 'model_type' is missing, so the family's formula is not known; add e.g. 'qwen2'")
        from transformers import CONFIG_MAPPING, AutoConfig

        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"config: model_type {model_type!r} is not known to the installed transformers")
        config = AutoConfig.for_model(model_type, **values)
    if not hasattr(config, "model_type"):
        raise ValueError(f"config is a {type(config).__name__}: give a transformers config, a dict, or a path")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _moe_parameters(config: Any, layer: int) -> int:
    """Router and active experts of one layer; dense layers and shared experts included."""
    h, kind = config.hidden_size, config.model_type
    if kind in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        is_dense = layer in (config.mlp_only_layers or []) or (layer + 1) % config.decoder_sparse_step
    else:
        is_dense = kind == "lfm2_moe" and layer < config.num_dense_layers
    is_narrow = kind in (*SHARED_EXPERT, "lfm2_moe", "qwen3_moe")
    num_experts = config.num_experts if is_narrow or kind == "olmoe" else config.num_local_experts
    if is_dense or not num_experts:
        return 3 * h * config.intermediate_size
    width = config.moe_intermediate_size if is_narrow else config.intermediate_size
    parameters = h * num_experts + config.num_experts_per_tok * 3 * h * width
    if kind in SHARED_EXPERT:
        parameters += 3 * h * config.shared_expert_intermediate_size + h
    return parameters


def _mlp_width(config: Any) -> int:
    """The width of every layer's MLP, where there are no experts."""
    kind = config.model_type
    # gpt2 leaves n_inner None for 4 h
    width = getattr(config, {"gpt2": "n_inner", "opt": "ffn_dim"}.get(kind, "intermediate_size"))
    width = width or 4 * config.hidden_size
    if kind == "lfm2" and config.block_auto_adjust_ff_dim:
        # the config's is that of an MLP without gate
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention_parameters(config: Any) -> int:
    """Projections of one attention layer, gates of its output included."""
    h, heads, head_dim, kind = config.hidden_size, config.num_attention_heads, _head_dim(config), config.model_type
    kv_heads = heads if kind in MULTI_HEAD else getattr(config, "num_key_value_heads", None) or heads
    queries = 2 * heads if kind in GATED_QUERY else heads
    parameters = h * head_dim * (queries + 2 * kv_heads) + heads * head_dim * h
    if kind == "lfm3" and config.use_attention_gate:
        parameters += h * heads
    return parameters


def _other_mixer(config: Any) -> tuple[int, int]:
    """What one layer has in place of attention: (matmul parameters, elements of its states)."""
    h = config.hidden_size
    if config.model_type in SHORT_CONV:
        # in: the channels, and a gate before the convolution and one after it
        return h * 3 * h + config.conv_L_cache * h + h * h, 0
    value_heads, key_dim = config.linear_num_value_heads, config.linear_key_head_dim
    keys, values = config.linear_num_key_heads * key_dim, value_heads * config.linear_value_head_dim
    # in: q, k, v, a gate as wide as v, and for each value head its decay and its beta
    parameters = h * (2 * keys + 2 * values + 2 * value_heads) + values * h
    return parameters + config.linear_conv_kernel_dim * (2 * keys + values), key_dim * values


def _windows(config: Any) -> tuple[int, ...]:
    """Window per attention layer, 0 for full; a config without layer_types that has a window applies it to all."""
    window = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    attention, family = {"full_attention", "sliding_attention"}, config.model_type
    other = {"linear_attention"} if family in GATED_DELTA else {"conv"} if family in SHORT_CONV else set()
    unknown, known = sorted(set(kinds) - attention - other), sorted(attention | other)
    if unknown:
        raise ValueError(f"config: layers of type {unknown} are not known in {family}; known are {known}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds if kind in attention)


def model_shape(config: Any) -> ModelShape:
    """The matmuls of a transformers decoder config (object, dict, or path of a config.json).

    Raises ValueError for a family whose layers are not known here (other linear attention, MLA, ...), naming it.
    """
    config = _load_config(config)
    kind = config.model_type
    if kind not in GATED_MLP + PLAIN_MLP + MOE:
        known = ", ".join(sorted(GATED_MLP + PLAIN_MLP + MOE))
        raise ValueError(f"config: the layers of model_type {kind!r} are not known here; known are {known}")
    h, layers, windows = config.hidden_size, config.num_hidden_layers, _windows(config)
    if kind == "opt" and config.word_embed_proj_dim != h:
        raise ValueError("config: opt with word_embed_proj_dim != hidden_size projects its embeddings; not known here")
    if kind in MOE:
        mlp = sum(_moe_parameters(config, layer) for layer in range(layers))
    else:
        mlp = layers * (3 if kind in GATED_MLP else 2) * h * _mlp_width(config)
    others = layers - len(windows)
    other_parameters, state_elements = _other_mixer(config) if others else (0, 0)
    return ModelShape(
        name=getattr(config, "name_or_path", "") or kind,
        linear_parameters=len(windows) * _attention_parameters(config) + others * other_parameters + mlp,
        pair_width=config.num_attention_heads * _head_dim(config),
        windows=windows,
        head_parameters=h * config.vocab_size,
        state_elements=others * state_elements,
    )


def _chain_pairs(lengths: np.ndarray, window: int) -> int:
    """Causal pairs of chains: n (n + 1) / 2, or with a window the sum of min(depth + 1, window)."""
    lengths = lengths.astype(np.int64)
    ramp = np.minimum(lengths, window) if window else lengths
    return int((ramp * (ramp + 1) // 2 + (lengths - ramp) * window).sum())


def _tree_pairs(positions: Sequence[np.ndarray], window: int) -> int:
    visible = (position.astype(np.int64) + 1 for position in positions)
    return sum(int((np.minimum(seen, window) if window else seen).sum()) for seen in visible)


def _cost(shape: ModelShape, tokens: int, head_rows: int, pairs_of: dict[int, int]) -> Cost:
    return Cost(
        tokens=tokens,
        pairs=pairs_of[0],
        head_rows=head_rows,
        linear=2 * shape.linear_parameters * tokens,
        attention=sum(4 * shape.pair_width * pairs_of[window] for window in shape.windows),
        head=2 * shape.head_parameters * head_rows,
        recurrent=6 * shape.state_elements * tokens,
    )


def _unique_trained(tree: RolloutTree) -> int:
    trained = np.zeros(tree.num_tokens, bool)
    mask = np.concatenate([trajectory.loss_mask for trajectory in tree.trajectories])
    trained[tree.trie.leaf_tokens[mask.astype(bool)]] = True
    return int(trained.sum())


def report(config: Any, trees: Sequence[RolloutTree], *, share_across_groups: bool = False) -> ChainVsTree:
    """Tokens, pairs and forward FLOPs of `trees`, as flattened chains and as packed trees.

    Args:
        config: any transformers decoder config: the object, a dict, or the path of a config.json.
        trees: RolloutTrees, one per prompt.
        share_across_groups: False counts every group's tree on its own. True counts tokens that several groups begin
            with (a common system prompt) once, by packing all of `trees` into one batch; with a token budget, where
            they are spread over batches, the truth lies between the two.

    Raises:
        ValueError: no trees; a config that cannot be read, or whose family is not known.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("trees is empty: there is nothing to count")
    shape = model_shape(config)
    if share_across_groups:
        from treegrpo.packing import pack

        (batch,) = pack(trees, share_across_groups=True)
        return _compare(shape, trees, [batch.position_ids.numpy()], int(batch.trained.sum()), True)
    return _compare(shape, trees, [tree.trie.position for tree in trees], sum(map(_unique_trained, trees)), False)


def report_batch(config: Any, batch: TreeBatch, lengths: np.ndarray | None = None) -> ChainVsTree:
    """What `report` says of a packed row as it is: what its groups begin with counts once where it stands there once.

    The chains are its leaves, or samples of `lengths` (int [n]) that train each of the leaves' trained tokens once.

    Raises ValueError for a config that cannot be read, or whose family is not known.
    """
    shared = batch.num_tokens < sum(tree.num_tokens for tree in batch.trees)
    positions, tree_rows = batch.position_ids.cpu().numpy(), int(batch.trained.sum())
    return _compare(model_shape(config), batch.trees, [positions], tree_rows, shared, lengths)


def _compare(
    shape: ModelShape,
    trees: Sequence[RolloutTree],
    positions: Sequence[np.ndarray],
    tree_rows: int,
    shared: bool,
    lengths: np.ndarray | None = None,
) -> ChainVsTree:
    windows = {0, *shape.windows}
    if lengths is None:
        lengths = np.array([trajectory.num_tokens for tree in trees for trajectory in tree.trajectories])
    chain_rows = sum(int(np.count_nonzero(t.loss_mask)) for tree in trees for t in tree.trajectories)
    chain_pairs = {window: _chain_pairs(lengths, window) for window in windows}
    tree_pairs = {window: _tree_pairs(positions, window) for window in windows}
    return ChainVsTree(
        model=shape.name,
        num_trees=len(trees),
        num_leaves=len(lengths),
        share_across_groups=shared,
        chain=_cost(shape, int(lengths.sum()), chain_rows, chain_pairs),
        tree=_cost(shape, sum(position.size for position in positions), tree_rows, tree_pairs),
    )
