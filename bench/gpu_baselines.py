"""Ways to compute a forest's attention on a GPU: ours, and the kernels people would use instead.

Shape legend: T packed tokens, L leaf-stream length, B leaves, N longest leaf, Hq/Hkv query and key/value heads, D head
dim, S segments (unbranched runs of tokens).

Contenders of the tree: FlexAttention with exact block lists, with and without building them; gathered paths through a
varlen kernel; one-level prefix grouping; a dense mask. Of the flattened leaves: our own kernel; varlen kernels; cuDNN
on padded leaves and leaf by leaf, on a workload of one chain the roof. Optional packages are used where they are
found, never asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import treegrpo_kernels as tk
from bench.baselines import Attend, Contender, Request, dense_mask_unsupported, heads_first, tree_backend
from bench.workloads import Forest
from treegrpo_kernels import gather

# (q [rows,Hq,D], k [keys,Hkv,D], v [keys,Hkv,D], cu_q, cu_k int32 [S+1], longest q, longest k) -> out [rows,Hq,D],
# causal from the bottom right, within the window it was made for
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]

FLEX_BLOCK = 128
# 32 heads of 128: more would not fit the 32-bit offsets some kernels use
MAX_PADDED_TOKENS = 500_000
MAX_PAIRS_OF_PLAIN_CUDA = 2 * 10**8
# cuDNN builds a forward and a backward for every length
MAX_LEAVES_ONE_BY_ONE = 16

NOTES: dict[str, str] = {}
"""contender -> what a reader must know of how it ran here."""


def _needs_gpu(request: Request) -> str | None:
    return None if request.device.type == "cuda" else f"its kernel needs a GPU, not {request.device.type}"


@cache
def missing(module: str, name: str) -> str | None:
    """Why `module.name` cannot be used here; None if it can."""
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        return f"{module}.{name} does not import: {error}".splitlines()[0]
    return None


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    grouped: bool = True,
    window: int = 0,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being told, later ones want the flag
    has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    flag = {"enable_gqa": True} if grouped and has_flag else {}
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(window - 1, 0), **flag)


def flash_varlen(window: int) -> Varlen:
    from flash_attn import flash_attn_varlen_func

    return partial(flash_attn_varlen_func, causal=True, window_size=(window - 1, 0))


def flash3_varlen(window: int) -> Varlen:
    from flash_attn_interface import flash_attn_varlen_func

    def varlen(*args) -> Tensor:
        out = flash_attn_varlen_func(*args, causal=True, window_size=(window - 1, 0))
        return out[0] if isinstance(out, tuple) else out

    return varlen


def repeat_heads(k: Tensor, num_heads: int) -> Tensor:
    """[rows, Hkv, D] -> [rows, Hq, D], each key head once for every query head of its group."""
    return k.repeat_interleave(num_heads // k.shape[1], dim=1)


def fault(run: Callable[[bool], Tensor], inputs: list[Tensor]) -> str | None:
    """None where `run(True)` and its gradients are those of `run(False)`, else what goes wrong."""

    def results(flag: bool) -> list[Tensor]:
        out = run(flag)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    expected = results(False)
    try:
        found = results(True)
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    for got, want in zip(found, expected, strict=True):
        error = float((got - want).detach().float().norm() / want.detach().float().norm())
        if not error < 0.02:
            return f"grouped heads are off by {error:.1e}"
    return None


def small_inputs(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes]


@cache
def torch_varlen_fault(device: torch.device) -> str | None:
    """None where torch's varlen kernel takes grouped heads, undocumented in 2.11, and computes them right."""
    q, k, v = inputs = small_inputs(device, (96, 4, 64), (96, 2, 64), (96, 2, 64))
    cu = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)

    def run(grouped: bool) -> Tensor:
        keys = (k, v) if grouped else (repeat_heads(k, 4), repeat_heads(v, 4))
        return torch_varlen(q, *keys, cu, cu, 56, 56, grouped=grouped)

    return fault(run, inputs)


@cache
def cudnn_fault(device: torch.device) -> str | None:
    """None where cuDNN's SDPA takes grouped heads and computes them right."""
    q, k, v = inputs = small_inputs(device, (2, 4, 128, 64), (2, 2, 128, 64), (2, 2, 128, 64))
    return fault(lambda grouped: cudnn_sdpa(q, k, v, grouped=grouped), inputs)


