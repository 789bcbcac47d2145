"""vLLM itself, in this process and as a server, and SGLang's server, with a small random model: `pytest
tests/test_real_engines.py` where one of them is installed (a GPU, or built for CPUs). Every log-prob is held against
the model's own, in float32."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from server_process import ENV, serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from two_processes import ENVIRONMENT, FSDP2, RESHARD, ROOT, run_command

from treegrpo.rollout.engine import EngineError, SamplingParams


def needs(package, name):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{name} is not installed")


VLLM, SGLANG = needs("vllm", "vLLM"), needs("sglang", "SGLang")
CONTEXT = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB, PAD, END = len(SPECIAL) + 256, 0, 2
# longer than two of vLLM's blocks on a CPU, which have 128 tokens
PROMPT = [1, *(3 + i * i % 251 for i in range(299))]
# SGLang computes 6 tokens less than it is told; float32 wants a back end that has it
LAUNCH = {
    "vllm": "vllm.entrypoints.openai.api_server --model {folder} --enforce-eager --gpu-memory-utilization 0.2"
    f" --max-model-len {CONTEXT} --logprobs-mode processed_logprobs --enable-prompt-tokens-details",
    "sglang": "sglang.launch_server --model-path {folder} --enable-deterministic-inference --disable-cuda-graph"
    f" --skip-server-warmup --context-length {CONTEXT + 6} --mem-fraction-static 0.2 --attention-backend "
    + ("triton" if torch.cuda.is_available() else "torch_native --device cpu --max-total-tokens 16384"),
}
# heads of 32: vLLM's attention for CPUs has no narrower ones
SHAPE = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def make_tokenizer():
    """Bytes, behind three special tokens: what AutoTokenizer makes of the folder of a Qwen2 model as well."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *symbols])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END])
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    return tokenizer


def build_model(seed: int = 0):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    ids = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=END, pad_token_id=PAD)
    config = Qwen2Config(
        **SHAPE, **ids, max_position_embeddings=2 * CONTEXT, initializer_range=0.3, tie_word_embeddings=True
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_local(folder):
    from treegrpo.rollout.vllm import VLLMEngine

    options = {"dtype": "float32", "gpu_memory_utilization": 0.2, "enforce_eager": True}
    return VLLMEngine(str(folder), make_tokenizer(), max_context_length=CONTEXT, **options)


def serve(name, folder, log):
    with serving(f"{LAUNCH[name]} --dtype float32".format(folder=folder).split(), log) as url:
        yield url


@pytest.fixture(scope="module")
def vllm_server(folder, tmp_path_factory):
    yield from serve("vllm", folder, tmp_path_factory.mktemp("server") / "log.txt")


@pytest.fixture(scope="module")
def sglang_server(folder, tmp_path_factory):
    yield from serve("sglang", folder, tmp_path_factory.mktemp("server") / "log.txt")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("local", marks=VLLM),
        pytest.param("vllm_server", marks=VLLM),
        pytest.param("sglang_server", marks=SGLANG),
    ],
)
def engine(request, folder, tmp_path_factory):
    if request.param == "local":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENV.items():
                patch.setenv(name, value)
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            made = make_local(folder)
            yield made
    else:
        from treegrpo.rollout.server import ServerEngine

        url = request.getfixturevalue(request.param)
        made = ServerEngine(url, make_tokenizer(), sync_dir=tmp_path_factory.mktemp("weights"))
        dialect = {"vllm_server": "openai", "sglang_server": "sglang"}[request.param]
        assert (made.dialect, made.max_context_length) == (dialect, CONTEXT)
        yield made
    made.close()
    with pytest.raises(EngineError, match="closed"):
        generate(made, SamplingParams())


@pytest.fixture
def model(engine):
    """The engine samples from it."""
    engine.sync_weights(model := build_model())
    return model


def generate(engine, *samplings, prompt=PROMPT):
    async def run():
        return await asyncio.gather(*[engine.generate(prompt, sampling) for sampling in samplings])

    return asyncio.run(run())


