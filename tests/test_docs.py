"""README and docs keep their promises: every block runs or is checked, names exist, picture and tables are current.

TREEGRPO_DOCS=trl (or verl, or any page): that page alone, and nothing of it is skipped. TREEGRPO_DOCS=launch: the
processes of `accelerate launch` are started; otherwise such a command runs as one process in this one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import doc_blocks as docs
import pytest
import tiny
import torch
from doc_blocks import PAGES, ROOT, Block
from test_convert import CHATML, TALK, byte_tokenizer

CHOSEN = os.environ.get("TREEGRPO_DOCS", "")
LAUNCH = CHOSEN == "launch"
ONLY = "" if LAUNCH else CHOSEN
NEEDS = {"trl": "trl", "verl": "verl"}
BLOCKS = [block for page in PAGES if ONLY in ("", page.stem) for block in docs.blocks(page)]
# what is neither slow nor in need of a network; of the others the arguments are parsed
RUN = ("flops", "inspect", "train", "eval", "export", "report", "convert")

pytestmark = [pytest.mark.usefixtures("one_thread", "own_cache"), pytest.mark.filterwarnings("ignore")]
whole = pytest.mark.skipif(bool(ONLY), reason=f"TREEGRPO_DOCS={ONLY} chooses one page")


@pytest.fixture(scope="session")
def sandboxes(tmp_path_factory):
    """The folder a page's commands run in, by page: the repository's files, and what earlier blocks left."""
    made: dict[str, Path] = {}

    def sandbox(page: Path) -> Path:
        if page not in made:
            made[page] = folder = tmp_path_factory.mktemp(page.stem)
            for entry in ROOT.iterdir():
                if entry.name not in ("runs", "build") and not entry.name.startswith("."):
                    (folder / entry.name).symlink_to(entry)
        return made[page]

    return sandbox


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """The sources as a page changes them, by page."""
    made: dict[str, Path] = {}

    def sources(page: Path) -> Path:
        if page not in made:
            made[page] = docs.patched_sources(page, tmp_path_factory.mktemp(f"{page.stem}-sources"))
        return made[page]

    return sources


def skip_without_package(page: Path) -> None:
    package = NEEDS.get(page.stem)
    if package and not ONLY and find_spec(package) is None:
        pytest.skip(f"{package} is not installed here; `make test-{package}` runs this page")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(block: Block, sandboxes, patched, request, monkeypatch, capsys):
    """In the order of the page: a block may use the files that earlier ones leave."""
    if block.language == "python":
        skip_without_package(block.page)
    folder = sandboxes(block.page)
    monkeypatch.chdir(folder)
    if block.writes:
        # the blocks behind the page's diff use it
        assert (patched(block.page) / block.writes).read_text(encoding="utf-8") == block.code
    elif block.language == "diff":
        changed = re.findall(r"^\+\+\+ b/(\S+)", block.code, re.MULTILINE)
        assert changed
        for name in changed:
            assert (patched(block.page) / name).read_text() != (ROOT / name).read_text(), name
    elif block.language == "python" and changes_sources(block):
        run_with(patched(block.page), block, folder)
    elif block.language == "python":
        run_here(block)
    elif block.language == "bash":
        found = list(docs.commands(block.code))
        assert found, "an empty block"
        for words in found:
            if words[0] == "pytest" and changes_sources(block):
                run_tests(patched(block.page), words[1:])
            else:
                run_command(words, folder, request, monkeypatch)


def run_here(block: Block) -> None:
    # compiled so that a trace names the page and its line
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    torch.manual_seed(0)
    torch.compiler.reset()
    exec(code, {"__name__": "__main__"})


def changes_sources(block: Block) -> bool:
    """Whether a diff stands before it on the page."""
    return any(other.language == "diff" for other in docs.before(block))


def run_tests(sources: Path, arguments: list[str]) -> None:
    """pytest on the page's sources and tests, which pyproject.toml puts first on the path."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_with(sources: Path, block: Block, folder: Path) -> None:
    """In a process of its own, which imports the page's sources in place of ours."""
    path = [sources / "kernels", sources, ROOT / "tests", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    script = sources / "block.py"
    script.write_text(f"import treegrpo\nassert treegrpo.__file__.startswith({str(sources)!r})\n{block.code}")
    done = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_command(words: list[str], folder: Path, request, monkeypatch) -> None:
    """Runs what is quick and offline, and checks the rest."""
    argv = docs.treegrpo_arguments(words)
    if words[:2] == ["rm", "-rf"]:
        for target in words[2:]:
            assert target.startswith("runs/") and ".." not in target
            shutil.rmtree(folder / target, ignore_errors=True)
        return
    if words[:2] == ["accelerate", "launch"]:
        argv = docs.launched(words)
        if LAUNCH and not placeholders(argv):
            command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
            return
    if argv is None:
        docs.check_command(words)
        return
    docs.check_flags(argv)
    docs.parse(argv, monkeypatch)
    if argv[0] in RUN and "--help" not in argv:
        run_treegrpo(filled(argv, folder, request))


def run_treegrpo(argv: list[str]) -> None:
    if argv[0] == "train":
        argv = [*argv, "--disable-tqdm"]
        if "--max-steps" not in argv and "--config" not in argv:
            argv += ["--max-steps", "2"]
        if "--dry-run" in argv and "--output-dir" not in argv:
            # all blocks of a page run in one folder, and the default is where another's run is
            argv += ["--output-dir", "runs/dry"]
    from treegrpo.cli import main

    assert main(argv) == 0, f"treegrpo {shlex.join(argv)}"


def placeholders(argv: list[str]) -> list[str]:
    return [word for word in argv if docs.PLACEHOLDER.fullmatch(word)]


# what README calls files of the reader's
FILLED = {"trajectories.json", "rollouts.jsonl.gz", "replay:rollouts.jsonl.gz", "questions.jsonl"}


def filled(argv: list[str], folder: Path, request) -> list[str]:
    """The command with small files in place of its placeholders, and of the files that README names."""
    if not (set(argv) & FILLED or placeholders(argv)):
        return argv
    tokenizer = folder / "runs" / "tokenizer"
    if not tokenizer.exists():
        tokenizer.parent.mkdir(exist_ok=True)
        made = byte_tokenizer(CHATML)
        made.save_pretrained(tokenizer)
        config = {**tiny.MODEL, "vocab_size": len(made), "max_position_embeddings": 1024}
        (folder / "runs" / "model.json").write_text(json.dumps(config))
        talks = [dict(messages=TALK[: 6 - i % 2 * 2], group=f"task {i // 2}", reward=i % 2) for i in range(8)]
        (folder / "trajectories.json").write_text(json.dumps(talks))
    values = {
        "Qwen/Qwen2.5-0.5B-Instruct": str(tokenizer),
        "PATH_OR_CONFIG": "runs/model.json",
        "CONFIG": "runs/model.json",
        "FILE": "rollouts.jsonl.gz",
    }
    if "FOLDER" in argv:
        box = request.getfixturevalue("box")
        values["FOLDER"] = str(box)
        shutil.copy(box / "train.jsonl", folder / "questions.jsonl")
        shutil.copy(box / "train.jsonl", folder / "held_out.jsonl")
        shutil.copy(box / "corpus.jsonl", folder / "corpus.jsonl")
    argv = [values.get(word, word) for word in argv]
    assert not placeholders(argv), f"no value for {placeholders(argv)}"
    return argv


@whole
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_well_formed(page: Path):
    text = page.read_text(encoding="utf-8")
    for block in docs.blocks(page):
        assert block.language in docs.LANGUAGES, f"{page.name}:{block.line}: {block.language!r}, not {docs.LANGUAGES}"
        if block.language == "python" and page.stem not in NEEDS:
            compile(block.code, block.name, "exec")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(docs.blocks(page)), "a fence is not closed"
    for target in docs.links(page):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@whole
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_spans_name_what_exists(page: Path):
    everywhere = {flag for command in ("", *docs.command_names()) for flag in docs.known_flags(command)}
    everywhere |= set(re.findall(r"--[\w-]+", (ROOT / "bench" / "device.sh").read_text()))
    for span in docs.spans(page):
        words = span.split()
        argv = docs.treegrpo_arguments(words)
        if argv:
            docs.check_flags(argv)
        elif words[0] == "make" and len(words) > 1:
            docs.check_command(words)
        elif re.match(r"(python|bash|pytest) [\w-]", span) or span.startswith("pip install "):
            docs.check_command([word.strip("'") for word in words])
        elif span.startswith("--") and page.stem not in NEEDS:
            assert words[0].partition("=")[0].replace("_", "-") in everywhere, f"no command has the flag {words[0]}"
        elif re.fullmatch(r"(bench|docs|tests|examples|csrc|kernels|treegrpo)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"no such file: {span}"
        elif re.fullmatch(r"(treegrpo|treegrpo_kernels|tk)(\.\w+)+", span):
            check_name(span)


def check_name(dotted: str) -> None:
    """``treegrpo.a.b`` is a module, or an attribute of one; of integrations only where their package is installed."""
    parts = dotted.replace("tk.", "treegrpo_kernels.").split(".")
    if parts[:2] == ["treegrpo", "integrations"] and len(parts) > 2 and find_spec(parts[2]) is None:
        assert (ROOT / "treegrpo" / "integrations" / parts[2]).exists(), dotted
        return
    found = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:depth]))
        found = getattr(found, part)


