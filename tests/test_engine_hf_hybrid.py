"""The hf engine over hybrid models: every token and log-prob is that of a forward of the sequence alone without a
cache, whatever states it was continued from; what is computed again is counted by hand."""

from __future__ import annotations

import asyncio

import models
import numpy as np
import pytest
import tiny_engine
import torch
import transformers
from models import EXPERTS
from packaging.version import Version
from tiny import VOCAB
from tiny_engine import greedy, grow_trees, make_model, together
from transformers import CONFIG_MAPPING

from treegrpo.rollout import hf, hybrid, layers
from treegrpo.rollout.engine import SamplingParams
from treegrpo.rollout.kv import KVBatch, KVShape, PrefixTree
from treegrpo.rollout.sampling import Draw, sample

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="hybrid models are refused"),
]
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine

LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DELTA = {**models.DELTA_NET, **LAYERS, "linear_value_head_dim": 6}
# with a bias, padding is no zero to the convolution
CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}
MAMBA = {**models.MAMBA, "num_hidden_layers": 3, "mamba_chunk_size": 64}
# keys and values of latents, which differ in size
KIMI = {**models.KIMI, **LAYERS}
FAMILIES = {
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": {**DELTA, "linear_allow_neg_eigval": True},
    "lfm2": CONV,
    "lfm2_moe": {**CONV, **EXPERTS, "num_dense_layers": 1, "use_expert_bias": False},
    "lfm3": CONV,
    "granitemoehybrid": {
        **MAMBA,
        **LAYERS,
        **EXPERTS,
        "shared_intermediate_size": 16,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "ssm_multipliers": [0.9, 0.8, 0.7, 1.5, 0.6]},
    "kimi_linear": KIMI,
    "bailing_hybrid": KIMI,
    # two layers that cache nothing, one of them where a cache looks first
    "nemotron_h": {
        "layers_block_type": ["mlp", "linear_attention", "full_attention", "moe", "linear_attention"],
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 64},
        **{"n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    },
}
# of newer releases
FAMILIES = {name: options for name, options in FAMILIES.items() if name in CONFIG_MAPPING}
# the engine sees states: of a convolution and a recurrence, and of a convolution alone
of_each_kind = pytest.mark.parametrize("family", ["olmo_hybrid", "lfm2"])
# seen: 1.1e-5, of a recurrence by tokens here and by chunks there, both in float32; with a wrong state 2e-2 and more
BOUND = 3e-5
# seen: 1.2e-4; a whole forward is 6e-5 from one in float64
BOUNDS = {"bailing_hybrid": 3e-4}


def make_hybrid(family: str = "qwen3_5_text", seed: int = 0):
    """States fade slowly and no weight is what it begins with: at their initial values a state lasts a token or two."""
    model = make_model(seed, model_type=family, **FAMILIES[family])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(4 * noise - 5 if name.endswith("A_log") else parameter + 0.15 * (noise - 0.5))
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # nemotron_h has one of its own, for which it is refused
            module.time_step_limit = (0.0, float("inf"))
    return model


def check(model, prompt, sampling, result) -> None:
    """Draws again from logits of one forward of the whole sequence without a cache."""
    sampled = result.token_ids
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *sampled]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    uniform = torch.from_numpy(np.random.default_rng(sampling.seed).random(len(sampled))).to(model.device)
    ids, logprobs = sample(logits, Draw.of([sampling] * len(sampled), model.device), uniform)
    assert sampled == ids.tolist()
    torch.testing.assert_close(
        torch.tensor(result.logprobs), logprobs.cpu(), atol=BOUNDS.get(model.config.model_type, BOUND), rtol=0
    )


def ask(engine, calls, session: str = ""):
    """Their completions, checked."""
    results = together(engine, calls, session)
    for (prompt, sampling), result in zip(calls, results, strict=True):
        check(engine._model, prompt, sampling, result)
    return results


def states_of(tree: PrefixTree) -> list[torch.Tensor]:
    return [*(tree.state or ()), *(x for child in tree.children.values() for x in states_of(child))]


