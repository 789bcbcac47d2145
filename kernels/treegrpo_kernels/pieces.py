"""Unbranched runs of a packed forest, level by level: what layers that carry a state along the path walk through.

Shape legend: T packed tokens, N pieces, C most tokens of a piece.

A piece is a run of tokens each of which is the only child of the one before it, cut where it branches and, if asked,
every C tokens. A piece begins with the state its parent piece ends with, so pieces of one level need nothing of each
other: as many steps as the longest chain of pieces, whatever the number of branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .plan import TreePlan


@dataclass(frozen=True)
class Pieces:
    """The pieces of one plan in the order of their levels, within a level as they are packed.

    Example: subtree_end = [6 6 5 4 5 6] (leaves 0 1 2 3, 0 1 2 4, 0 1 5) has the pieces [0 1] | [2] [5] | [3] [4]:
    token = [0 1 2 5 3 4], length = [2 1 1 1 1], parent = [-1 0 0 0 0], level_pieces = (1, 2, 2), level_tokens =
    (2, 2, 2). With at most one token a piece: [0] | [1] | [2] [5] | [3] [4].
    """

    token: Tensor  # int64 [T] packed index of every token, piece after piece
    place: Tensor  # int64 [T] where a packed token stands in ``token``
    length: Tensor  # int64 [N]
    parent: Tensor  # int64 [N] index of the parent within the level before, -1 for roots
    level_pieces: tuple[int, ...]  # pieces of each level
    level_tokens: tuple[int, ...]  # tokens of each level

    @property
    def num_pieces(self) -> int:
        return self.length.shape[0]


def pieces_of(plan: TreePlan, longest: int | None = None) -> Pieces:
    """The plan's pieces of at most ``longest`` tokens, built once per plan with sorts of N and T integers."""
    return plan.made_once(("pieces", longest), partial(_build, plan, longest))


# kept for calls that save it for their backward, whoever comes first
@torch.inference_mode(False)
@torch.no_grad()
def _build(plan: TreePlan, longest: int | None) -> Pieces:
    end = plan.subtree_end.long()
    num_tokens, device = end.shape[0], end.device
    index = torch.arange(num_tokens, device=device)
    # token t is the only child of t-1 iff their subtrees end together
    opens = torch.ones(num_tokens, dtype=torch.bool, device=device)
    opens[1:] = end[1:] != end[:-1]
    if longest is not None:
        run = torch.nonzero(opens).squeeze(1)
        within = index - run[opens.cumsum(0) - 1]
        opens |= within % longest == 0
    start = torch.nonzero(opens).squeeze(1)
    num_pieces = start.shape[0]
    length = torch.cat([start, start.new_tensor([num_tokens])]).diff()

    # pieces are a forest like tokens: a piece's subtree ends where that of its last token does
    piece = torch.arange(num_pieces, device=device)
    below = torch.searchsorted(start, end[start])
    closing = torch.bincount(below, minlength=num_pieces + 1)[:num_pieces]
    # how many pieces are open behind the first tokens of this one, itself not counted
    level = piece - closing.cumsum(0)
    # the parent is the last piece one level up
    key = level * num_pieces + piece
    sorted_key, order = torch.sort(key)
    before = torch.searchsorted(sorted_key, (level - 1) * num_pieces + piece) - 1
    level_pieces = torch.bincount(level)
    first = level_pieces.cumsum(0) - level_pieces
    parent = torch.where(level > 0, before - first[(level - 1).clamp(min=0)], -1)[order]

    start, length, level = start[order], length[order], level[order]
    rows = torch.repeat_interleave(piece, length, output_size=num_tokens)
    token = start[rows] + index - (length.cumsum(0) - length)[rows]
    place = torch.empty_like(token)
    place[token] = index
    level_tokens = torch.zeros_like(level_pieces).index_add_(0, level, length)
    counts = torch.stack([level_pieces, level_tokens]).tolist() if num_tokens else [[], []]
    return Pieces(token, place, length, parent, tuple(counts[0]), tuple(counts[1]))


