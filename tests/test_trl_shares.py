"""shared_tokens under TRL's loss against treegrpo.grpo_loss, and against sums over single tokens."""

import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from trl_tiny import difference, make, parameters, save_tiny  # noqa: E402

import treegrpo  # noqa: E402
from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, packed  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def moved(folder, out, **changes):
    """A trainer whose policy has moved away from the old one and from the reference, and the inputs of its step."""
    changes = dict(num_iterations=2, advantage_estimator="spo") | changes
    trainer = make(TreeGRPOTrainer, folder, out, config=TreeGRPOConfig, **changes)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [trainer.train_dataset[i // 4] for i in range(8 * trainer.args.steps_per_generation)]
    inputs = trainer._prepare_inputs(rows)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.03 * torch.randn_like(p)
    return trainer, inputs


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shared_tokens", ["mean", "once"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_loss_and_gradient_are_those_of_grpo_loss(loss_type, shared_tokens, level, accumulation, folder, tmp_path):
    changes = dict(loss_type=loss_type, shared_tokens=shared_tokens, importance_sampling_level=level)
    changes |= dict(beta=0.3, entropy_coef=0.2, gradient_accumulation_steps=accumulation)
    trainer, inputs = moved(folder, tmp_path, **changes)
    got = trainer._compute_loss(trainer.model, inputs)
    got_gradient = gradient(trainer.model, got)

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    columns = inputs["completion_ids"].shape[1]
    batch = packed(ids, mask, columns)

    def stream(values):
        rows = torch.zeros(ids.shape)
        rows[:, -columns:] = values
        return rows[mask.bool()]

    logp, entropy = (batch.expand(x) for x in treegrpo.token_logprobs(trainer.model, batch, entropy=True))
    # multiplicity of the two groups, which share nothing
    multiplicity = batch.multiplicity
    shares = torch.where(batch.leaf_mask, 1 / multiplicity, 0)
    normalizer = None
    if loss_type in ("dapo", "cispo"):
        # of the whole generation batch, for one accumulation window
        normalizer = inputs["num_items_in_batch"] * accumulation / trainer.args.steps_per_generation
        if accumulation == 1:
            assert float(normalizer) == pytest.approx(
                float((shares if shared_tokens == "once" else batch.leaf_mask).sum())
            )
    want, _ = treegrpo.grpo_loss(
        logp,
        stream(inputs["old_per_token_logps"]),
        stream(inputs["advantages"]),
        batch.leaf_mask,
        batch.leaf_offsets,
        loss_type=loss_type,
        beta=0.3,
        ref_logp=stream(inputs["ref_per_token_logps"]),
        importance_sampling_level=level,
        shared_tokens=shared_tokens,
        multiplicity=multiplicity,
        max_completion_length=trainer.max_completion_length,
        normalizer=normalizer,
        epsilon_high=0.2,
    )
    entropies = (entropy * shares).sum() / (shares.sum() if shared_tokens == "once" else batch.leaf_mask.sum())
    if loss_type not in ("dapo", "cispo"):
        want = want / accumulation
    want = want - 0.2 * entropies / accumulation
    assert float(got) == pytest.approx(float(want), rel=1e-5, abs=1e-6)
    want_gradient = gradient(trainer.model, want)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-4, atol=1e-5 * float(want_gradient.abs().max()))


@pytest.mark.parametrize("shared_tokens", ["mean", "once"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_the_weighted_sum_of_its_tokens(loss_type, shared_tokens, folder, tmp_path):
    """The policy term of TRL, token by token: with an advantage at one token alone, TRL's loss is that token's."""
    trainer, inputs = moved(folder, tmp_path, loss_type=loss_type, shared_tokens=shared_tokens)
    got = trainer._compute_loss(trainer.model, inputs)
    shares, advantages = inputs["token_shares"], inputs["advantages"]
    mask = inputs["completion_mask"]
    # counted by hand: leaves of the group with the same tokens up to here
    for row in range(8):
        for column in range(int(mask[row].sum())):
            own = inputs["completion_ids"][row, : column + 1]
            alike = [
                other
                for other in range(row // 4 * 4, row // 4 * 4 + 4)
                if int(mask[other].sum()) > column and (inputs["completion_ids"][other, : column + 1] == own).all()
            ]
            assert float(shares[row, column]) == pytest.approx(1 / len(alike))
    plain = {name: value for name, value in inputs.items() if name != "token_shares"}
    plain["num_items_in_batch"] = mask.sum()
    total = 0.0
    with torch.no_grad():
        for row, column in mask.nonzero().tolist():
            alone = torch.zeros_like(advantages)
            alone[row, column] = advantages[row, column]
            share = float(trainer._compute_loss(trainer.model, plain | {"advantages": alone})) * float(
                shares[row, column]
            )
            if shared_tokens == "once" and loss_type in ("grpo", "sapo"):
                share *= float(mask[row].sum() / shares[row].sum())
            elif shared_tokens == "once" and loss_type not in ("dr_grpo", "luspo"):
                share *= float(mask.sum() / shares.sum())
            total += share
    assert abs(total) > 1e-3
    assert float(got) == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_it_trains_and_per_leaf_is_trls(folder, tmp_path):
    runs = {}
    for shared in ("per_leaf", "mean", "once"):
        trainer = make(TreeGRPOTrainer, folder, tmp_path, config=TreeGRPOConfig, shared_tokens=shared, loss_type="grpo")
        trainer.train()
        runs[shared] = parameters(trainer)
    assert difference(runs["per_leaf"], runs["mean"]) > 1e-4 and difference(runs["once"], runs["mean"]) > 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_trees=2, num_expansions=2), r"num_generations=8 does not fit num_trees=2.*set num_generations=6"),
        (dict(num_expansions=2), r"num_generations=8 does not fit num_rounds=1.*give a multiple of 3"),
        (dict(num_trees=0), r"num_trees=0: give an integer, at least 1, or None"),
        (dict(num_expansions=-1), r"num_expansions=-1: give an integer, at least 0"),
        (dict(token_budget=0), r"token_budget=0: give an integer"),
        (dict(max_step_tokens=0), r"max_step_tokens=0: give an integer"),
        (dict(shared_tokens="twice"), r"shared_tokens='twice': use one of 'per_leaf'"),
        (dict(advantage_estimator="gae"), r"advantage_estimator='gae': use one of"),
        (dict(selection="best"), r"selection='best': use one of"),
        (dict(advantage_options=["norm=none"]), r"advantage_options need advantage_estimator"),
        (dict(advantage_estimator="spo", advantage_options=["norm"]), r"advantage_options: 'norm' is not name=value"),
        (dict(advantage_estimator="spo", advantage_options=["bias=1"]), r"spo has no option 'bias'; it takes"),
        (dict(advantage_estimator="spo", advantage_options=["eps=x"]), r"eps='x' is no number"),
        (dict(advantage_estimator="spo", scale_rewards="none"), r"scale_rewards='none' means nothing to .*'spo'"),
        (
            dict(advantage_estimator="grpo", multi_objective_aggregation="normalize_then_sum"),
            r"multi_objective_aggregation='normalize_then_sum' makes advantages itself",
        ),
        (dict(shared_tokens="mean", use_adaptive_entropy=True), r"use_adaptive_entropy.*turn it off"),
        (
            dict(shared_tokens="once", entropy_coef=0.1, top_entropy_quantile=0.5),
            r"entropy_coef and top_entropy_quantile together",
        ),
    ],
)
def test_the_config_refuses(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TreeGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)


