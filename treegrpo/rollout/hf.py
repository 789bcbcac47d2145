"""The `hf` engine: samples from a transformers decoder in this process, every branch from its parent's keys and values.

All live branches of all prompts are one batch: an iteration computes what is new of the prompts that came in, then one
token for every row. It runs in a single worker thread, so the event loop is free for tools.

Shape legend: B rows, V vocabulary, P columns of cached prefixes.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from treegrpo.logprobs import unwrap
from treegrpo.rollout import hybrid, kv, layers
from treegrpo.rollout.engine import Completion, EngineError, SamplingParams, checked_prompt
from treegrpo.rollout.sampling import Draw, StopText, sample

MAX_PREFILL_COLUMNS = 32768
"""Rows times columns of one prefill forward, cached ones and padding included; a longer prompt goes alone."""
UNIFORM_BLOCK = 64
"""Random numbers a request draws at a time."""


@dataclass(slots=True, eq=False)
class _Request:
    """One awaited completion; a row of the batch while it is sampled."""

    ids: list[int]
    sampling: SamplingParams
    limit: int
    """Tokens to sample at most."""
    session: kv.PrefixTree | None
    future: asyncio.Future[Completion]
    watched: Collection[int]
    """Token ids after which the end has to be looked for."""
    random: np.random.Generator
    uniforms: list[float] = field(default_factory=list)
    """Drawn ahead, next one last."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_prefilled: int = 0

    @property
    def is_awaited(self) -> bool:
        return not self.future.done() and not self.future.get_loop().is_closed()

    def uniform(self) -> float:
        if not self.uniforms:
            self.uniforms = self.random.random(UNIFORM_BLOCK)[::-1].tolist()
        return self.uniforms.pop()


@dataclass(slots=True)
class _Suffix:
    """A prompt to prefill, for all requests of the wave that have it: `pieces` cover its first `num_cached` tokens."""

    requests: list[_Request]
    num_cached: int
    pieces: list[kv.Piece]

    @property
    def new_ids(self) -> list[int]:
        return self.requests[0].ids[self.num_cached :]


class _DecodePlan:
    """What stays the same from one token to the next while no row joins or leaves."""

    def __init__(self, rows: list[_Request], starts: list[int], device: torch.device) -> None:
        self.columns = starts
        """The batch's list: another one once it has moved its columns."""
        self.starts = torch.tensor(starts, device=device)
        """int64 [B]: the batch column of each row's first token."""
        self.is_padded = any(starts)
        self.last = torch.tensor([(row.token_ids or row.ids)[-1] for row in rows], device=device)
        """int64 [B]: the tokens sampled last, or of prompts, replaced at every step."""
        self.draw = Draw.of([row.sampling for row in rows], device)


