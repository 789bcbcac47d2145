"""Files that are read with the place of what is wrong in them, and written whole or not at all."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`(number from 1, line)` of a file, decompressed if its name ends in `.gz`; blank lines are left out.

    Raises:
        ValueError: the compressed data is damaged.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        damage = f"the compressed data is damaged ({error}): copy it again"
        raise ValueError(f"{path}, line {number + 1}: {damage}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
