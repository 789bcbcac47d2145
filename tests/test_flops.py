"""The FLOP model: published examples, windows by brute force, and every family against the matmuls it really runs."""

import importlib
import json

import numpy as np
import pytest
import torch
from models import COMMON, EXACT, EXPERTS, WRONG, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig

from treegrpo import Trajectory, build_forest, build_tree, flops, packing
from treegrpo.step import Row, StepData, count_flops

QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
QWEN_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


class Tokens:
    """Fresh runs of distinct tokens, so that nothing is shared by chance."""

    def __init__(self):
        self.next = 0

    def __call__(self, count):
        self.next += count
        return np.arange(self.next - count, self.next)


def grpo_star(prompt, group_size, new):
    fresh = Tokens()
    start = fresh(prompt)
    rows = [np.concatenate([start, fresh(new)]) for _ in range(group_size)]
    mask = np.repeat([0, 1], [prompt, new])
    return build_tree(Trajectory(row, mask, reward=0.0) for row in rows)


def branching_agent(prompt, turns, new, observed, branch):
    """Each turn generates `new` tokens, then reads `observed`; every turn forks `branch` ways."""
    fresh = Tokens()
    paths = [[fresh(prompt)]]
    for _ in range(turns):
        paths = [[*path, fresh(new + observed)] for path in paths for _ in range(branch)]
    mask = np.concatenate([np.zeros(prompt), np.tile(np.repeat([1, 0], [new, observed]), turns)]).astype(int)
    return build_tree(Trajectory(np.concatenate(path), mask, reward=0.0) for path in paths)


CASES = {
    "agent": (lambda: branching_agent(2048, 3, 256, 512, 2), 34816, 12800, 2.44, 2.60),
    "grpo": (lambda: grpo_star(512, 8, 1024), 12288, 8704, 1.29, 1.37),
    "long prompt": (lambda: grpo_star(8192, 16, 512), 139264, 16384, 6.76, 7.72),
}


@pytest.mark.parametrize("case", CASES)
def test_published_examples(case):
    make, chain_tokens, tree_tokens, ratio_05b, ratio_8b = CASES[case]
    trees = [make()]
    small, large = flops.report(QWEN_05B, trees), flops.report(QWEN_8B, trees)
    for result in (small, large):
        assert (result.chain.tokens, result.tree.tokens) == (chain_tokens, tree_tokens)
    assert small.flop_ratio == pytest.approx(ratio_05b, abs=0.005)
    assert large.flop_ratio == pytest.approx(ratio_8b, abs=0.005)
    # distinct completions pay the LM head, so the FLOP ratio lies below the token ratio
    assert small.flop_ratio < small.token_ratio


def test_parts_by_hand():
    """One layer, h 8, two heads of 4, one KV head, f 16, V 32; leaves [1 2 3] and [1 2 4], last token trained."""
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    }
    tree = build_tree(Trajectory([1, 2, last], [0, 0, 1], reward=0.0) for last in (3, 4))
    result = flops.report(config, [tree])
    layer = 8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16
    assert result.chain == flops.Cost(6, 12, 2, 2 * layer * 6, 4 * 4 * 2 * 12, 2 * 8 * 32 * 2)
    assert result.tree == flops.Cost(4, 9, 2, 2 * layer * 4, 4 * 4 * 2 * 9, 2 * 8 * 32 * 2)
    assert result.tree.training == 3 * (result.tree.linear + result.tree.attention + result.tree.head)
    assert result.pair_ratio == 12 / 9 and result.token_ratio == 1.5


