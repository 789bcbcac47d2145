"""Triton's walk from state to state, in the interpreter or on a GPU, against the levels of chunks in torch."""

import cases
import numpy as np
import pytest
import torch
from test_recurrence import KINDS, inputs, with_gradients

pytest.importorskip("triton")

import treegrpo_kernels as tk
from treegrpo_kernels import pieces, triton
from treegrpo_kernels.state_chunks import chunked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reason = triton.reason(torch.device(DEVICE))
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=f"Triton: {reason}"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

FORESTS = {
    name: cases.named_subtree_end(name) for name in ("worked_example", "two_trees", "ragged_turns", "duplicates")
}
# runs of many chunks, a fork into one token, a run that ends with a full chunk
FORESTS["long"] = cases.trie_subtree_end(
    [[1] * 24 + [2] * 9, [1] * 24 + [3] * 8 + [4], [1] * 24 + [3] * 8 + [5] * 17, [6] * 3]
)


def results(subtree_end, tensors, dout, kernels, chunk):
    plan = tk.TreePlan.build(torch.as_tensor(subtree_end), device=DEVICE)
    moved = [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in tensors]
    found = with_gradients(lambda *x: chunked(*x, plan, chunk=chunk, kernels=kernels), moved, dout.to(DEVICE))
    return [x.cpu() for x in found]


def assert_as_exact(subtree_end, tensors, dout, chunk, sizes=None):
    """At most twice the error of torch's levels, against those in float64; of each part of the row by itself."""
    wide = [None if x is None else x.double() for x in tensors]
    exact = results(subtree_end, wide, dout.double(), False, chunk)
    walked, levels = (results(subtree_end, tensors, dout, kernels, chunk) for kernels in (True, False))
    for whole in zip(walked, levels, exact, strict=True):
        for x, y, z in zip(*(x.split(sizes or len(x)) for x in whole), strict=True):
            assert bool(x.isfinite().all())
            assert (x - z).norm() <= 2 * (y - z).norm() + 1e-6 * z.norm()
    return walked


# all kernels at chunks of 4 tokens; chunks of 8 end with the run where it forks, with and without each option
@pytest.mark.parametrize(
    ("kind", "chunk", "names"),
    [
        *((kind, 4, tuple(FORESTS)) for kind in KINDS),
        *((kind, 8, ("long", "ragged_turns")) for kind in ("kimi", "mamba")),
    ],
    ids=lambda x: str(x) if isinstance(x, (str, int)) else "",
)
def test_the_walk_equals_the_levels(kind, chunk, names, poisoned_empty):
    # in one row: the interpreter takes its time for every program, whatever it walks
    sizes = [len(FORESTS[name]) for name in names]
    row = np.concatenate([FORESTS[name] + sum(sizes[:i]) for i, name in enumerate(names)])
    tensors, dout = inputs(len(row), kind, dtype=torch.float32, hk=1, hv=2)
    assert_as_exact(row, tensors, dout, chunk, sizes)


@pytest.mark.parametrize(("d", "dv"), [(16, 16), (17, 33), (40, 6)])
def test_any_head_dims(d, dv, poisoned_empty):
    tensors, dout = inputs(len(FORESTS["long"]), "delta", dtype=torch.float32, hk=1, hv=2, d=d, dv=dv)
    first = assert_as_exact(FORESTS["long"], tensors, dout, 20)
    again = results(FORESTS["long"], tensors, dout, True, 20)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [64, 128])
def test_real_sizes_on_a_gpu(kind, d):
    leaves = [[1] * 700 + [2 + i] * (64 * i + 3) for i in range(6)]
    subtree_end = cases.trie_subtree_end([*leaves, [1] * 700 + [7] * 300 + [9] * 65])
    tensors, dout = inputs(len(subtree_end), kind, dtype=torch.float32, d=d, dv=d, decay=0.05)
    first = assert_as_exact(subtree_end, tensors, dout, 64)
    again = results(subtree_end, tensors, dout, None, 64)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_runs_of_the_docstring():
    plan = tk.TreePlan.build(torch.tensor([6, 6, 5, 4, 5, 6]))
    runs = pieces.runs_of(plan, 1)
    assert runs.piece.tolist() == [0, 1, 2, 3, 4, 5] and runs.offsets.tolist() == [0, 2, 3, 4, 5, 6]
    assert runs.parent.tolist() == [-1, 0, 0, 1, 1] and runs.children.tolist() == [1, 3, 5, 5, 5, 5]
    assert runs.level_runs == (1, 2, 2)


@pytest.mark.parametrize("longest", [1, 3, 64])
@pytest.mark.parametrize("seed", range(4))
def test_runs_hold_their_pieces_in_order(seed, longest):
    plan = tk.TreePlan.build(torch.as_tensor(cases.random_subtree_end(150, seed, branch=0.1)))
    whole, cut, runs = pieces.pieces_of(plan), pieces.pieces_of(plan, longest), pieces.runs_of(plan, longest)
    tokens = [x.tolist() for x in cut.token.split(cut.length.tolist())]
    begins = runs.offsets.tolist()
    for r, expected in enumerate(whole.token.split(whole.length.tolist())):
        mine = [t for i in runs.piece[begins[r] : begins[r + 1]].tolist() for t in tokens[i]]
        assert mine == expected.tolist()
        for child in range(int(runs.children[r]), int(runs.children[r + 1])):
            assert runs.parent[child] == r
    assert int(runs.children[-1]) == whole.num_pieces == sum(runs.level_runs)
