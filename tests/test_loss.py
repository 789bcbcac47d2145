"""grpo_loss against a padded [B, T] rebuild of TRL 1.16's formulas; row-wise identities, normalisers, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from treegrpo.loss import LOSS_TYPES, grpo_loss, loss_normalizer

LEVELS = ("token", "sequence")


def make_streams(lengths, seed=0, spread=0.4):
    """Random per-leaf streams, float64; three tokens of ten are not trained and hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logp = -torch.rand(total, generator=generator, dtype=torch.float64) * 2 - 0.05
    streams = {
        "logp": logp,
        "old_logp": logp + spread * torch.randn(total, generator=generator, dtype=torch.float64),
        "ref_logp": logp + spread * torch.randn(total, generator=generator, dtype=torch.float64),
        "entropy": torch.rand(total, generator=generator, dtype=torch.float64) * 3,
        "mask": torch.rand(total, generator=generator) < 0.7,
    }
    per_leaf = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    streams["advantages"] = per_leaf.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    streams["leaf_offsets"] = torch.tensor([0, *itertools.accumulate(lengths)])
    for name in ("old_logp", "ref_logp", "advantages", "entropy"):
        streams[name] = torch.where(streams["mask"], streams[name], math.nan)
    streams["logp"] = torch.where(streams["mask"], logp, math.nan).requires_grad_()
    return streams


