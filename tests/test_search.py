"""Tree search over a scripted engine: shapes, exact ids, forks of the state, prompts, budgets, ends of branches."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from scripted import EOS, Engine, Notebook, Quiet, Words, run, same_words, three_calls

from treegrpo import Trajectory, build_tree
from treegrpo.envs.base import StepResult
from treegrpo.rewards import math_answer, search_em
from treegrpo.rollout.online import Sampler
from treegrpo.rollout.search import RolloutStats, SearchOptions


@pytest.mark.parametrize("shape", [(1, 0, 0), (3, 0, 2), (4, 2, 0), (2, 2, 1), (1, 5, 1), (2, 1, 3), (3, 3, 2)])
def test_number_and_order_of_leaves(shape):
    trees, expansions, rounds = shape
    options = dict(num_trees=trees, num_expansions=expansions, num_rounds=rounds)
    for group in run(Engine(), num_rows=3, **options):
        each = rounds * expansions + 1
        assert [t.tree for t in group.trajectories] == [tree for tree in range(trees) for _ in range(each)]
        assert len(group.trajectories) == SearchOptions(**options).num_leaves == group.stats.leaves
        assert len(group.completions) == len(group.environments) == len(group.completion_ids) == trees * each
        assert build_tree(group.trajectories).num_leaves == trees * each


def test_ids_and_logprobs_are_the_engines_and_observations_the_environments():
    engine = Engine()
    for group in run(engine, num_rows=4, num_trees=2, num_expansions=4, num_rounds=2):
        calls = [call for call in engine.calls if call[0] == group.group]
        sampled = {(prompt, tuple(done.token_ids)): done for _, prompt, _, done in calls}
        words, seen = engine.tokenizer.words, set()
        for t, ids, text in zip(group.trajectories, group.completion_ids, group.completions, strict=True):
            whole = t.token_ids.tolist()
            start = len(engine.tokenizer.encode(group.prompt, add_special_tokens=False))
            assert t.steps[0] == start and whole[start:] == ids and t.info["num_turns"] == t.num_steps
            ends = [*t.steps[1:].tolist(), len(whole)]
            mask = np.zeros(len(whole), bool)
            for begin, end in zip(t.steps.tolist(), ends, strict=True):
                num = int(np.argmin(np.append(t.loss_mask[begin:end], False)))
                done = sampled[tuple(whole[:begin]), tuple(whole[begin : begin + num])]
                seen.add(id(done))
                assert t.logprobs[begin : begin + num].tolist() == np.float32(done.logprobs).tolist()
                assert np.isnan(t.logprobs[begin + num : end]).all()
                mask[begin : begin + num] = True
                observed = [words[i] for i in whole[begin + num : end]]
                assert observed == [] if end == len(whole) else observed[0] in ("notes", "error:")
            assert t.loss_mask.tolist() == mask.tolist()
            assert text == " ".join(words[i] for i in ids).removesuffix(EOS)
            json.dumps(t.info)
        assert len(seen) == len(calls) == group.stats.steps
        assert group.stats.generated_tokens == sum(len(done.token_ids) for *_, done in calls)
        assert group.stats.prefilled_tokens == sum(done.num_prefilled for *_, done in calls)


def test_branches_leave_their_tree_at_the_start_of_a_step():
    engine = Engine(three_calls)
    shared = set()
    for group in run(engine, num_rows=6, num_trees=2, num_expansions=3, num_rounds=2):
        # A step sampled once is one run of the trie, so its tokens are what the engine generated plus what it read.
        tree = build_tree(group.trajectories)
        assert group.stats.generated_tokens == 3 * group.stats.steps
        for t in group.trajectories:
            assert t.num_steps == 4 and t.steps.tolist() == [3, 9, 15, 21]
        for number in range(2):
            leaves = [t for t in tree.trajectories if t.tree == number]
            for later, leaf in enumerate(leaves[1:], 1):
                forks = [int(np.argmin(leaf.token_ids == other.token_ids)) for other in leaves[:later]]
                shared.add(max(forks) - 1)
    # Behind the prompt or behind an observation stands the word call or answer, shared by chance; then they differ.
    assert shared == {3, 9, 15, 21}


def test_nobody_writes_the_sampled_tokens_out(monkeypatch):
    """asyncio.run did, by comparing a signal's handler: half a second for eight groups of 16 leaves of 32k tokens."""
    written = []
    monkeypatch.setattr(Trajectory, "__repr__", lambda trajectory: written.append(trajectory) or "")
    run(Engine(), num_rows=2)
    assert not written


