"""The hf engine against `generate` and a plain forward of each sequence alone; what it prefills, counted by hand."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import numpy as np
import pytest
import torch
from tiny import MODEL, VOCAB
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from treegrpo.hf import use_tree_attention
from treegrpo.rollout.engine import EngineError, SamplingParams
from treegrpo.rollout.hf import HFEngine
from treegrpo.rollout.kv import KVBatch, KVShape, PrefixTree
from treegrpo.rollout.sampling import BYTE_OF, Draw, StopText, sample, token_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

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
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).eval()


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
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": 0}
    if not ends:
        options["min_new_tokens"] = max_tokens
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def forward_logprobs(model, prompt, sampled, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("session", ["", "s"])
def test_greedy_is_generate_on_each_prompt_alone(family, session, make_engine):
    model = make_model(**FAMILIES[family])
    engine = make_engine(model)
    results = together(engine, [(prompt, greedy(8 + 3 * i)) for i, prompt in enumerate(PROMPTS)], session)
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        expected = alone(model, prompt, 8 + 3 * i)
        assert result.token_ids == expected
        assert result.finish_reason == ("stop" if expected[-1] == END else "length")
        reference = forward_logprobs(model, prompt, expected)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_tree_attention_models_sample_as_sdpa_ones(make_engine):
    plain, tree = make_model(), use_tree_attention(make_model())
    calls = [(prompt, greedy()) for prompt in PROMPTS]
    a, b = together(make_engine(plain), calls), together(make_engine(tree), calls)
    assert [x.token_ids for x in a] == [x.token_ids for x in b]


def test_sampled_logprobs_are_of_the_distribution_drawn_from(make_engine):
    model = make_model()
    calls = [(prompt, SamplingParams(max_tokens=15, temperature=1.7, seed=i)) for i, prompt in enumerate(PROMPTS)]
    for (prompt, _), result in zip(calls, together(make_engine(model), calls), strict=True):
        reference = forward_logprobs(model, prompt, result.token_ids, 1.7)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(make_engine):
    engine = make_engine()
    calls = [
        (
            PROMPTS[i % 5],
            SamplingParams(max_tokens=3 + 5 * (i % 4), temperature=0.5 * (i % 3), top_p=1 - 0.2 * (i % 2), seed=i),
        )
        for i in range(20)
    ]
    crowd = together(engine, calls)
    for call, result in zip(calls, crowd, strict=True):
        single = together(engine, [call])[0]
        assert single.token_ids == result.token_ids
        assert single.logprobs == pytest.approx(result.logprobs, abs=1e-5)
    assert len({tuple(result.token_ids) for result in crowd}) > 10


def test_a_small_batch_bound_changes_nothing(make_engine):
    calls = [(PROMPTS[i % 5], SamplingParams(max_tokens=2 + i, seed=i)) for i in range(12)]
    wide, narrow = together(make_engine(), calls), together(make_engine(max_batch=3), calls)
    assert [x.token_ids for x in wide] == [x.token_ids for x in narrow]


def test_a_row_outlives_its_neighbour_and_the_columns_it_left(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)
    prompts = (list(range(3, 33)), list(range(10, 30)))
    _, result = together(engine, [(prompts[0], greedy(2)), (prompts[1], greedy(150))])
    reference = forward_logprobs(model, prompts[1], result.token_ids)
    torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


def test_a_tree_prefills_each_token_once(make_engine):
    engine = make_engine(ends=False)
    prompt = list(range(10, 30))
    full = SamplingParams(max_tokens=6, temperature=1.0)

    async def run():
        def ask(ids, seed):
            return engine.generate(ids, SamplingParams(max_tokens=6, seed=seed), session="tree")

        chains = await asyncio.gather(*(ask(prompt, seed) for seed in range(4)))
        parents = [prompt + chain.token_ids for chain in chains]
        first = [parents[0] + [31, 32, 33]] * 2 + [parents[1] + [34, 35]]
        branches = await asyncio.gather(*(ask(ids, 10 + i) for i, ids in enumerate(first)))
        again = await ask(prompt, 20)
        # a fork in the middle of what was generated
        middle = await ask(prompt + chains[2].token_ids[:3] + [36, 37], 21)
        return chains, branches, again, middle, first

    chains, branches, again, middle, first = asyncio.run(run())
    assert all(len(chain.token_ids) == full.max_tokens for chain in chains)
    assert [chain.num_prefilled for chain in chains] == [20, 0, 0, 0]
    # the observation and the parent's last sampled token, which was never forwarded
    assert [branch.num_prefilled for branch in branches] == [4, 0, 3]
    assert again.num_prefilled == 1
    assert middle.num_prefilled == 2
    assert engine.num_prefilled == 20 + 4 + 3 + 1 + 2
    assert engine.num_generated == sum(len(x.token_ids) for x in [*chains, *branches, again, middle])
    model = engine._model
    for ids, branch in zip(first, branches, strict=True):
        reference = forward_logprobs(model, ids, branch.token_ids)
        torch.testing.assert_close(torch.tensor(branch.logprobs), reference, atol=1e-5, rtol=0)

    asyncio.run(engine.release("tree"))
    assert together(engine, [(prompt, full)], "tree")[0].num_prefilled == 20


def test_sessions_do_not_share_and_the_nameless_one_keeps_nothing(make_engine):
    engine = make_engine()
    call = [([4, 5, 6, 7], greedy(3))]
    for session, count in (("a", 4), ("b", 4), ("a", 1), ("", 4), ("", 4)):
        assert together(engine, call, session)[0].num_prefilled == count
    assert [x.num_prefilled for x in together(engine, call * 3)] == [4, 0, 0]


def test_suffixes_of_different_lengths_behind_different_prefixes(make_engine):
    model = make_model()
    engine = make_engine(model)
    stems = [list(range(3, 3 + n)) for n in (4, 9, 17)]
    together(engine, [(stem, greedy(5)) for stem in stems], "s")
    prompts = [stem + [40 + j] * (1 + 4 * j) for stem in stems for j in range(3)] + [[44, 45], [46]]
    before = engine.num_prefilled
    for prompt, result in zip(prompts, together(engine, [(p, greedy()) for p in prompts], "s"), strict=True):
        assert result.token_ids == alone(model, prompt)
        reference = forward_logprobs(model, prompt, result.token_ids)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)
    # of every prompt at least the last token, of these at most what follows the stems
    assert 11 <= engine.num_prefilled - before <= 3 * (1 + 5 + 9) + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_random_trees_of_many_prompts_grown_at_once(family, make_engine):
    """Branches join and leave a batch too small for them, some give up; every log-prob is that of a plain forward."""
    model = make_model(**FAMILIES[family])
    engine = make_engine(model, max_batch=5)
    done = []

    async def grow(number):
        random = np.random.default_rng(number)
        nodes = [random.integers(3, VOCAB, random.integers(1, 30)).tolist()]

        async def branch(seed):
            parent = nodes[random.integers(len(nodes))]
            cut = random.integers(1, len(parent) + 1)
            prompt = parent[:cut] + random.integers(3, VOCAB, random.integers(0, 12)).tolist()
            sampling = SamplingParams(max_tokens=int(random.integers(1, 14)), temperature=0.8, seed=seed)
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

    async def run():
        await asyncio.gather(*(grow(number) for number in range(6)))

    asyncio.run(run())
    assert len(done) > 50
    assert sum(result.num_prefilled for _, _, result in done) < 0.7 * sum(len(prompt) for prompt, _, _ in done)
    for prompt, sampling, result in done:
        reference = forward_logprobs(model, prompt, result.token_ids, sampling.temperature)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=2e-5, rtol=0)


def tokens_of(text: str) -> list[int]:
    return [3 + LETTERS.index(letter) for letter in text]


class Scripted:
    """Replaces the engine's sampling: row i of a prompt gets the tokens of its script."""

    def __init__(self, engine, monkeypatch, scripts: dict[int, list[int]]) -> None:
        self.scripts = {first: list(script) for first, script in scripts.items()}
        original = engine._sample

        def scripted(rows, logits, draw):
            forced = torch.full_like(logits, -30.0)
            for i, row in enumerate(rows):
                forced[i, self.scripts[row.ids[0]][len(row.token_ids)]] = 30.0
            return original(rows, forced, draw)

        monkeypatch.setattr(engine, "_sample", scripted)


