"""Hybrid models through TreeGRPOTrainer: GRPOTrainer's updates, what trees and padded rows have alone, refusals."""

import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from models import HYBRID, TAUGHT, tiny_config, tiny_model  # noqa: E402
from test_trl import assert_same_run, train, tree_row  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_tiny import difference, make, parameters, save_tiny  # noqa: E402

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, use_tree_op  # noqa: E402
from treegrpo.recurrent import kinds_of  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

# one of each kind of layer, with the projections that LoRA trains; peft refuses Mamba's out_proj
ADAPTED = {
    "qwen3_5_text": ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"],
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj"],
    "lfm2": ["in_proj", "out_proj"],
    "nemotron_h": ["in_proj"],
}
REENTRANT = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True))
CASES = {
    "checkpointing": dict(gradient_checkpointing=True),
    "two_iterations": dict(num_iterations=2, beta=0.05, **REENTRANT),
}
# families whose projections put something where padding was, if they have a bias
BIASED = {"lfm2": dict(conv_bias=True), "nemotron_h": dict(use_bias=True), "bamba": dict(mamba_proj_bias=True)}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def folder(family, **changes):
        key = family, *changes
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return folder


def same_run(folder, out, **changes):
    """Prompts are of unlike lengths: TRL pads them on the left."""
    chain = train(GRPOTrainer, folder, out / "chain", **changes)
    tree = train(TreeGRPOTrainer, folder, out / "tree", **changes)
    assert_same_run(chain, tree, dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))


@pytest.mark.parametrize("family", TAUGHT)
def test_five_updates_are_those_of_grpo_trainer(family, folder_of, tmp_path):
    # also of families that compute no router loss themselves, where TRL takes Mixtral's
    routed = dict(router_aux_loss_coef=0.1, loss_type="grpo") if "num_experts" in HYBRID[family] else {}
    same_run(folder_of(family), tmp_path, **routed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ADAPTED)
def test_settings(family, name, folder_of, tmp_path):
    same_run(folder_of(family), tmp_path, **CASES[name])


@pytest.mark.parametrize("family", ADAPTED)
def test_lora_on_the_projections_of_recurrent_layers(family, folder_of, tmp_path):
    peft = pytest.importorskip("peft")
    lora = lambda: peft.LoraConfig(r=4, target_modules=ADAPTED[family], task_type="CAUSAL_LM")  # noqa: E731
    changes = dict(beta=0.05, **REENTRANT)
    want, _, _ = train(GRPOTrainer, folder_of(family), tmp_path / "chain", peft_config=lora(), **changes)
    changes |= dict(config=TreeGRPOConfig, token_budget=60, peft_config=lora())
    got, _, _ = train(TreeGRPOTrainer, folder_of(family), tmp_path / "tree", **changes)
    assert difference(want, got) < 1e-5
    adapters = {name: p for name, p in want.items() if "lora_B" in name}
    # they begin at zero
    assert len(adapters) >= len(ADAPTED[family]) and min(float(p.abs().max()) for p in adapters.values()) > 1e-4


def assert_rows_are_those_alone(trainer, output):
    """Log-probs of a padded batch against each of its rows alone, through no tree."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    model, keep = trainer.accelerator.unwrap_model(trainer.model), output["completion_ids"].shape[1]
    assert not output["prompt_mask"].all()
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)
        for row, scored in enumerate(found):
            prompt, length = int(output["prompt_mask"][row].sum()), int(output["completion_mask"][row].sum())
            own = ids[row][mask[row].bool()]
            logits = model(input_ids=own[None], use_cache=False).logits[0, prompt - 1 : -1]
            want = torch.log_softmax(logits, -1).gather(1, own[prompt:, None])[:, 0]
            torch.testing.assert_close(scored[:length], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ADAPTED)
def test_trees_grow_through_generate(family, folder_of, tmp_path):
    """Sampled by TRL from left-padded contexts of unlike lengths, trained as rows alone."""
    shape = dict(num_trees=2, num_expansions=1, max_step_tokens=3, temperature=0.7)
    changes = dict(config=TreeGRPOConfig, rollout_func=None, max_steps=1, **shape)
    trainer = make(TreeGRPOTrainer, folder_of(family), tmp_path, **changes)
    trainer._tokenize_prompts = lambda prompts: ([[int(w[1:]) for w in p.split()] for p in prompts], None, {})
    trainer.model.eval().train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    assert trainer._grown.trees == [0, 0, 1, 1] * 2
    trainer.temperature = 1.0
    assert_rows_are_those_alone(trainer, output)
    before = parameters(trainer)
    trainer.train()
    assert difference(before, parameters(trainer)) > 1e-4
    assert trainer.state.log_history[0]["batch/packing_ratio"] > 1


@pytest.mark.parametrize("family", BIASED)
def test_padding_leaves_nothing_behind_where_projections_have_a_bias(family, folder_of, tmp_path):
    """transformers masks what goes into such a projection, not what comes out: TRL's chains are wrong here."""
    trainer = make(TreeGRPOTrainer, folder_of(family, **BIASED[family]), tmp_path)
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    assert_rows_are_those_alone(trainer, trainer._generate_and_score_completions(rows))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_async_rows_of_hybrids_are_refused(family):
    """AsyncGRPOTrainer's constructor refuses such models; so does our op, to which a model may come otherwise."""
    from trl.experimental.async_grpo.packing import TREE_ATTENTION, register_tree_attention

    register_tree_attention()
    use_tree_op()
    row = tree_row()
    model = tiny_model(family, attention=TREE_ATTENTION)
    inputs = dict(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False)
    inputs |= {name: row[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    with pytest.raises(ValueError, match=r"would mix them: train it with TreeGRPOTrainer"):
        model(**inputs, tree_max_seqlen_q=0, tree_max_seqlen_k=0)
    # Granite 4 has models of attention alone in the file of its hybrids
    assert not kinds_of(tiny_config("granitemoehybrid", layer_types=["full_attention"] * 2))
