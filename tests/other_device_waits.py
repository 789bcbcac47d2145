"""How often a step waits for its device; run by test_other_device.py, with `-p other_device`."""

from __future__ import annotations

import pytest
import tiny
import torch
from other_device import DEVICE, watched

from treegrpo.trainer import Trainer


def test_waits_are_seen():
    x = torch.arange(3, device=DEVICE)
    with watched() as found:
        assert x.tolist() == [0, 1, 2] and int(x.sum()) == 3 and x.cpu()[1] == 1 and x[x > 1].numel() == 1
        _ = (x + 1).to(torch.float32)
    assert found == ["elsewhere"] * 4
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
        # the plain head's chunks; a GPU has the fused one
        ours = [name for name in found if name != "head.__init__"]
        assert ours == ["step.check_finite", "trainer._gradients"]