def test_stop_texts_span_tokens_and_only_generated_ones_count(make_engine, monkeypatch):
    engine = make_engine()
    script = tokens_of("ab</s>cd")
    Scripted(engine, monkeypatch, {5: script, 6: tokens_of("/s>xy</s>z"), 7: script})
    calls = [
        ([5], greedy(8, stop=("</s>",))),
        # the prompt ends with the first character of the stop text
        ([6, *tokens_of("<")], greedy(9, stop=("</q>", "</s>"))),
        ([7], greedy(5, stop=("</s>",))),
    ]
    spanning, behind, cut = together(engine, calls)
    assert (spanning.token_ids, spanning.finish_reason) == (tokens_of("ab</s>"), "stop")
    assert (behind.token_ids, behind.finish_reason) == (tokens_of("/s>xy</s>"), "stop")
    assert (cut.token_ids, cut.finish_reason) == (tokens_of("ab</s"), "length")


def test_end_of_sequence_and_stop_tokens_end_and_are_kept(make_engine, monkeypatch):
    engine = make_engine()
    Scripted(engine, monkeypatch, {5: [9, END, 9, 9], 6: [9, 9, 33, 9]})
    ended, stopped = together(engine, [([5], greedy(4)), ([6], greedy(4, stop_token_ids=(33,)))])
    assert (ended.token_ids, ended.finish_reason) == ([9, END], "stop")
    assert (stopped.token_ids, stopped.finish_reason) == ([9, 9, 33], "stop")


