"""Sampling agent rollouts: branches that continue from their parent's KV cache, against resubmitting the whole context.

Eight prompts, six trajectories each, three turns of 16 sampled tokens with 48 tokens of observation between them. The
contenders: the hf engine, which computes a prompt once and each observation once; transformers' `generate`, given the
whole context of all trajectories at every turn, as loops around an engine without prefix cache do. Both sample the same
number of tokens in batches of the same size. The check: greedy tokens of one turn are those of `generate`.
"""

import asyncio
from functools import cache

import pytest
import torch

from bench.models import VOCAB, config, model
from treegrpo.rollout.engine import SamplingParams
from treegrpo.rollout.hf import HFEngine

NUM_PROMPTS, NUM_BRANCHES, NUM_TURNS, ACTION, OBSERVATION = 8, 6, 3, 16, 48
PROMPTS = (64, 256, 1024)
QUICK_PROMPT = 16


@cache
def network(device, quick):
    made = model(config(layers=2 if quick else 4, hidden=64 if quick else 128), device).eval()
    # nothing but the number of tokens may end a completion, or the two would not sample the same number
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


@cache
def tokenizer():
    """Only its ids matter here: no stop text is asked for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


@cache
def texts(prompt_length):
    """(prompts [NUM_PROMPTS, prompt_length], observations [NUM_TURNS, OBSERVATION])."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (NUM_PROMPTS, prompt_length), generator=generator)
    return prompts, torch.randint(VOCAB, (NUM_TURNS, OBSERVATION), generator=generator)


def by_engine(device, quick, prompt_length):
    """Prompt tokens computed."""
    prompts, observations = texts(prompt_length)
    engine = HFEngine(network(device, quick), tokenizer())

    async def trajectory(i, branch):
        context = prompts[i].tolist()
        for turn in range(NUM_TURNS):
            sampling = SamplingParams(max_tokens=ACTION, seed=1000 * i + 10 * branch + turn)
            completion = await engine.generate(context, sampling, session=str(i))
            assert len(completion.token_ids) == ACTION
            context = context + completion.token_ids + observations[turn].tolist()

    async def everything():
        await asyncio.gather(*(trajectory(i, b) for i in range(NUM_PROMPTS) for b in range(NUM_BRANCHES)))

    asyncio.run(everything())
    engine.close()
    return engine.num_prefilled


@torch.no_grad()
def by_generate(device, quick, prompt_length):
    """Prompt tokens computed."""
    prompts, observations = texts(prompt_length)
    net = network(device, quick)
    context = prompts.repeat_interleave(NUM_BRANCHES, 0).to(device)
    computed = 0
    for turn in range(NUM_TURNS):
        computed += context.numel()
        sampled = net.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=ACTION,
            min_new_tokens=ACTION,
            do_sample=True,
            top_k=0,
        )
        context = torch.cat([sampled, observations[turn].to(device).expand(len(context), -1)], 1)
    return computed


CONTENDERS = {"engine": by_engine, "generate": by_generate}


def check(device, quick, prompt_length):
    """Share of greedy tokens that differ from those of `generate`: a near-tie may fall the other way."""
    prompts, _ = texts(prompt_length)
    net = network(device, quick)
    engine = HFEngine(net, tokenizer())

    async def greedy():
        sampling = SamplingParams(max_tokens=ACTION, temperature=0.0)
        return await asyncio.gather(*(engine.generate(row.tolist(), sampling) for row in prompts))

    found = torch.tensor([completion.token_ids for completion in asyncio.run(greedy())])
    engine.close()
    expected = net.generate(
        prompts.to(device), attention_mask=torch.ones_like(prompts).to(device), max_new_tokens=ACTION, do_sample=False
    )[:, -ACTION:].cpu()
    share = float((found != expected).double().mean())
    assert share <= 0.05, f"{share:.1%} of the greedy tokens differ"
    return share


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("prompt_length", PROMPTS)
def test_rollout(prompt_length, contender, meter, device, quick):
    length = QUICK_PROMPT if quick else prompt_length
    run = CONTENDERS[contender]
    is_engine = contender == "engine"
    meter.benchmark.group = f"rollout, prompt of {prompt_length}"
    meter.measure(
        lambda: run(device, quick, length),
        check=lambda: check(device, quick, length),
        baseline=(lambda: by_generate(device, quick, length)) if is_engine else None,
        baseline_name="generate" if is_engine else None,
        rounds=3,
        clock="wall",
        suite="rollout",
        contender=contender,
        workload=f"prompt_{prompt_length}",
        tokens=NUM_PROMPTS * NUM_BRANCHES * NUM_TURNS * ACTION,
        prefilled_tokens=run(device, quick, length),
    )
