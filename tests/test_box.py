"""The world in a box: splits share no fact, demonstrations are what they claim, demo and study run end to end."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from boxes import QUICK
from rich.console import Console

from treegrpo import demo, study
from treegrpo.box.demonstrations import Carelessness, demonstrate, demonstrations, lazy_templates
from treegrpo.box.warmstart import ROLLOUT_SETTINGS, build_tokenizer, questions, warm_start
from treegrpo.box.world import RELATIONS, SPLITS, build_world, write_corpus
from treegrpo.envs.data import read_rows
from treegrpo.envs.retrievers import BM25Retriever
from treegrpo.envs.search import SearchEnv
from treegrpo.envs.tags import format_valid, last_answer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")
CAREFUL = Carelessness(lazy=0, eager=0, wrong_fact=0, wrong_page=0, no_search=0)


@pytest.fixture(scope="module")
def world():
    return build_world(0)


def test_the_world_is_large_and_the_same_every_time(world):
    assert world.num_facts > 3000 and len(world.pages) == 1140
    again = build_world(0)
    assert (again.facts, again.pages, again.splits) == (world.facts, world.pages, world.splits)
    assert build_world(1).facts != world.facts
    for kind in ("person", "city", "work"):
        assert {world.splits[e] for e in world.kinds if world.kinds[e] == kind} == set(SPLITS)
    for relation in RELATIONS.values():
        assert len(relation.page) > 1 and len(relation.outer) > 1


def test_splits_share_no_fact_on_any_path(world):
    used = {
        split: {step for hops in (1, 2, 3) for q in world.questions(split, hops) for step in q.path} for split in SPLITS
    }
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not used[a] & used[b]
    assert sum(map(len, used.values())) > 3000


def test_answers_follow_the_path_and_no_hop_can_be_skipped(world):
    for hops in (1, 2, 3):
        for question in random.Random(0).sample(world.questions("heldout", hops), 200):
            entity, seen = question.path[0][0], set()
            for step in question.path:
                assert step[0] == entity and step[0] not in seen
                seen.add(entity)
                entity = world.facts[step]
            assert entity == question.answer and question.num_hops == hops
            assert question.path[0][0] in question.text.split() and question.answer not in question.text.split()


def test_parallel_worlds_know_the_same_names_and_other_facts(world):
    other = build_world(0, parallel=3)
    assert other.kinds == world.kinds and other.splits == world.splits
    same = sum(other.facts[key] == value for key, value in world.facts.items())
    assert same < 0.1 * world.num_facts
    assert set(other.words()) == set(world.words())


def test_every_word_is_a_token_and_every_page_is_found_by_its_name(world, tmp_path):
    tokenizer = build_tokenizer(world)
    for text in (*world.pages.values(), *(q.text for q in questions(world, "heldout", 0)[:500])):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    write_corpus(world, tmp_path / "corpus.jsonl")
    retriever = BM25Retriever(tmp_path / "corpus.jsonl", topk=1, cache_dir=tmp_path / "index")
    found = [retriever.search(name)[0].id == name for name in world.pages]
    assert statistics.mean(found) > 0.97


def test_a_careful_demonstration_is_right_and_the_environment_answers_as_it_says(world, tmp_path):
    write_corpus(world, tmp_path / "corpus.jsonl")
    retriever = BM25Retriever(tmp_path / "corpus.jsonl", topk=1, cache_dir=tmp_path / "index")
    names = ("prompt_template", "observation_template", "document_template")
    env = SearchEnv(retriever, topk=1, **{name: ROLLOUT_SETTINGS[name] for name in names})
    rng = random.Random(0)
    for _ in range(100):
        question = world.random_question(rng.choice((1, 2, 3)), rng)
        parts = demonstrate(world, question, set(), CAREFUL, rng)
        completion = " ".join(text for text, _ in parts[1:])
        assert parts[0] == (question.text, False)
        assert format_valid(completion) and last_answer(completion) == question.answer
        assert env.reset({"question": question.text}) == question.text
        for (action, own), (page, _) in zip(parts[1::2], parts[2::2], strict=False):
            assert own and env.step(action).observation.split() == page.split()
        assert env.step(parts[-1][0]).done and len(parts) == 2 + 2 * question.num_hops


def test_a_careless_one_errs_as_often_as_it_should():
    chosen = Carelessness()
    rows = list(demonstrations(0, 3000, seed=1))
    assert rows == list(demonstrations(0, 3000, seed=1))
    answered_at_once = statistics.mean(len(parts) == 2 for parts in rows)
    assert answered_at_once == pytest.approx(chosen.no_search, abs=0.015)
    lazy = lazy_templates(chosen, 0)
    heads = sum(len(relation.outer) for relation in RELATIONS.values())
    assert len(lazy) == round(chosen.share_lazy * heads)
    assert lazy_templates(chosen, 1) != lazy


def test_a_warm_start_is_made_once_and_repeats(box, tmp_path):
    from transformers import AutoModelForCausalLM

    made = {path.name for path in box.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "corpus.jsonl", "train.jsonl", "heldout.jsonl"} <= made
    steps = []
    assert warm_start(QUICK, folder=box.parent, progress=lambda *args: steps.append(args)) == box and not steps
    again = warm_start(QUICK, folder=tmp_path)
    a, b = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (box, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    rows = read_rows(box / "heldout.jsonl")
    assert [row["num_hops"] for row in rows[:400]] == [2] * 400
    train = read_rows(box / "train.jsonl")
    counts = [sum(row["num_hops"] == hops for row in train) for hops in (1, 2, 3)]
    assert counts[1] == 2 * counts[0] == 2 * counts[2]


def test_wilson_interval():
    """30 of 100: (0.3 + 0.0192 +- 0.0932) / 1.0384, worked by hand."""
    assert str(demo.Accuracy(30, 100)) == "30.0% [21.9%, 39.6%]"
    assert demo.Accuracy(0, 50).interval()[0] == pytest.approx(0, abs=1e-12)


def test_the_learning_demo_runs_and_writes_its_picture(box, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=160)
    result = demo.learn(console, steps=2, output_dir=tmp_path, folder=box, num_heldout=6)
    assert result["before"][2].num == result["after"][2].num == 6
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert accuracy["before"]["2"][1] == 6
    for expected in ("Held-out questions", "tokens saved", "tool calls", "unique tokens instead of"):
        assert expected in text.getvalue()
    with pytest.raises(ValueError, match="part='all'"):
        demo.run(console, part="all")


def test_the_study_resumes_and_compares_at_equal_tokens(box, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=200)
    options = {
        "seeds": 2,
        "tokens": 400,
        "num_questions": 4,
        "budgets": (2,),
        "workers": 1,
        "runs_dir": tmp_path / "runs",
        "results_dir": tmp_path / "results",
        "folder": box,
    }
    rows = study.run(console, **options)
    assert [row["name"] for row in rows] == ["chain G=2", "tree (1,2,1)"]
    assert all(row["generated_tokens"] >= 400 for row in rows)
    files = sorted((tmp_path / "runs").rglob("*.json"))
    assert len(files) == 4
    written = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    study.run(console, **options)
    assert all(file.stat().st_mtime_ns == written[file] for file in files[1:])
    assert files[0].exists() and "4 runs of 400 sampled tokens, 1 to do" in text.getvalue()
    saved = json.loads((tmp_path / "results" / "study.json").read_text())
    assert len(saved["runs"]) == 4 and saved["setting"]["tokens"] == 400
    assert (tmp_path / "results" / "study.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "results" / "study.md").read_text().count("\n") == 4
    with pytest.raises(ValueError, match="seeds=1"):
        study.run(console, **{**options, "seeds": 1})
    with pytest.raises(ValueError, match="budgets: 3"):
        study.run(console, **{**options, "budgets": (3,)})


# Stands in for a training run: seed 0 is done at once, then one fails or all take a minute.
STAND_IN = """
import os, sys, time
from dataclasses import asdict
from pathlib import Path