def test_stop_check_decodes_only_after_tokens_that_can_complete_one(tokenizer, monkeypatch):
    finder = StopText(tokenizer)
    watched = finder.watched(SamplingParams(stop=("ab</s>",), stop_token_ids=(40,)), frozenset({END}))
    assert {3 + LETTERS.index(">"), END, 40} <= set(watched)
    assert not set(tokens_of("abs</")) & set(watched)
    # a decoder may write the space between two tokens: nothing can be ruled out
    spaced = finder.watched(SamplingParams(stop=("a ",)), frozenset())
    assert all(token in spaced for token in tokens_of("abs"))


def test_bytes_of_a_vocabulary_entry_under_every_convention():
    assert b" the" in token_bytes("Ġthe")
    assert "é".encode() in token_bytes("Ã©")
    assert "é".encode()[-1:] in token_bytes("©")
    assert b"\xe2" in token_bytes("<0xE2>")
    assert token_bytes(b"\n") == b"\n"
    assert token_bytes(None) == b""


def test_byte_level_stop_split_inside_a_character():
    """A vocabulary of single bytes: the last byte of the stop's last character ends it."""
    inner = Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("[END]")])
    finder = StopText(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[END]"))
    ids = list("wäé".encode())
    stop = ("é",)
    watched = finder.watched(SamplingParams(stop=stop), frozenset())
    assert [i for i in range(1, len(ids) + 1) if ids[i - 1] in watched and finder.ends(ids[:i], stop)] == [len(ids)]


def test_top_p_keeps_the_smallest_set_and_renormalises():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(3000, 1)
    rows = (
        [SamplingParams(top_p=0.6)] * 1000
        + [SamplingParams()] * 1000
        + [SamplingParams(temperature=0, top_p=0.1)] * 1000
    )
    uniform = torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, logprobs = sample(logits, Draw.of(rows, torch.device("cpu")), uniform)
    shares = [torch.bincount(part, minlength=4) / 1000 for part in ids.split(1000)]
    torch.testing.assert_close(shares[0], torch.tensor([0.625, 0.375, 0, 0]), atol=0.05, rtol=0)
    torch.testing.assert_close(shares[1], torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.05, rtol=0)
    assert shares[2].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(logprobs[:1000].exp(), torch.tensor([0.625, 0.375])[ids[:1000]])
    torch.testing.assert_close(logprobs[1000:2000].exp(), torch.tensor([0.5, 0.3, 0.15, 0.05])[ids[1000:2000]])
    torch.testing.assert_close(logprobs[2000:].exp(), torch.full((1000,), 0.5))


def test_top_p_is_the_nucleus_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    # rounded, so that many are equal
    logits = (torch.randn(60, 30, generator=generator) * 2).round()
    rows = [SamplingParams(top_p=0.05 + 0.9 * i / 59) for i in range(60)]
    seen = [set() for _ in rows]
    for u in torch.linspace(0, 0.9999, 400, dtype=torch.float64):
        ids, logprobs = sample(logits, Draw.of(rows, torch.device("cpu")), u.expand(60))
        for i, token in enumerate(ids.tolist()):
            seen[i].add((token, round(logprobs[i].item(), 4)))
    for i, row in enumerate(rows):
        probabilities = logits[i].double().softmax(-1).tolist()
        kept, mass = [], 0.0
        for token in sorted(range(30), key=lambda token, p=probabilities: (-p[token], token)):
            if mass >= row.top_p:
                break
            kept.append(token)
            mass += probabilities[token]
        assert {token for token, _ in seen[i]} <= set(kept)
        # a token of less mass than a step of the grid may be missed
        assert {token for token in kept if probabilities[token] / mass > 0.003} <= {token for token, _ in seen[i]}
        for token, logprob in seen[i]:
            assert logprob == pytest.approx(math.log(probabilities[token] / mass), abs=1e-3)


def test_sampling_at_the_edges_never_draws_a_token_without_mass():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    ids, _ = sample(logits, Draw.of([SamplingParams()] * 2, torch.device("cpu")), uniform)
    assert ids.tolist() == [1, 2]


def test_seeds(make_engine):
    engine = make_engine()
    calls = [([5, 6], SamplingParams(max_tokens=70, seed=seed)) for seed in (1, 1, 2, -3)]
    a, b, c, d = (result.token_ids for result in together(engine, calls))
    assert a == b
    assert len({tuple(a), tuple(c), tuple(d)}) == 3
    assert together(engine, calls[:1])[0].token_ids == a


def test_room_ends_a_completion_and_bad_prompts_are_refused(make_engine):
    engine = make_engine(ends=False, max_context_length=10)
    result = together(engine, [([5, 6, 7, 8], greedy(50))])[0]
    assert (len(result.token_ids), result.finish_reason) == (6, "length")
    for prompt, message in (([], "empty"), ([5] * 10, "max_context_length = 10"), ([5, VOCAB], r"prompt_ids\[1\]")):
        with pytest.raises(ValueError, match=message):
            together(engine, [(prompt, greedy())])
    for options, message in (({"max_context_length": 10**6}, "256 positions"), ({"max_batch": 0}, "max_batch")):
        with pytest.raises(ValueError, match=message):
            make_engine(**options)


def test_a_cancelled_caller_leaves_and_the_others_go_on(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)

    async def run():
        tasks = [asyncio.ensure_future(engine.generate(p, greedy(200), session="s")) for p in PROMPTS]
        while engine.num_generated < 20:
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        if i in (0, 3):
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert result.token_ids == alone(model, prompt, 200, ends=False)
    assert not engine._rows and not engine._in_flight


def test_a_failing_forward_reaches_every_caller_and_the_engine_recovers(make_engine, monkeypatch):
    engine = make_engine(max_batch=2)
    forward, calls = engine._forward, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", failing)

    async def run():
        tasks = [engine.generate(prompt, greedy(60)) for prompt in PROMPTS]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    results = asyncio.run(run())
    assert len(results) == 5
    for result in results:
        assert isinstance(result, EngineError)
        assert isinstance(result.__cause__, RuntimeError)
    assert together(engine, [(PROMPTS[0], greedy())])[0].token_ids == alone(engine._model, PROMPTS[0])


def test_broken_weights_are_an_error(make_engine):
    model = make_model()
    engine = make_engine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="NaN"):
        together(engine, [([5], greedy())])


