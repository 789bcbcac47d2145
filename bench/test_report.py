"""The report: a page and two pictures from a result file; rows without a passed check stay out."""

import json

import pytest

from bench import report


def entry(suite, contender, median, workload="branching", oracle="passed", **info):
    info |= {"suite": suite, "contender": contender, "workload": workload, "oracle": oracle}
    return {"extra_info": info, "stats": {"median": median, "rounds": 5}}


def result_file(tmp_path):
    chain = {"tokens": 24192, "pairs": 10_000_000, "flops": 6e11, "head_rows": 100}
    tree = {"tokens": 5504, "pairs": 4_000_000, "flops": 2e11, "head_rows": 50}
    rate = {"gflops_per_s": 90.0, "baseline_gflops_per_s": 60.0, "gflops_ratio": 1.5}
    rows = [
        entry("step", "chain", 3.1, **chain),
        entry("step", "tree", 1.0, baseline_s=3.0, time_ratio=3.0, **tree),
        entry("step", "stock_transformers", 5.0, **chain),
        entry("attention", "tree_cpu", 0.01, passes="forward", gflops_per_s=80.0, time_ratio=2.5, **tree),
        entry("attention", "chain_sdpa", 0.03, passes="forward", gflops_per_s=70.0, **chain),
        entry("attention", "wrong_one", 0.001, oracle=None, passes="forward", gflops_per_s=999.0, **tree),
        entry("rate", "tree_cpu", 0.01, passes="forward", tokens=5504, **rate),
        entry("plan", "TreePlan.build", 2e-5, tokens=5504, pairs=4_000_000),
    ]
    rows += [
        entry(
            "growth", "tree_cpu", 0.01 * n, f"{n} x 4096", passes="forward", gflops_per_s=80.0, tokens=4096 * n, pairs=n
        )
        for n in (1, 2, 4)
    ]
    path = tmp_path / "result.json"
    commit = {"id": "0123456789abcdef", "dirty": True}
    data = {
        "machine_info": {"cpu": "a cpu"},
        "commit_info": commit,
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": rows,
    }
    path.write_text(json.dumps(data))
    return path


def test_page_and_pictures(tmp_path):
    out = tmp_path / "out"
    text = report.write(result_file(tmp_path), out)
    assert (out / "report.md").read_text() == text
    assert "0123456789 + local changes" in text and "wrong_one" not in text and "999" not in text
    # the interleaved chain time counts, not the row measured apart
    line = next(line for line in text.splitlines() if "chain / tree" in line)
    assert [cell.strip() for cell in line.split("|")[3:7]] == ["4.40x", "2.50x", "3.00x", "3.00x"]
    for picture in ("chain_against_tree.png", "growth.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "broken.json"
    for content in ("{", "[]", '{"benchmarks": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"broken\.json is not a result of pytest --benchmark-json"):
            report.load(path)
