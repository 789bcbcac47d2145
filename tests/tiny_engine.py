"""The hf engine over tiny models and a tokenizer of characters, and the references it is held against: `generate` and a
plain forward of each sequence alone; shared by the engine's tests. A test file takes the fixtures by assignment."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from tiny import MODEL, VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from treegrpo.rollout.engine import SamplingParams
from treegrpo.rollout.hf import HFEngine

# the accelerator, where there is one
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
END = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>/.,;"
PROMPTS = ([5], [7, 8, 9, 10, 11, 12, 13], [3, 4, 5, 6], [20, 30, 40], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Single characters, joined without spaces: "[END]" is id 1, "a" id 3."""
    words = {word: i for i, word in enumerate(("[PAD]", "[END]", "[UNK]", *LETTERS))}
    words |= {f"<{i}>": i for i in range(len(words), VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[END]", pad_token="[PAD]", unk_token="[UNK]")


def make_model(seed: int = 0, **changes):
    torch.manual_seed(seed)
    options = {**MODEL, "eos_token_id": END, "pad_token_id": 0, "bos_token_id": None, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).eval().to(DEVICE)


FAMILIES = {
    "qwen3": {},
    "llama": {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def make_engine(tokenizer):
    engines = []

    def make(model=None, ends: bool = True, **options) -> HFEngine:
        engines.append(HFEngine(make_model() if model is None else model, tokenizer, **options))
        if not ends:
            engines[-1]._end_ids = frozenset()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def greedy(max_tokens: int = 12, **options) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)


def together(engine, calls, session: str = ""):
    """Completions of `(prompt, sampling)` pairs awaited at once."""

    async def run():
        return await asyncio.gather(*(engine.generate(ids, sampling, session=session) for ids, sampling in calls))

    return asyncio.run(run())


def alone(model, prompt, max_tokens: int = 12, ends: bool = True) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": 0}
    if not ends:
        options["min_new_tokens"] = max_tokens
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def forward_logprobs(model, prompt, sampled, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *sampled]], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].cpu()
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]


def grow_trees(engine: HFEngine, num_trees: int, sampling_of, *, ends_only) -> list:
    """(prompt, sampling, completion) of branches of random trees, all grown at once: from the middle of what others
    sampled (from its end where ``ends_only(seed)``), rows join, leave, and every seventh gives up."""
    done: list = []

    async def grow(number: int) -> None:
        random = np.random.default_rng(number)
        nodes = [random.integers(3, VOCAB, random.integers(1, 30)).tolist()]

        async def branch(seed: int) -> None:
            parent = nodes[random.integers(len(nodes))]
            cut = len(parent) if ends_only(seed) else random.integers(1, len(parent) + 1)
            prompt = parent[:cut] + random.integers(3, VOCAB, random.integers(0, 12)).tolist()
            sampling = sampling_of(int(random.integers(1, 14)), seed)
            call = asyncio.ensure_future(engine.generate(prompt, sampling, session=str(number)))
            if seed % 7 == 6:
                await asyncio.sleep(0.005)
                call.cancel()
                return
            result = await call
            done.append((prompt, sampling, result))
            nodes.append(prompt + result.token_ids)

        for turn in range(4):
            await asyncio.gather(*(branch(10 * turn + i) for i in range(3)), return_exceptions=True)
        await engine.release(str(number))

    async def run() -> None:
        await asyncio.gather(*(grow(number) for number in range(num_trees)))

    asyncio.run(run())
    return done