def test_two_event_loops_in_a_row_also_after_one_was_torn_down(make_engine):
    model = make_model()
    engine = make_engine(model, ends=False)

    async def leave_behind():
        task = asyncio.ensure_future(engine.generate([9, 8], greedy(200), session="s"))
        while not engine.num_generated:
            await asyncio.sleep(0)
        return task

    asyncio.run(leave_behind())
    for _ in range(2):
        assert together(engine, [(PROMPTS[1], greedy())], "s")[0].token_ids == alone(model, PROMPTS[1], ends=False)
    assert not engine._rows and not engine._in_flight


@pytest.mark.parametrize("copies", [False, True])
def test_sync_weights_changes_the_output_and_drops_the_caches(copies, make_engine):
    model, other = make_model(0), make_model(1)
    engine = make_engine(model, copy_weights=copies)
    call = [(PROMPTS[1], greedy())]
    before = together(engine, call, "s")[0]
    engine.sync_weights(other)
    after = together(engine, call, "s")[0]
    assert after.num_prefilled == len(PROMPTS[1])
    assert before.token_ids == alone(model, PROMPTS[1])
    assert after.token_ids == alone(other, PROMPTS[1]) != before.token_ids


def test_a_copy_is_out_of_the_trainers_reach(make_engine):
    model = make_model()
    engine = make_engine(model, copy_weights=True)
    before = together(engine, [(PROMPTS[1], greedy())])[0].token_ids
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == before
    engine.sync_weights(model)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == alone(model, PROMPTS[1]) != before


