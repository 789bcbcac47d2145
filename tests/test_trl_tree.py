"""Trees grown through TRL: leaves, states, masks, credit, and a run to the end."""

import math
from collections import Counter as Multiset

import numpy as np
import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_agents import CALL, END, Counter, FakeVLLM, Script, save_agent  # noqa: E402
from trl_tiny import make, parameters, save_tiny  # noqa: E402

import treegrpo  # noqa: E402
from treegrpo.integrations.credit import leaves_of, on_tokens, step_advantages  # noqa: E402
from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SHAPE = dict(num_trees=2, num_expansions=2, num_rounds=2, num_generations=10, per_device_train_batch_size=20)


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    return save_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def questions(number=8):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(number)]})


def agent_trainer(agent, out, monkeypatch, backend="transformers", script=None, **changes):
    """A trainer whose model speaks from a script, through one of TRL's back-ends."""
    path, tokenizer = agent
    script = script or Script()
    if backend != "transformers":
        FakeVLLM.script, FakeVLLM.tokenizer = script, tokenizer
        monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)
        changes |= dict(use_vllm=True, vllm_mode=backend, vllm_importance_sampling_correction=True)
    arguments = SHAPE | dict(max_completion_length=600, max_steps=2, rewards=None, train_dataset=questions()) | changes
    arguments = dict(config=TreeGRPOConfig, environment_factory=Counter) | arguments
    trainer = make(TreeGRPOTrainer, path, out, processing_class=tokenizer, **arguments)
    if backend == "transformers":
        trainer.model.generate = script.generate(tokenizer)
    return trainer


def scored(trainer):
    """(what TRL keeps of a generation batch, the trees) of one batch."""
    trainer.model.train()
    rows = [trainer.train_dataset[i // trainer.num_generations] for i in range(2 * trainer.num_generations)]
    output = trainer._generate_and_score_completions(rows)
    return output, trainer._grown


@pytest.mark.parametrize("backend", ["transformers", "colocate"])
def test_leaves_are_whole_rollouts_with_their_own_state(backend, agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch, backend)
    tokenizer = agent[1]
    output, grown = scored(trainer)
    assert grown.trees == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    paths = []
    for row, environment in enumerate(trainer.environments):
        length = int(output["completion_mask"][row].sum())
        ids = output["completion_ids"][row][:length].tolist()
        mask = output["tool_mask"][row][:length].tolist()
        said = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])
        heard = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if not own])
        # every call of the path ran once on the state of this very branch
        assert environment.looked == CALL.findall(said)
        for place, word in enumerate(environment.looked, 1):
            assert f"{word} is number {place}" in heard
        assert "look" not in heard and "is number" not in said
        assert ids[-1] == END and said.endswith("<|im_end|>")
        # a step is a turn: it begins with the model's first word behind what the tools said
        steps = grown.steps[row]
        assert steps == [i for i in range(length) if mask[i] and (i == 0 or not mask[i - 1])]
        assert len(steps) == len(environment.looked) + 1
        paths.append((ids, steps))
    for base in range(0, 20, 5):
        for row in range(base + 1, base + 5):
            # a branch has the very ids of a leaf of its tree up to where one of that leaf's steps ends
            ids = paths[row][0]
            places = [
                p for other, steps in paths[base:row] for p in steps if other[:p] == ids[:p] and p in paths[row][1]
            ]
            assert places
    if backend == "transformers":
        assert "sampling_per_token_logps" not in output
    else:
        recorded = output["sampling_per_token_logps"]
        for row, (_, steps) in enumerate(paths):
            for step in steps:
                assert recorded[row, step : step + 3].tolist() == [-1 / 64, -2 / 64, -3 / 64]
            assert (recorded[row][output["tool_mask"][row] == 0] == 0).all()
        client = trainer.vllm_generation
        # the chains of all prompts in one call, then each round's branches; tools in between
        assert client.sizes[0] == 4 and client.sizes.count(8) >= 2 and client.synced == 1


