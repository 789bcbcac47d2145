"""The trainer drives an engine in another process: its weights follow the trainer's after every update."""

from __future__ import annotations

import json

import completions_server
import pytest
import served_engine

from treegrpo import load
from treegrpo.config import TrainConfig
from treegrpo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
urls, tokenizer = served_engine.urls, served_engine.tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """`(model folder, dataset)`."""
    folder = tmp_path_factory.mktemp("model")
    completions_server.tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dataset = folder / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w9"}) + "\n" for i in range(6)))
    return folder, dataset


def settings(url, files, output, **changes) -> TrainConfig:
    folder, dataset = files
    base = {
        "rollouts": f"server:{url}",
        "model": str(folder),
        "dataset": str(dataset),
        "env": "boxes:EchoEnv",
        "reward_funcs": ("boxes:token_reward",),
        "max_turns": 1,
        "max_step_tokens": 6,
        "num_expansions": 1,
        "groups_per_step": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "output_dir": str(output),
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainConfig(**{**base, **changes})


@pytest.mark.parametrize("dialect", served_engine.DIALECTS)
def test_the_server_samples_from_the_weights_of_now(urls, files, tmp_path, dialect):
    trainer = Trainer(settings(urls[dialect], files, tmp_path / "run"))
    assert trainer.config.corrects_sampling
    history = trainer.train()
    # After an update of 1e-2 the old weights are far away, so a server left behind would show.
    for row in history:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["rollout/leaves"] == 2 * 2 * 2
    assert history[0]["grad_norm"] > 0


def test_ids_that_the_tokenizer_has_no_word_for_are_trained_on(urls, files, tmp_path, monkeypatch):
    """Models often have more ids than words, and an untrained one samples them all."""
    monkeypatch.setattr(completions_server, "WORDS", completions_server.WORDS[:20])
    completions_server.tiny_tokenizer().save_pretrained(tmp_path / "short")
    changes = {"tokenizer": str(tmp_path / "short"), "max_steps": 1, "save_rollouts": True}
    Trainer(settings(urls["openai"], files, tmp_path / "run", **changes)).train()
    rollouts = load(tmp_path / "run" / "rollouts" / "step-1.jsonl.gz")
    assert max(t.token_ids.max() for t in rollouts) >= 20


def test_a_server_left_behind_shows_in_the_metrics(urls, files, tmp_path):
    trainer = Trainer(settings(urls["sglang"], files, tmp_path / "run"))
    engine = trainer.online.sampler.engine
    sync = engine.sync_weights
    engine.sync_weights = lambda model: sync(model) if trainer.step == 0 else None
    history = trainer.train()
    name = "sampling/sampling_logp_difference/max"
    assert history[0][name] < 1e-4 < 1e-2 < history[1][name] < history[2][name]
    assert history[2]["sampling/importance_sampling_ratio/min"] != 1