# ---- README


README = (ROOT / "README.md").read_text(encoding="utf-8")


@whole
def test_readme_says_what_it_is_and_stays_short():
    assert "prefix-tree attention for training" in README.splitlines()[0]
    assert len(README.splitlines()) <= 310


@whole
def test_layout_names_files_that_exist():
    layout = re.search(r"## Layout\n+```text\n(.*?)```", README, re.DOTALL)[1]
    folder = ROOT
    named = 0
    for line in layout.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / words[0] if len(words) == 1 else ROOT
        for word in words:
            if word.endswith((".py", "/", ".md")):
                assert (folder / word).exists() or (ROOT / word).exists(), word
                named += 1
    assert named > 15


@whole
def test_every_page_is_in_both_lists():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in README, page.name
        assert page.name == "README.md" or f"({page.name})" in (ROOT / "docs" / "README.md").read_text(), page.name


@whole
@pytest.mark.parametrize("name", ["forest", "tiles"])
def test_picture_is_what_its_script_draws(name):
    drawn = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))["draw"]()
    assert (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8") == drawn
    xml.etree.ElementTree.fromstring(drawn)


@whole
def test_break_even_table_is_what_its_script_prints():
    assert runpy.run_path(str(ROOT / "docs" / "break_even.py"))["table"]() in README


@whole
def test_tile_table_is_what_its_script_prints():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "tiles.py"))["table"]() in page


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@whole
def test_study_table_is_the_committed_one():
    shown = table_rows((ROOT / "docs" / "study.md").read_text(encoding="utf-8"))
    rows = table_rows((ROOT / "bench" / "results" / "study.md").read_text(encoding="utf-8"))[2:]
    assert len(rows) == 15
    for row in rows:
        assert [row[i] for i in (0, 1, 2, 4, 5, 11)] in shown, row
    gains = [float(row[5].split()[0]) for row in rows if row[5]]
    assert f"by {min(gains)} to {max(gains)} points" in README