@torch.no_grad()
def expected_logprobs(model, done, sampling, prompt=PROMPT):
    """Of the sampled tokens, in the distribution they were drawn from."""
    ids = torch.tensor([prompt + done.token_ids])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / (sampling.temperature or 1.0)
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        beyond = probs.cumsum(-1) - probs >= sampling.top_p
        logits[torch.zeros_like(beyond).scatter(1, order, beyond)] = -torch.inf
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def check(model, done, sampling, prompt=PROMPT, atol=2e-4):
    torch.testing.assert_close(
        torch.tensor(done.logprobs), expected_logprobs(model, done, sampling, prompt), rtol=0, atol=atol
    )


def test_greedy_tokens_and_logprobs(engine, model):
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    [done] = generate(engine, sampling)
    ids = list(PROMPT)
    with torch.no_grad():
        for token in done.token_ids:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    check(model, done, sampling)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.7, 0.9)])
def test_logprobs_are_of_the_distribution_drawn_from(temperature, top_p, engine, model):
    sampling = SamplingParams(max_tokens=30, temperature=temperature, top_p=top_p, seed=3)
    [alone] = generate(engine, sampling)
    if getattr(engine, "dialect", "") == "sglang":
        # its log-probs are those before top_p
        check(model, alone, replace(sampling, top_p=1.0))
        assert expected_logprobs(model, alone, sampling).isfinite().all()
    else:
        # a token at the edge of the nucleus is in or out by rounding, and its mass with it
        check(model, alone, sampling, atol=2e-4 if top_p == 1 else 0.02)
    others = [SamplingParams(max_tokens=40, seed=i) for i in range(9)]
    busy, *rest = generate(engine, sampling, *others)
    assert busy.token_ids == alone.token_ids, "a seed's tokens depend on what else is sampled"
    for done, other in zip(rest, others, strict=True):
        check(model, done, other)
    assert len({tuple(done.token_ids[:8]) for done in rest}) == 9


def test_what_ends_a_completion(engine, model):
    """Texts, ids, the end of sequence; the tokens that spell a stop are kept, and nothing behind them."""
    tokenizer = make_tokenizer()
    free = SamplingParams(max_tokens=200, temperature=1.3, seed=5)
    [done] = generate(engine, free)
    assert done.finish_reason in ("stop", "length")
    assert (done.token_ids[-1] == END) == (done.finish_reason == "stop")
    # a letter, and where it and the one behind it first stand
    ids = done.token_ids
    at = next(
        i for i in range(3, len(ids) - 1) if all(t > 3 and tokenizer.decode([t]).isascii() for t in ids[i : i + 2])
    )
    letter, pair = tokenizer.decode(ids[at : at + 1]), tokenizer.decode(ids[at : at + 2])
    first = ids.index(ids[at])
    first_pair = next(i + 1 for i in range(len(ids)) if ids[i : i + 2] == ids[at : at + 2])
    stops = [({"stop": (letter,)}, first), ({"stop": (pair,)}, first_pair), ({"stop_token_ids": (ids[at],)}, first)]
    for stop, place in stops:
        sampling = SamplingParams(max_tokens=200, temperature=1.3, seed=5, **stop)
        [cut] = generate(engine, sampling)
        assert cut.token_ids == done.token_ids[: place + 1] and cut.finish_reason == "stop", stop
        check(model, cut, sampling)
    [short] = generate(engine, SamplingParams(max_tokens=3, temperature=1.3, seed=5))
    assert (short.token_ids, short.finish_reason) == (done.token_ids[:3], "length")


def test_a_special_token_as_a_stop_text(engine, model):
    with torch.no_grad():
        changed = copy.deepcopy(model)
        # tied weights: a longer embedding is a likelier token
        changed.model.embed_tokens.weight[1] *= 4
    engine.sync_weights(changed)
    stopped = generate(engine, *[SamplingParams(max_tokens=60, seed=i, stop=(SPECIAL[1],)) for i in range(8)])
    with_it = [done for done in stopped if 1 in done.token_ids]
    assert len(with_it) >= 3
    for done in with_it:
        assert done.finish_reason == "stop" and done.token_ids.index(1) == len(done.token_ids) - 1


