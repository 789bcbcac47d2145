"""Writes the API reference from docstrings as HTML: `python docs/api.py [--out build/docs]` (`pip install pdoc`)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# what users import; treegrpo.hf, treegrpo.flops and treegrpo_kernels.reference come with the __all__ of their packages
MODULES = (
    *("treegrpo", "treegrpo.tree", "treegrpo.packing", "treegrpo.advantages", "treegrpo.credit", "treegrpo.samples"),
    *("treegrpo.logprobs", "treegrpo.loss", "treegrpo.mismatch", "treegrpo.rewards"),
    *("treegrpo.convert", "treegrpo.config", "treegrpo.trainer", "treegrpo.export", "treegrpo.toy"),
    *("treegrpo.envs.base", "treegrpo.envs.search", "treegrpo.envs.tools", "treegrpo.envs.calculator"),
    *("treegrpo.envs.retrievers", "treegrpo.envs.data"),
    *("treegrpo.rollout.engine", "treegrpo.rollout.hf", "treegrpo.rollout.server", "treegrpo.rollout.vllm"),
    *("treegrpo.rollout.search", "treegrpo.rollout.nodes", "treegrpo.rollout.settings"),
    *("treegrpo_kernels", "treegrpo_kernels.api", "treegrpo_kernels.plan"),
    *("treegrpo_kernels.op", "treegrpo_kernels.flops", "treegrpo_kernels.head", "treegrpo_kernels.native"),
)
INTEGRATIONS = {"trl": "treegrpo.integrations.trl", "verl": "treegrpo.integrations.verl"}


def modules() -> list[str]:
    """Those of MODULES, and the integrations whose package is installed here."""
    found = [name for package, name in INTEGRATIONS.items() if find_spec(package) and find_spec(name)]
    return [*MODULES, *found]


def build(out: Path) -> list[str]:
    """Writes one page a module into ``out``; returns the modules."""
    import pdoc
    import pdoc.render

    names = modules()
    for name in names:
        resolve(name)
    pdoc.render.configure(docformat="google", footer_text="treegrpo: prefix-tree attention for training")
    pdoc.pdoc(*names, output_directory=out)
    pages = (page.relative_to(out).with_suffix("") for page in out.rglob("*.html"))
    return sorted(".".join(page.parts) for page in pages if page.name != "index")


def resolve(name: str) -> ModuleType:
    """The module with its lazy names imported, for pdoc looks for them in the module's dictionary."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
    return module


def undocumented(names: Iterable[str]) -> list[str]:
    """Modules, classes, functions and methods with a public name and no docstring of their own or inherited."""
    import pdoc.doc

    found: list[str] = []

    def visit(item: pdoc.doc.Doc) -> None:
        if not item.docstring.strip():
            found.append(item.fullname)
        if isinstance(item, pdoc.doc.Namespace):
            for member in item.members.values():
                # what a class inherits from torch is not ours to describe
                ours = member.taken_from[0].startswith("treegrpo") and not member.name.startswith("_")
                if ours and not isinstance(member, (pdoc.doc.Variable, pdoc.doc.Module)):
                    visit(member)

    for name in names:
        visit(pdoc.doc.Module(resolve(name)))
    return sorted(set(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    out = parser.parse_args().out
    names = build(out)
    print(f"wrote {len(names)} pages: {out / 'index.html'}")
    for package, name in INTEGRATIONS.items():
        if name not in names:
            print(f"left out {name}: {package} is not installed here")
    if missing := undocumented(names):
        print(f"without a docstring: {', '.join(missing)}")


if __name__ == "__main__":
    main()
