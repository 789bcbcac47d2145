"""Rollouts from a completions server over HTTP: token ids go out, token ids and log-probs come back.

openai   POST /v1/completions as vLLM serves it: `prompt` is a list of ids, `return_token_ids` brings the sampled ids
         (older servers: `return_tokens_as_token_ids`, ids as texts "token_id:17")
sglang   POST /generate, SGLang's own endpoint: `input_ids`, `meta_info.output_token_logprobs` as (log-prob, id, _)
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import importlib.util
import logging
import math
import os
import random
import shutil
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload
from urllib.parse import urlsplit

import torch

from treegrpo.rollout.answers import (
    BadAnswer,
    as_object,
    check_sampled,
    excerpt,
    field,
    parse,
    read_openai,
    read_sglang,
)
from treegrpo.rollout.engine import Completion, EngineError, SamplingParams, checked_prompt
from treegrpo.rollout.weights import save_checkpoint

logger = logging.getLogger(__name__)

DIALECTS = ("auto", "openai", "sglang")
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""Said in every request: vLLM otherwise takes them from the model's generation_config.json, SGLang from its flag
--preferred-sampling-params."""
SGLANG_MARGIN = 6
"""SGLang refuses a prompt that leaves fewer than 7 tokens of its context length."""
MAX_BODY = 64 * 2**20
"""Bytes of an answer at most; 100k tokens with log-probs are about 10 MB."""


