"""Reads README.md and docs/*.md: fenced blocks, commands, code spans, links, and what pages change in the sources."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "bash", "diff", "text")
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
FILE = re.compile(r"# ((?:kernels|treegrpo)/[\w/]+\.py)\n")
# what a shell would do beyond running one program: examples are written without it
SHELL = set("|;<>$`")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of code, from 1."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.stem}-{self.line}-{self.language}"

    @property
    def writes(self) -> str | None:
        """The source file that a python block is, by its first line."""
        found = FILE.match(self.code) if self.language == "python" else None
        return found and found[1]


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    return tuple(
        Block(page, text.count("\n", 0, found.start()) + 2, found[1].strip(), found[2])
        for found in FENCE.finditer(text)
    )


def before(block: Block) -> list[Block]:
    """The page's earlier blocks."""
    return [other for other in blocks(block.page) if other.line < block.line]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """Inline code, line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Targets within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target.partition("#")[0] for target in found if "://" not in target and not target.startswith("#")]


def commands(code: str) -> Iterator[list[str]]:
    """Words of each command of a bash block; variables set in front of one stay in front."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            outside = re.sub(r"'[^']*'", "", line.partition(" #")[0])
            assert not SHELL & set(outside), f"not one plain command: {line.strip()}"
            yield words


def without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


# ---- the command line


def command_names() -> tuple[str, ...]:
    from treegrpo import cli

    return tuple(cli._commands(cli.TrainConfig()))


def known_flags(command: str) -> set[str]:
    """Flags of a command of ``treegrpo``, as its help prints them; "" for treegrpo itself."""
    return set(re.findall(r"--[\w-]+", help_of(command))) | {"--help"}


@functools.cache
def help_of(command: str) -> str:
    import contextlib
    import io

    from treegrpo.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    assert stop.value.code == 0, f"treegrpo has no command {command!r}"
    # a help text broken over lines must not break a flag
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


def check_flags(argv: list[str]) -> None:
    """Command and flags of ``treegrpo ...`` exist; values are not looked at."""
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    flags = known_flags(command)
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("_", "-")
            assert flag in flags, f"treegrpo {command} has no flag {flag}"


def parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser accepts ``treegrpo ...``, values included; nothing is run."""
    from treegrpo import cli

    real, called = cli._commands, []

    def recorded(function):
        @functools.wraps(function)
        def record(*args, **kwargs):
            called.append(function)

        return record

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_commands", lambda defaults: {n: recorded(f) for n, f in real(defaults).items()})
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code
    refused = f"treegrpo {shlex.join(argv)}: refused"
    assert code == 0 and ("--help" in argv or len(called) == 1), refused


def launched(words: list[str]) -> list[str]:
    """Arguments of treegrpo in ``accelerate launch ... -m treegrpo ...``; checks the launcher's own."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert words[1] == "launch", words
    given = launch_command_parser().parse_args(words[2:])
    if given.config_file is not None:
        load_config_from_file(str(ROOT / given.config_file))
    assert given.module and given.training_script == "treegrpo", words
    return given.training_script_args


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def treegrpo_arguments(words: list[str]) -> list[str] | None:
    """Arguments where the command is treegrpo's; None where it is another."""
    if words[0] == "treegrpo":
        return words[1:]
    if words[:3] in (["python", "-m", "treegrpo"], ["python3", "-m", "treegrpo"]):
        return words[3:]
    return None


def check_command(words: list[str]) -> None:
    """A command that is not run here: what it names exists. AssertionError for one that nobody checks."""
    match without_variables(words):
        case ["make", *targets]:
            for target in targets:
                assert "=" in target or target in make_targets(), f"the Makefile has no target {target}"
        case ["pip", "install", *requirements]:
            listed = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
            extras = re.findall(r"^(\w+) = \[", listed.partition("\n\n")[0], re.MULTILINE)
            for requirement in requirements:
                for extra in re.findall(r"^(?:treegrpo|\.)\[([\w,]+)\]", requirement):
                    assert set(extra.split(",")) <= set(extras), f"pyproject.toml has no extra {extra}"
        case ["python" | "bash" | "pytest" as program, *rest] if rest[:1] != ["-m"]:
            path = next(word for word in rest if not word.startswith("-"))
            assert PLACEHOLDER.fullmatch(path) or (ROOT / path).exists(), f"{program}: no such file {path}"
        case ["python", "-m", module, *_]:
            check_module(module)
        case other:
            raise AssertionError(f"nobody checks this command: {shlex.join(other)}; mark the block as text")


def check_module(name: str) -> None:
    """``python -m name`` would find it; modules of packages that are not installed are not looked for."""
    top = name.partition(".")[0]
    if top in ("bench", "treegrpo", "treegrpo_kernels"):
        folder = ROOT / "kernels" if top == "treegrpo_kernels" else ROOT
        path = folder.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), f"no module {name}"
    elif importlib.util.find_spec(top) is not None:
        assert importlib.util.find_spec(name) is not None, f"no module {name}"


# ---- pages that change the sources


def patched_sources(page: Path, folder: Path) -> Path:
    """A copy of both packages and the tests in ``folder`` with the page's files written and its diffs applied."""
    for source in ("treegrpo", "kernels", "tests"):
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for built in (ROOT / "kernels" / "treegrpo_kernels").glob("*.so"):
        os.symlink(built, folder / "kernels" / "treegrpo_kernels" / built.name)
    for name in ("bench", "examples", "pyproject.toml"):
        os.symlink(ROOT / name, folder / name)
    for block in blocks(page):
        if block.writes:
            (folder / block.writes).write_text(block.code, encoding="utf-8")
        if block.language == "diff":
            apply(block.code, folder)
    return folder


def apply(diff: str, folder: Path) -> None:
    """Applies hunks by their text alone, which must stand in the file exactly once: line numbers would go stale."""
    path = None
    for part in re.split(r"^(?=--- |@@)", diff, flags=re.MULTILINE):
        if part.startswith("--- "):
            path = folder / re.search(r"^\+\+\+ b/(\S+)", part, re.MULTILINE)[1]
        elif part.startswith("@@"):
            lines = part.splitlines()[1:]
            before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            text = path.read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{path.name}: stands there {text.count(before)} times, not once:\n{before}"
            path.write_text(text.replace(before, after), encoding="utf-8")
