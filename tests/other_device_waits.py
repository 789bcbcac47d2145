"""How often a step, or a layer, waits for its device; run by test_other_device.py, with `-p other_device`."""

from __future__ import annotations

import pytest
import tiny
import torch
from cases import random_subtree_end
from other_device import DEVICE, watched
from test_recurrence import KINDS, inputs

import treegrpo_kernels as tk
from treegrpo.trainer import Trainer


def test_waits_are_seen():
    x = torch.arange(3, device=DEVICE)
    with watched() as found:
        assert x.tolist() == [0, 1, 2] and int(x.sum()) == 3 and x.cpu()[1] == 1 and x[x > 1].numel() == 1
        assert x.bincount().numel() == 3 and x.repeat_interleave(x).numel() == 3
        _ = (x + 1).to(torch.float32).repeat_interleave(x, output_size=3)
    assert found == ["elsewhere"] * 6
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + torch.arange(3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"samples": "call", "num_iterations": 2, "beta": 0.1, "vllm_importance_sampling_correction": True},
        {"attention": "chain", "loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.01},
    ],
    ids=["default", "calls", "chain"],
)
def test_gradients_wait_for_the_device_at_their_end(tmp_path, changes):
    """However many rows: each loss looked at, then the norm of the gradients."""
    files = tiny.write(tmp_path, tiny.trajectories(num_groups=6, logprobs=True))
    trainer = Trainer(tiny.settings(files, tmp_path / "out", groups_per_step=3, row_token_budget=40, **changes))
    waits, gradients = [], trainer._gradients

    def watch(data):
        assert len(data.rows) == 3 and data.rows[0].batch.device == DEVICE
        with watched() as found:
            result = gradients(data)
        waits.append(found)
        return result

    trainer._gradients = watch
    trainer.train()
    assert len(waits) == 3
    for found in waits:
        # the plain head's chunks and the oracle's positions; a GPU has kernels
        ours = [name for name in found if name not in ("head.__init__", "hf.attend")]
        assert ours == ["step.check_finite", "trainer._gradients"]


@pytest.mark.parametrize("limit", [0, 2**40], ids=["computed again", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_wait_for_the_plan_alone(kind, limit, monkeypatch):
    monkeypatch.setattr("treegrpo_kernels.recurrence.RECOMPUTE_FROM", limit)
    plan = tk.TreePlan.build(torch.as_tensor(random_subtree_end(150, 2, branch=0.05)), device=DEVICE)
    tensors, dout = inputs(150, kind, dtype=torch.float32)
    q, *rest = (x.detach().to(DEVICE).requires_grad_() for x in tensors if x is not None)
    weight, dout = torch.randn(6, 4).to(DEVICE).requires_grad_(), dout.to(DEVICE)

    def layer():
        x = tk.tree_conv1d(q[:, 0], weight, None, plan, activation=torch.nn.functional.silu)
        rule = tk.tree_gated_delta_rule if len(rest) == 4 else tk.tree_gated_linear_attention
        return torch.autograd.grad(rule(q * x[:, None], *rest, plan), [q, weight, *rest], dout)

    with watched() as found:
        layer()
    assert found
    with watched() as found:
        layer()
    assert not found