def test_a_copy_samples_in_a_thread_while_the_model_is_trained(make_engine):
    model = make_model()
    engine = make_engine(model, copy_weights=True)
    calls = [(prompt, SamplingParams(max_tokens=40, seed=i)) for i, prompt in enumerate(PROMPTS)]
    expected = [result.token_ids for result in together(engine, calls)]
    results = []
    thread = threading.Thread(target=lambda: results.extend(together(engine, calls)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    thread.start()
    steps = 0
    while thread.is_alive():
        ids = torch.tensor([PROMPTS[4]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        steps += 1
    thread.join()
    assert steps > 0 and all(module.training for module in model.modules())
    assert [result.token_ids for result in results] == expected


def test_adapters_are_sampled_and_synced(make_engine):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    shared, copied = make_engine(model), make_engine(model, copy_weights=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(20.0)
    copied.sync_weights(model)
    for engine in (shared, copied):
        assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == alone(model, PROMPTS[1])
    assert alone(model, PROMPTS[1]) != alone(make_model(), PROMPTS[1])


def test_dropout_is_off_while_sampling_and_back_on_afterwards(make_engine):
    model = make_model(**FAMILIES["gpt2"], resid_pdrop=0.5, embd_pdrop=0.5)
    expected = alone(model, PROMPTS[1])
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    engine = make_engine(model)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == expected
    assert [module.training for module in model.modules()] == modes
    # what was sampled through the model can still be trained
    model(torch.tensor([PROMPTS[1]]), labels=torch.tensor([PROMPTS[1]])).loss.backward()


def test_weights_are_not_swapped_under_a_running_completion(make_engine):
    engine = make_engine(ends=False)

    async def run():
        task = asyncio.ensure_future(engine.generate([5], greedy(100)))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="await them first"):
            engine.sync_weights(engine._model)
        await task

    asyncio.run(run())


def test_a_slow_forward_does_not_stall_the_loop_nor_a_slow_task_the_engine(make_engine, monkeypatch):
    engine = make_engine()
    forward, threads = engine._forward, set()

    def slow(*args):
        threads.add(threading.current_thread())
        time.sleep(0.02)
        return forward(*args)

    monkeypatch.setattr(engine, "_forward", slow)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def slow_tool():
        await engine.generate([5], greedy(1))
        await asyncio.sleep(0.5)
        return time.perf_counter()

    async def chain():
        await engine.generate([6], greedy(6))
        await engine.generate([7], greedy(6))
        return time.perf_counter()

    async def run():
        ticker = asyncio.ensure_future(tick())
        late, early = await asyncio.gather(slow_tool(), chain())
        ticker.cancel()
        return late - early

    assert asyncio.run(run()) > 0.05
    assert ticks > 30
    assert threading.main_thread() not in threads and len(threads) == 1


def test_requests_that_follow_each_other_join_the_running_batch(make_engine, monkeypatch):
    engine = make_engine(ends=False)
    forward, sizes = engine._forward, []
    monkeypatch.setattr(engine, "_forward", lambda *args: sizes.append(args[0].shape) or forward(*args))

    async def chain(first):
        for turn in range(3):
            await engine.generate([first, turn], SamplingParams(max_tokens=4, seed=first))

    async def run():
        await asyncio.gather(*(chain(first) for first in range(5, 13)))

    asyncio.run(run())
    # three turns of a prefill and three steps, always all eight rows
    assert [tuple(size) for size in sizes] == [(8, 2), (8, 1), (8, 1), (8, 1)] * 3


def test_closed_engines_refuse(make_engine):
    engine = make_engine()
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        together(engine, [([5], greedy())])


WINDOWED = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def test_a_window_as_long_as_the_context_is_served(make_engine):
    model = make_model(**WINDOWED)
    assert "sliding_attention" in model.config.layer_types
    with pytest.raises(ValueError, match="sliding window of 24"):
        make_engine(model)
    engine = make_engine(model, max_context_length=24)
    together(engine, [(list(range(3, 18)), greedy(4))], "s")
    prompts = [[*range(3, 18), 40], [*range(20, 36)], [5], [7, 8]]
    for prompt, result in zip(prompts, together(engine, [(p, greedy(8)) for p in prompts], "s"), strict=True):
        assert result.token_ids == alone(model, prompt, 8)
        reference = forward_logprobs(model, prompt, result.token_ids)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mamba", "num_hidden_layers": 2, "state_size": 4},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
        {"model_type": "bloom", "n_layer": 2, "n_head": 4},
    ],
)
def test_models_without_plain_keys_and_values_are_refused(changes, make_engine):
    with pytest.raises(ValueError, match="another engine"):
        make_engine(make_model(**changes), max_context_length=64)


def test_prefix_tree_stores_each_token_once():
    tree = PrefixTree()

    def piece(ids):
        keys = torch.tensor(ids, dtype=torch.float32)[None, None, :, None]
        return keys, -keys

    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2], [7, 8], [1, 2, 3, 4, 5, 6], [1, 2, 3, 9]]
    for ids in sequences:
        tree.insert(ids, *piece(ids))
    assert tree.num_tokens == 5 + 1 + 2 + 1
    for ids in [*sequences, [1, 2, 3, 4, 0], [5], [1, 9], [7]]:
        length, pieces = tree.match(ids)
        expected = max(sum(1 for _ in common(ids, other)) for other in sequences)
        assert length == expected
        for part in (0, 1):
            joined = [x for pair in pieces for x in pair[part].flatten().abs().tolist()]
            assert joined == ids[:length]


