"""The hf engine against `generate` and a plain forward of each sequence alone; which models and prompts it takes."""

from __future__ import annotations

import pytest
import tiny_engine
import torch
import transformers
from packaging.version import Version
from tiny import VOCAB
from tiny_engine import END, FAMILIES, PROMPTS, alone, forward_logprobs, greedy, make_model, together

from treegrpo.hf import use_tree_attention
from treegrpo.rollout.engine import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("session", ["", "s"])
def test_greedy_is_generate_on_each_prompt_alone(family, session, make_engine):
    model = make_model(**FAMILIES[family])
    engine = make_engine(model)
    results = together(engine, [(prompt, greedy(8 + 3 * i)) for i, prompt in enumerate(PROMPTS)], session)
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        expected = alone(model, prompt, 8 + 3 * i)
        assert result.token_ids == expected
        assert result.finish_reason == ("stop" if expected[-1] == END else "length")
        reference = forward_logprobs(model, prompt, expected)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_tree_attention_models_sample_as_sdpa_ones(make_engine):
    plain, tree = make_model(), use_tree_attention(make_model())
    calls = [(prompt, greedy()) for prompt in PROMPTS]
    a, b = together(make_engine(plain), calls), together(make_engine(tree), calls)
    assert [x.token_ids for x in a] == [x.token_ids for x in b]


def test_sampled_logprobs_are_of_the_distribution_drawn_from(make_engine):
    model = make_model()
    calls = [(prompt, SamplingParams(max_tokens=15, temperature=1.7, seed=i)) for i, prompt in enumerate(PROMPTS)]
    for (prompt, _), result in zip(calls, together(make_engine(model), calls), strict=True):
        reference = forward_logprobs(model, prompt, result.token_ids, 1.7)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(make_engine):
    engine = make_engine()
    calls = [
        (
            PROMPTS[i % 5],
            SamplingParams(max_tokens=3 + 5 * (i % 4), temperature=0.5 * (i % 3), top_p=1 - 0.2 * (i % 2), seed=i),
        )
        for i in range(20)
    ]
    crowd = together(engine, calls)
    for call, result in zip(calls, crowd, strict=True):
        single = together(engine, [call])[0]
        assert single.token_ids == result.token_ids
        assert single.logprobs == pytest.approx(result.logprobs, abs=1e-5)
    assert len({tuple(result.token_ids) for result in crowd}) > 10


def test_a_small_batch_bound_changes_nothing(make_engine):
    calls = [(PROMPTS[i % 5], SamplingParams(max_tokens=2 + i, seed=i)) for i in range(12)]
    wide, narrow = together(make_engine(), calls), together(make_engine(max_batch=3), calls)
    assert [x.token_ids for x in wide] == [x.token_ids for x in narrow]


def test_a_row_outlives_its_neighbour_and_the_columns_it_left(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)
    prompts = (list(range(3, 33)), list(range(10, 30)))
    _, result = together(engine, [(prompts[0], greedy(2)), (prompts[1], greedy(150))])
    reference = forward_logprobs(model, prompts[1], result.token_ids)
    torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_room_ends_a_completion_and_bad_prompts_are_refused(make_engine):
    engine = make_engine(ends=False, max_context_length=10)
    result = together(engine, [([5, 6, 7, 8], greedy(50))])[0]
    assert (len(result.token_ids), result.finish_reason) == (6, "length")
    for prompt, message in (([], "empty"), ([5] * 10, "max_context_length=10"), ([5, VOCAB], r"prompt_ids\[1\]")):
        with pytest.raises(ValueError, match=message):
            together(engine, [(prompt, greedy())])
    for options, message in (({"max_context_length": 10**6}, "256 positions"), ({"max_batch": 0}, "max_batch")):
        with pytest.raises(ValueError, match=message):
            make_engine(**options)


WINDOWED = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def test_a_window_as_long_as_the_context_is_served(make_engine):
    model = make_model(**WINDOWED)
    assert "sliding_attention" in model.config.layer_types
    with pytest.raises(ValueError, match="sliding window of 24"):
        make_engine(model)
    engine = make_engine(model, max_context_length=24)
    together(engine, [(list(range(3, 18)), greedy(4))], "s")
    prompts = [[*range(3, 18), 40], [*range(20, 36)], [5], [7, 8]]
    for prompt, result in zip(prompts, together(engine, [(p, greedy(8)) for p in prompts], "s"), strict=True):
        assert result.token_ids == alone(model, prompt, 8)
        reference = forward_logprobs(model, prompt, result.token_ids)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba", "num_hidden_layers": 2, "state_size": 4},
        pytest.param(
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
            marks=pytest.mark.skipif(Version(transformers.__version__) >= Version("5.17"), reason="served since"),
        ),
        {"model_type": "bloom", "n_layer": 2, "n_head": 4},
    ],
)
def test_models_without_plain_keys_and_values_are_refused(changes, make_engine):
    with pytest.raises(ValueError, match="another engine"):
        make_engine(make_model(**changes), max_context_length=64)
