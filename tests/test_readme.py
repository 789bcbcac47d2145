"""The README keeps its promises: its code runs, the files and commands it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_code_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})


def test_layout_names_files_that_exist():
    layout = re.search(r"## Layout\n+```\n(.*?)```", TEXT, re.DOTALL)[1]
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


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    cli = (ROOT / "treegrpo" / "cli.py").read_text()
    for command in set(re.findall(r"^treegrpo (\w+)", TEXT, re.MULTILINE)):
        assert f"def {command}" in cli or f'"{command}"' in cli, command
