"""Trajectories, and one prompt's whole group of them as a tree: build, check, save, load. Nothing here needs torch.

The packed row and its three values per token (`subtree_end`, `prev`, `position`) are explained in trie.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gzip
import json
import math
import numbers
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treegrpo.files import read_lines
from treegrpo.trie import MAX_TOKEN_ID, Trie, token_trie

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "RolloutTree",
    "Segment",
    "Trajectory",
    "Trie",
    "build_forest",
    "build_tree",
    "load",
    "save",
    "token_trie",
]


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled leaf: every token the model saw, which of them the policy produced, and what it earned.

    Checked when made, frozen afterwards (arrays are read-only copies): use `dataclasses.replace` for a changed one.
    Two trajectories are equal when every field is, bit for bit; an unknown log-prob (NaN) equals an unknown one.

    >>> t = Trajectory(token_ids=[7, 8, 9, 5, 6], loss_mask=[0, 0, 1, 0, 1], reward=1.0, group="task-3",
    ...                logprobs=[float("nan"), float("nan"), -0.5, float("nan"), -2.0], steps=[2, 4])
    >>> t.num_tokens, t.num_steps        # prompt 7 8, step one 9 with observation 5, step two 6
    (5, 2)

    Raises ValueError naming the field, the index and the cure.
    """

    token_ids: np.ndarray
    """int64 [n], n >= 1: the sampled ids themselves, never re-tokenised; 0 <= id < 2**31."""
    loss_mask: np.ndarray
    """bool [n]: True (1) where the policy produced the token. Never at index 0, which nothing predicts."""
    reward: float | None = None
    """Finite, or None while it is unknown (an advantage then refuses it)."""
    logprobs: np.ndarray | None = None
    """float32 [n]: log-prob of each token as recorded at sampling; NaN only where loss_mask is 0. None: not recorded.
    A float64 input is rounded once to float32, the precision engines record in."""
    group: str = ""
    """The prompt. Rewards are compared within one group."""
    tree: int = 0
    """Which of the group's M sampled trees it came from."""
    steps: np.ndarray | None = None
    """int64 [num_steps], ascending: index of the first token of each agent step. None: all of it is one step."""
    info: dict[str, Any] | None = None
    """Anything else, carried along untouched; must be plain JSON to be saved."""

    if TYPE_CHECKING:
        # what is checked and becomes the fields above
        def __init__(
            self,
            token_ids: ArrayLike,
            loss_mask: ArrayLike,
            reward: float | None = None,
            logprobs: ArrayLike | None = None,
            group: str = "",
            tree: int = 0,
            steps: ArrayLike | None = None,
            info: dict[str, Any] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.group, str):
            raise ValueError(f"Trajectory.group is {self.group!r}, not a string: pass str(...) of it")
        where = f"Trajectory of group {self.group!r}"
        put = lambda field, value: object.__setattr__(self, field, value)  # noqa: E731
        tokens = _as_array(where, "token_ids", self.token_ids, "iu")
        if not tokens.size:
            raise ValueError(f"{where}: token_ids is empty; a trajectory holds at least one token, leave this one out")
        _refuse(where, "token_ids", tokens, (tokens < 0) | (tokens > MAX_TOKEN_ID), "give ids from 0 to 2**31 - 1")
        put("token_ids", _frozen(tokens, np.int64))

        mask = _as_array(where, "loss_mask", self.loss_mask, "biu", like=tokens)
        _refuse(where, "loss_mask", mask, (mask != 0) & (mask != 1), "give 1 where the policy produced it, else 0")
        if mask[0]:
            raise ValueError(
                f"{where}: loss_mask[0] is 1, but nothing precedes the first token, so it has no log-prob to train: "
                "set loss_mask[0] to 0, or put the prompt (or a beginning-of-sequence token) before it"
            )
        put("loss_mask", _frozen(mask, np.bool_))

        if self.reward is not None:
            if not _is_finite(self.reward):
                raise ValueError(f"{where}: reward is {self.reward!r}; give a finite number, or None when unknown")
            put("reward", float(self.reward))
        if self.logprobs is not None:
            logp = _as_array(where, "logprobs", self.logprobs, "fiu", like=tokens).astype(np.float32)
            _refuse(where, "logprobs", logp, np.isinf(logp), "give a finite log-prob, or NaN where loss_mask is 0")
            unknown = np.isnan(logp)
            cure = "give a number, set its loss_mask to 0, or pass logprobs=None to have them recomputed"
            _refuse(where, "logprobs", logp, unknown & self.loss_mask, cure)
            logp[unknown] = np.nan
            put("logprobs", _frozen(logp, np.float32))
        if self.steps is not None:
            put("steps", _frozen(self._checked_steps(where), np.int64))
        if isinstance(self.tree, bool) or not isinstance(self.tree, (int, np.integer)):
            raise ValueError(f"{where}: tree is {self.tree!r}; give an integer, the number of its tree in the group")
        put("tree", int(self.tree))
        if self.info is not None and not isinstance(self.info, dict):
            raise ValueError(f"{where}: info is a {type(self.info).__name__}; give a dict or None")

    def _checked_steps(self, where: str) -> np.ndarray:
        num = self.num_tokens
        steps = _as_array(where, "steps", self.steps, "iu").astype(np.int64)
        _refuse(where, "steps", steps, (steps < 0) | (steps >= num), f"give indices from 0 to {num - 1}")
        down = np.diff(steps, prepend=-1) <= 0
        _refuse(where, "steps", steps, down, "give the start of each step once, in ascending order")
        first = int(steps[0]) if steps.size else num
        if self.loss_mask[:first].any():
            index = int(self.loss_mask.argmax())
            raise ValueError(
                f"{where}: loss_mask[{index}] is 1, but that token comes before the first step (steps[0]): "
                "start the first step there, or pass steps=None"
            )
        return steps

    @property
    def num_tokens(self) -> int:
        return self.token_ids.size

    @property
    def num_steps(self) -> int:
        """How many advantages it takes: one per step, one in all when steps is None."""
        return 1 if self.steps is None else self.steps.size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    __hash__ = None  # type: ignore[assignment]


