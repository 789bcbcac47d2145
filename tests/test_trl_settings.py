"""Settings of GRPOConfig under TreeGRPOTrainer: what they do there, or that they are refused."""

import pytest

trl = pytest.importorskip("trl")
import torch  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_tiny import difference, make, parameters, save_tiny  # noqa: E402

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, packed  # noqa: E402
from treegrpo.logprobs import unwrap  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
TREES = dict(config=TreeGRPOConfig, num_trees=2, num_expansions=1, max_step_tokens=3)
PAGED = dict(
    use_transformers_continuous_batching=True,
    transformers_continuous_batching_config=dict(num_blocks=16, max_batch_tokens=64),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def generating(kind, folder, out, **changes):
    """A trainer after an update on what its own model sampled."""
    trainer = make(kind, folder, out, rollout_func=None, max_steps=1, **changes)
    trainer._tokenize_prompts = lambda prompts: ([[int(w[1:]) for w in p.split()] for p in prompts], None, {})
    trainer.train()
    return trainer


@pytest.mark.parametrize("changes", [PAGED, dict(cache_implementation="static")], ids=["continuous", "static"])
def test_generation_is_trls(changes, folder, tmp_path):
    chain = generating(GRPOTrainer, folder, tmp_path / "chain", **changes)
    tree = generating(TreeGRPOTrainer, folder, tmp_path / "tree", **changes)
    assert difference(parameters(chain), parameters(tree)) < 1e-5
    assert tree.state.log_history[0]["grad_norm"] > 0


def test_a_compiled_model_trains_as_another(folder, tmp_path):
    changes = dict(torch_compile=True, torch_compile_backend="aot_eager", max_steps=2)
    compiled = make(TreeGRPOTrainer, folder, tmp_path / "tree", **changes)
    compiled.train()
    chain = make(GRPOTrainer, folder, tmp_path / "chain", max_steps=2)
    chain.train()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert difference(parameters(chain), parameters(compiled)) < 1e-5


def test_trees_grow_through_continuous_batching(folder, tmp_path):
    trainer = generating(TreeGRPOTrainer, folder, tmp_path, **TREES, **PAGED)
    assert trainer.state.log_history[0]["tree/sampled_tokens"] > 0
    assert trainer.model.config._attn_implementation == "treegrpo"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_float32_where_it_is_asked_for(dtype, folder, tmp_path):
    changes = dict(bf16=True, cast_lm_head_to_fp32=True, model_init_kwargs=dict(dtype=dtype))
    trainer = make(TreeGRPOTrainer, folder, tmp_path, **changes)
    model, hidden = unwrap(trainer.model), []
    model.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state[0]))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), 2, compute_entropy=True
        )
    batch = packed(ids, torch.ones_like(ids), 2)
    logits = hidden[0].float() @ model.lm_head.weight.float().t()
    table = torch.log_softmax(logits[batch.prev.long()], -1)
    want = batch.expand(table.gather(1, batch.input_ids[:, None])[:, 0]).view(2, 4)[:, 2:]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    want = batch.expand(-(table.exp() * table).sum(-1)).view(2, 4)[:, 2:]
    torch.testing.assert_close(entropies, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(neftune_noise_alpha=5.0), r"neftune_noise_alpha=5.0 draws noise .* leave it out"),
        (dict(TREES, max_completion_length=None), r"max_completion_length=None: give the length"),
        (dict(TREES, vllm_structured_outputs_regex="a+"), r"max_step_tokens=3 with vllm_structured_outputs_regex"),
        (dict(TREES, advantage_estimator="at2po"), r"advantage_estimator='at2po' weighs steps .* use use_vllm=True"),
        (
            dict(TREES, advantage_estimator="spo", advantage_options=["value=entropy_softmax"]),
            r"advantage_estimator='spo' weighs steps .* value=child_mean",
        ),
    ],
)
def test_the_trainer_refuses(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(TreeGRPOTrainer, folder, tmp_path, rollout_func=None, **changes)


def test_log_probs_that_trl_computes_serve_at2po(folder, tmp_path):
    trainer = generating(TreeGRPOTrainer, folder, tmp_path, **TREES, advantage_estimator="at2po", num_iterations=2)
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(name, folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=rf"{name} puts virtual tokens .* LoRA"):
        make(TreeGRPOTrainer, folder, tmp_path, peft_config=adapter)
