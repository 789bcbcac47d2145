"""The recurrent layer of hybrid models (gated delta rule): forward + backward over a packed forest, against chains.

    chains        the same op on the flattened leaves, all in one row: the best chain
    transformers  its own function, each leaf alone, as where flash-linear-attention is not installed

Qwen3.5's head counts on a CPU at a quarter: 4 key and 8 value heads of 64; a GPU has 16 and 32 of 128 in bfloat16. A
chain pays for every leaf token, a tree for unique ones, so the time should fall by the sharing of tokens.
The check: outputs of every leaf and summed gradients against the chains, in float64.
"""

from functools import cache

import pytest
import torch

import treegrpo_kernels as tk
from bench import workloads
from treegrpo_kernels import recurrence

SIZES = {"cpu": (4, 8, 64, torch.float32), "cuda": (16, 32, 128, torch.bfloat16)}
TOLERANCE = 1e-9


@cache
def inputs(name: str, quick: bool, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, g, beta and dout of the packed row, float64 on the CPU."""
    num_keys, num_values, dim, _ = SIZES[device.type]
    generator = torch.Generator().manual_seed(0)
    num_tokens = workloads.forest(name, quick).num_tokens

    def draw(*shape):
        return torch.randn(num_tokens, *shape, generator=generator, dtype=torch.float64)

    q, k, v, dout = draw(num_keys, dim), draw(num_keys, dim), draw(num_values, dim), draw(num_values, dim)
    return [q, k, v, -0.1 * draw(num_values).abs(), draw(num_values).sigmoid(), dout]


def on_leaves(x: list[torch.Tensor], forest: workloads.Forest) -> list[torch.Tensor]:
    """Every leaf's own rows; a shared token's dout split evenly, so that gradients summed per token are the tree's."""
    index = forest.leaf_tokens
    *rows, dout = (y[index] for y in x)
    return [*rows, dout / torch.bincount(index)[index][:, None, None]]


def moved(x: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """On the device, leaves of autograd but for dout; decays in float32 at least, as models have them."""
    wide = torch.promote_types(dtype, torch.float32)
    made = [y.to(device, wide if i == 3 else dtype) for i, y in enumerate(x)]
    return [y.requires_grad_() for y in made[:-1]] + [made[-1]]


def chain_plan(forest: workloads.Forest, device: torch.device) -> tk.TreePlan:
    lengths = forest.leaf_offsets.diff()
    return tk.TreePlan.build(torch.repeat_interleave(lengths.cumsum(0), lengths), device=device)


def passes(x: list[torch.Tensor], plan: tk.TreePlan) -> list[torch.Tensor]:
    *tensors, dout = x
    out = tk.tree_gated_delta_rule(*tensors, plan, normalize=True)
    return [out, *torch.autograd.grad(out, tensors, dout)]


def passes_of_transformers(x: list[torch.Tensor], forest: workloads.Forest) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    *tensors, dout = x
    for begin, end in zip(forest.leaf_offsets[:-1].tolist(), forest.leaf_offsets[1:].tolist(), strict=True):
        q, k, v, g, beta = own = [y[None, begin:end].detach().requires_grad_() for y in tensors]
        out, _ = qwen.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        torch.autograd.grad(out, own, dout[None, begin:end])


@cache
def check(name: str, quick: bool, device: torch.device) -> float:
    forest = workloads.forest(name, quick)
    x = inputs(name, quick, device)
    tree = passes(moved(x, torch.device("cpu"), torch.float64), tk.TreePlan.build(forest.subtree_end))
    chains = moved(on_leaves(x, forest), torch.device("cpu"), torch.float64)
    out, *gradients = passes(chains, chain_plan(forest, torch.device("cpu")))
    summed = [torch.zeros_like(y).index_add_(0, forest.leaf_tokens, z) for y, z in zip(x, gradients, strict=False)]
    pairs = [(tree[0][forest.leaf_tokens], out), *zip(tree[1:], summed, strict=True)]
    error = max(float((y - z).detach().abs().max() / z.detach().abs().max()) for y, z in pairs)
    assert error <= TOLERANCE, f"the tree on {name} is off by {error:.1e}"
    return error


@pytest.mark.parametrize("baseline", ["chains", "transformers"])
@pytest.mark.parametrize("workload", workloads.NAMES)
def test_recurrence(workload, baseline, meter, device, quick):
    forest = workloads.forest(workload, quick)
    dtype = SIZES[device.type][-1]
    if baseline == "transformers":
        pytest.importorskip("transformers.models.qwen3_5", reason="transformers has no Qwen3.5 before 5.17")
        if device.type == "cuda":
            pytest.skip("a GPU's chains go through flash-linear-attention or the same op")
    meter.benchmark.group = f"recurrence {workload}"
    x = inputs(workload, quick, device)
    tree, plan = moved(x, device, dtype), tk.TreePlan.build(forest.subtree_end, device=device)
    chains, flat = moved(on_leaves(x, forest), device, dtype), chain_plan(forest, device)
    theirs = {
        "chains": lambda: passes(chains, flat),
        "transformers": lambda: passes_of_transformers(chains, forest),
    }
    meter.measure(
        lambda: passes(tree, plan),
        check=lambda: check(workload, quick, device),
        baseline=theirs[baseline],
        baseline_name=baseline,
        suite="recurrence",
        workload=workload,
        contender="tree",
        tokens=forest.num_tokens,
        token_ratio=forest.num_chain_tokens / forest.num_tokens,
        way="torch" if recurrence.fla_reason(device, dtype) else "fla",
    )