def _as_array(where: str, field: str, value: Any, kinds: str, like: np.ndarray | None = None) -> np.ndarray:
    if "b" not in kinds and isinstance(value, list) and bool in set(map(type, value)):
        # among integers numpy would make a number of it
        index = next(i for i, entry in enumerate(value) if isinstance(entry, bool))
        raise ValueError(f"{where}: {field}[{index}] is {value[index]}; give a number")
    try:
        array = np.array(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {field} is not a flat list of numbers ({error})") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        what = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{where}: {field} is {array.ndim}-dimensional {array.dtype}; give a flat list of {what}")
    if like is not None and array.size != like.size:
        raise ValueError(
            f"{where}: {field} has {array.size} entries for {like.size} token_ids; give one entry per token"
        )
    return array


def _refuse(where: str, field: str, array: np.ndarray, bad: np.ndarray, cure: str) -> None:
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(f"{where}: {field}[{index}] is {array[index]}; {cure}")


def _frozen(array: np.ndarray, dtype: type) -> np.ndarray:
    array = array.astype(dtype, copy=False)
    array.flags.writeable = False
    return array


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, (np.ndarray, float)):
        return type(left) is type(right) and np.asarray(left).tobytes() == np.asarray(right).tobytes()
    return type(left) is type(right) and left == right


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal run of packed tokens in which nothing forks and no trajectory ends before its last token.

    In the example of Trie: [A B] is Segment(start=0, end=2, parent=-1, children=(1, 4), leaves=(), depth=0), [D] is
    Segment(start=3, end=4, parent=1, children=(), leaves=(0,), depth=2).
    """

    start: int
    end: int
    parent: int
    """Index of the segment it continues, -1 at a root."""
    children: tuple[int, ...]
    """Indices of the segments that continue it, ascending."""
    leaves: tuple[int, ...]
    """Indices of the trajectories that end at its last token."""
    depth: int
    """Segments above it: 0 at a root."""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutTree:
    """One prompt's whole group of trajectories and their trie. Its M sampled trees are told apart by Trajectory.tree.

    >>> a = Trajectory([1, 2, 3, 4], [0, 0, 1, 1], reward=1.0, group="g")
    >>> b = Trajectory([1, 2, 3, 5], [0, 0, 1, 1], reward=0.0, group="g")
    >>> tree = build_tree([a, b])
    >>> tree.num_tokens, tree.num_chain_tokens, tree.num_pairs, tree.num_chain_pairs
    (5, 8, 14, 20)
    >>> tree.to_trajectories() == [a, b]
    True
    """

    group: str
    trajectories: tuple[Trajectory, ...]
    """The leaves, in the order given."""
    trie: Trie

    @property
    def num_leaves(self) -> int:
        return len(self.trajectories)

    @property
    def num_tokens(self) -> int:
        """Unique tokens."""
        return self.trie.num_tokens

    @property
    def num_chain_tokens(self) -> int:
        """Tokens of the flattened leaves."""
        return self.trie.leaf_tokens.size

    @property
    def num_pairs(self) -> int:
        return self.trie.num_pairs

    @property
    def num_chain_pairs(self) -> int:
        """Causal pairs of the flattened leaves, n (n + 1) / 2 each."""
        lengths = np.diff(self.trie.leaf_offsets)
        return int((lengths * (lengths + 1) // 2).sum())

    def to_trajectories(self) -> list[Trajectory]:
        """Every trajectory, bit for bit and in the order given, its tokens read back from the trie."""
        trie = self.trie
        rows = (trie.tokens[trie.leaf_tokens[a:b]] for a, b in _spans(trie.leaf_offsets))
        return [dataclasses.replace(t, token_ids=row) for t, row in zip(self.trajectories, rows, strict=True)]

    def segments(self) -> list[Segment]:
        """The trie's segments in packed order (a parent before its children)."""
        trie, num = self.trie, self.num_tokens
        ends = trie.leaf_tokens[trie.leaf_offsets[1:] - 1]
        closes = np.bincount(trie.prev[trie.prev >= 0], minlength=num) > 1
        closes[ends] = True
        opens = trie.prev != np.arange(num) - 1
        opens[0] = True
        opens[1:] |= closes[:-1]
        starts = np.flatnonzero(opens)
        owner = np.cumsum(opens) - 1
        above = trie.prev[starts]
        parents = np.where(above >= 0, owner[above], -1).tolist()
        children: list[list[int]] = [[] for _ in parents]
        leaves: list[list[int]] = [[] for _ in parents]
        depth: list[int] = []
        for index, parent in enumerate(parents):
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                children[parent].append(index)
        for leaf, index in enumerate(owner[ends].tolist()):
            leaves[index].append(leaf)
        cuts = [*starts.tolist(), num]
        return [
            Segment(cuts[i], cuts[i + 1], parents[i], tuple(children[i]), tuple(leaves[i]), depth[i])
            for i in range(len(parents))
        ]


