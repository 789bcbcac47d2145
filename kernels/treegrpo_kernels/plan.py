"""TreePlan: what every backend reads of a packed forest, computed once per batch, used by all layers and both passes.

Shape legend: T packed tokens, NQ = ceil(T / block_m) query tiles, NK = ceil(T / block_n) key tiles.

The mask is one integer per key: key j is visible to query i iff ``j <= i < subtree_end[j]``. For a key tile [n0, n1)
with ``kv_max = max subtree_end`` and ``kv_min = min subtree_end`` over its keys, and a query tile [m0, m1), both
clipped to T:

    skip     m1 <= n0  or  kv_max <= m0
    full     m0 >= n1 - 1  and  m1 <= kv_min          (no mask arithmetic needed)
    partial  otherwise

so the query tiles of one key tile are a contiguous range: dK/dV needs no list; forward and dQ walk a CSR list per query
tile.

Plans on a GPU are built by triton/plan.py, all others by the torch operations below (also on a GPU that Triton does not
serve); both give the same integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True)
class TileLists:
    """Which tiles meet, for one (block_m, block_n, window). All tensors int32 on the plan's device.

    Example: subtree_end = [6 6 5 4 5 6], block_m = block_n = 2 gives kv_max = [6 5 6], kv_min = [6 4 5];
    query tile 2 (rows 4, 5) sees key tile 0 in full, tiles 1 and 2 in part:
    q_indices[q_offsets[2]:q_offsets[3]] = [0 1 2], q_full[2] = 1.
    """

    block_m: int
    block_n: int
    window: int
    kv_max: Tensor  # [NK] max subtree_end of the tile's keys
    kv_min: Tensor  # [NK] min subtree_end of the tile's keys; 0 for a ragged last tile, so that it is never full
    q_offsets: Tensor  # [NQ+1] CSR offsets into q_indices
    q_indices: Tensor  # [nnz] key tiles of each query tile: the full ones first, then the partial ones, each ascending
    q_full: Tensor  # [NQ] how many of the entries are full
    q_order: Tensor  # [NQ] query tiles, longest list first
    kv_order: Tensor  # [NK] key tiles, longest query range first
    q_pos_min: Tensor  # [NQ] smallest position of the tile's rows (for windows)
    q_pos_max: Tensor  # [NQ]
    kv_pos_min: Tensor  # [NK]
    kv_pos_max: Tensor  # [NK]


class TreePlan:
    """A validated packed forest and its derived metadata. Build with :meth:`build`.

    Example: leaves [A B C D], [A B C E], [A B F] packed as A B C D E F have subtree_end = [6 6 5 4 5 6];
    then position = [0 1 2 3 3 2], num_pairs = 6 + 5 + 3 + 1 + 1 + 1 = 17 and longest_path = 4.
    """

    def __init__(self, subtree_end: Tensor, position: Tensor, num_pairs: int, longest_path: int) -> None:
        self.subtree_end = subtree_end
        self.position = position
        self.num_tokens = subtree_end.shape[0]
        self.num_pairs = num_pairs
        self.longest_path = longest_path
        self._window_pairs: dict[int, int] = {}
        self._tile_lists: dict[tuple[int, int, int], TileLists] = {}
        # what a backend made of the plan, under the backend's own keys
        self.derived: dict[object, Any] = {}
        # what api.py decided for the shapes, dtypes and options of calls with this plan
        self.calls: dict[tuple, tuple] = {}

    @property
    def device(self) -> torch.device:
        return self.subtree_end.device

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles begin without what was made of the plan, which holds addresses and is true of a device."""
        return vars(self) | {"_tile_lists": {}, "derived": {}, "calls": {}}

    @classmethod
    def build(cls, subtree_end: Tensor, *, device: torch.device | str | None = None) -> TreePlan:
        """Validate ``subtree_end`` (any integer dtype, [T]) and derive position and the exact pair count in O(T).

        Runs on the tensor's own device, or on ``device`` when given. Raises ``TypeError`` for a non-integer array and
        ``ValueError`` that names the first index at which the array is not a depth-first packed forest.
        """
        subtree_end = torch.as_tensor(subtree_end)
        if subtree_end.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"subtree_end must be an integer tensor, got {subtree_end.dtype}")
        if subtree_end.dim() != 1:
            raise ValueError(f"subtree_end must be one-dimensional [T], got shape {tuple(subtree_end.shape)}")
        num_tokens = subtree_end.shape[0]
        if num_tokens >= 2**31 - 1:
            raise ValueError(
                f"subtree_end has {num_tokens} tokens; one packed row holds fewer than 2**31 - 1: split it"
            )
        end = subtree_end.detach().to(device=device)
        kernels = _kernels(end.device) if num_tokens else None
        end32, position, violations, *counts = kernels.positions(end) if kernels else _positions(end)
        if violations:
            raise ValueError(_first_violation(end))
        return cls(end32, position, *counts)

    def count_pairs(self, window: int | None = None) -> int:
        """Exact number of visible (query, key) pairs, under a sliding window of ``window`` path tokens if given."""
        if not window:
            return self.num_pairs
        if window < 0:
            raise ValueError(f"window must be at least 1, got {window}: use None for no window")
        if window >= self.longest_path:
            return self.num_pairs
        if window not in self._window_pairs:
            self._window_pairs[window] = int((self.position.long() + 1).clamp(max=window).sum())
        return self._window_pairs[window]

    def tile_lists(self, block_m: int, block_n: int, window: int | None = None) -> TileLists:
        """Tile lists for tiles of ``block_m`` queries by ``block_n`` keys; cached. O(T + visible tiles)."""
        key = (block_m, block_n, window or 0)
        lists = self._tile_lists.get(key)
        if lists is None:
            if block_m < 1 or block_n < 1:
                raise ValueError(f"block_m and block_n must be positive, got {block_m} and {block_n}")
            if key[2] < 0:
                raise ValueError(f"window must be at least 1, got {window}: use None for no window")
            self._refuse_while_recorded()
            kernels = _kernels(self.device) if self.num_tokens else None
            build = kernels.tile_lists if kernels else _build_tile_lists
            lists = self._tile_lists[key] = TileLists(*key, **build(self.subtree_end, self.position, *key))
        return lists

    def key_lists(self, block_m: int, block_n: int) -> TileLists:
        """Lists whose key side fits tiles of ``block_n`` keys, which block_m and window have no part in: some that are
        made already, else those of (block_m, block_n). Of what is returned only the tensors ``kv_*`` are meant."""
        # a copy, for another thread may add lists meanwhile
        made = (lists for lists in tuple(self._tile_lists.values()) if lists.block_n == block_n)
        return next(made, None) or self.tile_lists(block_m, block_n)

    def made_once(self, key: object, make: Callable[[], Made]) -> Made:
        """What ``make`` makes of the plan, kept in ``derived`` under ``key``."""
        made = self.derived.get(key)
        if made is None:
            self._refuse_while_recorded()
            made = self.derived[key] = make()
        return made

    def _refuse_while_recorded(self) -> None:
        """What is made of a plan depends on the tree and outlives the call: no compiler, no graph may hold it."""
        if torch.compiler.is_compiling():
            within, before = "inside torch.compile", "the compiled function"
        elif self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            within, before = "while a CUDA graph is captured", "the capture"
        else:
            return
        raise ValueError(
            f"lists of a plan cannot be built {within}, for their length depends on the tree: call the operation once"
            f" with this plan and these shapes before {before}"
        )

    def __repr__(self) -> str:
        return f"TreePlan(num_tokens={self.num_tokens}, num_pairs={self.num_pairs}, device={str(self.device)!r})"


