"""The client of completions servers against a server that is unreachable, slow or answers garbage."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import completions_server
import pytest
import served_engine
from served_engine import GREEDY, PROMPT, Turns, expected, generate, misbehave, seen

from treegrpo.rollout import server
from treegrpo.rollout.engine import EngineError
from treegrpo.rollout.search import SearchOptions, search
from treegrpo.rollout.server import MAX_BODY, ServerEngine

pytestmark = pytest.mark.usefixtures("one_thread")
urls, tokenizer, model, engine = served_engine.urls, served_engine.tokenizer, served_engine.model, served_engine.engine


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
        ("openai", "beyond float32", r"log-prob 7 is -1e\+300"),
        ("sglang", "beyond float64", "log-prob 7 is -1000"),
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
    # SGLang would end at such an id
    asked = one.num_requests
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] is 99, but the model has ids 0 to 47"):
        generate(one, [1, 99])
    with pytest.raises(ValueError, match=rf"prompt_ids\[1\] is {2**70}"):
        generate(one, [1, 2**70])
    assert one.num_requests == asked
    misbehave(one, "400")
    with pytest.raises(EngineError, match=r"HTTP 400: .*said 400"):
        generate(one)
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
    before = seen(one.url)["completions"]

    async def run():
        task = asyncio.create_task(one.generate(PROMPT, GREEDY))
        # the server sleeps over this call, not over the next
        while (await asyncio.to_thread(seen, one.url))["completions"] == before:
            await asyncio.sleep(0.01)
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


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait_for_the_server():
    """As where it hangs while it loads weights."""
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    begun = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        server._run(asyncio.sleep(10))
    assert time.monotonic() - begun < 5