@dataclass(frozen=True)
class Slots:
    """Where the tokens of ``pieces_of(plan, longest)`` stand among N x ``longest``, in the order they are packed.

    Example: subtree_end = [6 6 5 4 5 6] has the pieces [0 1] | [2] [5] | [3] [4]: piece = [0 0 1 3 4 2],
    row = [0 1 0 0 0 0].
    """

    piece: Tensor  # int64 [T]
    row: Tensor  # int64 [T] within the piece
    num_pieces: int
    longest: int


def slots_of(plan: TreePlan, longest: int) -> Slots:
    """The slots of the plan's pieces of at most ``longest`` tokens, built once per plan."""
    return plan.made_once(("slots", longest), partial(_build_slots, plan, longest))


# kept for calls that save it for their backward, whoever comes first
@torch.inference_mode(False)
@torch.no_grad()
def _build_slots(plan: TreePlan, longest: int) -> Slots:
    pieces = pieces_of(plan, longest)
    piece = torch.arange(pieces.num_pieces, device=plan.device)
    piece = torch.repeat_interleave(piece, pieces.length, output_size=plan.num_tokens)[pieces.place]
    first = pieces.length.cumsum(0) - pieces.length
    return Slots(piece, pieces.place - first[piece], pieces.num_pieces, longest)


@dataclass(frozen=True)
class Runs:
    """The unbranched runs of ``pieces_of(plan)`` in that order, each as its shorter pieces. All int32 on the device.

    Example: subtree_end = [6 6 5 4 5 6] has the runs [0 1] | [2] [5] | [3] [4]; of pieces of at most one token, [0] |
    [1] | [2] [5] | [3] [4], their pieces are piece = [0 1 2 3 4 5], offsets = [0 2 3 4 5 6]; parent = [-1 0 0 1 1], and
    the children of run r are the runs children[r] up to children[r + 1]: children = [1 3 5 5 5 5].
    """

    piece: Tensor  # [N] pieces, run after run, each run's in order of its tokens
    offsets: Tensor  # [S+1] where each run's begin
    parent: Tensor  # [S] the run that a run begins behind, -1 for roots
    children: Tensor  # [S+1] the first run behind each, for those of a level stand in the order of their parents
    level_runs: tuple[int, ...]  # runs of each level


def runs_of(plan: TreePlan, longest: int) -> Runs:
    """The plan's runs and their pieces of at most ``longest`` tokens, built once per plan."""
    return plan.made_once(("runs", longest), partial(_build_runs, plan, longest))


@torch.inference_mode(False)
@torch.no_grad()
def _build_runs(plan: TreePlan, longest: int) -> Runs:
    whole, cut = pieces_of(plan), pieces_of(plan, longest)
    run = torch.arange(whole.num_pieces, device=plan.device)
    first = cut.token[cut.length.cumsum(0) - cut.length]
    run_of_piece = torch.repeat_interleave(run, whole.length, output_size=plan.num_tokens)[whole.place[first]]
    order = torch.argsort(run_of_piece * plan.num_tokens + first)
    offsets = torch.nn.functional.pad(torch.bincount(run_of_piece, minlength=whole.num_pieces).cumsum(0), (1, 0))
    before = torch.tensor([0, 0, *whole.level_pieces], device=plan.device).cumsum(0)[: len(whole.level_pieces)]
    level = torch.repeat_interleave(torch.tensor(whole.level_pieces, device=plan.device))
    parent = torch.where(whole.parent < 0, -1, whole.parent + before[level])
    num_children = torch.bincount(parent[parent >= 0], minlength=whole.num_pieces)
    num_roots = whole.level_pieces[0] if whole.level_pieces else 0
    children = num_roots + torch.nn.functional.pad(num_children.cumsum(0), (1, 0))
    order, offsets, parent, children = (x.to(torch.int32) for x in (order, offsets, parent, children))
    return Runs(order, offsets, parent, children, whole.level_pieces)