@pytest.mark.parametrize(
    ("family", "session"), [*((family, "s") for family in FAMILIES), ("qwen3_5_text", ""), ("falcon_h1", "")]
)
def test_requests_of_unlike_lengths_together(family, session, make_engine):
    engine = make_engine(make_hybrid(family), ends=False)
    random = np.random.default_rng(0)
    # the shortest are shorter than the kernel of the convolution, some longer than a chunk of the recurrence
    lengths = [1, 2, 3, 5, 13, 63, 65, 130]
    prompts = [random.integers(3, VOCAB, n).tolist() for n in lengths]
    for temperature in (0.0, 0.9):
        calls = [
            (prompt, SamplingParams(max_tokens=1 + 3 * i, temperature=temperature, seed=i))
            for i, prompt in enumerate(prompts)
        ]
        results = ask(engine, calls, session)
        assert [len(result.token_ids) for result in results] == [1 + 3 * i for i in range(8)]
        again = session and temperature > 0
        assert [result.num_prefilled for result in results] == ([1] * 8 if again else lengths)
    assert len({token for result in results for token in result.token_ids}) > 10


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "lfm2"])
def test_random_trees_of_many_prompts_grown_at_once(family, make_engine):
    """Branches from the middle and from the end of what others sampled, rows that join, leave and give up."""
    engine = make_engine(make_hybrid(family), max_batch=5)

    def sampling(limit, seed):
        return SamplingParams(max_tokens=limit, temperature=0.8 * (seed % 3 > 0), seed=seed)

    done = grow_trees(engine, 4, sampling, ends_only=lambda seed: seed % 2)
    assert len(done) > 35 and not engine._sessions
    assert sum(result.num_prefilled for _, _, result in done) < 0.7 * sum(len(prompt) for prompt, _, _ in done)
    for prompt, sampling, result in done:
        check(engine._model, prompt, sampling, result)


@of_each_kind
def test_a_prompt_is_computed_from_the_deepest_state_before_its_last_token(family, make_engine):
    engine = make_engine(make_hybrid(family), ends=False)
    prompt = list(range(10, 30))

    def counts(prompts):
        calls = [(ids, SamplingParams(max_tokens=6, seed=i)) for i, ids in enumerate(prompts)]
        results = ask(engine, calls, "s")
        ends = [ids + result.token_ids for ids, result in zip(prompts, results, strict=True)]
        return [result.num_prefilled for result in results], ends

    # every row decodes the last token; states are kept at 19 and at 25
    found, parents = counts([prompt] * 4)
    assert found == [20, 1, 1, 1]
    observed = parents[0] + [31, 32, 33]
    found, deeper = counts([observed, observed, parents[1] + [34, 35], parents[2]])
    assert found == [4, 1, 3, 1]
    # again, deeper still, and what ends where a state is kept: it is continued from the one before
    assert counts([prompt, observed, deeper[0] + [36], parents[3][:25]])[0] == [1, 1, 2, 6]
    # a fork in the middle of what was sampled begins where the prompt ended; its own end is kept
    fork = [*parents[3][:23], 37, 38]
    assert counts([fork])[0] == [6]
    assert counts([fork, [*fork, 39]])[0] == [1, 2]
    assert engine.num_prefilled == 23 + 9 + 10 + 6 + 3
    # a fork of a fork of the prompt, and nothing in common
    assert counts([[*prompt[:10], 40], [41, 42]])[0] == [11, 2]
    assert counts([[*prompt[:10], 43]])[0] == [1]
    asyncio.run(engine.release("s"))
    assert counts([prompt])[0] == [20]


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_kept_states_are_never_written_to(family, make_engine):
    engine = make_engine(make_hybrid(family), ends=False)
    prompt = list(range(5, 25))
    [first] = ask(engine, [(prompt, greedy(9))], "s")
    kept = states_of(engine._sessions["s"])
    before = [x.clone() for x in kept]
    # of the prompt and of the completion
    assert len(kept) == 2 * len(engine._shape.states)
    stems = (prompt, prompt + first.token_ids, prompt + first.token_ids[:4])
    calls = [(stem + [30 + i] * i, SamplingParams(max_tokens=3 + i, seed=i)) for stem in stems for i in range(4)]
    ask(engine, calls, "s")
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    # each in memory of its own, so that a batch can go
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in states_of(engine._sessions["s"]))