def test_what_branches_share_is_sampled_once(agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch)
    output, grown = scored(trainer)
    mask = output["completion_mask"] * output["tool_mask"]
    rows = [
        tuple(zip(ids[:n], grown_mask[:n], strict=True))
        for ids, grown_mask, n in zip(
            output["completion_ids"].tolist(), mask.tolist(), output["completion_mask"].sum(1).tolist(), strict=True
        )
    ]
    trained = int(mask.sum())
    assert grown.num_sampled < trained
    assert trainer._metrics["train"]["tree/sampled_tokens"] == [grown.num_sampled]
    # what was sampled is at least what is different
    prefixes = {(row // 10, *own[: i + 1]) for row, own in enumerate(rows) for i in range(len(own)) if own[i][1]}
    assert len(prefixes) <= grown.num_sampled
    calls = sum(len(environment.looked) for environment in trainer.environments)
    assert 0 < trainer._metrics["train"]["tools/call_frequency"][0] < calls / 20


def test_advantages_are_the_estimators_on_the_tree(agent, tmp_path, monkeypatch):
    for estimator, values in (
        (None, [{"eps": 1e-4}]),
        ("spo", [{"eps": 1e-4}]),
        ("treerl", [{"eps": 1e-6}, "eps=1e-6"]),
    ):
        options = dict(advantage_estimator=estimator)
        if len(values) > 1:
            options["advantage_options"] = values[1:]
        trainer = agent_trainer(agent, tmp_path / str(estimator), monkeypatch, **options)
        output, grown = scored(trainer)
        leaves = []
        for row, environment in enumerate(trainer.environments):
            prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
            length = int(output["completion_mask"][row].sum())
            leaves.append(
                treegrpo.Trajectory(
                    prompt + output["completion_ids"][row][:length].tolist(),
                    [0] * len(prompt) + output["tool_mask"][row][:length].tolist(),
                    reward=environment.get_reward(),
                    group=str(row // 10),
                    tree=row // 5 % 2,
                    steps=[len(prompt) + step for step in grown.steps[row]],
                )
            )
        trees = treegrpo.build_forest(leaves)
        expected = treegrpo.compute_advantages(trees, estimator or "tree_grpo", **values[0])
        [batch] = treegrpo.pack(trees)
        stream = batch.leaf_stream(expected)
        got = output["advantages"].cpu()
        assert got.abs().max() > 0.1
        if estimator is None:
            assert got.dim() == 1
            got = got[:, None].expand_as(output["completion_ids"])
        for row, leaf in enumerate(leaves):
            own = stream[batch.leaf_offsets[row] : batch.leaf_offsets[row + 1]]
            prompt = int(output["prompt_mask"][row].sum())
            torch.testing.assert_close(got[row][: leaf.num_tokens - prompt], own[prompt:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ["grpo", "tree_grpo"])
def test_on_chains_grpo_and_tree_grpo_are_trls_advantages(scale, estimator, folder, tmp_path):
    """tree_grpo too: every chain is a tree of its own, compared with nobody."""

    def rewards(completion_ids, **kwargs):
        # one completion nobody can score, one group of equals
        values = [float(sum(ids) % 7) for ids in completion_ids]
        values[1] = None
        values[4:8] = [2.0] * 4
        return values

    found = []
    for kind, changes in (
        (GRPOTrainer, {}),
        (TreeGRPOTrainer, dict(config=TreeGRPOConfig, advantage_estimator=estimator)),
    ):
        trainer = make(
            kind, folder, tmp_path, rewards=rewards, scale_rewards=scale, per_device_train_batch_size=12, **changes
        )
        trainer.model.train()
        rows = [trainer.train_dataset[i // 4] for i in range(12)]
        found.append(trainer._generate_and_score_completions(rows)["advantages"])
        logged = list(trainer._logs["advantages"])
        assert logged == pytest.approx(found[-1].tolist(), abs=1e-6)
    assert found[0].abs().max() > 0.5 and found[0][1] == 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_chains_have_the_steps_in_which_they_part(folder, tmp_path):
    """Completions of a prompt begin alike two and two: what two share has the mean of their rewards as its value."""
    trainer = make(
        TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, advantage_estimator="grid",
        advantage_options=["baseline=root", "value=leaf_mean", "norm=none"],
    )  # fmt: skip
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    output = trainer._generate_and_score_completions(rows)
    rewards = torch.tensor([float(sum(ids) % 7) for ids in trainer._last_rewards[1]])
    advantages = output["advantages"].cpu()
    for row in range(8):
        group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
        pair = rewards[row // 2 * 2 : row // 2 * 2 + 2]
        torch.testing.assert_close(advantages[row, :3], (pair.mean() - group.mean()).expand(3))
        length = int(output["completion_mask"][row].sum())
        expected = (rewards[row] - group.mean()).expand(length - 3)
        torch.testing.assert_close(advantages[row, 3:length], expected)


def test_chains_have_a_step_behind_each_answer_of_a_tool():
    prompt, said, heard = [7, 8], [1, 1], [0, 0]
    leaves = leaves_of(
        [prompt] * 3,
        [[5, 6, 9, 9, 5, 6], [5, 6, 9, 9, 5, 7], [4, 6]],
        [said + heard + said, said + heard + said, [1, 1]],
        [1.0, 0.0, math.nan],
        group_size=3,
        name="0",
    )
    # the completion, the second turn, and where the first two part inside it
    assert [leaf.steps.tolist() for leaf in leaves] == [[2, 6, 7], [2, 6, 7], [2]]
    assert [leaf.tree for leaf in leaves] == [0, 1, 2] and leaves[2].reward is None
    values = step_advantages(leaves, "spo", {"eps": 1e-4})
    assert values[0].tolist() == [0, 0, 0.5] and values[1].tolist() == [0, 0, -0.5] and values[2].tolist() == [0]
    rows = on_tokens(leaves, values, [2, 2, 2], 7)
    assert rows.tolist() == [[0, 0, 0, 0, 0, 0.5, 0], [0, 0, 0, 0, 0, -0.5, 0], [0] * 7]


def test_turns_are_cut_into_steps_where_branches_begin(folder, tmp_path):
    """Without tools, through the model's own sampling: no reward function, loss or metric of TRL is replaced."""
    changes = dict(config=TreeGRPOConfig, max_step_tokens=3, max_completion_length=9, rollout_func=None)
    trainer = make(TreeGRPOTrainer, folder, tmp_path, **SHAPE | changes)
    trainer._tokenize_prompts = lambda prompts: ([[int(w[1:]) for w in p.split()] for p in prompts], None, {})
    output, grown = scored(trainer)
    shared = Multiset()
    for row in range(20):
        length = int(output["completion_mask"][row].sum())
        assert grown.steps[row] == list(range(0, length, 3))
        ids = output["completion_ids"].tolist()
        tree = ids[row // 5 * 5 : row]
        shared[
            max(
                (sum(a == b for a, b in zip(ids[row][:3], other[:3], strict=True)) == 3 for other in tree),
                default=False,
            )
        ] += 1
    # seven in ten branches begin behind a step of their tree, the others at the prompt
    assert shared[True] > 4
    before = parameters(trainer)
    trainer.train()
    assert max(float((p - before[n]).abs().max()) for n, p in parameters(trainer).items()) > 1e-4
    last = trainer.state.log_history[-2]
    assert last["batch/packing_ratio"] > 1 and last["tree/sampled_tokens"] > 0 and math.isfinite(last["loss"])


@pytest.mark.parametrize("backend", ["transformers", "colocate"])
def test_an_agent_trains_to_the_end(backend, agent, tmp_path, monkeypatch):
    # the script's log-probs are not the model's: weights of whole sequences would all vanish
    changes = dict(beta=0.01, num_iterations=2, vllm_importance_sampling_mode="token_truncate")
    trainer = agent_trainer(agent, tmp_path, monkeypatch, backend, advantage_estimator="spo", **changes)
    before = parameters(trainer)
    trainer.train()
    assert max(float((p - before[n]).abs().max()) for n, p in parameters(trainer).items()) > 1e-4
    row = trainer.state.log_history[0]
    for name in ("tools/call_frequency", "tree/sampled_tokens", "batch/packing_ratio", "kl", "rewards/Counter/mean"):
        assert math.isfinite(row[name]), name
    assert row["batch/packing_ratio"] > 2
    if backend == "colocate":
        assert math.isfinite(row["sampling/importance_sampling_ratio/mean"])


def test_a_completion_is_no_longer_than_max_completion_length(agent, tmp_path, monkeypatch):
    whole = agent_trainer(agent, tmp_path, monkeypatch)
    longest = scored(whole)[0]["completion_ids"].shape[1]
    trainer = agent_trainer(agent, tmp_path, monkeypatch, max_completion_length=200)
    output, grown = scored(trainer)
    assert longest > 200 >= output["completion_ids"].shape[1]
    # a tool's answer that does not fit is dropped, as in TRL: the completion ends with the call
    ends = [int(mask.sum()) for mask in output["completion_mask"]]
    assert all(steps[-1] < end for steps, end in zip(grown.steps, ends, strict=True))
    assert all(output["tool_mask"][row, end - 1] == 1 for row, end in enumerate(ends))


def test_max_tool_calling_iterations_bounds_the_whole_path(agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch, max_tool_calling_iterations=1)
    scored(trainer)
    assert max(len(environment.looked) for environment in trainer.environments) == 1


def test_evaluation_samples_chains(agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch)
    trainer.model.eval()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 10] for i in range(20)])
    assert trainer._grown is None and output["advantages"].dim() == 1
    assert "tree/sampled_tokens" not in trainer._metrics["eval"]


def test_a_rollout_func_brings_its_own_trees(folder, tmp_path):
    from trl_tiny import rollouts

    def trees(prompts, trainer):
        output = rollouts(prompts, trainer)
        number = len(prompts)
        output["env_mask"] = [[1, 0] + [1] * (len(ids) - 2) for ids in output["completion_ids"]]
        return output | dict(tree=[i // 2 % 2 for i in range(number)], steps=[[0, 2] for _ in range(number)])

    seen = []

    def reward(completion_ids, **kwargs):
        seen.append(set(kwargs))
        return [float(sum(ids) % 7) for ids in completion_ids]

    shape = dict(num_trees=2, num_expansions=1, num_generations=4)
    trainer = make(
        TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, rewards=reward, rollout_func=trees, **shape
    )
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    rewards = np.array([sum(ids) % 7 for ids in trainer._last_rewards[1]], float).reshape(2, 2, 2)
    z = lambda x, axes: (x - x.mean(axes, keepdims=True)) / (x.std(axes, ddof=1, keepdims=True) + 1e-4)  # noqa: E731
    expected = z(rewards, 2) + z(rewards.reshape(2, 1, 4), 2).reshape(2, 2, 2)
    assert output["advantages"].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    assert (output["tool_mask"][:, 1] == 0).all() and not {"tree", "steps"} & seen[0]

    trainer = make(TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, rollout_func=rollouts, **shape)
    trainer.model.train()
    with pytest.raises(ValueError, match="returned no 'tree'"):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    short = lambda prompts, trainer: rollouts(prompts, trainer) | dict(tree=[0])  # noqa: E731
    trainer = make(TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, rollout_func=short, **shape)
    trainer.model.train()
    with pytest.raises(ValueError, match="1 entries of 'tree' for 8 completions"):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (dict(tree=[0] * 7 + ["a"]), r"tree\[7\]='a': give an integer"),
        (dict(tree=[0.5] * 8), r"tree\[0\]=0.5: give an integer"),
        (dict(tree=[0] * 8, steps=[[0]] * 7 + [[0, 12]]), r"steps\[7\]\[1\]=12: give where .* \d tokens, in ascending"),
        (dict(tree=[0] * 8, steps=[[0, 3, 2]] * 8), r"steps\[0\]\[2\]=2: give where"),
    ],
)
def test_trees_of_a_rollout_func_that_make_no_sense(trees, message, folder, tmp_path):
    from trl_tiny import rollouts

    own = lambda prompts, trainer: rollouts(prompts, trainer) | trees  # noqa: E731
    trainer = make(TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, rollout_func=own)
    trainer.model.train()
    with pytest.raises(ValueError, match=message):
        trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])


class Locked(Counter):
    def __init__(self):
        import threading

        self.lock = threading.Lock()


class Learned(Counter):
    def __init__(self):
        self.state = torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(environment_factory=None), "num_expansions=2 without tools.*max_step_tokens"),
        (dict(selection="entropy"), "selection='entropy' needs the log-probs"),
        (dict(environment_factory=Locked), "Locked cannot be copied.*__deepcopy__"),
        (dict(environment_factory=Learned), "Learned cannot be copied.*__deepcopy__"),
    ],
)
def test_refusals_of_the_trainer(changes, message, agent, tmp_path, monkeypatch):
    if changes.get("environment_factory", 1) is None:
        changes = changes | dict(rewards=lambda completions, **kwargs: [0.0] * len(completions), rollout_func=None)
    with pytest.raises(ValueError, match=message):
        scored(agent_trainer(agent, tmp_path, monkeypatch, **changes))


