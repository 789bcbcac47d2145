"""Files that are read with the place of what is wrong in them, and written whole or not at all."""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`(number from 1, line)` of a file, decompressed if its name ends in `.gz`; blank lines and a byte order mark are
    left out.

    Raises:
        ValueError: the compressed data is damaged.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        damage = f"the compressed data is damaged ({error}): copy it again"
        raise ValueError(f"{path}, line {number + 1}: {damage}") from error


def check_utf8(text: str, name: str) -> None:
    """ValueError naming what holds half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair ({error}): write the text as UTF-8") from error


def cache_home() -> Path:
    """Where what is made once is kept: `treegrpo` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treegrpo"


def check_folder(folder: str | Path, setting: str) -> None:
    """ValueError unless files can be written into `folder`, or it can be made; asked before the work, makes nothing.

    Args:
        folder: where files will go.
        setting: what the user gave it with, named in the error.
    """
    folder = Path(folder)
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise ValueError(f"{setting} {folder}: {found} is a file, not a folder; give another place")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{setting} {folder}: {found} cannot be written to; give another place")


def check_file(path: str | Path | None, setting: str) -> None:
    """ValueError unless `path` (None: nothing is asked for) can be written; its folder may still be missing."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"{setting} {path} is a folder: give the name of a file")
    check_folder(Path(path).parent, setting)


@contextmanager
def held(folder: Path, setting: str) -> Iterator[None]:
    """Keeps every other run out of `folder`, which is made where it is missing, until the block ends (or the process
    does, however). ValueError where another run is in it. Some network file systems know no locks: nothing is kept
    out there."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{setting} {folder}: another run is writing there; let it end, or give another") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing_weights(path: Path, temporary: Path) -> Iterator[None]:
    """OSError naming `path` where a full disk or the like stops safetensors or torch.save, which raise errors of their
    own without a name; what was written of it, the folder `temporary`, is removed."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen half written; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
