"""bench/device.sh with a Python that only writes down what it is asked: every stage reaches its command."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = "build tests sanitize step bench head hybrid split tune profile cuda"
PYTHON = """#!/usr/bin/env bash
printf 'python %s\\n' "$*" >> "$CALLS"
case "$*" in
  *get_device_name*) echo Some-GPU ;;
  *backends*) echo "cuda: not built" ;;
  *--short*) seq -f "row %g" 125 ;;
  -) cat > /dev/null ;;
  $FAILING) exit 3 ;;
esac
"""
TOOL = '#!/usr/bin/env bash\nfor x in "$@"; do printf "%s|" "$x"; done >> "$CALLS"; echo >> "$CALLS"\n'

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")


@pytest.fixture
def device(tmp_path):
    """`device(arguments, failing="pattern of what Python is asked")` -> (last table, lines of calls)."""
    timeout = f'{TOOL}exec {shutil.which("timeout")} "$@"\n'
    tools = {"python": PYTHON, "ncu": TOOL, "nvcc": TOOL, "compute-sanitizer": TOOL, "timeout": timeout}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(
        *arguments: str, failing: str = "nothing", root: Path = ROOT, commit: str = "abc"
    ) -> tuple[dict[str, str], str]:
        calls = tmp_path / "calls"
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
        environment |= {"CALLS": str(calls), "COMMIT": commit, "FAILING": failing}
        command = ["bash", str(root / "bench" / "device.sh"), "--out", str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "kernels that do not work here: cuda: not built" in done.stdout
        table = done.stdout.rpartition("stage ")[2].splitlines()[1:-1]
        return {row[:10].strip(): row[10:71].strip() for row in table}, calls.read_text()

    return run


def test_every_stage_runs_its_commands(device):
    outcomes, calls = device("--stages", STAGES)
    assert outcomes == dict.fromkeys(STAGES.split(), "ok")
    assert "setup.py build_ext --inplace" in calls
    assert "-m gpu and not cuda_kernels" in calls and "-m gpu and cuda_kernels" in calls
    for module in ("race_cuda", "tune_split", "tune", "profile_step"):
        assert f"python -m bench.{module}" in calls, module
    # a shell must not see the pattern as its own
    assert "--kernel-name|regex:sm90.*(forward|dq|dkv)_kernel|--launch-count|8|" in calls
    assert "--clock-control|none|" in calls
    assert "tests/sanitize.py|sm90" in calls


def test_cuda_tests_that_never_end_leave_time_for_the_race(device):
    _, calls = device("--stages", "cuda", "--seconds", "112")
    limit = int(re.search(r"-s\|INT\|-k\|8\|(\d+)\|bash", calls)[1])
    (asked,) = re.findall(r"-k\|5\|(\d+)\|\S+python\|-m\|pytest", calls)
    assert 30 < int(asked) <= limit / 2


def test_a_quick_run_builds_too(device):
    outcomes, calls = device("--quick")
    assert outcomes == dict.fromkeys(("build", "tests", "step", "bench", "head"), "ok")
    assert calls.count("--quick") >= 3


@pytest.mark.parametrize("seconds", [50, 60, 80, 540])
def test_commands_end_before_they_are_interrupted(seconds, device):
    for stage in ("step", "sanitize"):
        _, calls = device("--stages", stage, "--seconds", str(seconds))
        interrupt, own = re.findall(r"-s\|INT\|-k\|8\|(\d+)\|.*-seconds[=|](\d+)\|", calls)[-1]
        assert 0.75 * int(interrupt) < int(own) < int(interrupt) < seconds - 8


def test_the_last_table_is_whole(device, tmp_path):
    """29 races in three passes, 13 steps and 20 heads."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").write_text("{}")
    device("--stages", "head")
    assert "row 125\n" in (tmp_path / "out" / "log.txt").read_text()


def test_what_fails_is_said_and_the_rest_runs(device):
    outcomes, _ = device("--stages", "build step cuda", failing="*race_cuda --out*")
    assert outcomes == {"build": "ok", "step": "ok", "cuda": "FAILED (1), see log.txt"}
    outcomes, _ = device("--stages", "build head", "--seconds", "60", failing="setup.py*")
    assert re.fullmatch(r"skipped: 1\d s are left for it, it needs 20", outcomes["build"]) and outcomes["head"] == "ok"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_local_changes_are_part_of_the_commits_name(device, tmp_path):
    root = tmp_path / "repository"
    (root / "bench").mkdir(parents=True)
    script = shutil.copy(ROOT / "bench" / "device.sh", root / "bench")
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    log = tmp_path / "out" / "log.txt"
    device("--stages", "head", root=root, commit="")
    assert re.search(r"commit [0-9a-f]{7,},", log.read_text())
    with open(script, "a") as file:
        file.write("# changed\n")
    device("--stages", "head", root=root, commit="")
    assert re.search(r"commit [0-9a-f]{7,}-dirty,", log.read_text())


def test_no_gpu_is_said(tmp_path):
    done = refused(tmp_path, "--out", str(tmp_path / "out"), PYTHON="false")
    assert "no CUDA device seen" in done and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seconds", ["9.5", "5m", "-3"])
def test_no_limit_is_lost_over_a_wrong_one(seconds, tmp_path):
    """The shell's arithmetic would make nothing of it, and timeout takes nothing for no limit."""
    assert f"takes whole seconds, not {seconds}" in refused(tmp_path, "--seconds", seconds)


def test_a_folder_is_where_the_caller_is(device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device("--stages", "head", "--out", "here")
    assert (tmp_path / "here" / "log.txt").exists()


def refused(folder, *arguments, **environment):
    """What the script says when it does not start."""
    command = ["bash", str(ROOT / "bench" / "device.sh"), *arguments]
    done = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr
