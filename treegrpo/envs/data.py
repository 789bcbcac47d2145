"""Dataset files as rows: JSON and JSON lines, and the parquet files of Search-R1 and verl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from treegrpo.answers import gold_answers
from treegrpo.files import check_utf8, read_lines


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a `.jsonl`, `.json` (a list of objects) or `.parquet` file, the first two also `.gz`.

    Every row comes back with `question` (text) or `prompt` (text or chat messages), or both; `answers`, a list of texts
    (from answers, golden_answers, answer or reward_model.ground_truth.target; GSM8K's solutions from `####` on; []
    where the file has none); `source` (its `source` or `data_source`, else the file's name); `index`, its place in the
    file from 0, whatever number it carries itself; and every other column as it is.

    Parquet needs pyarrow. Raises ValueError naming the file, the line (parquet: row) and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a .jsonl, .json or .parquet file")
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        records, unit = _read_parquet(path), "row"
    elif kind in (".jsonl", ".json"):
        records, unit = _read_json(path, kind), "line" if kind == ".jsonl" else "entry"
    else:
        raise ValueError(f"{path}: the name ends in {kind!r}; give a .jsonl, .json or .parquet file")
    stem = path.name.removesuffix(".gz").removesuffix(kind)
    rows: list[dict[str, Any]] = []
    for number, record in records:
        try:
            rows.append(_row(record, len(rows), stem))
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows: give a file with at least one")
    return rows


def _row(record: Any, index: int, stem: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}: give an object with question and answers")
    question, prompt = record.get("question"), record.get("prompt")
    if question is None and prompt is None:
        raise ValueError("question is missing, and so is prompt: add one of them")
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise ValueError(f"question is {question!r}: give text")
    check_utf8(question or "", "question")
    if prompt is not None:
        _check_prompt(prompt)
    columns = {name: [value] for name, value in record.items() if name != "reward_model" or isinstance(value, dict)}
    try:
        answers = gold_answers(columns, 1)[0]
    except ValueError as error:
        if "no column" not in str(error):
            raise
        answers = []
    answers = [answer.rpartition("####")[2].strip() if "####" in answer else answer for answer in answers]
    source = record.get("source") or record.get("data_source") or stem
    if not isinstance(source, str):
        raise ValueError(f"source is {source!r}: give text")
    row = {name: value for name, value in record.items() if name not in ("question", "prompt")}
    row |= {name: value for name, value in (("question", question), ("prompt", prompt)) if value is not None}
    return row | {"answers": answers, "source": source, "index": index}


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt is empty: give text or messages")
        check_utf8(prompt, "prompt")
        return
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt is a {type(prompt).__name__}: give text or a list of messages")
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"prompt[{number}] is no message: give objects with role and content")
        if isinstance(message["content"], str):
            check_utf8(message["content"], f"prompt[{number}].content")


def _read_json(path: Path, kind: str) -> list[tuple[int, Any]]:
    lines = read_lines(path)
    if kind == ".jsonl":
        return [(number, _parsed(f"{path}, line {number}", line)) for number, line in lines]
    whole = _parsed(str(path), b"".join(line for _, line in lines))
    if not isinstance(whole, list):
        raise ValueError(f"{path}: a JSON {type(whole).__name__}: give a list of objects, or name it .jsonl")
    return list(enumerate(whole))


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as JSON ({error})") from error


def _read_parquet(path: Path) -> list[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is a parquet file, and pyarrow is not installed: pip install pyarrow, or convert it to JSON lines"
        ) from error
    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error}): write the file again") from error