def common(a, b):
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


def test_batch_rows_keep_their_values_through_joins_drops_and_moves():
    shape = KVShape(1, (1, 1), (1, 1), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    batch, rows, made = KVBatch(shape), [], 0
    for step in range(300):
        draw = int(torch.randint(0, 10, (), generator=generator))
        if draw == 0 or not rows:
            length = int(torch.randint(1, 40, (), generator=generator))
            values = [float(made * 1000 + j) for j in range(length)]
            made += 1
            keys = torch.tensor(values)[None, None, :, None]
            cut = length // 2
            batch.join([(keys[:, :, :cut], -keys[:, :, :cut]), (keys[:, :, cut:], -keys[:, :, cut:])], 2)
            rows += [list(values), list(values)]
        elif draw < 3 and len(rows) > 2:
            order = batch.drop([0, len(rows) - 1][: 1 + step % 2])
            rows = [rows[i] for i in order]
        else:
            new = [float(-step - i / 1000) for i in range(len(rows))]
            keys = torch.tensor(new)[:, None, None, None]
            batch.cache(1).update(keys, -keys, 0)
            batch.length += 1
            for row, value in zip(rows, new, strict=True):
                row.append(value)
        for i, row in enumerate(rows):
            keys, values = batch.row(i)
            assert torch.equal(keys.flatten(), torch.tensor(row))
            assert torch.equal(values, -keys)
    assert made > 10 and batch.keys.shape[3] < 400