def test_prefix_hits_and_their_end_with_new_weights(engine, model):
    sampling = SamplingParams(max_tokens=4, seed=1)
    [first], [second] = generate(engine, sampling), generate(engine, sampling)
    assert first.num_prefilled == len(PROMPT)
    assert second.num_prefilled < len(PROMPT) - 200
    assert second.token_ids == first.token_ids
    engine.sync_weights(other := build_model(seed=1))
    [third] = generate(engine, sampling)
    assert third.num_prefilled == len(PROMPT)
    check(other, third, sampling)


def test_adapters_arrive_merged(engine, model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    engine.sync_weights(adapted)
    sampling = SamplingParams(max_tokens=16, seed=2)
    [done] = generate(engine, sampling)
    check(copy.deepcopy(adapted).merge_and_unload().eval(), done, sampling)
    difference = torch.tensor(done.logprobs) - expected_logprobs(model, done, sampling)
    assert difference.abs().max() > 0.1
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())


def test_room_and_refusals(engine, model):
    long = PROMPT * 3
    [done] = generate(engine, SamplingParams(max_tokens=5000, seed=1, temperature=1.9), prompt=long)
    assert len(done.token_ids) <= CONTEXT - len(long)
    assert (done.finish_reason == "length") == (len(done.token_ids) == CONTEXT - len(long))
    with pytest.raises(ValueError, match=f"no room below max_context_length={CONTEXT}"):
        generate(engine, SamplingParams(), prompt=[5] * CONTEXT)
    with pytest.raises(ValueError, match=rf"prompt_ids\[1\] is {VOCAB + 5}, but the model has ids 0 to {VOCAB - 1}"):
        generate(engine, SamplingParams(max_tokens=2), prompt=[1, VOCAB + 5])
    [done] = generate(engine, sampling := SamplingParams(max_tokens=5, seed=4))
    check(model, done, sampling)


TRAINING = """
import json, os, sys
from treegrpo.config import TrainConfig
from treegrpo.trainer import Trainer

if __name__ == "__main__":
    trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])))
    try:
        for row in trainer.steps():
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(row), flush=True)
    finally:
        trainer.close()
"""


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, marks=VLLM) for how in ("vllm", "vllm_server", "overlap", "two processes", "fsdp2")),
        pytest.param("sglang_server", marks=SGLANG),
    ],
)
def test_training_samples_from_the_weights_it_has(how, folder, tmp_path, request):
    """After every update the sampler's log-probs are the trainer's: weights arrived, and nothing of the old is cached.
    Where the next step is sampled beside the training, they are one update old."""
    (tmp_path / "train.py").write_text(TRAINING)
    rows = [{"question": f"how much is {i} and {i + 1}?", "answer": "3"} for i in range(24)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dict(
        model=str(folder),
        dataset=str(tmp_path / "questions.jsonl"),
        env="calculator",
        prompt_template="{question}",
        max_turns=1,
        max_step_tokens=12,
        reward_funcs=["rewards_here:remainder"],
        rollouts=f"server:{request.getfixturevalue(how)}" if how.endswith("server") else "vllm",
        overlap_rollouts=how == "overlap",
        groups_per_step=4,
        max_steps=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_steps=0,
        output_dir=str(tmp_path / "run"),
    )
    if config["rollouts"] == "vllm":
        config["vllm_gpu_memory_utilization"] = 0.2
    (tmp_path / "rewards_here.py").write_text(
        "def remainder(completion_ids, **kwargs):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = launch if how in ("two processes", "fsdp2") else []
    with pytest.MonkeyPatch.context() as patch:
        sharded = FSDP2 | RESHARD if how == "fsdp2" else {}
        for name, value in {**ENV, "VLLM_LOGGING_LEVEL": "ERROR", **sharded}.items():
            patch.setenv(name, value)
        path = os.pathsep.join((str(tmp_path), str(ROOT), ENVIRONMENT["PYTHONPATH"]))
        patch.setitem(ENVIRONMENT, "PYTHONPATH", path)
        printed = run_command([sys.executable, *launch, str(tmp_path / "train.py"), json.dumps(config)])
    steps = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(steps) == 4
    differences = [row["sampling/sampling_logp_difference/max"] for row in steps]
    if how == "overlap":
        assert differences[0] < 1e-3 and min(differences[1:]) > 1e-3
    else:
        assert max(differences) < 1e-3, differences
    assert all(row["grad_norm"] > 0 for row in steps)