def test_entropy_selection_reads_recorded_log_probs(agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch, "colocate", selection="entropy")
    _, grown = scored(trainer)
    assert len(grown.trees) == 20


@pytest.mark.parametrize("selection", ["uniform", "entropy"])
def test_tokens_that_vllm_could_not_score(selection, agent, tmp_path, monkeypatch):
    generate = FakeVLLM.generate

    def unscored(*args, **kwargs):
        prompts, said, logprobs, rest = generate(*args, **kwargs)
        return prompts, said, [[[None] if i % 2 else lp for i, lp in enumerate(own)] for own in logprobs], rest

    monkeypatch.setattr(FakeVLLM, "generate", unscored)
    trainer = agent_trainer(agent, tmp_path, monkeypatch, "colocate", selection=selection)
    output, grown = scored(trainer)
    assert len(grown.trees) == 20 and output["sampling_per_token_logps"].isnan().any()


def test_two_batches_of_an_optimiser_step_branch_elsewhere(agent, tmp_path, monkeypatch):
    trainer = agent_trainer(agent, tmp_path, monkeypatch, gradient_accumulation_steps=2, steps_per_generation=1)
    picked = []
    for trainer._step in range(2):
        trainer.model.generate = Script().generate(agent[1])
        output, _ = scored(trainer)
        picked.append(output["completion_ids"].tolist())
    assert picked[0] != picked[1]
