"""What the hf engine prefills, counted by hand; the prefix tree and the batch of keys and values behind it."""

from __future__ import annotations

import asyncio
import sys

import pytest
import tiny_engine
import torch
from tiny_engine import FAMILIES, alone, forward_logprobs, greedy, grow_trees, make_model, together

from treegrpo.rollout.engine import SamplingParams, checked_prompt
from treegrpo.rollout.kv import KVBatch, KVShape, PrefixTree

pytestmark = pytest.mark.usefixtures("one_thread")
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine


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

    def sampling(limit, seed):
        return SamplingParams(max_tokens=limit, temperature=0.8, seed=seed)

    done = grow_trees(engine, 6, sampling, ends_only=lambda seed: False)
    assert len(done) > 50
    assert sum(result.num_prefilled for _, _, result in done) < 0.7 * sum(len(prompt) for prompt, _, _ in done)
    for prompt, sampling, result in done:
        reference = forward_logprobs(model, prompt, result.token_ids, sampling.temperature)
        torch.testing.assert_close(torch.tensor(result.logprobs), reference, atol=2e-5, rtol=0)


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


def bytecodes(work) -> int:
    """How many Python instructions `work` executes: what a loop over tokens costs, whatever the machine."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_long_context_is_read_without_python_per_token():
    def read(num_tokens):
        ids, keys = list(range(num_tokens)), torch.zeros(1, 1, num_tokens, 1)
        fork = [*ids[:-3], 0]
        tree = PrefixTree()
        tree.insert(ids, keys, keys)
        assert checked_prompt(ids, num_tokens + 5, num_tokens) == (ids, 5)
        assert tree.match(ids[:-1])[0] == num_tokens - 1 and tree.match(fork)[0] == num_tokens - 3
        tree.insert(fork, keys[:, :, 2:], keys[:, :, 2:])
        assert tree.num_tokens == num_tokens + 1

    assert bytecodes(lambda: read(16_000)) < 1.5 * bytecodes(lambda: read(1000))


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


def test_one_long_row_does_not_grow_the_room_of_those_that_left():
    batch = KVBatch(KVShape(1, (1, 1), (1, 1), torch.float32, torch.device("cpu")))
    piece = torch.zeros(1, 1, 4, 1)
    batch.join([(piece, piece)], 50)
    batch.drop(range(49))
    for _ in range(500):
        batch.cache(1).update(*torch.zeros(2, 1, 1, 1, 1), 0)
        batch.length += 1
    assert batch.keys.shape[1] <= 2 and batch.row(0)[0].shape[2] == 504