@pytest.mark.parametrize(
    ("room", "prefilled"),
    [(None, [20, 3, 2, 1]), (3, [20, 3, 2, 20]), (1, [20, 3, 27, 20]), (0, [20, 28, 27, 20])],
)
def test_states_used_longest_ago_are_dropped_and_computed_again(room, prefilled, make_engine):
    # two layers, 32 channels and the 3 tokens the convolution looks at; a byte less than one more
    size = None if room is None else 4 * 2 * 32 * 3 * (room + 1) - 1
    engine = make_engine(make_hybrid("lfm2"), ends=False, max_state_bytes=size)
    prompt = list(range(10, 30))
    [first] = ask(engine, [(prompt, greedy(6))], "s")
    # one state per prompt and per completion; the second is used again in between, the first is not
    end = prompt + first.token_ids
    calls = [(ids, greedy(6)) for ids in ([*end, 31, 32], [*end, 33], prompt)]
    results = [first, *(ask(engine, [call], "s")[0] for call in calls)]
    assert [result.num_prefilled for result in results] == prefilled
    kept = engine._kept._nodes
    assert len(states_of(engine._sessions["s"])) == len(kept) == (6 if room is None else room)
    asyncio.run(engine.release("s"))
    # the worker may still be letting go of the last request
    engine._executor.submit(int).result()
    assert not kept


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "lfm2", "falcon_h1"])
def test_new_tokens_are_never_padded_and_the_forwards_stay_few(family, make_engine, monkeypatch):
    engine = make_engine(make_hybrid(family), ends=False)
    forward, calls = engine._forward, []

    def watching(ids, positions, mask, cache):
        calls.append(ids.shape)
        assert mask is None or bool(mask[:, -ids.shape[1] :].all())
        return forward(ids, positions, mask, cache)

    monkeypatch.setattr(engine, "_forward", watching)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCAB, n).tolist() for n in range(1, 33)]
    results = ask(engine, [(prompt, greedy(1)) for prompt in prompts], "s")
    # one for each power of two, then one token for every row
    assert [columns for _, columns in calls] == [16, 8, 4, 2, 1, 1]
    # of one length in one forward, whether a state is there or not; rows times columns are bounded
    ends = [prompt + x.token_ids for prompt, x in zip(prompts, results, strict=True)]
    calls.clear()
    ask(engine, [([*ids, 3, 4, 5], greedy(1)) for ids in [*ends[:9], []]], "s")
    assert [tuple(size) for size in calls] == [(9, 3), (1, 2), (10, 1)]
    calls.clear()
    monkeypatch.setattr(hf, "MAX_PREFILL_COLUMNS", 40)
    ask(engine, [([*ids, 6, 7, 8, 9], greedy(1)) for ids in ends[-5:-2]], "s")
    assert [tuple(size) for size in calls] == [(1, 4), (1, 4), (1, 4), (3, 1)]


@pytest.mark.parametrize("copies", [False, True])
def test_new_weights_forget_states(copies, make_engine):
    model, other = make_hybrid(), make_hybrid(seed=1)
    engine = make_engine(model, copy_weights=copies)
    call = [(list(range(5, 15)), greedy())]
    before = ask(engine, call, "s")[0]
    engine.sync_weights(other)
    after = together(engine, call, "s")[0]
    check(other, *call[0], after)
    assert after.num_prefilled == 10 and after.token_ids != before.token_ids
    if copies:
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert together(engine, call, "s")[0].token_ids == after.token_ids


def test_states_keep_their_own_precision(make_engine):
    engine = make_engine(make_hybrid().bfloat16(), ends=False)
    prompt = list(range(5, 25))
    together(engine, [(prompt, greedy(9))] * 2, "s")
    convolution, recurrence = engine._shape.states
    assert convolution == ((2 * 16 + 24, 4), torch.bfloat16) and recurrence == ((4, 8, 6), torch.float32)
    assert {x.dtype for x in states_of(engine._sessions["s"])} == {torch.bfloat16, torch.float32}


def state(value: float) -> tuple[torch.Tensor, ...]:
    return torch.full((2, 3), value), torch.full((2, 1, 1), -value)


