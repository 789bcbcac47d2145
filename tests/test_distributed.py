"""Two processes train as one does: groups dealt by cost, one process without any, parameters equal."""

import pytest
import tiny
import torch
from boxes import online_config, quick_box
from distributed_worker import run
from two_processes import DDP, two_processes

from treegrpo import balance, build_forest, toy

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {
    "uneven": dict(groups_per_step=3, row_token_budget=200),
    "one_empty": dict(groups_per_step=1, loss_type="dapo"),
    "calls_iterations_reference": dict(
        groups_per_step=2, samples="call", num_iterations=2, gradient_accumulation_steps=2, beta=0.05
    ),
    "chain": dict(groups_per_step=3, attention="chain"),
    "lora": dict(groups_per_step=3, lora_r=3, beta=0.05, gradient_checkpointing=True),
    # a mean over sequences: what fills up the other process must not count as one
    "checkpointing": dict(groups_per_step=1, gradient_checkpointing=True, loss_type="grpo"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def files(folder):
    return tiny.write(folder)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Settings of a run that samples the next step's trees in one thread and trains in the other."""
    folder = tmp_path_factory.mktemp("sampled")
    changes = dict(overlap_rollouts=True, max_steps=5, groups_per_step=4, vllm_importance_sampling_correction=False)
    return online_config(quick_box(folder), folder / "run", **changes).to_dict()


def settings(files, name):
    rollouts, model = files
    base = dict(rollouts=f"replay:{rollouts}", model=str(model), output_dir=str(rollouts.parent / name), max_steps=3)
    # Adam divides rounding by itself where a gradient is nearly zero (1e-7 in one of these weights, 1e-3 around it)
    base |= dict(learning_rate=2e-3, adam_epsilon=1e-4, save_strategy="no", disable_tqdm=True)
    return base | RUNS[name.partition("-")[2]]


@pytest.fixture(scope="module")
def shared(folder, files, sampled):
    """All runs of two processes, in one launch."""
    runs = {name: settings(files, f"two-{name}") for name in RUNS} | {"sampled": sampled}
    return two_processes(folder, {name: dict(settings=of_one, environment=DDP) for name, of_one in runs.items()})


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(files, shared, name):
    history, parameters, gradients, _ = run(settings(files, f"one-{name}"))
    assert not isinstance(shared[name], str), shared[name]
    rows, found, found_gradients, _ = shared[name]
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-6
    assert max(float((found_gradients[n] - g).abs().max()) for n, g in gradients.items()) < 1e-6
    # not unique tokens: groups on two processes cannot share a beginning
    for key in ("loss", "grad_norm", "tree/chain_tokens", "num_tokens", "entropy", "ratio/min"):
        got, want = ([row.get(key) for row in every] for every in (rows, history))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6, nan_ok=True), key
    assert all(row["batch/rank_imbalance"] == 1.0 for row in history)
    imbalance = [row["batch/rank_imbalance"] for row in rows]
    assert all(1.0 <= x <= 2.0 for x in imbalance) and (RUNS[name]["groups_per_step"] > 1 or imbalance == [2.0] * 3)


def test_two_processes_sample_while_they_train(sampled, shared):
    """What the threads gather and what the trainers add up must not be taken for each other."""
    history, parameters, *_ = run({**sampled, "overwrite_output_dir": True})
    assert not isinstance(shared["sampled"], str), shared["sampled"]
    rows, found, *_ = shared["sampled"]
    assert [row["reward"] for row in rows] == pytest.approx([row["reward"] for row in history])
    assert max(float((found[n] - p).abs().max()) for n, p in parameters.items()) < 1e-5


def test_groups_are_dealt_longest_first():
    gen = torch.Generator().manual_seed(0)
    for num_ranks in (1, 2, 3, 8, 64):
        costs = torch.randint(1, 1000, (40,), generator=gen).tolist()
        parts = balance.assign(costs, num_ranks)
        assert sorted(i for part in parts for i in part) == list(range(40)) and len(parts) == num_ranks
        loads = [sum(costs[i] for i in part) for part in parts]
        assert max(loads) <= 4 / 3 * max(sum(costs) / num_ranks, max(costs)) + 1
        # whoever has the most would not gain by giving its smallest away
        busiest = max(range(num_ranks), key=loads.__getitem__)
        assert loads[busiest] - min(costs[i] for i in parts[busiest]) <= min(loads)
    with pytest.raises(ValueError, match="at least 1"):
        balance.assign([1], 0)


def test_costs_are_flops_or_tokens(files):
    trees = build_forest(toy.sample_groups(3))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files[1])
    tree, chain = (balance.costs(trees, config, attention) for attention in ("tree", "chain"))
    assert all(a < b for a, b in zip(tree, chain, strict=True))
    assert balance.costs(trees, {"model_type": "unheard_of"}, "tree") == [one.num_tokens for one in trees]