def run_cell(cell, seed, tokens, learning_rate, num_questions, folder):
    if seed == 0:
        return {**asdict(cell), "name": cell.name, "seed": seed, "accuracy": {2: [1, 4]}, "seconds": 0.0}
    (Path(folder) / f"{cell.key}-s{seed}").write_text(str(os.getpid()))
    if folder.endswith("fails"):
        raise KeyError("no such column")
    time.sleep(60)

if __name__ == "__main__":
    import stand_in
    from rich.console import Console
    from treegrpo import study

    study.run_cell = stand_in.run_cell
    folder = Path(sys.argv[1])
    study.run(Console(), seeds=3, budgets=(2,), workers=2, runs_dir=folder, results_dir=folder, folder=folder)
"""


def waited_for(condition) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def test_ctrl_c_ends_the_study_and_its_workers(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    study_run = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waited_for(lambda: sum(len(path.read_text()) > 0 for path in tmp_path.glob("*-s1")) == 2)
        os.killpg(study_run.pid, signal.SIGINT)
        error = study_run.communicate(timeout=20)[1]
        assert study_run.returncode == -signal.SIGINT and "KeyboardInterrupt" in error
        for started in tmp_path.glob("*-s1"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(started.read_text()), 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study_run.pid, signal.SIGKILL)
        study_run.wait()
    assert len([*tmp_path.rglob("*-s0.json")]) == 2
    assert not [*tmp_path.glob("*-s2")]


def test_a_failed_run_of_the_study_keeps_the_others(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "fails"
    folder.mkdir()
    monkeypatch.setattr(study, "run_cell", importlib.import_module("stand_in").run_cell)
    jobs = [(cell, seed) for seed in (1, 0) for cell in study.CELLS]
    found = []
    for some in (jobs[14:16], jobs):
        results = map(found.append, study._results(some, (1, 0.1, 4, str(folder)), workers=1))
        with pytest.raises(KeyError, match="no such column"):
            list(results)
    # of the second time only what the pool had taken up before it failed
    assert len(found) == 1 and len([*folder.iterdir()]) < 15


def test_study_numbers_by_hand():
    """Two seeds, chain 2 and 4 of 10, tree 5 and 5: means 30% and 50%, paired difference 20% with half interval
    12.706 * stdev(30, 10) / sqrt(2) = 12.706 * 14.142 / 1.4142 = 127.06 points."""

    def result(name, trees, expansions, seed, right):
        return {
            "budget": 4,
            "name": name,
            "num_trees": trees,
            "num_expansions": expansions,
            "seed": seed,
            "accuracy": {hops: [right, 10] for hops in (1, 2, 3)},
            "milestones": [[30, right - 1, 10], [60, right, 10]],
            "generated_tokens": 100,
            "tool_calls": 5,
            "steps": 3,
            "zero_std_share": 0.5,
            "seconds": 1.0,
            "trained_chain_tokens": 300,
            "trained_unique_tokens": 200,
        }

    results = [result("chain G=4", 4, 0, s, r) for s, r in ((0, 2), (1, 4))]
    results += [result("tree (2,2,1)", 2, 2, s, 5) for s in (0, 1)]
    chain, tree = study.summary(results)
    assert chain["hops2"] == pytest.approx(0.3) and tree["hops2"] == pytest.approx(0.5)
    assert tree["hops2_interval"] == 0 and tree["versus_chain"] == pytest.approx(0.2)
    assert tree["versus_chain_interval"] == pytest.approx(1.2706)
    assert tree["hops2_at_0.25"] == pytest.approx(0.4) and chain["hops2_at_0.5"] == pytest.approx(0.3)
    assert tree["packing_ratio"] == 1.5 and chain["versus_chain"] == 0
    for cell in study.CELLS:
        if cell.num_expansions:
            assert (
                cell.budget == cell.num_trees * (1 + cell.num_rounds * cell.num_expansions / 2) or cell.num_trees == 1
            )
