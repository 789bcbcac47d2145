"""The vLLM engine against a stand-in for the package `vllm`: the same names and arguments, a real tiny model behind
them. vLLM itself does not run here; these tests show how the engine calls it and what it does with the answers."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sys
import threading
import types

import completions_server
import pytest
import torch
from completions_server import CONTEXT, complete, tiny_model, tiny_tokenizer

from treegrpo.rollout.engine import EngineError, SamplingParams
from treegrpo.rollout.vllm import VLLMEngine
from treegrpo.rollout.weights import checkpoint_weights

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [1, 5, 9, 11]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@dataclasses.dataclass(kw_only=True)
class StandInParams:
    """Refuses what the engine has no business to ask for, prompt_logprobs first of all."""

    n: int
    logprobs: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    detokenize: bool


class StandInModel:
    def __init__(self, model):
        self.model = model

    def load_weights(self, weights):
        own = dict(self.model.state_dict())
        loaded = set()
        for name, tensor in weights:
            own[name].copy_(tensor)
            loaded.add(name)
        assert loaded == {n for n, _ in checkpoint_weights(self.model)}


class StandInLLM:
    def __init__(self, **options):
        self.options = options
        self.tokenizer = tiny_tokenizer()
        inner = StandInModel(tiny_model())
        self.model = inner.model
        runner = types.SimpleNamespace(model=inner)
        worker = types.SimpleNamespace(model_runner=runner)
        # vLLM's executor of several workers has no driver
        executor = types.SimpleNamespace(**{"driver_worker": worker} if options["tensor_parallel_size"] == 1 else {})
        self.llm_engine = types.SimpleNamespace(
            model_executor=executor,
            model_config=types.SimpleNamespace(max_model_len=options["max_model_len"] or CONTEXT),
        )
        self.batches, self.cached, self.num_resets, self.threads = [], [], 0, set()
        self.may_run = threading.Event()
        self.may_run.set()
        self.spoil, self.can_reset = None, True

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert not use_tqdm
        assert len(prompts) == len(sampling_params)
        assert self.may_run.wait(10)
        self.batches.append([p["prompt_token_ids"] for p in prompts])
        self.threads.add(threading.current_thread().name)
        return [self.one(p, s) for p, s in zip(prompts, sampling_params, strict=True)]

    def one(self, prompt, params):
        assert set(prompt) == {"prompt_token_ids"}
        prompt = prompt["prompt_token_ids"]
        if prompt[0] == 47:
            raise RuntimeError("CUDA out of memory, says the stand-in")
        names = ("max_tokens", "temperature", "top_p", "stop", "stop_token_ids", "seed")
        ids, logprobs, reason = complete(
            self.model, self.tokenizer, prompt, **{name: getattr(params, name) for name in names}
        )
        cached = len(prompt) - 1 if prompt in self.cached else 0
        self.cached.append(prompt)
        steps = [{i: types.SimpleNamespace(logprob=p, rank=1)} for i, p in zip(ids, logprobs, strict=True)]
        output = types.SimpleNamespace(
            prompt_token_ids=prompt,
            num_cached_tokens=cached,
            outputs=[types.SimpleNamespace(token_ids=tuple(ids), logprobs=steps, finish_reason=reason)],
        )
        if self.spoil:
            self.spoil(output)
        return output

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert (method, timeout, args, set(kwargs)) == ("reload_weights", None, (), {"weights_path"})
        from transformers import AutoModelForCausalLM

        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).state_dict())

    def reset_prefix_cache(self):
        self.num_resets += 1
        self.cached.clear()
        return self.can_reset


@pytest.fixture
def engine(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = StandInLLM, StandInParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    made = []

    def make(**options):
        made.append(VLLMEngine("folder", tiny_tokenizer(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def generate(engine, prompt=PROMPT, sampling=GREEDY):
    return asyncio.run(engine.generate(prompt, sampling))


def expected(model, sampling, prompt=PROMPT):
    fields = ("max_tokens", "temperature", "top_p", "seed")
    options = {name: getattr(sampling, name) for name in fields}
    return complete(
        model, tiny_tokenizer(), prompt, stop=sampling.stop, stop_token_ids=[*sampling.stop_token_ids, 2], **options
    )


def test_how_vllm_is_built_and_called(engine, monkeypatch):
    asked = []
    one = engine(max_context_length=40, gpu_memory_utilization=0.3, seed=7, max_num_seqs=8)
    assert one.llm.options == {
        "model": "folder",
        "max_model_len": 40,
        "gpu_memory_utilization": 0.3,
        "tensor_parallel_size": 1,
        "seed": 7,
        "dtype": "bfloat16",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "max_num_seqs": 8,
    }
    import os

    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    monkeypatch.setattr(one, "_sampling_params", lambda **given: asked.append(given) or StandInParams(**given))
    generate(one, sampling=SamplingParams(max_tokens=90, temperature=0.7, top_p=0.9, stop=("w7",), seed=5))
    assert asked == [
        {
            "n": 1,
            "logprobs": 0,
            "max_tokens": 36,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 5,
            "stop": ["w7"],
            "stop_token_ids": [2],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "detokenize": True,
        }
    ]
    assert engine().max_context_length == CONTEXT
    assert engine(tensor_parallel_size=2).llm.options["tensor_parallel_size"] == 2


def test_of_several_processes_each_has_an_engine_on_its_own_gpu(engine, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert engine().llm.options["distributed_executor_backend"] == "external_launcher"
    assert engine(distributed_executor_backend="uni").llm.options["distributed_executor_backend"] == "uni"
    # its workers are processes of its own
    assert "distributed_executor_backend" not in engine(tensor_parallel_size=2).llm.options
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert "distributed_executor_backend" not in engine().llm.options


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(max_tokens=12, temperature=0.6, top_p=0.8, seed=4),
        SamplingParams(max_tokens=60, seed=6, stop=("w7", "</search>"), stop_token_ids=(30,)),
    ],
    ids=["greedy", "nucleus", "stop"],
)
def test_ids_and_logprobs_as_sampled(engine, sampling):
    done = generate(engine(), sampling=sampling)
    ids, logprobs, reason = expected(tiny_model(), sampling)
    assert (done.token_ids, done.finish_reason) == (ids, reason)
    assert done.logprobs == pytest.approx(logprobs, abs=1e-6)
    assert done.num_prefilled == len(PROMPT)


def test_calls_of_one_moment_are_one_batch_and_later_ones_the_next(engine):
    one = engine()
    one.llm.may_run.clear()

    async def run():
        first = [asyncio.create_task(one.generate([1, i], GREEDY)) for i in range(3, 6)]
        await asyncio.sleep(0.05)
        later = [asyncio.create_task(one.generate([2, i], GREEDY)) for i in range(3, 7)]
        await asyncio.sleep(0.05)
        assert not any(t.done() for t in first)
        later[1].cancel()
        one.llm.may_run.set()
        return await asyncio.gather(*first, *later, return_exceptions=True)

    results = asyncio.run(run())
    assert one.llm.batches == [[[1, 3], [1, 4], [1, 5]], [[2, 3], [2, 5], [2, 6]]]
    assert isinstance(results.pop(4), asyncio.CancelledError)
    prompts = [p for batch in one.llm.batches for p in batch]
    for done, prompt in zip(results, prompts, strict=True):
        assert done.token_ids == expected(tiny_model(), GREEDY, prompt)[0]
    assert len(one.llm.threads) == 1
    assert generate(one).token_ids == expected(tiny_model(), GREEDY)[0], "a second event loop"


def test_a_loop_that_ended_in_the_middle_does_not_block_the_next(engine):
    one = engine()
    one.llm.may_run.clear()

    async def interrupted():
        asyncio.create_task(one.generate(PROMPT, GREEDY))  # noqa: RUF006 - left alone on purpose
        await asyncio.sleep(0.05)
        asyncio.create_task(one.generate([1, 2], GREEDY))  # noqa: RUF006
        await asyncio.sleep(0.01)
        one.llm.may_run.set()

    asyncio.run(interrupted())
    assert generate(one, [1, 8]).token_ids == expected(tiny_model(), GREEDY, [1, 8])[0]
    assert [1, 2] not in [p for batch in one.llm.batches for p in batch]


def test_a_failing_batch_is_told_and_the_next_one_runs(engine):
    one = engine()

    async def run():
        bad = await asyncio.gather(one.generate([47], GREEDY), one.generate(PROMPT, GREEDY), return_exceptions=True)
        return bad, await one.generate(PROMPT, GREEDY)

    bad, good = asyncio.run(run())
    for error in bad:
        assert isinstance(error, EngineError)
        assert "batch of 2: RuntimeError('CUDA out of memory" in str(error)
        assert isinstance(error.__cause__, RuntimeError)
    assert good.token_ids == expected(tiny_model(), GREEDY)[0]


def set_logprob(output, value):
    next(iter(output.outputs[0].logprobs[-1].values())).logprob = value


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: set_logprob(o, float("nan")), "log-prob 5 is nan"),
        (lambda o: set_logprob(o, 0.1), "log-prob 5 is 0.1"),
        (lambda o: o.outputs[0].logprobs.pop(), r"6 token ids without a log-prob each \(5 steps\)"),
        (lambda o: setattr(o.outputs[0], "logprobs", None), "without a log-prob each"),
        (lambda o: o.outputs[0].logprobs.__setitem__(2, {}), "without a log-prob each"),
        (lambda o: setattr(o.outputs[0], "finish_reason", "abort"), "finish reason 'abort'"),
        (lambda o: setattr(o, "prompt_token_ids", [1]), "changed the prompt"),
    ],
)
def test_what_is_no_completion_is_refused(engine, spoil, message):
    one = engine()
    one.llm.spoil = spoil
    with pytest.raises(EngineError, match=message):
        generate(one)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_weight_sync_and_cache_reset(engine, num_gpus):
    one = engine(tensor_parallel_size=num_gpus)
    other = tiny_model(seed=1)
    assert generate(one).num_prefilled == 4
    assert generate(one).num_prefilled == 1
    for count in (1, 2):
        one.sync_weights(other)
        assert one.llm.num_resets == count
        done = generate(one)
        assert done.token_ids == expected(other, GREEDY)[0] != expected(tiny_model(), GREEDY)[0]
        assert done.num_prefilled == 4, "the cache of the old weights was kept"
    one.llm.can_reset = False
    with pytest.raises(EngineError, match="kept the prefix cache"):
        one.sync_weights(other)


def adapted(dtype=torch.float32):
    """A LoRA model whose adapters are not zero, its head trained in full."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model().to(dtype), config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_adapters_arrive_merged_under_the_base_names(engine, num_gpus):
    one = engine(tensor_parallel_size=num_gpus)
    model = adapted()
    one.sync_weights(model)
    done = generate(one)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    ids, logprobs, _ = expected(merged, GREEDY)
    assert done.token_ids == ids != expected(tiny_model(), GREEDY)[0]
    assert done.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_trained_model_bitwise_alone(dtype):
    model = adapted(dtype)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    names = {n for n, _ in checkpoint_weights(model)}
    assert names == {n for n, _ in tiny_model().named_parameters()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # merging in place and back would not have been: this is what the check above guards against
    if dtype == torch.bfloat16:
        model.merge_adapter()
        model.unmerge_adapter()
        assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tied_weights_come_once():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**completions_server.tiny_model().config.to_diff_dict(), "tie_word_embeddings": True})
    model = Qwen3ForCausalLM(config)
    names = [n for n, _ in checkpoint_weights(model)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="an adapter changes one of two tied weights"):
        list(checkpoint_weights(model))


def test_errors(engine, monkeypatch):
    one = engine(max_context_length=10)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        generate(one, [])
    with pytest.raises(ValueError, match="no room below max_context_length=10"):
        generate(one, [1] * 10)
    with pytest.raises(ValueError, match="logprobs_mode='raw_logprobs'"):
        engine(logprobs_mode="raw_logprobs")
    with pytest.raises(ValueError, match="tensor_parallel_size=0"):
        engine(tensor_parallel_size=0)
    one.close()
    one.close()
    with pytest.raises(EngineError, match="closed"):
        generate(one)
    with pytest.raises(EngineError, match="closed"):
        one.sync_weights(tiny_model())
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="pip install vllm"):
        engine()
