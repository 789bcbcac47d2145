"""Metrics: sums over batches, the file and its resumption, the summary page."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from treegrpo import Trajectory, build_forest, toy
from treegrpo.inspect import _draw_row, _draw_tree, visible_fraction
from treegrpo.metrics import MetricsFile, StepMetrics, read_metrics
from treegrpo.report import final_table, number, write_report


def test_metrics_of_batches_equal_those_of_one():
    metrics = StepMetrics()
    metrics.add_loss(
        {"kl": torch.tensor(1.0), "ratio/min": torch.tensor(0.5), "clip_ratio/high_max": torch.tensor(0.0)}, 10
    )
    metrics.add_loss(
        {"kl": torch.tensor(4.0), "ratio/min": torch.tensor(0.7), "clip_ratio/high_max": torch.tensor(0.2)}, 20
    )
    metrics.add("tokens", 3, how="sum")
    metrics.add("tokens", 4, how="sum")
    assert metrics.reduced() == pytest.approx({"kl": 3.0, "ratio/min": 0.5, "clip_ratio/high_max": 0.2, "tokens": 7.0})


def test_metrics_without_weight_are_nan():
    metrics = StepMetrics()
    metrics.add("kl", 1.0, weight=0)
    assert math.isnan(metrics.reduced()["kl"])


def test_metrics_file_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 5):
        file.write({"step": step, "loss": 0.5})
    MetricsFile(path, resume_step=2).write({"step": 3, "loss": 0.25})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    MetricsFile(path)
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [(b'{"step": 1}\n{"st', "line 2: not valid JSON"), (b"\x85", "line 1: not valid"), (b"[1]\n", "line 1: not a row")],
)
def test_damaged_metrics_are_named(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_names_of_metrics_are_shown_as_they_are(tmp_path):
    """Those that a reward function logs are anybody's: no markup, no cells and no orders to the terminal."""
    name = "em[nq] [/b] a|b\n\x1b[2J"
    MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, name: 1.0})
    console = Console(file=io.StringIO(), width=100)
    console.print(final_table(read_metrics(tmp_path / "metrics.jsonl"), "runs/[b]"))
    assert "em[nq] [/b] a|b\\n\\x1b[2J" in console.file.getvalue() and "runs/[b]" in console.file.getvalue()
    assert "| em[nq] [/b] a\\|b\\n\\x1b[2J | 1 | 1 | 1 |" in write_report(tmp_path)[1].read_text()


def test_empty_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has not finished its first step"):
        write_report(tmp_path)


def test_report_shows_first_last_and_mean(tmp_path):
    rows = [
        {"step": step, "loss": float(step), "num_tokens": 10 * step, "step_time": 0.5, "tree/unique_tokens": 5}
        | {"tree/chain_tokens": 10, "batch/packing_ratio": 2.0}
        for step in (1, 2, 3)
    ]
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in rows:
        file.write(row)
    picture, page = write_report(tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "| loss | 1 | 3 | 2 |" in page.read_text() and "3 steps, 1.5 s" in page.read_text()
    table = final_table(rows, "run")
    assert next(iter(table.columns[2].cells)) == "3"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"step": 0, "eval_reward": 0.25}], "0 steps, 0.0 s in the 0 logged ones."),
        ([{"step": 1}], "1 steps, 0.0 s in the 0 logged ones."),
        (
            [{"step": 1, "num_tokens": 20, "step_time": 2.0, "kl": None}, {"step": 2, "eval_reward": 0.5}],
            "2 steps, 2.0 s in the 1 logged ones, 20 tokens of trajectories.",
        ),
    ],
    ids=["evaluated_only", "no_number", "last_evaluated_only"],
)
def test_report_of_rows_without_all_numbers(tmp_path, rows, text):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in rows:
        file.write(row)
    picture, page = write_report(tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert text in page.read_text() and "Packed rows" not in page.read_text()


@pytest.mark.parametrize(
    ("value", "text"), [(12345.0, "12,345"), (0.000123456, "0.0001235"), (1234.5, "1,234.5"), (-2.0, "-2")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_picture_of_the_mask_never_exceeds_its_canvas():
    tree = build_forest(toy.sample_groups(1))[0]
    small = visible_fraction(tree.trie.subtree_end, canvas=64)
    assert small.shape == (64, 64) and np.all(np.diag(small) == 1) and np.all(np.triu(small, 1) == 0)
    ends = np.array([6, 6, 5, 4, 5, 6])
    expected = [[k <= q < ends[k] for k in range(6)] for q in range(6)]
    assert visible_fraction(ends).tolist() == np.array(expected, dtype=float).tolist()


@pytest.mark.parametrize("num_leaves", [1, 3, 200])
def test_a_picture_has_one_collection_however_many_segments(num_leaves):
    from matplotlib.figure import Figure

    [tree] = build_forest([Trajectory([1, 2, 3 + leaf], [0, 0, 1]) for leaf in range(num_leaves)])
    num_segments = len(tree.segments())
    of_tree, of_row = Figure().subplots(2)
    _draw_tree(of_tree, tree)
    _draw_row(of_row, tree)
    lines = [len(collection.get_segments()) for collection in of_tree.collections]
    assert lines == ([num_segments, num_segments - 1] if num_leaves > 1 else [1])
    assert [len(collection.get_paths()) for collection in of_row.collections] == [num_segments]
    assert not of_tree.lines and not of_row.patches
    assert of_tree.dataLim.bounds[::2] == (0, 3)


def test_step_metrics_are_read_once(monkeypatch):
    """A step adds dozens of numbers; each read would wait for the device."""
    reads = []
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x.shape) or whole(x))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: pytest.fail("a number is read where it is added"))
    metrics = StepMetrics()
    for value in (1.0, 4.0):
        metrics.add("kl", torch.tensor(value), weight=torch.tensor(value))
        metrics.add_loss({"ratio/max": torch.tensor(value), "entropy": torch.tensor(2.0)}, 3)
    assert reads == []
    assert metrics.reduced() == {"kl": 3.4, "ratio/max": 4.0, "entropy": 2.0}
    assert reads == [(8,)] and metrics.reduced()["kl"] == 3.4