def build_tree(trajectories: Iterable[Trajectory]) -> RolloutTree:
    """The exact token trie of one group. Raises ValueError if there is none, or they are of several groups."""
    forest = build_forest(trajectories)
    if len(forest) > 1:
        names = ", ".join(repr(tree.group) for tree in forest[:3])
        raise ValueError(f"build_tree got trajectories of {len(forest)} groups ({names}, ...): use build_forest")
    return forest[0]


def build_forest(trajectories: Iterable[Trajectory]) -> list[RolloutTree]:
    """One RolloutTree per group, groups in order of first appearance, leaves in the order given.

    >>> rows = [Trajectory([1, 2], [0, 1], group="g"), Trajectory([1, 2], [0, 1], group="h"),
    ...         Trajectory([1, 3], [0, 1], group="g")]
    >>> [(tree.group, tree.num_leaves, tree.num_tokens) for tree in build_forest(rows)]
    [('g', 2, 3), ('h', 1, 2)]
    """
    groups: dict[str, list[Trajectory]] = {}
    for index, trajectory in enumerate(trajectories):
        if not isinstance(trajectory, Trajectory):
            raise ValueError(
                f"trajectories[{index}] is a {type(trajectory).__name__}: give treegrpo.Trajectory objects"
            )
        groups.setdefault(trajectory.group, []).append(trajectory)
    if not groups:
        raise ValueError("no trajectories, so no group to build a tree of: give at least one")
    counts = np.array([len(members) for members in groups.values()])
    rows = [t.token_ids for members in groups.values() for t in members]
    # One pass for all groups, cut apart afterwards: thousands of small groups cost no more than one large one.
    whole = token_trie(rows, np.repeat(np.arange(len(groups)), counts))
    leaf_cuts = np.append(0, np.cumsum(counts))
    row_cuts = whole.leaf_offsets[leaf_cuts]
    token_cuts = np.append(np.minimum.reduceat(whole.leaf_tokens, row_cuts[:-1]), whole.num_tokens)
    shift = np.repeat(token_cuts[:-1], np.diff(token_cuts)).astype(np.int32)
    subtree_end = whole.subtree_end - shift
    prev = np.maximum(whole.prev - shift, np.int32(-1))
    leaf_tokens = whole.leaf_tokens - np.repeat(token_cuts[:-1], np.diff(row_cuts))
    forest = []
    cuts = zip(groups.items(), _spans(token_cuts), _spans(row_cuts), _spans(leaf_cuts), strict=True)
    for (group, members), (t0, t1), (r0, r1), (i0, i1) in cuts:
        trie = Trie(
            tokens=whole.tokens[t0:t1],
            subtree_end=subtree_end[t0:t1],
            prev=prev[t0:t1],
            position=whole.position[t0:t1],
            leaf_tokens=leaf_tokens[r0:r1],
            leaf_offsets=whole.leaf_offsets[i0 : i1 + 1] - r0,
        )
        forest.append(RolloutTree(group, tuple(members), trie))
    return forest