def test_a_tree_continues_only_where_a_state_was_kept():
    tree = PrefixTree()

    def insert(ids, num_known=0, kept=None):
        keys = torch.tensor(ids[num_known:], dtype=torch.float32)[None, None, :, None]
        tree.insert(ids, keys, -keys, num_known, kept)

    def resumed(ids):
        length, pieces, kept = tree.resume(ids)
        assert [x for keys, _ in pieces for x in keys.flatten().tolist()] == ids[:length]
        return length, None if kept is None else kept[0][0, 0].item()

    assert resumed([1, 2]) == (0, None)
    insert([1, 2, 3, 4, 5, 6], kept=state(6.0))
    assert resumed([1, 2, 3, 4, 5]) == (0, None) and resumed([1, 2, 3, 4, 5, 6, 7]) == (6, 6.0)
    # a fork leaves nothing where it splits, and the state where it was
    insert([1, 2, 3, 9], 3, state(4.0))
    assert resumed([1, 2, 3, 8]) == (0, None) == resumed([1, 2, 3])
    assert resumed([1, 2, 3, 4, 5, 6]) == (6, 6.0) and resumed([1, 2, 3, 9]) == (4, 4.0)
    # a state inside a node makes it two, and at the end of one nothing new
    insert([1, 2, 3, 4, 5], kept=state(5.0))
    insert([1, 2, 3, 4, 5], kept=state(0.0))
    insert([1, 2], kept=state(2.0))
    insert([1, 2, 3])
    assert resumed([1, 2, 3]) == (2, 2.0) and resumed([1, 2, 3, 4, 5, 7]) == (5, 5.0)
    assert tree.num_tokens == 7 and tree.match([1, 2, 3, 4, 7])[0] == 4
    assert len(states_of(tree)) == 2 * 4


def test_batch_rows_keep_their_states_through_joins_drops_and_moves():
    states = (((3,), torch.float64), ((1, 1), torch.float32))
    shape = KVShape(
        1, (1, 1), (1, 1), torch.float32, torch.device("cpu"), ((False, True), (True, False), (False, True)), states
    )
    generator = torch.Generator().manual_seed(0)
    batch, rows = KVBatch(shape), []
    for step in range(300):
        draw = int(torch.randint(0, 10, (), generator=generator))
        if draw == 0 or not rows:
            keys = torch.zeros(1, 1, step % 3 and 1 + step % 40, 1)
            first = float(step) if keys.shape[2] else 0.0
            batch.join([(keys, keys)] if first else [], 2, state(first) if first else None)
            rows += [first, first]
        elif draw < 3 and len(rows) > 2:
            order = batch.drop([0, len(rows) - 1][: 1 + step % 2])
            rows = [rows[i] for i in order]
        else:
            cache, new = batch.cache(1), torch.arange(len(rows)) + step / 7
            cache.update(*torch.zeros(2, len(rows), 1, 1, 1), 1)
            for layer in (0, 2):
                # as the models do: a step of the convolution writes in place, one of the recurrence hands over
                cache.layers[layer].conv_states[0].copy_(new[:, None].expand(-1, 3))
                cache.update_recurrent_state(-new[:, None, None], layer)
            batch.length += 1
            rows = new.tolist()
        for i, row in enumerate(rows):
            convolution, recurrence = batch.state(i)
            assert convolution.dtype == torch.float64 and bool((convolution.float() == torch.tensor(row)).all())
            assert bool((recurrence == -torch.tensor(row)).all())


def test_strides_compute_every_length_in_few_forwards():
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 40):
        for longest in (1, 3, 50, 1000):
            lengths = random.integers(0, longest + 1, count).tolist()
            done = [0] * count
            steps = hybrid.strides(lengths)
            for width, indices in steps:
                for i in indices:
                    done[i] += width
            assert done == lengths
            assert len(steps) <= min(len(set(lengths) - {0}), max(lengths).bit_length())
    assert hybrid.strides([0]) == [] and hybrid.strides([7, 300, 7]) == [(300, [1]), (7, [0, 2])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba2", "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, "linear_attention"),
        ({"model_type": "minimax", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "jamba", "num_experts": 2, "mamba_d_state": 4}, "linear_attention"),
        ({"model_type": "lfm2", "layer_types": ["conv", "conv"]}, "no attention layer"),
        # a step of one token does not bound them: seen, 2e-3 between what is sampled and what is trained
        ({"model_type": "nemotron_h", **FAMILIES["nemotron_h"]}, r"bounds the time steps.*\(0\.001, inf\)"),
        ({"model_type": "falcon_h1", **FAMILIES["falcon_h1"], "time_step_limit": (0.0, 0.5)}, "bounds the time steps"),
    ],
)
def test_other_models_with_states_are_refused(changes, message, make_engine):
    with pytest.raises(ValueError, match=f"{message}.*another engine"):
        make_engine(make_model(**changes), max_context_length=64)


def test_versions_whose_layers_cannot_go_on_from_a_state_are_refused(make_engine, monkeypatch):
    monkeypatch.setattr(layers, "HYBRIDS_SINCE", "99.0")
    with pytest.raises(ValueError, match=r"install 99\.0 or newer"):
        make_engine(make_hybrid())
