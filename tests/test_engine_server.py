"""The client of completions servers against a real server process that serves a real tiny model (both dialects): what
it samples, alone and under a tree search, its weights, its arguments."""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import replace

import completions_server
import numpy as np
import pytest
import served_engine
import torch
from completions_server import CONTEXT
from served_engine import DIALECTS, GREEDY, PROMPT, Turns, expected, generate, misbehave, seen

from treegrpo.rollout.engine import Completion, EngineError, SamplingParams
from treegrpo.rollout.search import SearchOptions, search
from treegrpo.rollout.server import ServerEngine

pytestmark = pytest.mark.usefixtures("one_thread")
urls, tokenizer, model, engine = served_engine.urls, served_engine.tokenizer, served_engine.model, served_engine.engine


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(max_tokens=12, seed=3),
        SamplingParams(max_tokens=12, temperature=0.6, top_p=0.8, seed=4),
        SamplingParams(max_tokens=60, temperature=1.3, seed=5, stop_token_ids=(20, 21, 22, 23)),
        SamplingParams(max_tokens=60, seed=6, stop=("w7", "</search>")),
    ],
    ids=["greedy", "sampled", "nucleus", "stop ids", "stop texts"],
)
def test_ids_and_logprobs_are_those_of_the_model(engine, model, tokenizer, dialect, sampling):
    done = generate(engine(dialect), sampling=sampling)
    # SGLang's log-probs are those before top_p
    ids, logprobs, reason = expected(model, tokenizer, PROMPT, sampling, before_top_p=dialect == "sglang")
    assert done.token_ids == ids
    assert done.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert done.finish_reason == reason
    assert len(set(ids)) > 1
    if sampling.stop:
        assert reason == "stop"
        text = tokenizer.decode(done.token_ids)
        assert any(text.endswith(s) for s in sampling.stop)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_the_server_tells_is_asked_once(engine, dialect, caplog):
    with caplog.at_level(logging.INFO):
        one = engine(dialect)
    assert (one.dialect, one.max_context_length) == (dialect, CONTEXT)
    assert f"speaks the {dialect} dialect" in caplog.text
    asked = one.num_requests
    generate(one)
    generate(one)
    assert one.num_requests == asked + 2
    assert engine(dialect, dialect=dialect, max_context_length=50, model="tiny").num_requests == 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_fork_prefills_only_its_own_tokens(engine, dialect):
    one = engine(dialect)
    prompt = [1, 30, 31, 32, 33, 34]
    first = generate(one, prompt)
    assert first.num_prefilled == len(prompt) - 1  # earlier prompts begin with 1 too
    assert generate(one, prompt).num_prefilled == 1
    assert generate(one, [*prompt, *first.token_ids[:3], 40, 41]).num_prefilled == 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_many_at_once_are_each_what_they_are_alone(engine, model, tokenizer, dialect):
    one = engine(dialect)
    jobs = [([1, 5 + i], SamplingParams(max_tokens=6, seed=i)) for i in range(12)]

    async def run():
        return await asyncio.gather(*(one.generate(p, s, session=str(i)) for i, (p, s) in enumerate(jobs)))

    for done, (prompt, sampling) in zip(asyncio.run(run()), jobs, strict=True):
        assert done.token_ids == expected(model, tokenizer, prompt, sampling)[0]


def test_old_vllm_ids_as_texts(engine, model, tokenizer):
    one = engine()
    misbehave(one, "old")
    assert generate(one).token_ids == expected(model, tokenizer, PROMPT, GREEDY)[0]


def test_max_tokens_ends_where_the_context_does(engine):
    one = engine("sglang", max_context_length=10)
    done = generate(one, sampling=SamplingParams(max_tokens=50, temperature=0.0))
    assert (len(done.token_ids), done.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="10 tokens, which leaves no room below max_context_length=10"):
        generate(one, [1] * 10)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        generate(one, [])


# under a tree search


class Here:
    """The server's model in this process."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.max_context_length = model, tokenizer, completions_server.CONTEXT

    async def generate(self, prompt_ids, sampling, *, session=""):
        return Completion(*expected(self.model, self.tokenizer, list(prompt_ids), sampling), len(prompt_ids))

    async def release(self, session):
        pass


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tree_search_over_the_server_is_the_one_over_the_model(engine, model, tokenizer, dialect):
    options = SearchOptions(num_trees=2, num_expansions=2, num_rounds=1, max_tokens=10, max_turns=3)
    rows = [{"prompt": "w1 w2 w3"}, {"prompt": "w9 w10"}]
    run = functools.partial(search, make_env=Turns, rows=rows, groups=["a", "b"], options=options, seeds=[1, 2])
    served, here = run(engine(dialect)), run(Here(model, tokenizer))
    for one, other in zip(served, here, strict=True):
        assert len(one.trajectories) == 6
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            assert list(a.token_ids) == list(b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        # the shared prefixes of a tree are read from the server's cache
        assert one.stats.prefilled_tokens < other.stats.prefilled_tokens / 2


def test_sglang_takes_fewer_tokens_than_it_says(engine):
    one = engine("sglang")
    assert one.max_context_length == CONTEXT
    assert len(generate(one, [5] * (CONTEXT - 1)).token_ids) == 1
    with pytest.raises(ValueError, match=f"no room below max_context_length={CONTEXT}"):
        generate(one, [5] * CONTEXT)


def test_a_stop_text_that_sglang_missed_ends_the_completion(engine, model, tokenizer):
    """It looks for a text in as many tokens as the text's own encoding has, and one."""
    one = engine("sglang")
    free = SamplingParams(max_tokens=40, seed=3, temperature=1.2)
    ids, logprobs, _ = expected(model, tokenizer, PROMPT, free)
    stop = tokenizer.decode(ids[7:9])
    assert stop not in tokenizer.decode(ids[:8])
    misbehave(one, "missed stop")
    done = generate(one, PROMPT, replace(free, stop=("nothing", stop)))
    assert (done.token_ids, done.finish_reason) == (ids[:9], "stop")
    assert done.logprobs == pytest.approx(logprobs[:9], abs=1e-5)


