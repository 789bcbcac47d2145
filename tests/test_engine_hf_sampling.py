"""How the hf engine draws tokens and ends completions: stop texts and tokens, top-p against a plain loop, seeds."""

from __future__ import annotations

import math

import pytest
import tiny_engine
import torch
from tiny_engine import END, LETTERS, greedy, together
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treegrpo.rollout.engine import SamplingParams
from treegrpo.rollout.sampling import BYTE_OF, Draw, StopText, sample, token_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine


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


def test_a_stop_behind_a_gap_in_the_ids_is_watched():
    inner = Tokenizer(models.WordLevel({"[END]": 0, "a": 1, "</search>": 9}, unk_token="[END]"))
    finder = StopText(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[END]"))
    assert 9 in finder.watched(SamplingParams(stop=("</search>",)), frozenset())


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
