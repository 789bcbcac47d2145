"""Every example's settings read, and their plan comes out of a dry run that loads and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from treegrpo.cli import main
from treegrpo.config import read_config

pytestmark = pytest.mark.usefixtures("own_cache")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# settings of the trainer; the others are accelerate's
FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml") if "distributed_type:" not in path.read_text())
SHAPES = {path.stem: path for path in (EXAMPLES / "models").glob("*.yaml")}


@pytest.mark.parametrize("name", FILES)
def test_dry_run(name, box, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(EXAMPLES / name)
    shape = next((path for stem, path in SHAPES.items() if stem in name), SHAPES["qwen3-tiny"])
    argv = ["train", "--config", str(EXAMPLES / name), "--model", str(shape), "--dry-run"]
    is_sampled = config.rollouts in ("hf", "vllm")
    if is_sampled:
        argv += ["--dataset", str(box / "train.jsonl"), "--tokenizer", str(box)]
        if not config.retriever:
            argv += ["--retriever", f"bm25:{box / 'corpus.jsonl'}"]
    else:
        rollouts, _ = tiny.write(tmp_path, tiny.trajectories(logprobs=True))
        argv += ["--rollouts", f"replay:{rollouts}"]
    assert main(argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"warm-up {config.warmup_steps} of {config.max_steps} steps" in text and "parameters" in text
    if is_sampled:
        assert "6 leaves: M=2 trees, N=2 branches, L=1 rounds" in text
        assert f"{len((box / 'train.jsonl').read_text().splitlines()):,} in " in text
    assert not (tmp_path / config.output_dir).exists()


def test_the_published_settings_are_there():
    """Table 5 of arXiv 2509.21240: 180 rounds of 8 updates, 64 prompts each, warm-up 0.285, KL 0.001, (2, 2, 1)."""
    names = [name for name in FILES if name.startswith(("nq-", "hotpotqa-"))]
    assert len(names) == 6
    for name in names:
        config = read_config(EXAMPLES / name)
        assert (config.groups_per_step, config.max_steps, config.learning_rate) == (64, 180 * 8, 1e-6)
        assert config.warmup_steps == round(0.285 * 1440) and config.beta == 0.001
        assert (config.num_trees, config.num_expansions, config.num_rounds, config.max_turns) == (2, 2, 1, 3)
        assert config.top_p == 0.95 and config.reward_funcs == ("search_em/paper",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "nowhere.jsonl"], "no such file"),
        (["--reward-funcs", "bleu"], "bleu"),
        (["--advantage-estimator", "magic"], "magic"),
        (["--env", "chess"], "chess"),
    ],
)
def test_a_dry_run_finds_what_is_wrong(more, message, box, capsys):
    argv = ["train", "--config", str(EXAMPLES / "world-in-a-box.yaml"), "--model", str(box), "--dry-run"]
    argv += ["--dataset", str(box / "train.jsonl"), "--retriever", f"bm25:{box / 'corpus.jsonl'}"]
    assert main([*argv, *more]) == 2
    assert message in capsys.readouterr().err
