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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    then position = [0 1 2 3 3 2] and num_pairs = 6 + 5 + 3 + 1 + 1 + 1 = 17.
    """

    def __init__(self, subtree_end: Tensor, position: Tensor, num_pairs: int) -> None:
        self.subtree_end = subtree_end
        self.position = position
        self.num_tokens = subtree_end.shape[0]
        self.num_pairs = num_pairs
        self.device = subtree_end.device
        self._window_pairs: dict[int, int] = {}
        self._tile_lists: dict[tuple[int, int, int], TileLists] = {}
        # what a backend made of the plan, under the backend's own keys
        self.derived: dict[object, list[Tensor]] = {}

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
        end = subtree_end.detach().to(device=device, dtype=torch.int64)
        index = torch.arange(num_tokens, device=end.device)
        out_of_range = (end <= index) | (end > num_tokens)
        # clamped so that a bad entry cannot index outside before it is reported
        closing = torch.bincount(end.clamp(0, num_tokens), minlength=num_tokens + 1)[:num_tokens]
        position = (1 - closing).cumsum(0) - 1
        crossing = _crossing(end, position, index)
        bad = out_of_range | crossing
        # one device synchronisation carries both the verdict and the pair count
        num_bad, num_pairs = torch.stack([bad.sum(), (end - index).sum()]).tolist()
        if num_bad:
            first = int(bad.to(torch.int8).argmax())
            raise ValueError(_describe(first, int(end[first]), num_tokens, bool(out_of_range[first])))
        return cls(end.to(torch.int32), position.to(torch.int32), num_pairs)

    def count_pairs(self, window: int | None = None) -> int:
        """Exact number of visible (query, key) pairs, under a sliding window of ``window`` path tokens if given."""
        if not window:
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
            if torch.compiler.is_compiling():
                raise ValueError(
                    "tile lists cannot be built inside torch.compile, for their length depends on the tree: call"
                    f" plan.tile_lists({block_m}, {block_n}, {window}) before the compiled function"
                )
            lists = self._tile_lists[key] = _build_tile_lists(self.subtree_end, self.position, *key)
        return lists

    def __repr__(self) -> str:
        return f"TreePlan(num_tokens={self.num_tokens}, num_pairs={self.num_pairs}, device={str(self.device)!r})"


def _crossing(end: Tensor, position: Tensor, index: Tensor) -> Tensor:
    """True where a token's interval leaves its parent's: bool [T].

    ``position`` counts open intervals. A token's parent is the token before it if that is still open, else the last
    earlier token one level up. If every token lies inside its parent, the chain of parents holds exactly the open
    intervals, hence the intervals nest.
    """
    num_tokens = end.shape[0]
    bad = torch.zeros(num_tokens, dtype=torch.bool, device=end.device)
    if num_tokens < 2:
        return bad
    continues = end[:-1] > index[1:]
    bad[1:] = continues & ((end[1:] > end[:-1]) | (position[1:] != position[:-1] + 1))
    branches = torch.nonzero(~continues).squeeze(1) + 1
    branches = branches[position[branches] > 0]
    if branches.numel() == 0:
        return bad
    stride = num_tokens + 1
    by_level = torch.sort(position * stride + index).values
    found = torch.searchsorted(by_level, (position[branches] - 1) * stride + branches) - 1
    parent_key = by_level[found.clamp(min=0)]
    parent = parent_key % stride
    same_level = (found >= 0) & (parent_key // stride == position[branches] - 1)
    bad[branches] = ~same_level | (end[parent] <= branches) | (end[branches] > end[parent])
    return bad


def _describe(index: int, value: int, num_tokens: int, out_of_range: bool) -> str:
    cure = "lay each tree out depth first, every node's tokens contiguous (treegrpo.pack does)"
    if out_of_range:
        return f"subtree_end[{index}] = {value} must lie in ({index}, {num_tokens}]; {cure}"
    return f"subtree_end[{index}] = {value} crosses the subtree it lies in; {cure}"


def _build_tile_lists(subtree_end: Tensor, position: Tensor, block_m: int, block_n: int, window: int) -> TileLists:
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

    def int32(x: Tensor) -> Tensor:
        return x.to(torch.int32).contiguous()

    return TileLists(
        block_m=block_m,
        block_n=block_n,
        window=window,
        kv_max=int32(kv_max),
        kv_min=int32(kv_min),
        q_offsets=int32(q_offsets),
        q_indices=int32(kv_tile[order]),
        q_full=int32(torch.bincount(q_tile[full], minlength=num_q)),
        q_order=int32(torch.argsort(per_q, descending=True, stable=True)),
        kv_order=int32(torch.argsort(kv_max - kv_start, descending=True, stable=True)),
        q_pos_min=int32(q_pos_min),
        q_pos_max=int32(q_pos_max),
        kv_pos_min=int32(kv_pos_min),
        kv_pos_max=int32(kv_pos_max),
    )


def _tiles(x: Tensor, num_tiles: int, block: int, fill: int) -> Tensor:
    """[T] -> [num_tiles, block], the ragged end filled with ``fill``."""
    return torch.nn.functional.pad(x, (0, num_tiles * block - x.shape[0]), value=fill).view(num_tiles, block)