WORKLOADS = {
    "GRPO star, prompt 8k, 16 x 1k": "star_8k",
    "GRPO star, prompt 2k, 8 x 2k": "star_2k",
    "search agent (2,6,1)": "search_2_6_32k",
    "search agent (2,2,1)": "search_2_2_32k",
    "one chain of 16k": "chain_16k",
    "one chain of 32k": "chain_32k",
}


def committed_races() -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """{(workload, D): {pass: its row}} of the report that README names."""
    folder = re.search(r"`bench/results/(NVIDIA-[\w-]+)/` has the whole table", README)[1]
    report = (ROOT / "bench" / "results" / folder / "report.md").read_text(encoding="utf-8")
    header, _, *rows = table_rows(report[: report.index("Peak memory")])
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row[0].startswith("**"):
            part = row[0].strip("*")
        else:
            found.setdefault((row[0], row[1]), {})[part] = dict(zip(header, row, strict=True))
    return found


@whole
def test_attention_table_is_the_committed_one():
    """Every cell of README's table of races against the report it names."""
    found = committed_races()
    races = README[README.index("### Attention on an H200") : README.index("### Training steps on an H200")]
    shown = [row for row in table_rows(races) if row[0] in WORKLOADS]
    assert len(shown) == len(found)
    for name, *cells in shown:
        forward, backward, both = found[WORKLOADS[name], cells[0]].values()
        flex = [over_ours(part["FlexAttention"]) for part in (forward, backward)]
        rivals = [over_ours(both[rival]) for rival in ("gathered paths", "chains, varlen FA2", "chains, cuDNN")]
        ours = [part["ours"].split()[0] for part in (forward, backward)]
        assert cells == [both["D"], both["tokens"], both["pairs"], *ours, " / ".join(flex), *rivals], name