class HFEngine:
    """`RolloutEngine` over a transformers decoder in this process.

    Prefixes are kept per session until `release`; the session "" keeps none, there only identical prompts that arrive
    together share. One event loop at a time; several one after the other are fine. Rows are left-padded, so logits
    differ in the last bits with what else is in the batch.

    Of hybrid models (`layers.HYBRIDS`, with transformers 5.17 and newer) a prefix is continued where a state was kept:
    before the last token of each prompt, and of each prompt with its completion. A branch from between is computed from
    the nearest such place before it; every request decodes the last token of its prompt itself. A kept state stays on
    the model's device until `release`, or `max_state_bytes` are full. It takes, however long the prefix, 4 Hv Dk Dv
    bytes and a little for each layer of linear attention (75 MB for Qwen3-Next 80B: as much as keys and values of 3,000
    tokens), and so does each row of the batch.

    Args:
        model: a causal decoder with plain keys and values in every layer, or a hybrid one; wrapped (PEFT, compile) or
            not.
        tokenizer: its tokenizer; its end of sequence and that of the generation config end a completion.
        max_context_length: prompt and completion; the config's max_position_embeddings by default.
        max_batch: rows decoded at once; further requests wait.
        copy_weights: sample from a copy (wrappers taken off, adapters inside kept), which `sync_weights` fills from a
            model of the same structure: one thread may then train while another samples. False samples from `model`.
        max_state_bytes: what kept states of a hybrid model may take, those used longest ago are then computed again; by
            default a quarter of what is free on a GPU now, and on a CPU what they need.

    Raises:
        ValueError: a model that caches something else than plain keys and values, or in a hybrid something else than
            one state a layer beside them; one whose sliding window is shorter than the context, or whose Mamba layers
            bound their time steps.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_context_length: int | None = None,
        max_batch: int = 256,
        copy_weights: bool = False,
        max_state_bytes: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: decode at least one row at once")
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.num_prefilled = 0
        """Prompt tokens computed so far."""
        self.num_generated = 0
        """Tokens sampled so far, those of cancelled requests included."""
        self._copies = copy_weights
        self._model = _copy(unwrap(model)) if copy_weights else unwrap(model)
        self.max_context_length = layers.context_length(self._model, max_context_length)
        self._window = layers.check_layers(self._model, self.max_context_length)
        self._shape = layers.probe_shape(self._model)
        self._keep, self._cache_name = layers.keywords(self._model)
        if max_state_bytes is None and self._shape.device.type == "cuda":
            max_state_bytes = torch.cuda.mem_get_info(self._shape.device)[0] // 4
        self._kept = kv.KeptStates(math.inf if max_state_bytes is None else max_state_bytes)
        self._end_ids = _end_ids(self._model, tokenizer)
        self._stop_text = StopText(tokenizer)
        self._sessions: dict[str, kv.PrefixTree] = {}
        self._waiting: list[_Request] = []
        self._in_flight: set[_Request] = set()
        self._driver: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        self._is_closed = False
        # from here on only the worker thread reads and writes
        self._pending: deque[_Request] = deque()
        self._rows: list[_Request] = []
        self._batch = kv.KVBatch(self._shape)
        self._plan: _DecodePlan | None = None

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: str = "") -> Completion:
        """One completion; see `RolloutEngine.generate`. EngineError, with the cause, where a forward failed."""
        if self._is_closed:
            raise EngineError("the engine is closed: make a new one")
        # one id outside would fail the forward of everybody
        vocab_size = self._model.get_input_embeddings().weight.shape[0]
        ids, room = checked_prompt(prompt_ids, self.max_context_length, vocab_size)
        limit = min(sampling.max_tokens, room)
        future = asyncio.get_running_loop().create_future()
        tree = self._sessions.setdefault(session, kv.PrefixTree(kept=self._kept)) if session else None
        watched = self._stop_text.watched(sampling, self._end_ids)
        random = np.random.default_rng(sampling.seed % 2**64)
        request = _Request(ids, sampling, limit, tree, future, watched, random)
        self._waiting.append(request)
        self._in_flight.add(request)
        self._start()
        try:
            return await future
        finally:
            self._in_flight.discard(request)

    async def release(self, session: str) -> None:
        """Forgets a session's prefixes; what is still being sampled for it goes on."""
        self._sessions.pop(session, None)

    def sync_weights(self, model: nn.Module) -> None:
        """See `RolloutEngine.sync_weights`. RuntimeError while something is being generated."""
        if any(request.is_awaited for request in self._in_flight):
            raise RuntimeError("sync_weights was called while completions are being sampled: await them first")
        if self._is_closed:
            raise EngineError("the engine is closed: make a new one")
        self._executor.submit(self._forget).result()
        self._sessions.clear()
        source = unwrap(model)
        if self._copies:
            _fill(self._model, source)
        elif source is not self._model:
            self._window, self._shape = layers.check_layers(source, self.max_context_length), layers.probe_shape(source)
            self._model, self._batch = source, kv.KVBatch(self._shape)
            self._keep, self._cache_name = layers.keywords(source)

    def close(self) -> None:
        """Frees caches and the thread; what is still being generated is cancelled."""
        if self._is_closed:
            return
        self._is_closed = True
        for request in self._in_flight:
            if request.is_awaited:
                request.future.cancel()
        self._executor.submit(self._forget).result()
        self._executor.shutdown()
        self._sessions.clear()

    def _forget(self) -> None:
        self._pending.clear()
        self._rows, self._batch, self._plan = [], kv.KVBatch(self._shape), None

    # the event loop's side

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        driver = self._driver
        if driver is not None and not driver.done():
            if driver.get_loop() is loop:
                return
            if not driver.get_loop().is_closed():
                raise RuntimeError("the engine serves another running event loop: make one engine for each")
        self._driver = loop.create_task(self._drive())

    async def _drive(self) -> None:
        """Iterates while there is something to sample, in the loop of whoever asked first."""
        loop = asyncio.get_running_loop()
        modules: list[nn.Module] = list(self._model.modules())
        try:
            while self._waiting or self._pending or self._rows:
                new, self._waiting = self._waiting, []
                for request, completion in await loop.run_in_executor(self._executor, self._iterate, new, modules):
                    if not request.future.done():
                        request.future.set_result(completion)
                # callers that go on at once join the very next iteration
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            # the loop shuts down, and its requests with it; wait for the worker, which may hold the model in eval mode
            for request in self._in_flight:
                request.future.cancel()
            self._waiting.clear()
            if not self._is_closed:
                self._executor.submit(self._forget).result()
            raise
        except Exception as error:
            # handed to every caller, whoever's row it was: the batch is one forward
            self._waiting.clear()
            for request in [request for request in self._in_flight if request.is_awaited]:
                failure = EngineError(f"sampling failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                request.future.set_exception(failure)

    # the worker thread's side

    def _iterate(self, new: list[_Request], modules: list[nn.Module]) -> list[tuple[_Request, Completion]]:
        self._pending.extend(new)
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            # not inference_mode: the weights may be the trainer's
            with torch.no_grad():
                return self._step()
        except BaseException:
            self._forget()
            raise
        finally:
            for module in training:
                module.training = True

    def _step(self) -> list[tuple[_Request, Completion]]:
        """Drops who gave up, prefills who came, decodes one token for each row; returns who is finished."""
        self._drop([i for i, request in enumerate(self._rows) if not request.is_awaited])
        admitted: list[_Request] = []
        while self._pending and len(self._rows) + len(admitted) < self.max_batch:
            request = self._pending.popleft()
            if request.is_awaited:
                admitted.append(request)
        finished = self._prefill(admitted) if admitted else []
        if self._rows:
            finished += self._decode()
        elif not self._pending:
            self._forget()
        return finished

    def _drop(self, indices: list[int]) -> None:
        if indices:
            order = self._batch.drop(indices)
            self._rows, self._plan = [self._rows[i] for i in order], None

    def _decode(self) -> list[tuple[_Request, Completion]]:
        rows, batch = self._rows, self._batch
        cache = batch.cache(1)
        if self._plan is None or self._plan.columns is not batch.starts:
            self._plan = _DecodePlan(rows, batch.starts, self._shape.device)
        plan = self._plan
        positions = (batch.length - plan.starts)[:, None]
        mask = None
        if plan.is_padded:
            mask = torch.arange(batch.length + 1, device=plan.starts.device) >= plan.starts[:, None]
        logits = self._forward(plan.last[:, None], positions, mask, cache)
        batch.length += 1
        plan.last, finished = self._sample(rows, logits, plan.draw)
        ended = [i for i, request in enumerate(rows) if i in finished]
        for i in ended:
            request = rows[i]
            if request.session is not None:
                # the last sampled token was never forwarded
                ids = request.ids + request.token_ids[:-1]
                request.session.insert(ids, *batch.row(i), state=batch.state(i))
        self._drop(ended)
        return [(rows[i], finished[i]) for i in ended]

    def _prefill(self, admitted: list[_Request]) -> list[tuple[_Request, Completion]]:
        """Computes what no session has yet, once for identical prompts; the rows that go on join the batch."""
        groups: dict[tuple[int, tuple[int, ...]], list[_Request]] = {}
        for request in admitted:
            # without a session, identical prompts still share, under one key
            groups.setdefault((id(request.session), tuple(request.ids)), []).append(request)
        if self._shape.states:
            self._prefill_hybrid(list(groups.values()))
            return []
        suffixes = []
        for requests in groups.values():
            session, ids = requests[0].session, requests[0].ids
            # the last token always runs: its logits are needed
            cached = session.match(ids[:-1]) if session is not None else (0, [])
            suffixes.append(_Suffix(requests, *cached))
        finished = []
        for chunk in self._chunks(suffixes):
            finished += self._prefill_chunk(chunk)
        return finished

    def _chunks(self, suffixes: list[_Suffix]) -> Iterator[list[_Suffix]]:
        """Suffixes of similar length together, so that little is padded."""
        chunk: list[_Suffix] = []
        for suffix in sorted(suffixes, key=lambda suffix: suffix.num_cached - len(suffix.requests[0].ids)):
            if chunk:
                longest = len(chunk[0].new_ids)
                columns = longest + max(s.num_cached for s in (*chunk, suffix))
                if (
                    columns * (len(chunk) + 1) > MAX_PREFILL_COLUMNS
                    or longest > 2 * len(suffix.new_ids) + 16
                    # a gap between prefix and suffix must not push keys out of a window counted in columns
                    or (self._window is not None and columns > self._window)
                ):
                    yield chunk
                    chunk = []
            chunk.append(suffix)
        yield chunk

    def _prefill_chunk(self, chunk: list[_Suffix]) -> list[tuple[_Request, Completion]]:
        """One forward. Columns: cached prefixes right-aligned before column P, new tokens right-aligned behind it."""
        device = self._shape.device
        chunk = sorted(chunk, key=lambda suffix: -suffix.num_cached)
        batch = kv.KVBatch(self._shape)
        width, past = max(len(suffix.new_ids) for suffix in chunk), chunk[0].num_cached
        batch.reserve(len(chunk), past, width)
        for suffix in chunk:
            batch.join(suffix.pieces)
        ids = np.zeros((len(chunk), width), np.int64)
        positions = np.zeros((len(chunk), width), np.int64)
        mask = np.zeros((len(chunk), past + width), bool)
        for i, suffix in enumerate(chunk):
            new = suffix.new_ids
            ids[i, width - len(new) :] = new
            positions[i, width - len(new) :] = np.arange(suffix.num_cached, suffix.num_cached + len(new))
            mask[i, past - suffix.num_cached : past] = True
            mask[i, past + width - len(new) :] = True
        new_ids, new_positions = torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device)
        padding = None if mask.all() else torch.from_numpy(mask).to(device)
        logits = self._forward(new_ids, new_positions, padding, batch.cache(width))
        batch.length += width

        repeats = torch.tensor([len(suffix.requests) for suffix in chunk], device=device)
        rows = [request for suffix in chunk for request in suffix.requests]
        for suffix in chunk:
            suffix.requests[0].num_prefilled = len(suffix.new_ids)
            self.num_prefilled += len(suffix.new_ids)
        draw = Draw.of([row.sampling for row in rows], device)
        _, finished = self._sample(rows, logits.repeat_interleave(repeats, 0), draw)
        self._join(chunk, batch, past, rows, finished)
        return [(rows[i], completion) for i, completion in finished.items()]

    def _join(
        self, chunk: list[_Suffix], batch: kv.KVBatch, past: int, rows: list[_Request], finished: dict[int, Completion]
    ) -> None:
        """Stores what a prefill computed, and puts the requests that go on into the decode batch."""
        going_on = {request for i, request in enumerate(rows) if i not in finished}
        if going_on:
            self._batch.reserve(len(going_on), max(len(request.ids) for request in going_on))
        length = batch.length
        for i, suffix in enumerate(chunk):
            first = suffix.requests[0]
            spans = ((past - suffix.num_cached, past), (length - len(suffix.new_ids), length))
            pieces = [(batch.keys[:, i, :, a:b], batch.values[:, i, :, a:b]) for a, b in spans]
            if first.session is not None:
                first.session.insert(first.ids, *pieces[1], suffix.num_cached)
            stay = [request for request in suffix.requests if request in going_on]
            if stay:
                self._batch.join(pieces, len(stay))
                self._rows = self._rows + stay
        self._plan = None

    def _prefill_hybrid(self, groups: list[list[_Request]]) -> None:
        """Computes all but the last token of each prompt, and puts the requests into the decode batch."""
        prefixes = []
        for requests in groups:
            session, ids = requests[0].session, requests[0].ids[:-1]
            prefixes.append(hybrid.Prefix(ids, *(session.resume(ids) if session is not None else ())))
        hybrid.complete(prefixes, self._shape, self._forward, MAX_PREFILL_COLUMNS)
        self._batch.reserve(sum(map(len, groups)), max(prefix.num_cached for prefix in prefixes))
        for requests, prefix in zip(groups, prefixes, strict=True):
            if requests[0].session is not None and prefix.num_new:
                prefix.store(requests[0].session)
            self._batch.join(prefix.pieces, len(requests), prefix.state)
            self._rows = self._rows + requests
            for request in requests:
                # the last token, in every row
                request.num_prefilled = 1
            requests[0].num_prefilled += prefix.num_new
            self.num_prefilled += prefix.num_new + len(requests)
        self._plan = None

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        """Logits [B, V] behind the last column of `ids` [B, n]; `mask` [B, columns] hides padding."""
        if mask is not None:
            mask = mask.long()
        out = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
            **self._keep,
        )
        return out.logits[:, -1]

    def _sample(self, rows: list[_Request], logits: Tensor, draw: Draw) -> tuple[Tensor, dict[int, Completion]]:
        """Draws a token for each row: the ids [B], and the completions of the rows that are finished by it."""
        uniform = None
        if not draw.is_greedy:
            uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits.device)
        ids, logprobs = sample(logits, draw, uniform)
        self.num_generated += len(rows)
        values = logprobs.tolist()
        if not math.isfinite(sum(values)):
            raise ValueError("the model's logits hold NaN or infinity: the weights have diverged")
        finished = {}
        for i, (row, token, value) in enumerate(zip(rows, ids.tolist(), values, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(value)
            if token in row.watched and self._is_end(row, token):
                finished[i] = Completion(row.token_ids, row.logprobs, "stop", row.num_prefilled)
            elif len(row.token_ids) >= row.limit:
                finished[i] = Completion(row.token_ids, row.logprobs, "length", row.num_prefilled)
        return ids, finished

    def _is_end(self, row: _Request, token: int) -> bool:
        if token in self._end_ids or token in row.sampling.stop_token_ids:
            return True
        return self._stop_text.ends(row.token_ids, row.sampling.stop)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _fill(twin: nn.Module, source: nn.Module) -> None:
    """Loads the weights of `source`, but not what a 4-bit base has in its state beside them, which no module takes."""
    held = {name for of in (twin.named_parameters, twin.named_buffers) for name, _ in of(remove_duplicate=False)}
    extra = twin.state_dict().keys() - held
    twin.load_state_dict({name: value for name, value in source.state_dict().items() if name not in extra})


def _end_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The end of sequence of the tokenizer and those of the generation config (an id, a list of them, or none)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
