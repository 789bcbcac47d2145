"""Sampler against trainer: TRL's four corrections on hand-made numbers, and their place in the loss."""

from __future__ import annotations

import math

import pytest
import torch

from treegrpo.loss import grpo_loss
from treegrpo.metrics import StepMetrics
from treegrpo.mismatch import MODES, importance_sampling_ratio

NAN = math.nan
OLD = torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0, -3.0])
SAMPLED = torch.tensor([NAN, -1.0 - math.log(2), -2.0, NAN, -1.0 - math.log(4), -3.0 + math.log(2)])
MASK = torch.tensor([0, 1, 1, 0, 1, 1])
OFFSETS = torch.tensor([0, 3, 6])
# per token 2, 1 | 4, 1/2; per leaf 2 | 2
CASES = {
    ("token_truncate", None, 3.0): [1, 2, 1, 1, 3, 0.5],
    ("token_mask", None, 3.0): [1, 2, 1, 1, 0, 0.5],
    ("token_mask", 0.6, None): [1, 2, 1, 1, 4, 0],
    ("token_mask", 1.0, 1.0): [1, 0, 1, 1, 0, 0],
    ("token_truncate", 0.75, 1.5): [1, 1.5, 1, 1, 1.5, 0.75],
    ("sequence_truncate", None, 1.5): [1, 1.5, 1.5, 1, 1.5, 1.5],
    ("sequence_mask", None, 3.0): [1, 2, 2, 1, 2, 2],
    ("sequence_mask", None, 1.9): [1, 0, 0, 1, 0, 0],
    ("token_truncate", None, None): [1, 2, 1, 1, 4, 0.5],
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_by_hand(case):
    mode, low, high = case
    weights, metrics = importance_sampling_ratio(OLD, SAMPLED, MASK, OFFSETS, mode=mode, clip_min=low, clip_max=high)
    torch.testing.assert_close(weights, torch.tensor(CASES[case], dtype=torch.float32))
    expected = (math.log(2) + 0 + math.log(4) + math.log(2)) / 4
    assert float(metrics["sampling/sampling_logp_difference/mean"][0]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["sampling/sampling_logp_difference/max"][0]) == pytest.approx(math.log(4), rel=1e-5)
    kept = weights[MASK.bool()]
    for name, value in (("min", kept.min()), ("max", kept.max())):
        assert float(metrics[f"sampling/importance_sampling_ratio/{name}"][0]) == pytest.approx(float(value))


@pytest.mark.parametrize("mode", MODES)
def test_metrics_of_rows_put_together_are_those_of_one_row(mode):
    """Leaves of 3, 2 and 1 tokens, of which the last leaf's and one more are unknown."""
    torch.manual_seed(0)
    old, sampled, mask = torch.randn(6), torch.randn(6), torch.tensor([0, 1, 1, 1, 1, 1])
    sampled[1] = sampled[5] = NAN
    bounds = [0, 3, 5, 6]
    options = dict(mode=mode, clip_max=1.2)

    def together(rows):
        whole = StepMetrics()
        for first, last in rows:
            part, offsets = slice(bounds[first], bounds[last]), torch.tensor(bounds[first : last + 1]) - bounds[first]
            _, metrics = importance_sampling_ratio(old[part], sampled[part], mask[part], offsets, **options)
            for name, (value, weight) in metrics.items():
                whole.add_loss({name: value}, weight)
        return whole.reduced()

    expected = together([(0, 3)])
    assert len(expected) == 5
    for rows in ([(0, 2), (2, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]):
        assert together(rows) == pytest.approx(expected)


def test_unknown_log_probs_weigh_one_and_unknown_modes_are_refused():
    weights, metrics = importance_sampling_ratio(OLD, torch.full((6,), NAN), MASK, OFFSETS)
    assert torch.equal(weights, torch.ones(6)) and metrics == {}
    partly = SAMPLED.clone()
    partly[1] = NAN
    weights, _ = importance_sampling_ratio(OLD, partly, MASK, OFFSETS, mode="token_truncate")
    assert weights[1] == 1 and weights[4] == 3
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode is 'soft'"):
        importance_sampling_ratio(OLD, SAMPLED, MASK, OFFSETS, mode="soft")


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_the_loss_weights_the_policy_term_and_not_the_divergence(loss_type):
    """TRL multiplies the policy loss of a token before it adds beta times the KL."""
    torch.manual_seed(0)
    logp = (OLD + 0.1 * torch.randn(6)).double().requires_grad_()
    advantages, ref = torch.randn(6).double(), torch.randn(6).double()
    weights = torch.tensor([9.0, 2, 1, 9, 3, 0.5]).double()
    options = {"loss_type": loss_type, "normalizer": 1.0}

    def loss(**more):
        return grpo_loss(logp, OLD.double(), advantages, MASK, OFFSETS, **options, **more)[0]

    kl = loss(beta=0.5, ref_logp=ref) - loss()
    weighted = loss(importance_sampling_ratio=weights)
    both = loss(beta=0.5, ref_logp=ref, importance_sampling_ratio=weights)
    torch.testing.assert_close(both - weighted, kl)
    scaled = grpo_loss(logp, OLD.double(), advantages * weights, MASK, OFFSETS, **options)[0]
    torch.testing.assert_close(weighted, scaled)
    with pytest.raises(ValueError, match="importance_sampling_ratio has shape"):
        loss(importance_sampling_ratio=weights[:3])
