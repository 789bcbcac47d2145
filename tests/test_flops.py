"""The FLOP model: published examples, parts by hand, windows by brute force; configs and tables."""

import json

import numpy as np
import pytest
import torch
from models import COMMON, tiny_config

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


def test_config_as_object_dict_file_and_folder(tmp_path):
    config = tiny_config("qwen2")
    config.save_pretrained(tmp_path)
    expected = flops.model_shape(config)
    stored = json.loads((tmp_path / "config.json").read_text())
    for given in (stored, tmp_path, str(tmp_path / "config.json")):
        assert flops.model_shape(given) == expected
    assert flops.model_shape({"model_type": "qwen2", **COMMON}) == expected


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