def test_an_end_at_the_last_place_is_a_stop(engine, model, tokenizer):
    """SGLang 0.5.3 to 0.5.9 looks at max_tokens first."""
    one = engine("sglang")
    ids, _, _ = expected(model, tokenizer, PROMPT, GREEDY)
    misbehave(one, "early length")
    sampling = replace(GREEDY, max_tokens=3, stop_token_ids=(ids[2],))
    assert ids[2] not in ids[:2]
    assert generate(one, PROMPT, sampling).finish_reason == "stop"


# weights


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weight_sync_changes_what_is_sampled(engine, model, tokenizer, dialect, tmp_path):
    one = engine(dialect, sync_dir=tmp_path / "weights")
    other = completions_server.tiny_model(seed=1)
    old, new = (expected(m, tokenizer, PROMPT, GREEDY) for m in (model, other))
    assert old[0] != new[0]
    assert generate(one).token_ids == old[0]
    assert generate(one).num_prefilled == 1
    try:
        one.sync_weights(other)
        done = generate(one)
        assert done.token_ids == new[0]
        assert done.logprobs == pytest.approx(new[1], abs=1e-5)
        assert done.num_prefilled == len(PROMPT), "the cache of the old weights was kept"
        asked = {"openai": ["/collective_rpc", "/reset_prefix_cache"], "sglang": ["/update_weights_from_disk"]}[dialect]
        calls = [call.partition("?")[0] for call in seen(one.url)["calls"]]
        assert calls[-len(asked) :] == asked
        # SGLang answers with an error while another client's request runs, the new weights loaded
        assert "/flush_cache" not in calls
        # which names its model by the checkpoint from then on
        assert engine(dialect, model="tiny").max_context_length == CONTEXT
    finally:
        one.sync_weights(model)
    assert generate(one).token_ids == old[0]
    assert len(list((tmp_path / "weights").iterdir())) == 1, "only the newest checkpoint stays, no temporary folder"


def test_sync_inside_a_running_loop(engine, model, tokenizer, tmp_path):
    one = engine("sglang", sync_dir=tmp_path)

    async def run():
        one.sync_weights(model)
        return await one.generate(PROMPT, GREEDY)

    assert asyncio.run(run()).token_ids == expected(model, tokenizer, PROMPT, GREEDY)[0]


def test_a_way_for_the_weights_must_be_chosen(engine, model):
    with pytest.raises(ValueError, match=r"old weights: give sync_dir .* sync .* frozen=True"):
        engine(frozen=False).sync_weights(model)
    engine(frozen=True).sync_weights(model)
    given = []
    engine(sync=given.append).sync_weights(model)
    assert given == [model]
    with pytest.raises(ValueError, match="choose one of them"):
        engine(sync=given.append, sync_dir="x")


def test_a_server_without_development_mode_says_so(engine, model, tmp_path):
    one = engine("sglang", sync_dir=tmp_path, dialect="openai", model="tiny", max_context_length=CONTEXT)
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        one.sync_weights(model)
    assert not list(tmp_path.iterdir())


# arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://host"}, "give an address like"),
        ({"url": "file:///etc/passwd"}, "give an address like"),
        ({"url": "http://user:secret@host"}, "give an address like"),
        ({"dialect": "grpc"}, "dialect='grpc'"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_arguments(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ServerEngine(**{"url": "http://127.0.0.1:9", "tokenizer": tokenizer, **options})


def test_closed_twice_and_the_key_stays_secret(urls, tokenizer, monkeypatch):
    monkeypatch.setenv("TREEGRPO_API_KEY", "hush-hush")
    one = ServerEngine(urls["openai"] + "/v1/", tokenizer, frozen=True)
    assert one.url == urls["openai"]

    async def header():
        return one._client().headers["Authorization"]

    assert asyncio.run(header()) == "Bearer hush-hush"
    one.close()
    one.close()
    with pytest.raises(EngineError, match="closed") as caught:
        generate(one)
    assert "hush" not in str(caught.value) + repr(one)


def test_saved_weights_are_whole(model, tmp_path):
    """A folder that appears is a whole checkpoint of plain transformers."""
    from transformers import AutoModelForCausalLM

    from treegrpo.rollout.weights import save_checkpoint

    loaded = AutoModelForCausalLM.from_pretrained(save_checkpoint(model, tmp_path / "a" / "b"))
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="exists"):
        save_checkpoint(model, tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="no save_pretrained"):
        save_checkpoint(torch.nn.Linear(1, 1), tmp_path / "c")