def best_torch_varlen(device: torch.device, contender: str, window: int) -> Varlen:
    """torch's varlen kernel; with K and V repeated for each query head, which is noted, where it cannot group."""
    reason = torch_varlen_fault(device)
    if reason is None:
        return partial(torch_varlen, window=window)
    NOTES[contender] = f"K and V repeated per query head: {reason}"

    def repeated(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        return torch_varlen(q, k, v, *rest, grouped=False, window=window)

    return repeated


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor, *, grouped: bool) -> Tensor:
    """q [B, Hq, N, D], k and v [B, Hkv, N, D] -> [B, Hq, N, D], causal, by cuDNN or not at all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def chain_varlen(forest: Forest, device: torch.device, varlen: Varlen) -> Attend:
    """The leaves [L], each causal in itself."""
    cu = forest.leaf_offsets.to(device, torch.int32)
    longest = int(forest.leaf_offsets.diff().max())
    return lambda q, k, v: varlen(q, k, v, cu, cu, longest, longest)


def gathered(forest: Forest, device: torch.device, varlen: Varlen) -> Attend:
    """TRL's packed row: every segment attends to K and V gathered along its whole path."""
    layout = gather.layout_of(tk.TreePlan.build(forest.subtree_end, device=device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_path, v_path = k.index_select(0, layout.path), v.index_select(0, layout.path)
        return varlen(q, k_path, v_path, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)

    return attend


def one_level(subtree_end: Tensor) -> str | None:
    """None where every tree is a prompt and unbranched responses, else why one-level grouping cannot take it."""
    end = subtree_end.cpu().long()
    starts = F.pad(torch.nonzero(end[1:] != end[:-1]).squeeze(1) + 1, (1, 0))
    stops = F.pad(starts[1:], (0, 1), value=end.numel())
    deep = (stops != end[starts]) & (tk.reference.positions(end)[starts] > 0)
    num_deep = int(deep.sum())
    return f"prefix grouping has one level: {num_deep} nodes below a root branch again" if num_deep else None


def prefix_grouped(forest: Forest, device: torch.device, varlen: Varlen) -> Attend:
    """PrefixGrouper's method: prompts attend to themselves, responses to [prompt; response], in two varlen calls."""
    layout = gather.layout_of(tk.TreePlan.build(forest.subtree_end, device=device))
    lengths, paths = layout.cu_q.diff().long(), layout.cu_k.diff().long()
    is_prompt = lengths == paths
    prompt_rows = torch.nonzero(is_prompt.repeat_interleave(lengths)).squeeze(1)
    response_rows = torch.nonzero((~is_prompt).repeat_interleave(lengths)).squeeze(1)
    response_path = layout.path[(~is_prompt).repeat_interleave(paths)]
    back = torch.argsort(torch.cat([prompt_rows, response_rows]))

    def offsets(counts: Tensor) -> tuple[Tensor, int]:
        return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32), int(counts.max())

    cu_prompt, longest_prompt = offsets(lengths[is_prompt])
    if response_rows.numel():
        cu_q, longest_q = offsets(lengths[~is_prompt])
        cu_k, longest_k = offsets(paths[~is_prompt])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompts = (x.index_select(0, prompt_rows) for x in (q, k, v))
        parts = [varlen(*prompts, cu_prompt, cu_prompt, longest_prompt, longest_prompt)]
        if response_rows.numel():
            keys = (x.index_select(0, response_path) for x in (k, v))
            parts.append(varlen(q.index_select(0, response_rows), *keys, cu_q, cu_k, longest_q, longest_k))
        return torch.cat(parts).index_select(0, back)

    return attend


def padded_end(forest: Forest, device: torch.device) -> Tensor:
    """subtree_end of whole blocks, int32 [ceil(T / 128) * 128]: a padding token sees itself."""
    end, num_tokens = forest.subtree_end.to(device, torch.int32), forest.num_tokens
    pads = torch.arange(num_tokens, -(-num_tokens // FLEX_BLOCK) * FLEX_BLOCK, device=device, dtype=torch.int32)
    return torch.cat([end, pads + 1])


def _visible(end: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return visible


def _near(end: Tensor, position: Tensor, window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # a tensor, for an int would be compiled in or a symbol
    hidden = position - window

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (hidden[query] < position[key])

    return near


def exact_block_mask(end: Tensor, window: int = 0):
    """BlockMask of subtree_end [multiple of 128] from the smallest and largest end of each key block: exact classes;
    under a window also from smallest and largest positions, as our own lists are."""
    from torch.nn.attention.flex_attention import BlockMask

    start = torch.arange(0, end.numel(), FLEX_BLOCK, device=end.device)
    stop, tiles = start + FLEX_BLOCK, end.view(-1, FLEX_BLOCK)
    highest, lowest = tiles.amax(1), tiles.amin(1)
    # [query block, key block]
    seen = (stop[:, None] > start) & (highest > start[:, None])
    full = (start[:, None] >= stop - 1) & (stop[:, None] <= lowest)
    visible = _visible(end)
    if window:
        position = tk.reference.positions(end).to(torch.int32)
        deepest, shallowest = (of(position.view(-1, FLEX_BLOCK), 1) for of in (torch.amax, torch.amin))
        seen &= shallowest[:, None] - deepest < window
        full &= deepest[:, None] - shallowest < window
        visible = _near(end, position, window)

    def lists(of: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(of.to(torch.int8), dim=1, descending=True, stable=True)
        return of.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(*lists(seen & ~full), *lists(full & seen), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible)


def compile_flex(*, dynamic: bool, backend: str | Callable = "inductor") -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph, since the eager fallback would be a dense product
    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True, backend=backend)


@cache
def flex_kernel(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> Callable:
    """FlexAttention compiled once for all lengths; where that fails, compiled for every length, which is noted."""
    compiled = compile_flex(dynamic=True)
    shapes = [(2 * FLEX_BLOCK, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    try:
        inputs = small_inputs(device, *shapes)
        end = torch.full((2 * FLEX_BLOCK,), 2 * FLEX_BLOCK, dtype=torch.int32, device=device)
        torch.autograd.grad(call_flex(compiled, exact_block_mask(end), *inputs).sum(), inputs)
    except Exception as error:
        NOTES["flex"] = f"compiled for every length: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        torch._dynamo.config.recompile_limit = 64
        return compile_flex(dynamic=False)
    return compiled


def call_flex(compiled: Callable, block_mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows [multiple of 128, H, D] through FlexAttention, which wants heads first."""
    out = compiled(*map(heads_first, (q, k, v)), block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def _flex(forest: Forest, device: torch.device) -> Attend:
    block_mask = exact_block_mask(padded_end(forest, device), forest.window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compiled = flex_kernel(device, q.shape[1], k.shape[1], q.shape[2])
        return call_flex(compiled, block_mask, q, k, v)

    return attend


def _flex_and_mask(forest: Forest, device: torch.device) -> Attend:
    """Its mask built in every call, from the ends of blocks: torch's own create_block_mask asks about every pair."""
    end = padded_end(forest, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block_mask = exact_block_mask(end, forest.window)
        return call_flex(flex_kernel(device, q.shape[1], k.shape[1], q.shape[2]), block_mask, q, k, v)

    return attend


def leaf_by_leaf(forest: Forest, sdpa: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """The leaves [L] one after the other, nothing padded; `sdpa` takes [1, H, N, D]."""
    lengths = forest.leaf_offsets.diff().tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaves = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*map(heads_first, leaf))[0].transpose(0, 1) for leaf in leaves])

    return attend


def chain_ours(forest: Forest, device: torch.device, backend: str) -> Attend:
    """The leaves [L] as so many trees of one branch: what our kernel does without anything to share."""
    ends = forest.leaf_offsets[1:].repeat_interleave(forest.leaf_offsets.diff())
    plan = tk.TreePlan.build(ends, device=device)
    return lambda q, k, v: tk.tree_attention(q, k, v, plan, window=forest.window or None, backend=backend)


def padded_causal(forest: Forest, sdpa: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """Leaves padded to one length: q [B * N, Hq, D] as `sdpa` takes it, [B, Hq, N, D]."""
    num_leaves = forest.leaf_offsets.numel() - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(*(x.unflatten(0, (num_leaves, -1)).transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _on_cudnn(name: str, method: Callable[[Forest, Callable], Attend]) -> Callable[[Forest, torch.device], Attend]:
    def prepare(forest: Forest, device: torch.device) -> Attend:
        reason = cudnn_fault(device)
        if reason is not None:
            NOTES[name] = f"K and V repeated per query head: {reason}"
        return method(forest, lambda q, k, v: cudnn_sdpa(q, k, v, grouped=reason is None))

    return prepare


def _cudnn_unsupported(request: Request) -> str | None:
    return _needs_gpu(request) or ("SDPA has no sliding window but as a dense mask" if request.forest.window else None)


def _padded_unsupported(request: Request) -> str | None:
    lengths = request.forest.leaf_offsets.diff()
    padded = int(lengths.max()) * lengths.numel()
    too_many = f"{padded} padded tokens: more than {MAX_PADDED_TOKENS} are left out"
    return _cudnn_unsupported(request) or (too_many if padded > MAX_PADDED_TOKENS else None)


def _leaves_unsupported(request: Request) -> str | None:
    num_leaves = request.forest.leaf_offsets.numel() - 1
    if num_leaves == 1:
        return "one chain is one call: see chain_cudnn"
    too_many = f"{num_leaves} leaves, a kernel each: more than {MAX_LEAVES_ONE_BY_ONE} are left out"
    return _cudnn_unsupported(request) or (too_many if num_leaves > MAX_LEAVES_ONE_BY_ONE else None)


def _chain_ours_unsupported(request: Request) -> str | None:
    if request.forest.leaf_offsets.numel() == 2:
        return f"one chain is a tree: see {OURS}"
    return tree_backend("triton").unsupported(request)


def _dense_mask(forest: Forest, device: torch.device) -> Attend:
    mask = tk.reference.dense_mask(forest.subtree_end.to(device), forest.window or None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # the kernel that takes a mask takes no grouped heads
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        out = F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), attn_mask=mask)
        return out[0].transpose(0, 1)

    return attend


def _plain_cuda() -> Contender:
    inner = tree_backend("cuda")

    def unsupported(request: Request) -> str | None:
        if request.device.type == "cuda" and torch.cuda.get_device_capability(request.device) == (9, 0):
            return "on Hopper other CUDA kernels serve these calls: bench.race_cuda"
        if request.forest.num_pairs > MAX_PAIRS_OF_PLAIN_CUDA:
            return f"the plain kernel is slow: left out above {MAX_PAIRS_OF_PLAIN_CUDA:,} pairs"
        return inner.unsupported(request)

    return Contender(inner.name, inner.layout, unsupported, inner.prepare)


def _needs(module: str, name: str) -> Callable[[Request], str | None]:
    return lambda request: _needs_gpu(request) or missing(module, name)


def _prefix_unsupported(request: Request) -> str | None:
    return _needs("torch.nn.attention.varlen", "varlen_attn")(request) or one_level(request.forest.subtree_end)


def _trl_unsupported(request: Request) -> str | None:
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return "trl is not installed; gather_varlen is its method on torch's varlen kernel"
    return _needs("flash_attn_interface", "flash_attn_varlen_func")(request)


def _flash4_unsupported(request: Request) -> str | None:
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn-4 is not installed; its licence is the user's to accept"
    return f"flash-attn-4 {version} is here, but this bench has no adapter that was ever run"


def _on_torch_varlen(name: str, method: Callable[[Forest, torch.device, Varlen], Attend]):
    return lambda forest, device: method(forest, device, best_torch_varlen(device, name, forest.window))


_torch_kernel = _needs("torch.nn.attention.varlen", "varlen_attn")
OURS = "tree_triton"
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        tree_backend("triton"),
        tree_backend("cpu"),
        Contender("flex", "blocks", _needs_gpu, _flex),
        Contender("gather_varlen", "tree", _torch_kernel, _on_torch_varlen("gather_varlen", gathered)),
        Contender("chain_varlen", "leaf", _torch_kernel, _on_torch_varlen("chain_varlen", chain_varlen)),
        Contender("chain_cudnn", "padded", _padded_unsupported, _on_cudnn("chain_cudnn", padded_causal)),
        Contender("chain_cudnn_leaves", "leaf", _leaves_unsupported, _on_cudnn("chain_cudnn_leaves", leaf_by_leaf)),
        Contender("chain_triton", "leaf", _chain_ours_unsupported, lambda f, device: chain_ours(f, device, "triton")),
        Contender("flex_and_mask", "blocks", _needs_gpu, _flex_and_mask),
        Contender("prefix_grouping", "tree", _prefix_unsupported, _on_torch_varlen("prefix_grouping", prefix_grouped)),
        Contender(
            "chain_flash_attn",
            "leaf",
            _needs("flash_attn", "flash_attn_varlen_func"),
            lambda forest, device: chain_varlen(forest, device, flash_varlen(forest.window)),
        ),
        Contender(
            "gather_flash_attn",
            "tree",
            _needs("flash_attn", "flash_attn_varlen_func"),
            lambda forest, device: gathered(forest, device, flash_varlen(forest.window)),
        ),
        Contender(
            "trl_flash3",
            "tree",
            _trl_unsupported,
            lambda forest, device: gathered(forest, device, flash3_varlen(forest.window)),
        ),
        Contender("flash_attn_4", "tree", _flash4_unsupported, _dense_mask),
        Contender("sdpa_dense_mask", "tree", dense_mask_unsupported, _dense_mask),
        _plain_cuda(),
    )
}