def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels that build plans on ``device``; None where torch operations do."""
    if device.type != "cuda":
        return None
    from . import triton

    if triton.reason(device) is not None:
        return None
    from .triton import plan

    return plan


def _positions(end: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """end [T] of any integer dtype -> (int32 copy, position [T] int32, violations, visible pairs, longest path).

    position[t] is the number of open subtrees that t lies in. The intervals nest iff where one ends, position is no
    larger than where it began. For let j be the first interval that another, t, crosses: j < t < end[j] < end[t]. The
    intervals around j reach beyond end[j], else t would cross an earlier one; t reaches beyond it too. Hence
    position[end[j]] > position[j]. That nested intervals keep the rule is plain.
    """
    end = end.long()
    num_tokens = end.shape[0]
    index = torch.arange(num_tokens, device=end.device)
    # clamped so that a bad entry cannot index outside before it is reported
    inside = end.clamp(0, num_tokens)
    closing = torch.bincount(inside, minlength=num_tokens + 1)
    position = index - closing[:num_tokens].cumsum(0)
    at_end = torch.cat([position, position.new_full((1,), -1)])[inside]
    bad = (end <= index) | (end > num_tokens) | (at_end > position)
    longest = position.max() + 1 if num_tokens else end.new_zeros(())
    # one device synchronisation carries the verdict and the counts
    counts = torch.stack([bad.sum(), (end - index).sum(), longest]).tolist()
    return end.to(torch.int32), position.to(torch.int32), *counts


def _first_violation(end: Tensor) -> str:
    """What is wrong with ``end`` [T], which is no packed forest, at the first index where it is."""
    num_tokens = end.shape[0]
    cure = "lay each tree out depth first, every node's tokens contiguous (treegrpo.pack does)"
    around: list[int] = []  # ends of the subtrees that token t lies in, innermost last
    for t, stop in enumerate(end.tolist()):
        while around and around[-1] <= t:
            around.pop()
        if not t < stop <= num_tokens:
            return f"subtree_end[{t}] = {stop} must lie in ({t}, {num_tokens}]; {cure}"
        if around and stop > around[-1]:
            return f"subtree_end[{t}] = {stop} crosses the subtree it lies in; {cure}"
        around.append(stop)
    raise AssertionError("subtree_end is a packed forest")


def _build_tile_lists(
    subtree_end: Tensor, position: Tensor, block_m: int, block_n: int, window: int
) -> dict[str, Tensor]:
    """The tensors of :class:`TileLists` by name."""
    num_tokens, device = subtree_end.shape[0], subtree_end.device
    num_q, num_kv = -(-num_tokens // block_m), -(-num_tokens // block_n)
    kv_max = _tiles(subtree_end, num_kv, block_n, 0).amax(1).long()
    kv_min = _tiles(subtree_end, num_kv, block_n, 0).amin(1).long()
    q_pos_min = _tiles(position, num_q, block_m, num_tokens).amin(1)
    q_pos_max = _tiles(position, num_q, block_m, -1).amax(1)
    kv_pos_min = _tiles(position, num_kv, block_n, num_tokens).amin(1)
    kv_pos_max = _tiles(position, num_kv, block_n, -1).amax(1)

    kv_start = torch.arange(num_kv, device=device) * block_n
    kv_stop = (kv_start + block_n).clamp(max=num_tokens)
    low, high = kv_start // block_m, -(-kv_max // block_m)
    full_low = -(-(kv_stop - 1) // block_m)
    full_high = torch.where(kv_min >= num_tokens, num_q, kv_min // block_m)

    count = high - low
    first = count.cumsum(0) - count
    kv_tile = torch.repeat_interleave(torch.arange(num_kv, device=device), count)
    q_tile = low[kv_tile] + torch.arange(kv_tile.shape[0], device=device) - first[kv_tile]
    full = (q_tile >= full_low[kv_tile]) & (q_tile < full_high[kv_tile])
    if window:
        near = q_pos_min[q_tile] - kv_pos_max[kv_tile] < window
        full &= q_pos_max[q_tile] - kv_pos_min[kv_tile] < window
        kv_tile, q_tile, full = kv_tile[near], q_tile[near], full[near]
    order = torch.argsort((q_tile * 2 + ~full) * num_kv + kv_tile)
    per_q = torch.bincount(q_tile, minlength=num_q)
    q_offsets = torch.zeros(num_q + 1, dtype=torch.int64, device=device)
    torch.cumsum(per_q, 0, out=q_offsets[1:])

    made = dict(
        kv_max=kv_max,
        kv_min=kv_min,
        q_offsets=q_offsets,
        q_indices=kv_tile[order],
        q_full=torch.bincount(q_tile[full], minlength=num_q),
        q_order=torch.argsort(per_q, descending=True, stable=True),
        kv_order=torch.argsort(kv_max - kv_start, descending=True, stable=True),
        q_pos_min=q_pos_min,
        q_pos_max=q_pos_max,
        kv_pos_min=kv_pos_min,
        kv_pos_max=kv_pos_max,
    )
    return {name: x.to(torch.int32).contiguous() for name, x in made.items()}


def _tiles(x: Tensor, num_tiles: int, block: int, fill: int) -> Tensor:
    """[T] -> [num_tiles, block], the ragged end filled with ``fill``."""
    return torch.nn.functional.pad(x, (0, num_tiles * block - x.shape[0]), value=fill).view(num_tiles, block)
