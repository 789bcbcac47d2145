"""Models with recurrences and short convolutions: long paths, checkpointing, and what they are without a tree."""

import copy
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from models import EXACT, TAUGHT, VOCAB, tiny_model, tree_twin
from test_equivalence import (
    TWO_GROUPS,
    assert_equal_to_leaves_alone,
    backward,
    gradient_error,
    loss_options,
    make_leaves,
    pack_leaves,
    packed_loss,
)
from test_recurrence import without_states

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not TAUGHT, reason="transformers hands recurrent layers no keywords before 5.17"),
]
ROOT = Path(__file__).resolve().parent.parent
DELTA_RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


def in_float64(taught):
    """The function a model calls, with the oracle in place of what transformers computes in float32 without a tree."""

    @functools.wraps(taught)
    def rule(query, key, value, g, beta, *, tree_plan=None, **kwargs):
        if tree_plan is not None:
            return taught(query, key, value, g=g, beta=beta, tree_plan=tree_plan, **kwargs)
        assert kwargs["use_qk_l2norm_in_kernel"] and query.shape[0] == 1
        q, k = (x[0] * torch.rsqrt((x[0] * x[0]).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        chain = torch.full((len(q),), len(q))
        return without_states(q * q.shape[2] ** -0.5, k, value[0], g[0], beta[0], chain)[None], None

    return rule


# but for those whose layers are another's, with experts
@pytest.mark.parametrize("family", [name for name in TAUGHT if name not in ("qwen3_5_moe_text", "lfm2_moe")])
def test_states_carried_over_many_chunks(family, monkeypatch):
    """Forks within and at the end of chunks of 64 tokens, the tree and the flattened baseline."""
    trunk = [1] + [5, 6, 7] * 30
    deeper = [*trunk, *[13] * 37]
    leaves = [trunk + [9, 8] * 20, deeper + [10, 11, 12] * 25, deeper + [4] * 9, deeper + [14] * 70, [2] * 64 + [3] * 9]
    model = tiny_model(family)
    twin = tree_twin(model)
    file = sys.modules[type(model).__module__]
    for name in DELTA_RULES:
        if hasattr(file, name):
            monkeypatch.setattr(file, name, in_float64(getattr(file, name)))
    made = make_leaves(model, {"a": leaves[:4], "b": leaves[4:]}, seed=2)
    assert_equal_to_leaves_alone(model, twin, made, 1e-6, chains=(False, True), loss_type="grpo", beta=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "family", [name for name in ("qwen3_5_text", "nemotron_h", "lfm2", "kimi_linear") if name in TAUGHT]
)
def test_checkpointing_sees_the_tree_again(family, reentrant):
    model = tree_twin(tiny_model(family))
    leaves = make_leaves(model, TWO_GROUPS, seed=7)
    [batch] = pack_leaves(leaves)
    # with layers in training mode, where Mamba's take a fused kernel if there is one
    model.train()
    plain = backward(model, packed_loss(model, batch, leaves, **loss_options("dapo", beta=0.05))[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = backward(model, packed_loss(model, batch, leaves, **loss_options("dapo", beta=0.05))[0])
    assert gradient_error(again, plain)[0] <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("family", TAUGHT)
def test_without_a_tree_it_is_the_model_bit_for_bit(family):
    plain = tiny_model(family, dtype=torch.float32, attention="sdpa")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    # before anything of this file's functions is replaced, should this test run first
    theirs = [plain.generate(ids, attention_mask=mask, **options) for mask in (torch.ones_like(ids), padded)]
    twin = tree_twin(copy.deepcopy(plain))
    for mask, their in zip((torch.ones_like(ids), padded), theirs, strict=True):
        ours = twin.generate(ids, attention_mask=mask, **options)
        assert torch.equal(ours.sequences, their.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, their.logits, strict=True))


@pytest.mark.parametrize(
    "family", [name for name in ("qwen3_5_text", "falcon_h1", "kimi_linear", "nemotron_h") if name in TAUGHT]
)
def test_what_a_tree_cannot_mean_is_refused(family):
    twin = tree_twin(tiny_model(family))
    leaves = make_leaves(twin, TWO_GROUPS)
    inputs = pack_leaves(leaves)[0].model_inputs()
    rows = {name: x.expand(2, -1) if isinstance(x, torch.Tensor) and x.dim() == 2 else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"pack all trees into one row"):
        twin(**rows)
    # a cache that is still empty, as models make one by default
    with pytest.raises(ValueError, match=r"use_cache=False"):
        twin(**{**inputs, "use_cache": True})
    cache = twin(input_ids=inputs["input_ids"][:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"use_cache=False"):
        twin(**{**inputs, "use_cache": True}, past_key_values=cache)


def test_the_docs_name_every_family():
    """Those of the pinned transformers, as README counts them."""
    docs = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", docs))
    assert [family for family in EXACT if family.removesuffix("_text") not in named] == []
    if "lfm3" in EXACT and "gptj" not in EXACT:
        assert f"- {len(EXACT)} families of transformers" in (ROOT / "README.md").read_text(encoding="utf-8")