HYBRID_BY_HAND = {
    "model_type": "olmo_hybrid",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "vocab_size": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def test_hybrid_parts_by_hand():
    """The leaves above; one of two layers has pairs, the other a state of 4 x 8 in each of two value heads."""
    pytest.importorskip("transformers.models.olmo_hybrid")
    tree = build_tree(Trajectory([1, 2, last], [0, 0, 1], reward=0.0) for last in (3, 4))
    result = flops.report(HYBRID_BY_HAND, [tree])
    mlp = 3 * 8 * 16
    attention = 8 * (8 + 2 * 4) + 8 * 8
    # q and k, v and its gate, two numbers a value head; the convolution of q, k and v; back
    delta = 8 * (2 * 4 + 2 * 16 + 2 * 2) + 3 * (2 * 4 + 16) + 16 * 8
    linear, recurrent = 2 * (attention + delta + 2 * mlp), 2 * 3 * (4 * 8) * 2
    assert result.chain == flops.Cost(6, 12, 2, linear * 6, 4 * 4 * 2 * 12, 2 * 8 * 32 * 2, recurrent * 6)
    assert result.tree == flops.Cost(4, 9, 2, linear * 4, 4 * 4 * 2 * 9, 2 * 8 * 32 * 2, recurrent * 4)
    assert result.tree.forward == (linear + recurrent) * 4 + result.tree.attention + result.tree.head
    assert f"recurrent FLOPs{recurrent * 6:>17}{recurrent * 4:>14}         1.50x" in result.table()
    assert result.to_dict()["tree"]["recurrent"] == recurrent * 4


def test_a_chain_costs_the_same_both_ways():
    tree = build_tree([Trajectory(np.arange(40), [0] * 10 + [1] * 30, reward=1.0)])
    result = flops.report(QWEN_05B, [tree])
    assert result.chain == result.tree and result.flop_ratio == 1


def ancestors(trie, token):
    path = []
    while token >= 0:
        path.append(token)
        token = trie.prev[token]
    return path


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_windows_are_exact(window):
    """Pairs of a sliding layer by walking up from every token; full layers keep all of them."""
    tree = branching_agent(3, 3, 2, 2, 2)
    config = tiny_config("gemma2", sliding_window=window)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    result = flops.report(config, [tree])
    width = config.num_attention_heads * config.head_dim
    seen = [len(ancestors(tree.trie, token)) for token in range(tree.num_tokens)]
    sliding = sum(min(count, window) for count in seen)
    assert result.tree.attention == 4 * width * (sliding + sum(seen))
    lengths = [t.num_tokens for t in tree.trajectories]
    sliding = sum(min(position + 1, window) for n in lengths for position in range(n))
    assert result.chain.attention == 4 * width * (sliding + sum(n * (n + 1) // 2 for n in lengths))


CLAIMED = {*flops.GATED_MLP, *flops.PLAIN_MLP, *flops.MOE}
# two value heads to a key head, and no two sizes alike
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
# a window in a layer, and none where a convolution is
LFM3 = {**CONV, "layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 5}
HYBRID = {
    "qwen3_next": {**SHARED, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**SHARED, **DELTA},
    "olmo_hybrid": DELTA,
    "lfm2": {**CONV, "block_multiple_of": 14, "block_ffn_dim_multiplier": 1.7},
    "lfm2_moe": {**EXPERTS, **CONV, "num_dense_layers": 1},
    "lfm3": LFM3,
}
EXTRA = {
    "olmo": {},
    "qwen2_moe": {**SHARED, "norm_topk_prob": True},
    **HYBRID,
}
KNOWN = [family for family in EXACT if family in CLAIMED - set(EXTRA)]
VARIANTS = {
    "wide heads": ("qwen3", {"head_dim": 16}),
    "no GQA": ("llama", {"num_key_value_heads": 4}),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "windows from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "window unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "gpt2 width": ("gpt2", {"n_inner": 40}),
    "a value head to a key head": ("qwen3_5_text", {**DELTA, "linear_num_value_heads": 2}),
    "head dim from hidden size": ("olmo_hybrid", {**DELTA, "head_dim": None}),
    "hybrid, dense layers": ("qwen3_next", {**SHARED, **DELTA, "mlp_only_layers": [1]}),
    "hybrid, sparse step": ("qwen3_next", {**SHARED, **DELTA, "decoder_sparse_step": 2}),
    "hybrid without experts": ("qwen3_next", {**SHARED, **DELTA, "num_experts": 0}),
    "lfm2 width as given": ("lfm2", {**CONV, "block_auto_adjust_ff_dim": False}),
    "longer convolution": ("lfm2_moe", {**EXPERTS, **CONV, "conv_L_cache": 6, "num_dense_layers": 0}),
    "no gate": ("lfm3", {**LFM3, "use_attention_gate": False}),
}


def family_case(family, overrides, name):
    """Families newer than the installed transformers are skipped."""
    missing = pytest.mark.skipif(family not in CONFIG_MAPPING, reason=f"this transformers has no {family}")
    return pytest.param(family, overrides, id=name, marks=missing)


def test_every_family_claimed_is_checked():
    assert {*KNOWN, *EXTRA} == CLAIMED
    assert set(HYBRID) == {*flops.GATED_DELTA, *flops.SHORT_CONV}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, {}, family) for family in KNOWN]
    + [family_case(family, overrides, family) for family, overrides in EXTRA.items()]
    + [family_case(family, overrides, name) for name, (family, overrides) in VARIANTS.items()],
)
def test_family_against_executed_matmuls(family, overrides):
    """Eager attention multiplies all T x T pairs, so the counter must show linear + 4 Hq D T^2 a layer + head.

    It also shows what is left out here: products of rotary angles, those of a delta rule in chunks (`recurrent` has a
    test of its own), and the outputs of a padded convolution that lie behind the last token.
    """
    model = tiny_model(family, dtype=torch.float32, **overrides)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    num_tokens = 11
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.arange(3, 3 + num_tokens)[None], use_cache=False)
    counts = counter.get_flop_counts()
    # lfm2_moe called it pos_emb
    angles = [by_op for name, by_op in counts.items() if name.endswith(("rotary_emb", "pos_emb"))]
    beside = sum(sum(by_op.values()) for by_op in angles)
    # the projections of a gated-delta layer are mm
    beside += sum(by_op.get(torch.ops.aten.bmm, 0) for name, by_op in counts.items() if name.endswith("linear_attn"))
    # padded by K - 1 on both sides, a convolution has K - 1 outputs more than there are tokens
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv1d)]
    beside += sum(2 * module.weight.numel() * (module.kernel_size[0] - 1) for module in convolutions)
    shape = flops.model_shape(model.config)
    expected = 2 * shape.linear_parameters * num_tokens + 2 * shape.head_parameters * num_tokens
    expected += 4 * shape.pair_width * num_tokens**2 * len(shape.windows)
    assert counter.get_total_flops() - beside == expected
    used = [m.sliding_window or 0 for m in model.modules() if hasattr(m, "sliding_window") and hasattr(m, "o_proj")]
    if used:
        assert shape.windows == tuple(used)


