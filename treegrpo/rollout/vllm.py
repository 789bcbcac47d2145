"""Rollouts from vLLM in this process."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from treegrpo.rollout.answers import BadAnswer, check_sampled
from treegrpo.rollout.engine import Completion, EngineError, SamplingParams, checked_prompt
from treegrpo.rollout.weights import checkpoint_weights, save_checkpoint

FIXED = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": True}
"""What `LLM` is always built with: log-probs after temperature and top_p, and a fork that is a prefix hit."""


class VLLMEngine:
    """Samples with `vllm.LLM` (0.22 to 0.33: `pip install vllm` for a GPU, or its build for CPUs).

    Calls are batched: what waits goes into one `LLM.generate`, run by one worker thread; what arrives meanwhile forms
    the next batch. Inside a batch vLLM schedules freely, but the batch ends with its slowest branch, and until then
    its other branches wait, and so do newcomers. Where branches differ much in length or tools are slow, a vLLM server
    (`ServerEngine`) samples without that wait.

    Prefix hits come in whole blocks (16 tokens by default, 128 on a CPU). Prompt log-probs are never asked for: they
    would make vLLM compute the whole prompt again. The seed of a call fixes its random numbers; the last bits of the
    logits may still depend on what else is in the batch (vLLM's batch-invariant mode, VLLM_BATCH_INVARIANT=1, takes
    that away).

    Weights: on one GPU vLLM runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING is set to 0 for that, which also
    lets vLLM seed this process's random generators when it starts) and its model loads the trainer's tensors by name.
    Of several trainer processes each has an engine of its own, on the GPU of its LOCAL_RANK; all are built at the same
    time. Where its workers are other processes (tensor_parallel_size above 1) weights travel as a checkpoint in the
    temporary folder, loaded by vLLM's `reload_weights`. Adapters arrive merged. The prefix cache is dropped after every
    sync.

    Args:
        model_path: folder or hub name of the model.
        tokenizer: of that model; its end of sequence stops every completion.
        max_context_length: prompt and completion together; None takes what vLLM reads from the model's config.
        gpu_memory_utilization: share of the GPU's memory for weights and cache, the rest is the trainer's.
        tensor_parallel_size, seed, dtype: as vLLM names them.
        vocab_size: ids at or above it are refused; None takes the tokenizer's length.
        llm_kwargs: further arguments of `vllm.LLM`; those of `FIXED` may not be given.

    Raises:
        ValueError: vLLM is not installed, or an argument makes no sense.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        *,
        max_context_length: int | None = None,
        gpu_memory_utilization: float = 0.4,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        dtype: str = "bfloat16",
        vocab_size: int | None = None,
        **llm_kwargs: Any,
    ) -> None:
        for name in FIXED:
            if name in llm_kwargs:
                raise ValueError(f"{name}={llm_kwargs[name]!r}: always {FIXED[name]!r} here; remove it")
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size}: give at least 1")
        if tensor_parallel_size == 1:
            # read when LLM is built; the model is out of reach in another process
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                f"the vllm engine needs vLLM ({error}): pip install vllm, or use another engine"
            ) from error
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._sampling_params = vllm.SamplingParams
        if tensor_parallel_size == 1 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # an engine a process, each on the GPU of its local rank: by itself vLLM takes the first one for all
            llm_kwargs = {"distributed_executor_backend": "external_launcher", **llm_kwargs}
        self.llm = vllm.LLM(
            model=str(model_path),
            max_model_len=max_context_length,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size,
            seed=seed,
            dtype=dtype,
            **FIXED,
            **llm_kwargs,
        )
        # None where its workers are other processes
        self._driver_worker = getattr(getattr(self.llm.llm_engine, "model_executor", None), "driver_worker", None)
        self.max_context_length = max_context_length or self.llm.llm_engine.model_config.max_model_len
        self._waiting: list[tuple[list[int], Any, asyncio.Future]] = []
        self._driver: asyncio.Task | None = None
        # the current device belongs to a thread
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        initializer = (lambda: None) if device is None else (lambda: torch.cuda.set_device(device))
        self._worker = ThreadPoolExecutor(1, "vllm", initializer)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams, *, session: str = "") -> Completion:
        """See `RolloutEngine.generate`. `session` is not needed: vLLM finds shared prefixes by itself.

        Raises:
            EngineError: vLLM failed, or what it returned is no completion.
        """
        prompt, room = checked_prompt(prompt_ids, self.max_context_length, self.vocab_size)
        if self.llm is None:
            raise EngineError("this vLLM engine is closed")
        end = self.tokenizer.eos_token_id
        params = self._sampling_params(
            n=1,
            logprobs=0,
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=sorted({*sampling.stop_token_ids, *([] if end is None else [end])}),
            include_stop_str_in_output=True,
            # stop texts may be special tokens, which vLLM would otherwise not see in its text
            skip_special_tokens=False,
            detokenize=True,
        )
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((prompt, params, future))
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._drive(loop))
        output = await future
        return self._completion(prompt, params.max_tokens, output)

    async def release(self, session: str) -> None:
        """Nothing to do: vLLM drops what it no longer needs."""

    def sync_weights(self, model: torch.nn.Module) -> None:
        """See `RolloutEngine.sync_weights` and the class."""
        if self.llm is None:
            raise EngineError("this vLLM engine is closed")
        # behind a batch that is still running
        self._worker.submit(self._load, model).result()

    def close(self) -> None:
        """Waits for the running batch, then gives vLLM's memory back as far as Python lets go of it."""
        self._worker.shutdown()
        self.llm = self._driver_worker = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    async def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        """Batch after batch until nothing waits."""
        batch: list[tuple[list[int], Any, asyncio.Future]] = []
        try:
            # lets callers of the same moment join the first batch
            await asyncio.sleep(0)
            while self._waiting:
                # a call may have been cancelled, or its event loop be gone
                batch = [w for w in self._waiting if w[2].get_loop() is loop and not w[2].done()]
                self._waiting.clear()
                if not batch:
                    continue
                try:
                    outputs = await loop.run_in_executor(self._worker, self._generate_batch, batch)
                # whatever vLLM raises reaches every caller of the batch, with its cause
                except Exception as error:
                    for _, _, future in batch:
                        if not future.done():
                            failure = EngineError(f"vLLM failed on a batch of {len(batch)}: {error!r}")
                            failure.__cause__ = error
                            future.set_exception(failure)
                    continue
                for (_, _, future), output in zip(batch, outputs, strict=True):
                    if not future.done():
                        future.set_result(output)
        finally:
            for _, _, future in batch:
                future.cancel()

    def _generate_batch(self, batch: list[tuple[list[int], Any, asyncio.Future]]) -> list[Any]:
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in batch]
        outputs = self.llm.generate(prompts, [params for _, params, _ in batch], use_tqdm=False)
        if len(outputs) != len(batch):
            raise EngineError(f"{len(outputs)} outputs for {len(batch)} prompts")
        return outputs

    def _completion(self, prompt: list[int], max_tokens: int, output: Any) -> Completion:
        [choice] = output.outputs
        ids = [int(i) for i in choice.token_ids]
        steps = choice.logprobs or []
        try:
            if output.prompt_token_ids is not None and list(output.prompt_token_ids) != prompt:
                raise BadAnswer("vLLM changed the prompt's token ids")
            if len(steps) != len(ids) or any(i not in step for i, step in zip(ids, steps, strict=True)):
                raise BadAnswer(f"{len(ids)} token ids without a log-prob each ({len(steps)} steps)")
            logprobs = [float(step[i].logprob) for i, step in zip(ids, steps, strict=True)]
            check_sampled(ids, logprobs, choice.finish_reason, max_tokens, self.vocab_size)
        except BadAnswer as error:
            raise EngineError(f"vLLM returned no completion: {error}") from None
        cached = min(max(getattr(output, "num_cached_tokens", None) or 0, 0), len(prompt))
        return Completion(ids, [min(p, 0.0) for p in logprobs], choice.finish_reason, len(prompt) - cached)

    @torch.no_grad()
    def _load(self, model: torch.nn.Module) -> None:
        if self._driver_worker is not None:
            self._driver_worker.model_runner.model.load_weights(checkpoint_weights(model))
        else:
            with tempfile.TemporaryDirectory(prefix="treegrpo-") as folder:
                path = save_checkpoint(model, Path(folder) / "weights")
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if self.llm.reset_prefix_cache() is False:
            raise EngineError("vLLM kept the prefix cache of the old weights: is a request still running?")
