"""Numbers of one optimiser step, summed over its batches and processes, and the file they are kept in (TRL's names)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo.files import read_lines, write_whole

if TYPE_CHECKING:
    import torch


class StepMetrics:
    """Collects named numbers; `reduced` gives what one process over one big batch would have seen.

    >>> metrics = StepMetrics()
    >>> metrics.add("kl", 1.0, weight=1)
    >>> metrics.add("kl", 4.0, weight=2)
    >>> metrics.reduced()
    {'kl': 3.0}
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}
        self._added: list[tuple[str, str, Any, Any]] = []

    def add(self, name: str, value: Any, *, weight: Any = 1.0, how: str = "mean") -> None:
        """`how`: mean (weighted), sum, min or max (of what has a weight). `value` and `weight` may be 0-d tensors; they
        are read in `reduced`, all at once, so that a step does not wait for its device at every number."""
        self._added.append((name, how, *(x.detach() if _is_tensor(x) else x for x in (value, weight))))

    def add_loss(self, metrics: dict[str, torch.Tensor], weight: Any, clip_weight: Any = None) -> None:
        """The metrics of `grpo_loss` for one batch with `weight` trained tokens; `clip_weight` is the number of leaves
        where its clip ratios are means over those."""
        for name, value in metrics.items():
            how = "min" if name.endswith("min") else "max" if name.endswith("max") else "mean"
            is_over_leaves = clip_weight is not None and how == "mean" and "clip_ratio" in name
            self.add(name, value, weight=clip_weight if is_over_leaves else weight, how=how)

    def _read(self) -> None:
        """Turns what was added into numbers: one read for all tensors of a device."""
        # here, for who only reads the file needs none of it
        import torch

        given = [x for _, _, *pair in self._added for x in pair]
        numbers: list[float] = [math.nan if _is_tensor(x) else float(x) for x in given]
        for device in {x.device for x in given if _is_tensor(x)}:
            places = [i for i, x in enumerate(given) if _is_tensor(x) and x.device == device]
            read = torch.stack([given[i].double() for i in places]).tolist()
            for i, number in zip(places, read, strict=True):
                numbers[i] = number
        for (name, how, *_), value, weight in zip(self._added, numbers[::2], numbers[1::2], strict=True):
            if how in ("min", "max") and not weight:
                # part of a cut tree may train nothing: its bounds are of no token
                continue
            total = self._values.setdefault((name, how), [0.0, 0.0] if how in ("mean", "sum") else [value, 1.0])
            if how == "mean":
                total[0] += value * weight
                total[1] += weight
            elif how == "sum":
                total[0] += value
            else:
                total[0] = min(total[0], value) if how == "min" else max(total[0], value)
        self._added = []

    def reduced(self, accelerator=None) -> dict[str, float]:
        """One number per name, over all processes of `accelerator` (every process calls it)."""
        self._read()
        tables = [self._values]
        if accelerator is not None and accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            tables = gather_object(tables)
        result = {}
        for name, how in dict.fromkeys(key for table in tables for key in table):
            values, weights = zip(*(table[name, how] for table in tables if (name, how) in table), strict=True)
            if how == "mean":
                result[name] = sum(values) / sum(weights) if sum(weights) else math.nan
            else:
                result[name] = sum(values) if how == "sum" else min(values) if how == "min" else max(values)
        return result


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


class MetricsFile:
    """metrics.jsonl of a run: one object per logged step. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = (
            [row for row in read_metrics(path) if row["step"] <= resume_step] if path.exists() and resume_step else []
        )
        write_whole(path, "".join(_line(row) for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. ValueError names a line that is no JSON object with a step."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no metrics at {path}: give the output_dir of a run")
    rows = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: not a row of metrics (no step)")
        rows.append(row)
    return rows