def pad(stream, offsets):
    """[L] -> [B, T] with zeros, NaN (unknown) as zero."""
    rows = [stream[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    return torch.nan_to_num(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).double(), nan=0.0)


def padded_loss(
    streams, loss_type, level, epsilon, epsilon_high, delta, beta, max_completion_length, entropy_coef, bias_kl
):
    """TRL's loss from its formulas, one padded row per leaf."""
    offsets = streams["leaf_offsets"]
    logp, old, ref, adv, mask, entropy = (
        pad(streams[name], offsets) for name in ("logp", "old_logp", "ref_logp", "advantages", "mask", "entropy")
    )
    log_ratio = logp - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * adv * logp
    else:
        unclipped = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(unclipped * adv, ratio.clamp(1 - epsilon, 1 + epsilon_high) * adv)
    kl = (ref - logp).exp() - (ref - logp) - 1
    loss = loss + beta * (kl * ratio if bias_kl else kl)
    loss = loss * mask
    reduced = {
        "grpo": (loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
        "bnpo": loss.sum() / mask.sum().clamp(min=1),
        "dapo": loss.sum() / mask.sum().clamp(min=1),
        "cispo": loss.sum() / mask.sum().clamp(min=1),
        "dr_grpo": loss.sum() / (mask.shape[0] * max_completion_length),
    }[loss_type]
    return reduced - entropy_coef * (entropy * mask).sum() / mask.sum().clamp(min=1)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize(("beta", "bias_kl"), [(0.0, True), (0.05, True), (0.05, False)])
@pytest.mark.parametrize("epsilon_high", [None, 0.28])
def test_equals_padded_rows(loss_type, level, delta, beta, bias_kl, epsilon_high):
    streams = make_streams([7, 1, 12, 4, 9], seed=3)
    keywords = {"delta": delta, "beta": beta, "max_completion_length": 20, "entropy_coef": 0.01}
    loss, metrics = grpo_loss(
        **streams,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=epsilon_high,
        use_bias_correction_kl=bias_kl,
        **keywords,
    )
    expected = padded_loss(
        streams, loss_type, level, 0.2, 0.2 if epsilon_high is None else epsilon_high, bias_kl=bias_kl, **keywords
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient(loss, streams["logp"]), gradient(expected, streams["logp"]), rtol=1e-11, atol=1e-14, equal_nan=True
    )
    if loss_type != "cispo" and level == "token":
        assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


def test_defaults_are_trl_names_and_values():
    streams = make_streams([5, 8], seed=1)
    loss, metrics = grpo_loss(*(streams[k] for k in ("logp", "old_logp", "advantages", "mask", "leaf_offsets")))
    expected = padded_loss(streams, "grpo", "token", 0.2, 0.2, None, 0.0, 512, 0.0, True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} < set(metrics)
    assert not {"kl", "entropy"} & set(metrics)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_are_masked_means(level):
    streams = make_streams([6, 10, 3], seed=5)
    clip = {"epsilon": 0.1, "epsilon_high": 0.3}
    _, metrics = grpo_loss(**streams, **clip, beta=0.1, importance_sampling_level=level, use_bias_correction_kl=False)
    offsets = streams["leaf_offsets"]
    logp, old, ref, adv, mask, entropy = (
        pad(streams[name].detach(), offsets)
        for name in ("logp", "old_logp", "ref_logp", "advantages", "mask", "entropy")
    )
    log_ratio = logp - old
    counts = mask.sum(-1)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / counts)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    low, high = ((ratio < 0.9) & (adv < 0)) * mask, ((ratio > 1.3) & (adv > 0)) * mask

    def mean(x):
        return (x.sum(-1) / counts).mean() if level == "sequence" else x.sum() / mask.sum()

    kl = ((ref - logp).exp() - (ref - logp) - 1) * mask
    used = ratio[mask > 0]
    expected = {
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(low) + mean(high),
        "clip_ratio/low_min": (low.sum(-1) / counts).min(),
        "clip_ratio/high_max": (high.sum(-1) / counts).max(),
        "kl": kl.sum() / mask.sum(),
        "entropy": (entropy * mask).sum() / mask.sum(),
        "ratio/mean": used.mean(),
        "ratio/min": used.min(),
        "ratio/max": used.max(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_a_leaf_without_trained_tokens_is_not_the_least_clipped():
    logp, mask, offsets = torch.zeros(4), torch.tensor([1, 1, 0, 0]), torch.tensor([0, 2, 4])
    _, metrics = grpo_loss(logp, logp + 1, -torch.ones(4), mask, offsets)
    assert metrics["clip_ratio/low_min"] == metrics["clip_ratio/low_mean"] == 1


def test_cispo_bound_is_epsilon_high_itself():
    logp = torch.tensor([-0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.log(torch.tensor([2.0, 9.0], dtype=torch.float64))
    arguments = (logp, old, torch.ones(2).double(), torch.ones(2), torch.tensor([0, 2]))
    loss, metrics = grpo_loss(*arguments, loss_type="cispo", epsilon_high=5.0)
    assert gradient(loss, logp).tolist() == pytest.approx([-2 / 2, -5 / 2])
    assert metrics["cispo_clip_ratio"].item() == 0.5
    assert "clip_ratio/low_mean" not in metrics


# Dual-clip loss of a trunk token under all three leaves of one tree, before division by Z (epsilon .2, delta 3).
RATIOS = [0.5, 0.8, 1, 1.1, 1.5, 4]
TRUNK_GOLDEN = {
    (3.181516, -0.923391, -0.923391): [-0.113332, -1.067787, -1.334734, -1.468207, -1.047646, 1.722527],
    (0.231298, 0.231298, -1.797330): [1.206566, 1.067787, 1.334734, 1.468207, 2.140880, 4.836875],
    (1.154698, -0.577349, -0.577349): [0.346409, 0, 0, 0, 0.346409, 2.078456],
}


@pytest.mark.parametrize("advantages", TRUNK_GOLDEN)
def test_golden_trunk_token(advantages):
    old = torch.full((3,), -1.0, dtype=torch.float64)
    offsets = torch.arange(4)
    for ratio, expected in zip(RATIOS, TRUNK_GOLDEN[advantages], strict=True):
        loss, _ = grpo_loss(
            old + math.log(ratio), old, torch.tensor(advantages), torch.ones(3), offsets, delta=3.0, normalizer=1
        )
        assert loss.item() == pytest.approx(expected, abs=3e-6)


def test_golden_k3():
    for difference, expected in {-1: 0.367879, -0.5: 0.106531, 0.1: 0.005171, 0.5: 0.148721}.items():
        logp = torch.tensor([-2.0], dtype=torch.float64)
        arguments = (logp, logp, torch.zeros(1), torch.ones(1), torch.tensor([0, 1]))
        loss, metrics = grpo_loss(*arguments, beta=1.0, ref_logp=logp + difference)
        assert loss.item() == pytest.approx(expected, abs=1e-6) == metrics["kl"].item()


def random_forest(seed, num_nodes=9, max_node=4):
    """Random tree of nodes with 1..max_node tokens: packed indices of each leaf's path, and the number of tokens."""
    generator = np.random.default_rng(seed)
    parents = [-1] + [int(generator.integers(0, i)) for i in range(1, num_nodes)]
    sizes = generator.integers(1, max_node + 1, num_nodes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # Inner nodes are leaves now and then: trajectories that are prefixes of others.
    ends = [i for i in range(num_nodes) if i not in parents or generator.random() < 0.2]
    paths = []
    for node in ends:
        path = []
        while node >= 0:
            path = [*range(starts[node], starts[node + 1]), *path]
            node = parents[node]
        paths.append(path)
    return paths, int(starts[-1])


def expand_forest(seed):
    """Unique-token tensors of a random tree and its per-leaf streams."""
    paths, num_tokens = random_forest(seed)
    generator = torch.Generator().manual_seed(seed)
    leaf_tokens = torch.tensor([t for path in paths for t in path])
    offsets = torch.tensor([0, *itertools.accumulate(map(len, paths))])
    logp = (-torch.rand(num_tokens, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    old = logp.detach() + 0.5 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    ref = logp.detach() + 0.5 * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    entropy = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    trained = torch.rand(num_tokens, generator=generator) < 0.8
    leaf_adv = torch.randn(len(paths), generator=generator, dtype=torch.float64)
    advantages = leaf_adv.repeat_interleave(offsets.diff())
    counts = torch.bincount(leaf_tokens[trained[leaf_tokens]], minlength=num_tokens)
    return paths, leaf_tokens, offsets, logp, old, ref, entropy, trained, advantages, counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighting", ["token", "leaf_mean", "mean", "once"])
def test_deduplicated_identity(seed, weighting):
    """Rows sharing a token share its ratio: with P_u, N_u, n_u summed over them the loss lives on unique tokens.

    sum_u -P_u min(r, 1 + e) - N_u min(max(r, 1 - e), c) + beta n_u K3 - eta n_u H, over Z.
    """
    paths, leaf_tokens, offsets, logp, old, ref, entropy, trained, advantages, counts = expand_forest(seed)
    mask, epsilon, delta, beta, eta = trained[leaf_tokens], 0.2, 3.0, 0.04, 0.02
    keywords = {"delta": delta, "beta": beta, "use_bias_correction_kl": False}
    per_leaf = [logp[leaf_tokens], old[leaf_tokens], advantages, mask, offsets]
    # The entropy bonus is a token mean for every loss type, so the identity with it is asked of the token means only.
    if weighting == "leaf_mean":
        sizes = torch.stack([mask[a:b].sum() for a, b in itertools.pairwise(offsets.tolist())]).clamp(min=1)
        weights, normalizer, eta = 1 / sizes.double().repeat_interleave(offsets.diff()), len(paths), 0.0
        loss, _ = grpo_loss(*per_leaf, ref_logp=ref[leaf_tokens], loss_type="grpo", **keywords)
    else:
        multiplicity = counts[leaf_tokens]
        shared = {"token": "per_leaf", "mean": "mean", "once": "once"}[weighting]
        weights = torch.ones_like(advantages) if weighting == "token" else 1 / multiplicity.double()
        normalizer = trained[leaf_tokens.unique()].sum() if weighting == "once" else mask.sum()
        loss, _ = grpo_loss(
            *per_leaf,
            ref_logp=ref[leaf_tokens],
            entropy=entropy[leaf_tokens],
            entropy_coef=eta,
            loss_type="dapo",
            shared_tokens=shared,
            multiplicity=multiplicity,
            **keywords,
        )
    weights = torch.where(mask, weights, 0)

    def accumulate(x):
        return torch.zeros(logp.numel(), dtype=torch.float64).index_add(0, leaf_tokens, x)

    positive, negative = (
        accumulate((weights * advantages).clamp(min=0)),
        accumulate((weights * advantages).clamp(max=0)),
    )
    count = accumulate(weights)
    ratio, difference = (logp - old).exp(), ref - logp
    per_token = -positive * ratio.clamp(max=1 + epsilon) - negative * ratio.clamp(min=1 - epsilon).clamp(max=delta)
    per_token = per_token + count * (beta * (difference.exp() - difference - 1) - eta * entropy)
    expected = per_token.sum() / normalizer
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(loss, logp), gradient(expected, logp), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_mean_averages_the_advantages_of_the_sharing_leaves(loss_type):
    """At ratio 1 a token's gradient under "mean" is that under "per_leaf" divided by its leaves (hard ARPO)."""
    _, leaf_tokens, offsets, logp, *_, trained, advantages, counts = expand_forest(11)
    arguments = (logp[leaf_tokens], logp.detach()[leaf_tokens], advantages, trained[leaf_tokens], offsets)
    keywords = {"loss_type": loss_type, "epsilon_high": 2.0, "multiplicity": counts[leaf_tokens]}
    assert (counts > 1).any()
    per_leaf, _ = grpo_loss(*arguments, **keywords)
    mean, _ = grpo_loss(*arguments, **keywords, shared_tokens="mean")
    expected = gradient(per_leaf, logp) / counts.clamp(min=1)
    torch.testing.assert_close(gradient(mean, logp), expected, rtol=1e-12, atol=1e-15)


def test_once_of_equal_advantages_is_the_mean_over_unique_tokens():
    _, leaf_tokens, offsets, logp, *_, trained, _, counts = expand_forest(4)
    ones = torch.ones(leaf_tokens.numel(), dtype=torch.float64)
    arguments = (logp[leaf_tokens], logp.detach()[leaf_tokens], ones, trained[leaf_tokens], offsets)
    loss, _ = grpo_loss(*arguments, loss_type="dapo", shared_tokens="once", multiplicity=counts[leaf_tokens])
    expected = -(trained & (counts > 0)).double() / (trained & (counts > 0)).sum()
    torch.testing.assert_close(gradient(loss, logp), expected, rtol=1e-12, atol=1e-15)
    loss, _ = grpo_loss(*arguments, loss_type="grpo", shared_tokens="once", multiplicity=counts[leaf_tokens])
    assert loss.item() == pytest.approx(-1, rel=1e-12)


def cut_leaves(streams, first, stop):
    """The streams of leaves first..stop-1, with their own offsets."""
    offsets = streams["leaf_offsets"]
    a, b = int(offsets[first]), int(offsets[stop])
    part = {name: stream[a:b] for name, stream in streams.items() if name != "leaf_offsets"}
    return part | {"leaf_offsets": offsets[first : stop + 1] - a}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shared_tokens", ["per_leaf", "mean", "once"])
def test_accumulation_equals_one_big_batch(loss_type, level, shared_tokens):
    streams = make_streams([7, 3, 12, 4, 9, 0, 5], seed=8)
    streams["multiplicity"] = torch.randint(1, 4, streams["mask"].shape, generator=torch.Generator().manual_seed(1))
    common = {"loss_type": loss_type, "shared_tokens": shared_tokens, "max_completion_length": 16}
    keywords = common | {"importance_sampling_level": level, "beta": 0.1, "entropy_coef": 0.03, "delta": 2.0}
    whole, _ = grpo_loss(**streams, **keywords)
    parts = [cut_leaves(streams, a, b) for a, b in ((0, 2), (2, 3), (3, 7))]

    def step_normalizer(loss_type):
        options = common | {"loss_type": loss_type}
        return sum(
            loss_normalizer(mask=p["mask"], leaf_offsets=p["leaf_offsets"], multiplicity=p["multiplicity"], **options)
            for p in parts
        )

    totals = {"normalizer": step_normalizer(loss_type), "entropy_normalizer": step_normalizer("dapo")}
    summed = sum(grpo_loss(**part, **keywords, **totals)[0] for part in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient(summed, streams["logp"]), gradient(whole, streams["logp"]), rtol=1e-11, atol=1e-14, equal_nan=True
    )
    floats = {name: float(value) for name, value in totals.items()}
    assert (
        grpo_loss(**parts[0], **keywords, **floats)[0].item() == grpo_loss(**parts[0], **keywords, **totals)[0].item()
    )


class LargestFloat(TorchDispatchMode):
    """Elements of the largest floating-point tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trained_tokens_are_counted_without_a_stream_of_ones(loss_type):
    mask = torch.arange(3000) % 3 > 0
    with LargestFloat() as largest:
        size = loss_normalizer(loss_type, mask, torch.tensor([0, 1000, 3000]), max_completion_length=16)
    assert size.dtype == torch.float64 and size == {"grpo": 2, "dr_grpo": 32}.get(loss_type, 2000)
    assert largest.size == 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 5, 0], [4, 4]])
@pytest.mark.parametrize("shared_tokens", ["per_leaf", "once"])
def test_leaves_without_trained_tokens_are_finite(loss_type, level, lengths, shared_tokens):
    streams = make_streams(lengths)
    streams["mask"] = torch.zeros_like(streams["mask"])
    multiplicity = torch.zeros_like(streams["logp"])
    loss, metrics = grpo_loss(
        **streams,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.1,
        shared_tokens=shared_tokens,
        multiplicity=multiplicity,
    )
    assert loss.item() == 0 and loss.requires_grad
    assert torch.equal(gradient(loss, streams["logp"]), torch.zeros_like(streams["logp"]))
    assert all(math.isfinite(value.item()) for value in metrics.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(loss_type, level):
    streams = make_streams([4, 0, 6, 3], seed=2)
    logp = torch.nan_to_num(streams.pop("logp").detach(), nan=-1.0).requires_grad_()
    entropy = torch.nan_to_num(streams.pop("entropy"), nan=1.0).requires_grad_()
    # cispo stops the gradient through its ratio, so its derivative is not that of the value: hold the ratio constant
    if loss_type == "cispo":
        streams["old_logp"] = streams["old_logp"] - 10
    keywords = {"importance_sampling_level": level, "loss_type": loss_type, "entropy_coef": 0.1, "delta": 1.5}

    def value(logp, entropy):
        keywords["beta"] = 0.0 if loss_type == "cispo" else 0.2
        return grpo_loss(logp, entropy=entropy, **streams, **keywords, shared_tokens="per_leaf")[0]

    assert torch.autograd.gradcheck(value, (logp, entropy))


def test_backward_is_bitwise_repeatable():
    streams = make_streams([50, 3, 200, 70], seed=6)
    results = []
    for _ in range(2):
        loss, _ = grpo_loss(**streams, importance_sampling_level="sequence", beta=0.1)
        results.append((loss, gradient(loss, streams["logp"])))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].nan_to_num(), results[1][1].nan_to_num())


def test_float32_sums_do_not_drift():
    """Sums are accumulated in float64, so 200,000 tokens keep float32's precision."""
    streams = make_streams([100_000, 100_000], seed=7, spread=0.1)
    exact, _ = grpo_loss(**streams, loss_type="dapo")
    single = {name: x.float() if x.is_floating_point() else x for name, x in streams.items()}
    rounded, _ = grpo_loss(**single, loss_type="dapo")
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() - exact.item()) < 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'.*'grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo'"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level is 'turn'.*'token', 'sequence'"),
        ({"shared_tokens": "sqrt"}, "shared_tokens is 'sqrt'.*'per_leaf', 'mean', 'once'"),
        ({"shared_tokens": "mean"}, r"shared_tokens='mean' needs multiplicity"),
        ({"beta": 0.1, "ref_logp": None}, "ref_logp is missing: beta=0.1"),
        ({"entropy_coef": 0.1, "entropy": None}, "entropy is missing"),
        ({"old_logp": torch.zeros(7)}, r"old_logp has shape \(7,\), expected \(9,\)"),
        ({"advantages": torch.zeros(2)}, r"advantages has shape \(2,\)"),
        ({"mask": torch.ones(9, 1)}, r"mask has shape \(9, 1\)"),
        ({"ref_logp": torch.zeros(8)}, r"ref_logp has shape \(8,\)"),
        ({"logp": torch.zeros(3, 3)}, r"logp must be floating point \[L\]"),
        ({"leaf_offsets": torch.tensor([0, 4])}, "leaf_offsets run from 0 to 4, expected 0 to 9"),
        ({"leaf_offsets": torch.tensor([1, 9])}, "leaf_offsets run from 1 to 9"),
        ({"leaf_offsets": torch.tensor([0, 6, 4, 9])}, r"leaf_offsets\[2\] is below the one before"),
        ({"leaf_offsets": torch.tensor([0.0, 9.0])}, "leaf_offsets must be integers"),
        ({"normalizer": 0.0}, "normalizer is 0.0"),
        ({"normalizer": math.nan}, "normalizer is nan"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length is None"),
    ],
)
def test_bad_input(change, message):
    streams = make_streams([5, 4])
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(streams | change))
