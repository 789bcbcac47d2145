"""`python -m treegrpo`, and the command `treegrpo`."""

import sys
from importlib.util import find_spec


def main() -> int:
    """The command line; says what to install where its packages are missing."""
    if missing := [name for name in ("tyro", "rich", "yaml", "jinja2") if find_spec(name) is None]:
        cure = "pip install --no-build-isolation '.[train]' in treegrpo's folder, or pip install 'treegrpo[train]'"
        print(f"error: the command line needs {', '.join(missing)}: {cure}", file=sys.stderr)
        return 2
    from treegrpo.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
