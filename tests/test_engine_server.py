"""The client of completions servers against a real server process that serves a real tiny model (both dialects), and
against one that is unreachable, slow or answers garbage."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import completions_server
import numpy as np
import pytest
import torch

from treegrpo.envs.base import Environment, StepResult
from treegrpo.rollout.engine import Completion, EngineError, SamplingParams
from treegrpo.rollout.search import SearchOptions, search
from treegrpo.rollout.server import MAX_BODY, ServerEngine

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [1, 5, 9, 11]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
DIALECTS = ("openai", "sglang")


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """One process for all tests: `{dialect: address}`."""
    log = tmp_path_factory.mktemp("server") / "stderr.txt"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("completions_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            ports = process.stdout.readline().split()
            assert len(ports) == 2, log.read_text()
            yield {d: f"http://127.0.0.1:{int(p)}" for d, p in zip(DIALECTS, ports, strict=True)}
        finally:
            process.communicate()
            assert process.returncode == 0


@pytest.fixture(scope="module")
def tokenizer():
    return completions_server.tiny_tokenizer()


@pytest.fixture(scope="module")
def model(one_thread):
    return completions_server.tiny_model()


@pytest.fixture
def engine(urls, tokenizer):
    made = []

    def make(served="openai", **options):
        options = {"backoff": 0.01, "frozen": "sync" not in options and "sync_dir" not in options, **options}
        made.append(ServerEngine(urls[served], tokenizer, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()


def seen(url):
    with urllib.request.urlopen(url + "/count", timeout=10) as response:
        return json.load(response)


def misbehave(engine, kind, times=1, **more):
    post(engine.url + "/misbehave", {"kind": kind, "times": times, **more})


def generate(engine, prompt=PROMPT, sampling=GREEDY):
    return asyncio.run(engine.generate(prompt, sampling))


def expected(model, tokenizer, prompt, sampling):
    return completions_server.complete(
        model,
        tokenizer,
        prompt,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=list(sampling.stop),
        stop_token_ids=[*sampling.stop_token_ids, tokenizer.eos_token_id],
        seed=sampling.seed,
    )


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
    ids, logprobs, reason = expected(model, tokenizer, PROMPT, sampling)
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
    assert (one.dialect, one.max_context_length) == (dialect, completions_server.CONTEXT)
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


# what a server may do wrong


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_unreachable(tokenizer):
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"unreachable or too slow after 4 tries over .* s \(last: ConnectError"):
        ServerEngine(url, tokenizer, max_retries=3, backoff=0.01)
    late = ServerEngine(
        url, tokenizer, dialect="openai", model="m", max_context_length=99, max_retries=2, backoff=0.01, frozen=True
    )
    with pytest.raises(EngineError, match=r"after 3 tries .* is the server running"):
        generate(late)
    assert (late.num_requests, late.num_retries) == (3, 2)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["sleep", "drip"])
def test_too_slow(engine, kind):
    """A server that sends a byte now and then is as slow as one that is silent."""
    one = engine(timeout=0.3, max_retries=1)
    misbehave(one, kind, 2)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"too slow after 2 tries over .* \(last: no answer within 0.3 s\)"):
        generate(one)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("dialect", "kind", "message"),
    [
        ("openai", "not json", r"not JSON .*<html>it works!</html>"),
        ("sglang", "not json", r"not JSON .*<html>it works!</html>"),
        ("openai", "deep", r"not JSON .*and 199800 bytes"),
        ("openai", "a list", r"the answer is not a JSON object; it answered '\[1, 2\]'"),
        ("openai", "empty object", "choices is missing or no list"),
        ("sglang", "empty object", "meta_info is missing or no dict"),
        ("openai", "nan", "log-prob 7 is nan"),
        ("sglang", "nan", "log-prob 7 is nan"),
        ("openai", "minus infinity", "log-prob 7 is -inf"),
        ("sglang", "positive", "log-prob 7 is 0.5, not a finite number up to 0"),
        ("openai", "null", "log-prob 7 is None"),
        ("openai", "lengths", "8 token ids but 7 log-probs"),
        ("sglang", "lengths", "8 completion_tokens but 7 log-probs"),
        ("openai", "no token", "no token was sampled"),
        ("sglang", "no token", "no token was sampled"),
        ("openai", "too many", "400 tokens where max_tokens is 8"),
        ("openai", "big id", "token 7 is 48, not an id below the vocabulary size 48"),
        ("sglang", "negative id", "token 7 is -1"),
        ("sglang", "text id", "token 7 is '7'"),
        ("openai", "true id", "token 7 is True"),
        ("openai", "no ids", "no token_ids: the server does not answer with token ids"),
        ("openai", "abort", "finish reason 'abort'"),
        ("sglang", "abort", "finish reason 'abort'"),
        ("openai", "other prompt", "changed the prompt's token ids"),
        ("sglang", "other prompt", "counts 5 prompt tokens where 4 were sent"),
        ("openai", "huge", f"larger than {MAX_BODY} bytes"),
    ],
)
def test_garbage_is_named_and_not_asked_for_again(engine, dialect, kind, message):
    one = engine(dialect)
    misbehave(one, kind)
    before = seen(one.url)["completions"]
    with pytest.raises(EngineError, match=message) as caught:
        generate(one)
    assert len(str(caught.value)) < 700
    assert seen(one.url)["completions"] == before + 1
    assert generate(one).finish_reason == "length"


@pytest.mark.parametrize("kind", ["503", "429", "close"])
def test_what_may_pass_is_tried_again(engine, model, tokenizer, kind):
    one = engine("sglang")
    before, asked = seen(one.url)["completions"], one.num_requests
    misbehave(one, kind, 2)
    assert generate(one).token_ids == expected(model, tokenizer, PROMPT, GREEDY)[0]
    assert seen(one.url)["completions"] == before + 3
    assert (one.num_requests, one.num_retries) == (asked + 3, 2)


def test_refusals_and_redirects_are_final(engine):
    one = engine("sglang")
    before = seen(one.url)["completions"]
    with pytest.raises(EngineError, match=r"HTTP 400: .*Token id 99 is out of vocabulary"):
        generate(one, [1, 99])
    misbehave(one, "307")
    with pytest.raises(EngineError, match=r"HTTP 307 .redirects are not followed"):
        generate(one)
    assert seen(one.url)["completions"] == before + 2
    with pytest.raises(EngineError, match=r"HTTP 404: .*model does not exist"):
        generate(engine("openai", model="another", max_context_length=20))


def test_one_failure_leaves_the_other_result(engine, model, tokenizer):
    one = engine(max_retries=1)
    misbehave(one, "503", 2, first_id=3)

    async def run():
        return await asyncio.gather(one.generate([3, 4], GREEDY), one.generate(PROMPT, GREEDY), return_exceptions=True)

    bad, good = asyncio.run(run())
    assert isinstance(bad, EngineError)
    assert "said 503" in str(bad)
    assert good.token_ids == expected(model, tokenizer, PROMPT, GREEDY)[0]


def test_a_cancelled_call_does_not_spoil_the_next(engine, model, tokenizer):
    one = engine()
    misbehave(one, "sleep", 1)

    async def run():
        task = asyncio.create_task(one.generate(PROMPT, GREEDY))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await one.generate(PROMPT, GREEDY)

    assert asyncio.run(run()).token_ids == expected(model, tokenizer, PROMPT, GREEDY)[0]


class Page(BaseHTTPRequestHandler):
    """Says the same to everything, as a web server that knows nothing of models."""

    def do_GET(self):
        body = b"<html>it works!</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_something_else_at_the_address(tokenizer):
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(EngineError, match=r"/v1/models: not JSON .*<html>it works!</html>"):
            ServerEngine(url, tokenizer)
        server.shutdown()


# under a tree search


class Turns(Environment):
    """Two tool calls, whatever is said, then the answer."""

    stop = ("w7", "w8", "</search>")

    def __init__(self):
        self.num_turns = 0

    def reset(self, row):
        self.num_turns = 0
        return row["prompt"]

    def step(self, action, *, is_last=False):
        self.num_turns += 1
        done = is_last or self.num_turns == 3
        return StepResult(done=done, observation=None if done else " w40 w41", num_tool_calls=0 if done else 1)


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


def test_groups_that_are_complete_survive_a_server_that_fails_later(engine):
    one = engine(max_retries=1)
    misbehave(one, "503", 99, first_id=completions_server.WORDS.index("w9"))
    kept, first_is_kept = [], threading.Event()

    class Second(Turns):
        def reset(self, row):
            assert row["prompt"] != "w9 w10" or first_is_kept.wait(10)
            return super().reset(row)

    def keep(group):
        kept.append(group)
        first_is_kept.set()

    options = SearchOptions(num_trees=1, num_expansions=1, num_rounds=1, max_tokens=4, max_turns=3)
    rows = [{"prompt": "w1 w2 w3"}, {"prompt": "w9 w10"}]
    try:
        with pytest.raises(EngineError, match=r"after 2 tries .*said 503"):
            search(one, Second, rows, groups=["good", "bad"], options=options, seeds=[1, 2], on_group=keep)
    finally:
        misbehave(one, "503", 0)
    assert [group.group for group in kept] == ["good"]
    assert len(kept[0].trajectories) == 2


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
        load, reset = seen(one.url)["calls"][-2:]
        assert (load, reset.partition("?")[0]) == {
            "openai": ("/collective_rpc", "/reset_prefix_cache"),
            "sglang": ("/update_weights_from_disk", "/flush_cache"),
        }[dialect]
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
    one = engine("sglang", sync_dir=tmp_path, dialect="openai", model="tiny")
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