class StateProducts(TorchDispatchMode):
    """Counts the multiply-adds of products as large as a state [1, Hv, Dk, Dv]; its decay, a scalar a head, is none."""

    def __init__(self, state):
        super().__init__()
        self.state, self.multiply_adds = state, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mul.Tensor and result.shape == self.state:
            is_decay = any(factor.shape[-2:] == (1, 1) for factor in args)
            self.multiply_adds += 0 if is_decay else result.numel()
        return result


@pytest.mark.parametrize(
    ("family", "overrides"),
    [family_case(family, HYBRID[family], family) for family in flops.GATED_DELTA]
    + [family_case("qwen3_5_text", {**DELTA, "linear_num_value_heads": 2}, "a value head to a key head")],
)
def test_recurrent_against_the_rule_token_by_token(family, overrides, monkeypatch):
    """transformers' own recurrent rule in place of its chunks: the same logits, and its products are counted."""
    name = family.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    input_ids, counted = torch.arange(3, 14)[None], []

    def rule(query, key, value, **options):
        with StateProducts((1, value.shape[2], key.shape[3], value.shape[3])) as products:
            result = modeling.torch_recurrent_gated_delta_rule(query, key, value, **options)
        counted.append(products.multiply_adds)
        return result

    with torch.no_grad():
        expected = tiny_model(family, **overrides)(input_ids, use_cache=False).logits
        monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", rule)
        model = tiny_model(family, **overrides)
        torch.testing.assert_close(model(input_ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    result = flops.report(model.config, [build_tree([Trajectory(np.arange(11), [0] + [1] * 10, reward=0.0)])])
    assert len(counted) == 2 and result.chain.recurrent == 2 * sum(counted) > 0


@pytest.mark.parametrize("family", [*sorted(set(EXACT) - {*KNOWN, *EXTRA}), "minimax", "mamba2", "llama4_text"])
def test_unknown_families_are_refused(family):
    assert family in EXACT or family in WRONG
    with pytest.raises(ValueError, match=rf"model_type '{family}' are not known here; known are .*qwen3"):
        flops.model_shape(tiny_config(family))


@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_unknown_layer_type_is_refused(family):
    config = tiny_config(family)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=rf"of type \['linear_attention'\] are not known in {family}; known are \["):
        flops.model_shape(config)


def test_config_as_object_dict_file_and_folder(tmp_path):
    config = tiny_config("qwen2")
    config.save_pretrained(tmp_path)
    expected = flops.model_shape(config)
    stored = json.loads((tmp_path / "config.json").read_text())
    for given in (stored, tmp_path, str(tmp_path / "config.json")):
        assert flops.model_shape(given) == expected
    assert flops.model_shape({"model_type": "qwen2", **COMMON}) == expected


@pytest.mark.parametrize(
    ("outer", "family", "overrides"),
    [
        ("qwen3_5", "qwen3_5_text", DELTA),
        ("qwen3_5_moe", "qwen3_5_moe_text", {**SHARED, **DELTA}),
        ("lfm2_vl", "lfm2", CONV),
    ],
)
def test_the_text_config_of_a_nested_one(outer, family, overrides, tmp_path):
    if outer not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {outer}")
    text = tiny_config(family, **overrides)
    config = AutoConfig.for_model(outer, text_config=text.to_dict())
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for given in (config, stored, tmp_path, str(tmp_path / "config.json")):
        assert flops.model_shape(given) == flops.model_shape(text)


def test_bad_configs_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for given, message in [
        (str(tmp_path / "nothing"), "there is no file .*nothing"),
        (tmp_path, "there is no file .*config.json"),
        (broken, "broken.json is not JSON"),
        ({"hidden_size": 8}, "'model_type' is missing"),
        ({"model_type": "no_such_model"}, "'no_such_model' is not known to the installed transformers"),
        (3, "config is a int"),
    ]:
        with pytest.raises(ValueError, match=message):
            flops.model_shape(given)
    with pytest.raises(ValueError, match="trees is empty"):
        flops.report(QWEN_05B, [])


def two_groups_with_one_system_prompt():
    system = list(range(100, 130))
    rows = []
    for group in range(2):
        for leaf in range(3):
            ids = [*system, 10 + group, 20 + leaf, 30, 31]
            mask = [0] * (len(system) + 1) + [1, 1, 1]
            rows.append(Trajectory(ids, mask, reward=0.0, group=str(group)))
    return build_forest(rows)


def test_sharing_across_groups_is_said():
    trees = two_groups_with_one_system_prompt()
    apart, shared = flops.report(QWEN_05B, trees), flops.report(QWEN_05B, trees, share_across_groups=True)
    assert apart.tree.tokens == sum(tree.num_tokens for tree in trees) == 2 * (31 + 9)
    assert shared.tree.tokens == apart.tree.tokens - 30
    assert apart.tree.pairs == sum(tree.num_pairs for tree in trees)
    assert shared.tree.pairs == apart.tree.pairs - 30 * 31 // 2
    assert shared.chain == apart.chain and shared.tree.head_rows == apart.tree.head_rows
    assert "each group on its own" in apart.table() and "shared across groups" in shared.table()
    assert shared.to_dict()["share_across_groups"] is True


@pytest.mark.parametrize("share", [False, True])
def test_a_packed_row_is_counted_as_it_is_and_not_packed_again(share, monkeypatch):
    trees = two_groups_with_one_system_prompt()
    config = QWEN_05B | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 4}
    expected = flops.report(config, trees, share_across_groups=share)
    [batch] = packing.pack(trees, share_across_groups=share)
    monkeypatch.setattr(packing, "token_trie", None)
    data = StepData(trees, [Row.of(batch, torch.zeros(batch.num_chain_tokens))])
    count_flops(data, config)
    assert data.rows[0].cost == expected and len({0, *flops.model_shape(config).windows}) == 2


def test_table_and_json_carry_the_numbers_and_the_definition():
    result = flops.report(QWEN_05B, [grpo_star(64, 4, 32)])
    table = result.table()
    assert flops.DEFINITION in table and "training FLOPs" in table and f"{result.flop_ratio:.2f}x" in table
    loaded = json.loads(result.to_json())
    assert loaded["definition"] == flops.DEFINITION
    assert loaded["tree"]["training"] == result.tree.training and loaded["flop_ratio"] == result.flop_ratio
    assert loaded["chain"]["tokens"] == 4 * 96 and loaded["tree"]["tokens"] == 64 + 4 * 32
    # no row of zeros where no layer has a state
    assert "recurrent FLOPs" not in table and loaded["chain"]["recurrent"] == loaded["tree"]["recurrent"] == 0