def span(cells: Iterable[str]) -> str:
    ratios = [float(ratio) for cell in cells for ratio in re.findall(r"([\d.]+)x", cell)]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


@whole
def test_readme_begins_with_what_its_tables_say():
    begin = " ".join(README[README.index("**In numbers**") : README.index("## Two commands")].split())
    tables = README[README.index("### Attention on an H200") :]
    races = [row for row in table_rows(tables) if row[0] in WORKLOADS and len(row) == 10 and row[3] != "1.00x"]
    assert len(races) == 5
    flex, gathered, *chains = zip(*(row[6:] for row in races), strict=True)
    best = [min(pair, key=lambda cell: float(cell.rstrip("x"))) for pair in zip(*chains, strict=True)]
    assert f"{span(flex)} as fast as FlexAttention" in begin
    assert f"{span(gathered)} as gathered paths" in begin
    assert f"{span(best)} as the flattened chains" in begin
    steps = tables[tables.index("### Training steps on an H200") : tables.index("### On a CPU")]
    ratios = [row[6] for row in table_rows(steps)[2:6]]
    low, high = span(ratios).split(" to ")
    assert f"{low} (search agent) to {high} (tau-bench, call by call)" in begin


@whole
def test_rates_of_the_kernels_page_are_the_committed_ones():
    from bench import gpu_workloads
    from treegrpo_kernels import TreePlan

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    shown = table_rows(page[page.index("## What came of it") :])[2:7]
    assert len(shown) == 5
    for name, *cells in shown:
        forward, backward = (
            int(found["ours"].split()[0]) for found in list(committed_races()[name, "128"].values())[:2]
        )
        plan = TreePlan.build(gpu_workloads.forest(name).subtree_end)
        computed = forward * len(plan.tile_lists(128, 128).q_indices) * 128 * 128 / plan.num_pairs
        rates = [forward, round(computed), f"{computed / 989:.0%}", backward, round(backward * 7 / 5)]
        assert cells == list(map(str, rates)), name


STEPS = ("grpo_star", "search_agent", "binary", "branching", "tau_whole", "tau_calls")


@whole
def test_cpu_numbers_are_the_committed_ones():
    from bench.report import load

    folder = re.search(r"`bench/results/(x86[\w-]+)/` has every row", README)[1]
    machine, rows = load(ROOT / "bench" / "results" / folder / "bench.json")
    assert machine["commit"].startswith(folder.rpartition("-")[2]) and "changes" not in machine["commit"]
    shown = README[README.index("### On a CPU") :]
    cells = [row[2:] for row in table_rows(shown) if row[1].startswith("forward")]
    rates = [row for row in rows if row["suite"] == "rate"]
    assert len(cells) == len(rates)
    for cell, row in zip(cells, rates, strict=True):
        speeds = f"{row['gflops_per_s']:.0f}", f"{row['baseline_gflops_per_s']:.0f}", f"{row['gflops_ratio']:.2f}x"
        assert cell == [*speeds, f"{row['iqr_s'] / row['median_s']:.0%}"]
    ratios = {row["workload"]: row["time_ratio"] for row in rows if row["suite"] == "step" and row.get("time_ratio")}
    sentence = shown[shown.index("One training step") : shown.index("as fast.")]
    assert re.findall(r"[\d.]+x", sentence) == [f"{ratios[name]:.2f}x" for name in STEPS]


def over_ours(cell: str) -> str:
    return re.search(r"\((.*)\)", cell)[1]


# ---- API reference


@whole
def test_every_public_name_has_a_docstring_that_renders(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install pdoc")
    api = runpy.run_path(str(ROOT / "docs" / "api.py"))
    names = api["build"](tmp_path)
    assert {"treegrpo", "treegrpo.hf", "treegrpo_kernels.plan"} < set(names)
    assert api["undocumented"](names) == []
    for name in names:
        page = tmp_path.joinpath(*name.split(".")).with_suffix(".html").read_text(encoding="utf-8")
        page = re.sub(r'<div class="pdoc-code.*?</pre></div>', "", page, flags=re.DOTALL)
        assert not re.search(r":(meth|func|class|mod):`", page), f"{name}: a reference that did not render"
    # a lazy name, its arguments as a list
    page = (tmp_path / "treegrpo.html").read_text(encoding="utf-8")
    assert 'id="grpo_loss"' in page and "<strong>leaf_offsets:</strong>" in page