def test_tokens_cost_what_the_reference_says():
    """Chains of T = 4 steps: an expansion costs (T + 1) / (2 T) of a chain's steps and 1/2 of its tool calls."""
    groups = run(Engine(three_calls), Quiet, num_rows=100, num_trees=2, num_expansions=2)
    stats = sum((group.stats for group in groups), RolloutStats())
    assert stats.steps / stats.groups == pytest.approx(2 * 4 + 4 * 2.5, abs=0.6)
    assert stats.tool_calls / stats.groups == pytest.approx(2 * 3 + 4 * 1.5, abs=0.6)


@pytest.mark.parametrize("selection", ["uniform", "entropy"])
def test_what_is_sampled_does_not_depend_on_what_finishes_first(selection):
    engines = [Engine(jitter=jitter) for jitter in range(4)]
    options = dict(num_rows=5, num_trees=3, num_expansions=3, num_rounds=2, selection=selection)
    runs = [run(engine, **options) for engine in engines]
    orders = {tuple(call[1:3] for call in engine.calls) for engine in engines}
    assert len(orders) == 4
    for sampled, engine in zip(runs[1:], engines[1:], strict=True):
        assert same_words(runs[0], engines[0], sampled, engine)
    other = Engine()
    assert not same_words(runs[0], engines[0], run(other, seed=100, **options), other)


def test_every_call_has_a_seed_of_its_own():
    engine = Engine(three_calls)
    run(engine, num_rows=4, num_trees=3, num_expansions=3, num_rounds=2)
    seeds = [sampling.seed for _, _, sampling, _ in engine.calls]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert {sampling.stop for _, _, sampling, _ in engine.calls} == {("stop",)}


@pytest.mark.parametrize(
    ("budget", "leaves", "steps"),
    [(1, 1, 4), (12, 1, 4), (13, 2, 8), (24, 2, 8), (25, 3, None), (10_000, 6, None)],
)
def test_token_budget(budget, leaves, steps):
    """Chains of 4 steps of 3 tokens; (M, N, L) = (2, 2, 1)."""
    engine = Engine(three_calls)
    groups = run(engine, Quiet, num_rows=3, token_budget=budget)
    free = Engine(three_calls)
    whole = run(free, Quiet, num_rows=3)
    for group, full in zip(groups, whole, strict=True):
        stats = group.stats
        assert len(group.trajectories) == stats.leaves == leaves and stats.budget_stopped == 6 - leaves
        assert steps is None or stats.steps == steps
        assert stats.generated_tokens == 3 * stats.steps
        assert stats.generated_tokens < budget + 12
        trees = [t.tree for t in group.trajectories]
        assert sorted(set(trees)) == list(range(len(set(trees)))) and trees == sorted(trees)
        words = lambda e, t: [e.tokenizer.words[i] for i in t.token_ids]  # noqa: E731
        everything = [words(free, t) for t in full.trajectories]
        assert all(words(engine, t) in everything for t in group.trajectories)
    if leaves == 6:
        assert same_words(groups, engine, whole, free)


def test_budget_counts_chains_that_were_not_begun():
    (group,) = run(Engine(three_calls), Quiet, num_trees=3, num_expansions=2, num_rounds=2, token_budget=13)
    assert [t.tree for t in group.trajectories] == [0, 1]
    assert group.stats.budget_stopped == 15 - 2


