"""The TRL examples run to the end, and trees sampled by treegrpo's own search under TRL's trainer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
pytest.importorskip("bm25s")
import torch  # noqa: E402
from boxes import QUICK, token_reward  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import GRPOConfig  # noqa: E402
from trl_agents import save_agent  # noqa: E402
from trl_tiny import make  # noqa: E402

from treegrpo.box.warmstart import ROLLOUT_SETTINGS  # noqa: E402
from treegrpo.envs.data import read_rows  # noqa: E402
from treegrpo.envs.tools import make_env_factory  # noqa: E402
from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer, tree_rollouts  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, arguments, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", [name, *common, *arguments.split()])
    if hasattr(module, "SMALL"):
        module.SMALL = QUICK
    module.main()


def test_gsm8k_learns_sums(tmp_path, monkeypatch, capsys):
    run("trl_gsm8k", "--max_steps 60", tmp_path, monkeypatch)
    first, last = capsys.readouterr().out.splitlines()[-1].split(",")[0].removeprefix("reward ").split(" -> ")
    assert float(last) > float(first) + 0.1


def test_gsm8k_reads_a_file_for_a_model_of_its_own(tmp_path, monkeypatch, capsys):
    path, _ = save_agent(tmp_path / "model")
    rows = [{"question": "2 and 3?", "answer": "That is 5.\n#### 5"}, {"question": "1 and 1?", "answer": "#### 2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"--model {path} --data {tmp_path / 'train.jsonl'} --max_steps 1 --logging_steps 1"
    run("trl_gsm8k", line + " --per_device_train_batch_size 8", tmp_path, monkeypatch)
    assert "reward 0.000 -> 0.000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--data needs --model"):
        run("trl_gsm8k", f"--data {tmp_path / 'train.jsonl'}", tmp_path, monkeypatch)


def test_search_runs(tmp_path, monkeypatch, capsys):
    run("trl_search", "--max_steps 2 --logging_steps 1 --max_turns 2", tmp_path, monkeypatch)
    assert "packing ratio" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(SystemExit, match="--model needs --data and --retriever"):
        run("trl_search", "--model nowhere", tmp_path, monkeypatch)


def searching(box, out, config=TreeGRPOConfig, own=12, **changes):
    """A trainer in the world in a box whose trees treegrpo.rollout grows."""
    tokenizer = AutoTokenizer.from_pretrained(box)
    names = ("prompt_template", "observation_template", "document_template", "topk")
    templates = {name: ROLLOUT_SETTINGS[name] for name in names}
    make_env = make_env_factory(
        "search", tokenizer=tokenizer, retriever=f"bm25:{box / 'corpus.jsonl'}", options=templates
    )
    rows = read_rows(box / "train.jsonl")[:8]
    options = dict(num_generations=6, per_device_train_batch_size=12, max_completion_length=200, max_steps=2)
    if config is TreeGRPOConfig:
        options |= dict(num_trees=2, num_expansions=2)
    return make(
        TreeGRPOTrainer,
        box,
        out,
        config=config,
        rewards=token_reward,
        train_dataset=Dataset.from_dict({"prompt": [make_env().reset(row) for row in rows]}),
        processing_class=tokenizer,
        rollout_func=tree_rollouts(make_env, max_turns=3, max_step_tokens=own),
        **options | changes,
    )


def test_searched_trees_carry_their_log_probs_and_steps(box, tmp_path):
    trainer = searching(box, tmp_path, num_iterations=2)
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 6] for i in range(12)])
    assert trainer._grown.trees == [0, 0, 0, 1, 1, 1] * 2
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    assert 0 < int(mask.sum()) < int(output["completion_mask"].sum())
    # what was recorded at sampling is what the packed forward says of the same ids
    difference = (output["sampling_per_token_logps"] - output["old_per_token_logps"])[mask]
    assert difference.abs().max() < 1e-4
    for row, steps in enumerate(trainer._grown.steps):
        starts = [i for i in range(mask.shape[1]) if mask[row, i] and (i == 0 or not mask[row, i - 1])]
        assert steps[0] == 0 and set(starts) <= set(steps)
    alike = output["completion_ids"][:, :1]
    assert any(len(set(alike[i : i + 3].flatten().tolist())) < 3 for i in range(0, 12, 3))
    trainer.train()
    assert trainer.state.log_history[0]["batch/packing_ratio"] > 1.2


def test_searched_steps_are_as_long_as_the_config_says(box, tmp_path):
    trainer = searching(box, tmp_path, own=None, max_step_tokens=4)
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 6] for i in range(12)])
    mask = output["completion_mask"] * output["tool_mask"]
    for row, steps in zip(mask.tolist(), trainer._grown.steps, strict=True):
        assert max(sum(row[a:b]) for a, b in zip(steps, [*steps[1:], len(row)], strict=True)) <= 4


def test_searched_evaluation_is_a_chain_a_row(box, tmp_path):
    trainer = searching(box, tmp_path)
    trainer.model.eval()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(3)] * 2)
    assert len(output["completion_ids"]) == 6
    assert torch.equal(output["prompt_ids"][0], output["prompt_ids"][3])


def test_searched_trees_need_the_config(box, tmp_path):
    trainer = searching(box, tmp_path, config=GRPOConfig)
    trainer.model.train()
    with pytest.raises(ValueError, match="from TreeGRPOConfig, not GRPOConfig"):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 12)


def test_two_batches_of_an_optimiser_step_are_not_sampled_alike(box, tmp_path):
    trainer = searching(box, tmp_path, gradient_accumulation_steps=2, steps_per_generation=1)
    trainer.model.train()
    found = []
    for trainer._step in (0, 0, 1):
        output = trainer._generate_and_score_completions([trainer.train_dataset[i // 6] for i in range(12)])
        found.append(output["completion_ids"].tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_k=5),
        dict(min_p=0.1),
        dict(repetition_penalty=1.1),
        dict(generation_kwargs=dict(typical_p=0.9)),
        dict(chat_template_kwargs=dict(enable_thinking=False)),
        dict(max_completion_length=None),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_searched_trees_refuse_settings_that_they_do_not_read(changes, box, tmp_path):
    trainer = searching(box, tmp_path, **changes)
    trainer.model.train()
    with pytest.raises(ValueError, match=next(iter(changes))):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 12)