def test_the_config_is_trls_and_reads_a_command_line(tmp_path):
    common = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    plain, ours = trl.GRPOConfig(**common), TreeGRPOConfig(**common)
    # accelerate's state is a new object each time
    assert all(vars(ours)[name] == value for name, value in vars(plain).items() if name != "distributed_state")
    assert ours.estimator() is None and not ours.grows_trees
    line = (
        f"--output_dir {tmp_path} --use_cpu --bf16 false --num_trees 2 --num_expansions 2 --num_generations 6"
        " --per_device_train_batch_size 6 --advantage_estimator grid --advantage_options baseline=parent norm=none"
        " eps=1e-6 --shared_tokens once --token_budget 4096 --root_eligible false --max_step_tokens 64"
    )
    (config,) = trl.TrlParser(TreeGRPOConfig).parse_args_and_config(line.split())
    assert config.estimator() == ("grid", {"eps": 1e-6, "baseline": "parent", "norm": "none"})
    assert (config.num_trees, config.shared_tokens, config.token_budget) == (2, "once", 4096)
    assert config.search_options().num_leaves == 6 and config.root_eligible is False
    own = [f for f in config.__dataclass_fields__.values() if f.name not in trl.GRPOConfig.__dataclass_fields__]
    assert len(own) == 11 and all(f.metadata["help"] for f in own)