class ServerEngine:
    """Samples from any OpenAI-compatible completions server that speaks token ids.

    Log-probs must be those of the distribution the token was drawn from, after temperature and top_p. The client
    cannot see whether they are; where they are not, the trainer's metric `sampling/sampling_logp_difference` is large
    from the first step. Start vLLM (0.22 and later) as

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --enable-prompt-tokens-details

    without the second flag its log-probs are those before temperature; without the last all prompt tokens count as
    prefilled; the development mode is needed for `sync_dir` alone, and its endpoints belong on no public address.
    SGLang (0.5.4 and later):

        python -m sglang.launch_server --model-path MODEL --enable-deterministic-inference

    without that flag it ignores the seed; with it a seed's tokens still depend on whether another request of the moment
    has top_p below 1 or temperature 0, and attention back ends other than fa3, fa4 and triton lose the prefix cache.
    Its log-probs are those before top_p: leave top_p at 1. Its context is 6 tokens shorter than it says, for it refuses
    longer prompts: a max_context_length of your own has to allow for that.

    Weights reach the server in one of three ways, and `sync_weights` raises where none was chosen, since a server whose
    weights never change trains off-policy in silence:
    `sync_dir` (a folder the server sees under the same path: each sync writes a checkpoint there, asks the server to
    load it, drops its prefix cache and removes the checkpoint before; SGLang: /update_weights_from_disk, which drops
    the cache too; vLLM: /collective_rpc reload_weights, /reset_prefix_cache, both in its development mode),
    `sync` (your function of the model, which also drops the server's prefix cache), or
    `frozen=True` (evaluation: the weights stay).

    Args:
        url: http or https address of the server; a final /v1 is dropped.
        tokenizer: of the model; its end of sequence stops every completion.
        model: the name the server gives the model; None takes the only one it lists.
        dialect: "openai", "sglang" or "auto", which asks the server once.
        max_context_length: prompt and completion together; None asks the server.
        vocab_size: ids at or above it are refused; None takes the tokenizer's length.
        api_key: sent as a bearer token; None reads the environment variable TREEGRPO_API_KEY.
        timeout: seconds one try may take, waiting in the server's queue included.
        max_retries: further tries after a lost connection, a time-out, HTTP 429 or 5xx.
        backoff: seconds before the first further try, doubled each time up to 30, times a random 0.5 to 1.
        sync_timeout: seconds the server may take to load weights.

    Raises:
        ValueError: an argument that makes no sense, or no HTTP client is installed.
        EngineError: the server must be asked something and does not answer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        model: str | None = None,
        dialect: str = "auto",
        max_context_length: int | None = None,
        vocab_size: int | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        sync: Callable[[torch.nn.Module], None] | None = None,
        sync_dir: str | Path | None = None,
        sync_timeout: float = 600.0,
        frozen: bool = False,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"dialect={dialect!r}: choose one of {', '.join(DIALECTS)}")
        for name, seconds in (("timeout", timeout), ("sync_timeout", sync_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name}={seconds}: give a number of seconds above 0")
        if max_retries < 0 or not 0 <= backoff < math.inf:
            raise ValueError(f"max_retries={max_retries}, backoff={backoff}: give numbers, at least 0")
        if (sync is not None) + (sync_dir is not None) + frozen > 1:
            raise ValueError("sync, sync_dir, frozen: choose one of them")
        self.url = _checked_url(url)
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.timeout, self.max_retries, self.backoff = timeout, max_retries, backoff
        self.num_requests = 0
        """Tries sent, the repeated ones included."""
        self.num_retries = 0
        self._httpx = _import_httpx()
        self._api_key = os.environ.get("TREEGRPO_API_KEY") if api_key is None else api_key
        self._clients: Any = weakref.WeakKeyDictionary()
        self._sync, self._frozen, self._sync_timeout = sync, frozen, sync_timeout
        self._sync_dir = None if sync_dir is None else Path(sync_dir).resolve()
        self._num_syncs = 0
        self._synced: Path | None = None
        self._is_closed = False
        self.model, self.dialect = model, dialect
        # 0 until the server has said it
        self.max_context_length = max_context_length or 0
        if dialect == "auto" or max_context_length is None or (model is None and dialect == "openai"):
            _run(self._ask_server())

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: str = "") -> Completion:
        """See `RolloutEngine.generate`. `session` is not needed: the server finds shared prefixes by itself.

        Raises:
            EngineError: unreachable, too slow, or the answer is not one: ids outside the vocabulary, another number of
                log-probs than ids, log-probs that are not finite or above 0, another prompt than the one sent.
        """
        # SGLang looks at no id, and one beyond its embedding ends the whole server
        prompt, room = checked_prompt(prompt_ids, self.max_context_length, self.vocab_size)
        max_tokens = min(sampling.max_tokens, room)
        build, read = {"openai": (self._openai_body, read_openai), "sglang": (self._sglang_body, read_sglang)}[
            self.dialect
        ]
        path = "/v1/completions" if self.dialect == "openai" else "/generate"
        data = await self._request("POST", path, build(prompt, sampling, max_tokens))
        try:
            ids, logprobs, reason, cached = read(parse(data), prompt)
            check_sampled(ids, logprobs, reason, max_tokens, self.vocab_size)
            if self.dialect == "sglang":
                num, reason = self._ended(ids, reason, sampling)
                ids, logprobs = ids[:num], logprobs[:num]
        except BadAnswer as error:
            raise EngineError(f"{self.url}{path}: {error}; it answered {excerpt(data)}") from None
        num_prefilled = len(prompt) if cached is None else min(max(len(prompt) - cached, 0), len(prompt))
        return Completion(ids, [min(float(p), 0.0) for p in logprobs], reason, num_prefilled)

    async def release(self, session: str) -> None:
        """Nothing to do: the server drops what it no longer needs."""

    def sync_weights(self, model: torch.nn.Module) -> None:
        """See `RolloutEngine.sync_weights` and the class."""
        if self._frozen:
            return
        if self._sync is not None:
            self._sync(model)
            return
        if self._sync_dir is None:
            raise ValueError(
                "the server would go on sampling from old weights: give sync_dir (a folder the server reads, weights"
                " go through it), sync (a function that brings the model's weights to it), or frozen=True if they are"
                " to stay"
            )
        self._num_syncs += 1
        folder = save_checkpoint(model, self._sync_dir / f"weights-{os.getpid()}-{id(self):x}-{self._num_syncs}")
        try:
            _run(self._load(folder))
        except EngineError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self._synced is not None:
            shutil.rmtree(self._synced, ignore_errors=True)
        self._synced = folder

    def close(self) -> None:
        """Refuses further calls. Connections last one request each, so none is left open; the last checkpoint in
        sync_dir stays, the server may still read it."""
        self._is_closed = True
        self._clients.clear()

    def _openai_body(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": self._stop_token_ids(sampling),
            "include_stop_str_in_output": True,
            # stop texts may be special tokens, which the server would otherwise not see in its text
            "skip_special_tokens": False,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": False,
            **NEUTRAL,
            "top_k": 0,
        }
        return body if self.model is None else {"model": self.model, **body}

    def _sglang_body(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> dict[str, Any]:
        return {
            "input_ids": prompt,
            "return_logprob": True,
            "stream": False,
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "sampling_seed": sampling.seed,
                "stop": list(sampling.stop),
                "stop_token_ids": self._stop_token_ids(sampling),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                **NEUTRAL,
                "top_k": -1,
            },
        }

    def _ended(self, ids: list[int], reason: str, sampling: SamplingParams) -> tuple[int, str]:
        """How many tokens SGLang should have sampled, and why no more. It looks for a stop text in as many tokens as
        the text's own encoding has, and one: what is spelled in more runs on. Versions 0.5.3 to 0.5.9
        call an end at max_tokens "length"."""

        def holds(num: int) -> bool:
            text = self.tokenizer.decode(ids[:num], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return any(stop in text for stop in sampling.stop)

        if sampling.stop and holds(len(ids)):
            return 1 + bisect.bisect_left(range(1, len(ids) + 1), True, key=holds), "stop"
        return len(ids), "stop" if ids[-1] in self._stop_token_ids(sampling) else reason

    def _stop_token_ids(self, sampling: SamplingParams) -> list[int]:
        end = self.tokenizer.eos_token_id
        return sorted({*sampling.stop_token_ids, *([] if end is None else [end])})

    async def _ask_server(self) -> None:
        """Fills in dialect, model and max_context_length where they were left open."""
        if self.dialect == "auto":
            is_sglang = False
            for path in ("/get_model_info", "/model_info"):
                data = await self._request("GET", path, missing_ok=True)
                is_sglang = is_sglang or (data is not None and b"model_path" in data)
            self.dialect = "sglang" if is_sglang else "openai"
            logger.info("%s speaks the %s dialect", self.url, self.dialect)
        data = await self._request("GET", "/v1/models", missing_ok=self.dialect == "sglang")
        try:
            models = [] if data is None else field(parse(data), "data", list)
            names = [field(as_object(entry, "a listed model"), "id", str) for entry in models]
            if self.model is None and self.dialect == "openai":
                if len(names) != 1:
                    raise ValueError(f"{self.url} serves {names}: say which by model")
                self.model = names[0]
            if not self.max_context_length:
                # after an update of its weights SGLang names the model by the checkpoint's folder
                margin, asked = (SGLANG_MARGIN, None) if self.dialect == "sglang" else (0, self.model)
                lengths = [
                    m.get("max_model_len") for m, name in zip(models, names, strict=True) if asked in (None, name)
                ]
                if not lengths or type(lengths[0]) is not int or lengths[0] < 2 + margin:
                    raise ValueError(f"{self.url} does not tell its context length: give max_context_length")
                self.max_context_length = lengths[0] - margin
        except BadAnswer as error:
            raise EngineError(f"{self.url}/v1/models: {error}; it answered {excerpt(data or b'')}") from None

    async def _load(self, folder: Path) -> None:
        if self.dialect == "sglang":
            path = "/update_weights_from_disk"
            data = await self._request("POST", path, {"model_path": str(folder)}, timeout=self._sync_timeout)
            try:
                if not field(parse(data), "success", bool):
                    raise BadAnswer("the server did not load the weights")
            except BadAnswer as error:
                raise EngineError(f"{self.url}{path}: {error}; it answered {excerpt(data)}") from None
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        # without the query vLLM answers 200 and keeps the cache where a request is still running
        for path, sent in (("/collective_rpc", body), ("/reset_prefix_cache?reset_running_requests=true", None)):
            if await self._request("POST", path, sent, timeout=self._sync_timeout, missing_ok=True) is None:
                raise EngineError(f"{self.url} has no {path}: start vLLM with VLLM_SERVER_DEV_MODE=1, or give sync")

    @overload
    async def _request(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> bytes: ...

    @overload
    async def _request(
        self, method: str, path: str, body: Any = None, *, timeout: float | None = None, missing_ok: bool
    ) -> bytes | None: ...

    async def _request(
        self, method: str, path: str, body: Any = None, *, timeout: float | None = None, missing_ok: bool = False
    ) -> bytes | None:
        """The body of a 2xx answer, None where the server may lack the endpoint and does. Tries again what may pass."""
        if self._is_closed:
            raise EngineError(f"{self.url}: this engine is closed")
        timeout = self.timeout if timeout is None else timeout
        start, tries = time.monotonic(), 0
        while True:
            tries += 1
            self.num_requests += 1
            try:
                status, data = await asyncio.wait_for(self._send(method, path, body, timeout), timeout)
                if 200 <= status < 300:
                    return data
                if status in (404, 405) and missing_ok:
                    return None
                if status != 429 and status < 500:
                    moved = " (redirects are not followed: give the final address)" if 300 <= status < 400 else ""
                    raise EngineError(
                        f"{self.url}{path}: the server refused with HTTP {status}{moved}: {excerpt(data)}"
                    )
                problem = f"HTTP {status}: {excerpt(data)}"
            # one class from Python 3.11 on
            except (asyncio.TimeoutError, TimeoutError):
                problem = f"no answer within {timeout:g} s"
            except self._httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except self._httpx.RequestError as error:
                raise EngineError(f"{self.url}{path}: {type(error).__name__}: {error}") from error
            if tries > self.max_retries:
                raise EngineError(
                    f"{self.url}{path}: unreachable or too slow after {tries} tries over"
                    f" {time.monotonic() - start:.1f} s (last: {problem}): is the server running, and is the address"
                    " right? If it is busy, raise timeout or ask for less at once"
                )
            self.num_retries += 1
            logger.warning("%s%s, try %d: %s", self.url, path, tries, problem)
            await asyncio.sleep(min(self.backoff * 2 ** (tries - 1), 30.0) * random.uniform(0.5, 1.0))

    async def _send(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, bytes]:
        client = self._client()
        connect = self._httpx.Timeout(None, connect=min(timeout, 10.0))
        async with client.stream(method, self.url + path, json=body, timeout=connect) as response:
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_BODY:
                    raise EngineError(
                        f"{self.url}{path}: the answer is larger than {MAX_BODY} bytes: {excerpt(bytes(data))}"
                    )
            return response.status_code, bytes(data)

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
            if self._api_key:
                headers["Authorization"] = f"Bearer {self._api_key}"
            # a connection for each request: none outlives its event loop, none is found closed by the server
            limits = self._httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._clients[loop] = self._httpx.AsyncClient(headers=headers, limits=limits, follow_redirects=False)
        return self._clients[loop]


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"url={url!r}: give an address like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _import_httpx() -> Any:
    # httpx2 is what huggingface_hub 2 brings along
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ValueError("a server engine needs an HTTP client: pip install httpx")


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs to the end in a thread of its own, so that it does not matter whether this one has an event loop. An
    interrupt ends it: a server may take its time."""
    begun: Future[tuple[asyncio.AbstractEventLoop, Any]] = Future()

    async def known() -> None:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, known())
        try:
            done.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            # it may just have ended
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
            raise
