"""A real server process that serves a real tiny model in both dialects, clients of it, and the same model in this
process; shared by the tests of the server engine. A test file takes the fixtures by assignment."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import completions_server
import pytest

from treegrpo.envs.base import Environment, StepResult
from treegrpo.rollout.engine import SamplingParams
from treegrpo.rollout.server import ServerEngine

PROMPT = [1, 5, 9, 11]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
DIALECTS = ("openai", "sglang")


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """One process for all tests of a file: `{dialect: address}`."""
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


def expected(model, tokenizer, prompt, sampling, **options):
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
        **options,
    )


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