def _spans(cuts: np.ndarray) -> Iterable[tuple[int, int]]:
    cuts = cuts.tolist()
    return zip(cuts, cuts[1:], strict=False)


FIELDS = tuple(field.name for field in dataclasses.fields(Trajectory))


def save(path: str | os.PathLike, trajectories: Iterable[Trajectory]) -> None:
    """Write one JSON object per trajectory and line; compressed, with repeatable bytes, when the name ends in `.gz`.

    A whole file or nothing: it is written under a temporary name and renamed; its folder is made where it is missing.
    Unknown log-probs (NaN) become null, every other number is written so that `load` gives it back bit for bit.
    Raises ValueError naming the trajectory if its `info` is not plain JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            compressed = path.suffix == ".gz"
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) if compressed else contextlib.nullcontext(raw) as stream:
                for index, trajectory in enumerate(trajectories):
                    stream.write(_to_line(index, trajectory).encode())
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> list[Trajectory]:
    """Read what `save` wrote, or any JSON lines with at least token_ids and loss_mask. Names that are no field of
    Trajectory are kept in `info`; blank lines are skipped.

    Raises ValueError naming the file, the line and the cure.
    """
    path = Path(path)
    trajectories = []
    for number, line in read_lines(path):
        try:
            trajectories.append(_from_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return trajectories


def _to_line(index: int, trajectory: Trajectory) -> str:
    t = trajectory
    record = {"group": t.group, "tree": t.tree, "reward": t.reward, "token_ids": t.token_ids.tolist()}
    record["loss_mask"] = t.loss_mask.astype(np.int8).tolist()
    if t.logprobs is not None:
        record["logprobs"] = [None if value != value else value for value in t.logprobs.tolist()]
    if t.steps is not None:
        record["steps"] = t.steps.tolist()
    if t.info is not None:
        try:
            survives = json.loads(json.dumps(t.info, allow_nan=False)) == t.info
        except (TypeError, ValueError):
            survives = False
        if not survives:
            raise ValueError(
                f"trajectory {index} (group {t.group!r}): info would not survive JSON; keep to dicts with string keys, "
                "lists, strings, finite numbers, booleans and None"
            )
        record["info"] = t.info
    return json.dumps(record, separators=(",", ":")) + "\n"


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return record


def _from_line(line: bytes) -> Trajectory:
    try:
        record = json.loads(line, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): mend or delete the line, or write the file again") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object: give one object per line")
    for field in ("token_ids", "loss_mask"):
        if field not in record:
            raise ValueError(f"{field} is missing: add it, or convert messages to tokens first")
    extra = {name: record.pop(name) for name in list(record) if name not in FIELDS}
    for name in extra:
        if meant := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85):
            raise ValueError(f"unknown name {name!r}: rename it to {meant[0]!r}, or move it into info")
    info, logprobs = record.get("info"), record.get("logprobs")
    if info is not None and not isinstance(info, dict):
        raise ValueError(f"info is a JSON {type(info).__name__}: give an object or null")
    if both := sorted(extra.keys() & (info or {}).keys()):
        raise ValueError(f"{both[0]!r} stands both on the line and in its info: remove one")
    if extra:
        record["info"] = extra | (info or {})
    if isinstance(logprobs, list):
        record["logprobs"] = [math.nan if value is None else value for value in logprobs]
    return Trajectory(**record)
