"""Arrows point one way, optional packages stay optional, and the folder kernels/ hides nobody's package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def test_kernels_import_nothing_of_the_trainer():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            assert name.split(".")[0] not in ("treegrpo", "transformers", "trl", "verl", "bench"), f"{path}: {name}"


def test_torch_appears_only_in_the_bindings():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh", ".inl")]
    assert files
    for path in files:
        if "bindings" not in path.name:
            for line in path.read_text().splitlines():
                # the bindings' own header would bring torch along
                assert not line.startswith(("#include <torch", "#include <ATen", "#include <c10")), f"{path}: {line}"
                assert not (line.startswith("#include") and "bindings" in line), f"{path}: {line}"


@pytest.mark.parametrize("word", ["rollout", "reward", "advantage", "trajectory"])
def test_kernels_and_csrc_never_name_what_is_trained(word):
    for path in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*")]:
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            code = path.read_text().lower().replace("nothing of rollouts", "")
            assert word not in code, f"{path} names a {word}"


def run(code: str, *, cwd: Path, path: list[Path] = ()) -> str:
    prelude = f"import sys; sys.path[:] = [{str(cwd)!r}] + sys.path + {[str(p) for p in path]!r}\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_repository_root_does_not_hide_a_package_called_kernels(tmp_path):
    """Another ``kernels`` stands at the end of the path; started from the root, it must still be the one found."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("who = 'the hub client'\n")
    assert run("import kernels; print(kernels.who)", cwd=ROOT, path=[tmp_path]) == "the hub client"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_without_triton_and_transformers():
    code = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "flash_attn"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, "kernels")
import torch, treegrpo_kernels as tk
# as long again to import as torch, for those who compile nothing
print("torch._dynamo" in sys.modules)
plan = tk.TreePlan.build(torch.tensor([2, 2]))
x = torch.ones(2, 1, 4)
print(tk.tree_attention(x, x, x, plan, backend="reference").sum().item())
"""
    assert run(code, cwd=ROOT) == "False\n8.0"


def test_editors_see_the_public_names():
    """What `treegrpo` imports on first use stands in a block that type checkers read."""
    import treegrpo

    tree = ast.parse((ROOT / "treegrpo" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    modules = {name: f"treegrpo.{module}" for name, module in treegrpo._MODULE_OF.items()}
    assert seen == {*modules.items(), *((name, "treegrpo") for name in treegrpo._SUBMODULES)}


def test_trees_help_and_reports_need_no_torch(tmp_path):
    code = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import treegrpo
tree = treegrpo.build_tree([treegrpo.Trajectory([1, 2], [0, 1]), treegrpo.Trajectory([1, 3], [0, 1])])
print(tree.num_tokens)
"""
    assert run(code, cwd=ROOT) == "3"
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code += f"""
import contextlib
from treegrpo.cli import main
with contextlib.suppress(SystemExit):
    main(["train", "--help"])
print(main(["report", {str(tmp_path)!r}]))
"""
    shown = run(code, cwd=ROOT)
    assert "--row-token-budget" in shown and shown.endswith("0")