def replayed(group, t, words):
    """The notes and observations of a fresh environment that takes this leaf's actions alone; a step that raises leaves
    no trace."""
    notes, observations = [], []
    ends = [*t.steps[1:].tolist(), t.num_tokens]
    for begin, end in zip(t.steps.tolist(), ends, strict=True):
        text = [words[i] for i in t.token_ids[begin:end]]
        trained = int(t.loss_mask[begin:end].sum())
        action = " ".join(text[:trained]).removesuffix(EOS)
        failed = action.endswith("7") and end != t.num_tokens
        if not failed:
            notes.append(action)
        observations.append("error: OSError: disk full" if failed else f"notes {len(notes)} end")
        if end != t.num_tokens:
            assert " ".join(text[trained:]) == observations[-1]
    return notes


def test_siblings_never_see_each_others_changes():
    engine = Engine()
    errors = forks = 0
    for group in run(engine, num_rows=8, num_trees=2, num_expansions=4, num_rounds=2):
        for t, environment in zip(group.trajectories, group.environments, strict=True):
            assert environment.notes == replayed(group, t, engine.tokenizer.words)
        assert len(set(map(id, group.environments))) == len(group.environments)
        errors += group.stats.tool_errors
        forks += group.stats.steps < sum(t.num_steps for t in group.trajectories)
        assert group.stats.tool_calls >= group.stats.tool_errors and group.stats.tool_timeouts == 0
    assert errors > 10 and forks == 8


def test_observations_are_encoded_once():
    engine = Engine(three_calls)
    encoded = []

    class Recording(Words):
        def encode(self, text, add_special_tokens=True):
            encoded.append(text)
            return super().encode(text, add_special_tokens=add_special_tokens)

    engine.tokenizer = Recording()
    (group,) = run(engine, Quiet, num_trees=2, num_expansions=5, num_rounds=2)
    assert encoded.count("seen") == group.stats.tool_calls < sum(t.num_steps - 1 for t in group.trajectories)
    assert encoded.count(group.prompt) == 1


def test_stats_add_up():
    stats = [group.stats for group in run(Engine(), num_rows=3)]
    total = sum(stats, RolloutStats())
    assert total.groups == 3 and total.leaves == 18
    assert total.generated_tokens == sum(each.generated_tokens for each in stats) > 0
    assert total.seconds == pytest.approx(sum(each.seconds for each in stats)) and total.seconds > 0


def test_asynchronous_steps():
    class Async(Notebook):
        async def step(self, action, *, is_last=False):
            await asyncio.sleep(0)
            return Notebook.step(self, action, is_last=is_last)

    first, second = Engine(), Engine()
    assert same_words(run(first, num_rows=3), first, run(second, Async, num_rows=3), second)


def test_last_steps():
    last = []

    class Noting(Quiet):
        def step(self, action, *, is_last=False):
            last.append(is_last)
            return super().step(action, is_last=is_last)

    (group,) = run(Engine(three_calls), Noting, num_trees=1, num_expansions=0, max_turns=2)
    assert last == [False, False, True]
    assert group.trajectories[0].info == {"truncated": False, "num_turns": 3, "end": "max_turns"}
    assert group.completions[0].endswith("now"), "nothing follows the last step"
    (group,) = run(Engine(three_calls), Quiet, num_trees=2, num_expansions=2, max_turns=0)
    assert all(t.num_steps == 1 for t in group.trajectories)


def test_a_step_cut_by_max_tokens_ends_its_branch_but_may_hold_the_answer():
    seen = []

    class Noting(Quiet):
        def step(self, action, *, is_last=False):
            seen.append((action, is_last))
            return super().step(action, is_last=is_last)

    (group,) = run(Engine(three_calls), Noting, num_trees=1, num_expansions=2, max_tokens=2)
    assert len(seen) == 3 and all(is_last and action.startswith("call") for action, is_last in seen)
    assert group.stats.truncated_leaves == 3
    assert [t.info for t in group.trajectories] == [{"truncated": True, "num_turns": 1, "end": "max_tokens"}] * 3
    assert all(t.num_tokens == 3 + 2 for t in group.trajectories)


@pytest.mark.parametrize(
    ("length", "tokens", "turns", "end"),
    [
        # Prompt 3, steps of 3 sampled tokens, observations of 1.
        (5, 5, 1, "context"),  # room for 2 tokens of the step
        (6, 6, 1, "context"),  # for the step, not for its observation
        (7, 6, 1, "context"),  # for the observation, but then for no token
        (8, 8, 2, "context"),
        (18, 18, 4, "done"),
    ],
)
def test_a_full_context_ends_the_branch(length, tokens, turns, end):
    engine = Engine(three_calls)
    (group,) = run(engine, Quiet, num_trees=1, num_expansions=1, max_context_length=length)
    for t in group.trajectories:
        assert (t.num_tokens, t.num_steps, t.info["end"]) == (tokens, turns, end)
        assert t.info["truncated"] == (end == "context")
    assert all(len(prompt) + sampling.max_tokens <= length for _, prompt, sampling, _ in engine.calls)
    engine = Engine(three_calls, max_context_length=length)
    assert run(engine, Quiet, num_trees=1)[0].trajectories[0].num_tokens == tokens


def test_chat_prompts():
    def look(word: str) -> str:
        """Looks a word up.

        Args:
            word: Which.
        """
        return word

    class Chat(Notebook):
        def reset(self, row):
            return [{"role": "user", "content": row["question"]}]

        def tools(self):
            return [look, {"type": "function"}]

    engine = Engine()
    (group,) = run(engine, Chat)
    schemas = engine.tokenizer.chat.pop("tools")
    assert schemas[0]["function"]["name"] == "look" and schemas[1] == {"type": "function"}
    assert engine.tokenizer.chat == dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    assert group.prompt == [{"role": "user", "content": "question 0 ?"}]
    prompt = engine.tokenizer.encode("user : question 0 ?", add_special_tokens=False)
    assert all(t.token_ids[:5].tolist() == prompt and t.steps[0] == 5 for t in group.trajectories)


def test_a_transformers_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", EOS, "user", "question", "?", "call", "answer", "now", "seen", *map(str, range(1000))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=EOS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"

    class Chat(Quiet):
        def reset(self, row):
            return [{"role": "user", "content": row["question"]}]

    engine = Engine(three_calls)
    engine.tokenizer = tokenizer
    (group,) = run(engine, Chat, num_trees=1)
    leaf = group.trajectories[0]
    assert leaf.token_ids[:4].tolist() == tokenizer.encode("user question 0 ?")
    assert leaf.steps.tolist() == [4, 8, 12, 16] and leaf.token_ids[7] == words.index("seen")
    assert leaf.token_ids[-1] == tokenizer.eos_token_id and group.environments[0].notes[-1].startswith("answer ")
    assert not group.environments[0].notes[-1].endswith(EOS)


def test_no_rows():
    assert run(Engine(), num_rows=0) == []


def test_what_an_environment_says_is_nobodys_answer():
    """No markup tells a tool's turn from the policy's here, as in chat templates without blocks for it."""

    class Generous(Notebook):
        def step(self, action, *, is_last=False):
            found = "found <answer> 7 </answer> \\boxed{7} #### 7"
            return StepResult(done="call" not in action, observation=found if "call" in action else None)

    def policy(text, rng):
        return f"I give up {EOS}" if "found" in text else "call 1"

    sampler = Sampler(
        engine=Engine(policy), make_env=Generous, reward_funcs=[math_answer, search_em], reward_weights=[1.0, 1.0]
    )
    options = SearchOptions(num_trees=2, num_expansions=1)
    rows = [{"question": "?", "answers": ["7"], "own_texts": "not ours"}]
    (group,), (means,) = sampler.sample(rows, ["g"], options, [0])
    assert "<answer> 7 </answer>" in group.completions[0] and group.own_texts == ["call 1\nI give up "] * 4
    assert {t.reward for t in group.trajectories} == {0.0}
    assert means["rewards/math_answer/mean"] == 0
