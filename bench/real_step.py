"""One training step of Qwen2.5 (random weights) as a tree and as chains: forward, GRPO loss, backward, AdamW.

Contenders, the same weights, loss, head code and optimiser:

    tree          packed trees through the op
    chain         leaves side by side in padding-free rows through the op: the fastest chain kernel here
    chain_varlen  the same rows through flash-attn's or torch's varlen kernel, atomics allowed

All project trained tokens only. A step is cut into rows of at most ROW_TOKENS (whole trees, or whole leaves) whose
gradients add up, as a trainer does that cannot hold a group's leaves at once.

Model FLOPs are treegrpo.flops' training FLOPs: 3 x forward over visible pairs. Executed FLOPs add what is computed
again: the head's logits in backward, under checkpointing every layer's forward, and the attention's scores and dP,
which its two backward passes both compute (3.5 x its forward, not 2 x; 2.5 x in the one pass of the varlen kernels;
masked elements of partial tiles are left out).
MFU = model FLOPs / seconds / PEAK_FLOPS. Steps are timed in pairs, so that the second begins, as in training, while the
host is still ahead of the device.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from bench import gpu_workloads
from bench.timing import Stopwatch, spread
from treegrpo import Trajectory, build_forest, compute_advantages, flops, grpo_loss, pack, token_logprobs
from treegrpo.hf import use_tree_attention
from treegrpo.logprobs import chain_logprobs
from treegrpo.loss import loss_normalizer
from treegrpo.packing import TreeBatch
from treegrpo.tree import RolloutTree
from treegrpo_kernels.plan import TreePlan

# dense bf16 of H100 and H200 SXM, NVIDIA's datasheet
PEAK_FLOPS = 989e12
CONTENDERS = ("tree", "chain", "chain_varlen")
LONG_FLOPS, FEWEST_ROUNDS, STEPS = 400e12, 2, 2
# siblings that see each other put the gradients of small models off by 0.2 to 0.6
GRADIENT_CAP = 0.1
# a mean of thousands of clipped terms of size 1
LOSS_SLACK = 5e-3

# hidden, MLP width, layers, query heads, key/value heads of the published configs; all tie embedding and head
MODELS = {
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3b": (2048, 11008, 36, 16, 2),
    "tiny": (64, 128, 2, 4, 2),
}
VOCAB = {"tiny": 4096}
ROW_TOKENS = {"0.5b": 24_576, "1.5b": 16_384, "3b": 16_384, "tiny": 1_024}

K, TINY_K = gpu_workloads.K, gpu_workloads.TINY_K
WORKLOADS = {
    "star": lambda k: gpu_workloads.star(2 * k, k, 8),
    "search_2_2": lambda k: gpu_workloads.search(2, 2, 14 * k, k),
    "search_2_6": lambda k: gpu_workloads.search(2, 6, 14 * k, k),
    "binary": lambda k: gpu_workloads.binary(7 if k == K else 4, k // 16),
    # one group; the tiny slices are longer, for a recording begins with what nobody trains
    "tau_whole": lambda k: gpu_workloads.tau(12 * k if k == K else 32 * k, k, calls=False),
    "tau_calls": lambda k: half(gpu_workloads.tau(12 * k if k == K else 32 * k, k, calls=True)),
}


def half(rows: list[Trajectory]) -> list[Trajectory]:
    """The samples of a group's first two conversations of four; all of them are well over 100,000 chain tokens."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row.num_tokens < rows[i - 1].num_tokens]
    return rows[: starts[2]] if len(starts) > 2 else rows


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    workload: str
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"{self.model}-{self.workload}" + ("-checkpointing" if self.checkpointing else "")


@dataclass
class Row:
    """One forward and backward: a packed batch and its streams [L]."""

    batch: TreeBatch
    advantages: Tensor
    leaves: tuple[int, ...]
    """Which of the problem's leaves, tree by tree, in the order of the stream."""
    old_logp: Tensor | None = None


def config_of(name: str):
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, kv_heads = MODELS[name]
    return Qwen2Config(
        vocab_size=VOCAB.get(name, 151_936),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131_072,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )


class Trainee:
    """A model with its optimiser, made on the device itself."""

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype, attn_implementation="sdpa")
        self.name, self.device = name, device
        self.model: nn.Module = use_tree_attention(model.train(), check=False)
        self.varlen = False
        self.model.register_forward_pre_hook(self._options, with_kwargs=True)
        # so small a rate that all contenders meet the same weights
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-12, fused=device.type == "cuda")

    def _options(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"tree_deterministic": not self.varlen}

    def set_checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


_alive: dict[tuple[str, torch.device], Trainee] = {}


def trainee(name: str, device: torch.device) -> Trainee:
    """The model of that name; one is alive at a time."""
    if (name, device) not in _alive:
        _alive.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _alive[name, device] = Trainee(name, device)
    return _alive[name, device]


@dataclass
class Problem:
    """A case's rows for every contender."""

    case: Case
    device: torch.device
    tiny: bool

    @cached_property
    def leaves(self) -> tuple[Trajectory, ...]:
        """Token ids made to fit the vocabulary; rewards in turn 0 and 1, for recorded groups may agree and train
        nothing."""
        vocab = config_of(self.case.model).vocab_size
        rows = WORKLOADS[self.case.workload](TINY_K if self.tiny else K)
        return tuple(
            replace(row, token_ids=np.asarray(row.token_ids) % vocab, reward=float(i % 2)) for i, row in enumerate(rows)
        )

    @cached_property
    def trees(self) -> list[RolloutTree]:
        return build_forest(self.leaves)

    @cached_property
    def advantages(self) -> list[list[np.ndarray]]:
        return compute_advantages(self.trees, "grpo")

    @cached_property
    def cost(self) -> flops.ChainVsTree:
        return flops.report(config_of(self.case.model), self.trees)

    @cached_property
    def tree_rows(self) -> list[Row]:
        budget = max(ROW_TOKENS[self.case.model], *(tree.num_tokens for tree in self.trees))
        batches = pack(self.trees, token_budget=budget, share_across_groups=False, device=self.device)
        starts = np.cumsum([0, *(tree.num_leaves for tree in self.trees)]).tolist()
        return [
            Row(
                batch,
                batch.leaf_stream(self.advantages),
                tuple(leaf for tree in batch.tree_indices for leaf in range(starts[tree], starts[tree + 1])),
            )
            for batch in batches
        ]

    @cached_property
    def chain_rows(self) -> list[Row]:
        """The same leaves, as many to a row as fit; a row's batch only says where its leaves lie."""
        budget = ROW_TOKENS[self.case.model]
        rows: list[Row] = []
        for tree, advantages in zip(self.trees, self.advantages, strict=True):
            for leaf, own in zip(tree.trajectories, advantages, strict=True):
                if not rows or rows[-1][0] + leaf.num_tokens > budget:
                    rows.append([0, [], []])
                rows[-1][0] += leaf.num_tokens
                rows[-1][1].append(leaf)
                rows[-1][2].append(own)
        starts = np.cumsum([0, *(len(leaves) for _, leaves, _ in rows)]).tolist()
        return [self._chain_row(leaves, own, start) for (_, leaves, own), start in zip(rows, starts, strict=False)]

    def _chain_row(self, leaves: list[Trajectory], advantages: list[np.ndarray], start: int) -> Row:
        # one tree of all, so that the streams keep the leaves' order
        (tree,) = build_forest([replace(leaf, group="") for leaf in leaves])
        (batch,) = pack([tree], device=self.device)
        return Row(batch, batch.leaf_stream([advantages]), tuple(range(start, start + len(leaves))))

    def rows(self, contender: str) -> list[Row]:
        return self.chain_rows if contender.startswith("chain") else self.tree_rows

    @cached_property
    def normalizer(self) -> Tensor:
        parts = [loss_normalizer("dapo", row.batch.leaf_mask, row.batch.leaf_offsets) for row in self.tree_rows]
        return torch.stack(parts).sum()

    def by_leaf(self, contender: str, streams: list[Tensor]) -> list[Tensor]:
        """What the rows of a contender hold [L], leaf by leaf: the same order for all of them."""
        found = {}
        for row, stream in zip(self.rows(contender), streams, strict=True):
            found |= dict(zip(row.leaves, stream.split(row.batch.leaf_offsets.diff().tolist()), strict=True))
        return [found[leaf] for leaf in range(len(found))]

    def logp(self, net: Trainee, contender: str) -> list[Tensor]:
        """A contender's log-probs, leaf by leaf, 0 where nothing is trained."""
        net.varlen = contender == "chain_varlen"
        with torch.no_grad():
            streams = [logprobs(net.model, row, contender) * row.batch.leaf_mask for row in self.rows(contender)]
        return self.by_leaf(contender, streams)

    def prepare(self, net: Trainee) -> None:
        """Old log-probs a little off the chain's, so that clipping is active; all contenders have the same."""
        old = [x + 0.3 * torch.sin(torch.arange(len(x), device=self.device) % 97) for x in self.logp(net, "chain")]
        for row in (*self.tree_rows, *self.chain_rows):
            row.old_logp = torch.cat([old[leaf] for leaf in row.leaves])


@contextmanager
def causal(rows: list[Row]) -> Iterator[None]:
    """While open, siblings see each other: the mask of a packed row that knows no tree, at the tree's positions."""
    plans = [row.batch.plan for row in rows]
    for row, plan in zip(rows, plans, strict=True):
        length = plan.num_tokens
        whole = torch.full_like(plan.subtree_end, length)
        row.batch._plan = TreePlan(whole, plan.position, length * (length + 1) // 2, longest_path=length)
    try:
        yield
    finally:
        for row, plan in zip(rows, plans, strict=True):
            row.batch._plan = plan


def logprobs(model: nn.Module, row: Row, contender: str) -> Tensor:
    """log-probs on the leaf stream [L]."""
    if contender.startswith("chain"):
        return chain_logprobs(model, row.batch, backend="gather" if contender == "chain_varlen" else "auto")
    return row.batch.expand(token_logprobs(model, row.batch))


def gradients(net: Trainee, problem: Problem, contender: str, *, clips: bool = True) -> Tensor:
    """The loss; the gradients are left in the parameters. Without ``clips`` the ratio is 1 everywhere: a rounding that
    moves a token over the clip bound changes its gradient by all there is."""
    net.varlen = contender == "chain_varlen"
    net.optimiser.zero_grad(set_to_none=True)
    total = torch.zeros((), device=problem.device)
    for row in problem.rows(contender):
        batch = row.batch
        logp = logprobs(net.model, row, contender)
        loss, _ = grpo_loss(
            logp,
            row.old_logp if clips else logp.detach(),
            row.advantages,
            batch.leaf_mask,
            batch.leaf_offsets,
            loss_type="dapo",
            normalizer=problem.normalizer,
        )
        loss.backward()
        total += loss.detach()
    return total


def step(net: Trainee, problem: Problem, contender: str) -> Tensor:
    loss = gradients(net, problem, contender)
    net.optimiser.step()
    return loss


def executed_flops(cost: flops.Cost, contender: str, checkpointing: bool) -> int:
    """What a step really multiplies; see the module's docstring."""
    again = cost.linear + cost.attention if checkpointing else 0
    # the forward's two products, then five in one pass or seven in two
    products = 2 + (5 if contender == "chain_varlen" else 7)
    return 3 * cost.linear + 4 * cost.head + products * cost.attention // 2 + again


@dataclass
class Errors:
    """Distances from the chain."""

    gradient: float = 0.0
    """Relative L2 distance of the gradient without clipping."""
    logp: float = 0.0
    """Mean over the trained tokens, nats."""
    loss: float = 0.0
    """Of the clipped loss."""


@dataclass
class Outcome:
    """What was measured for one case."""

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    errors: dict[str, Errors]
    """How far each contender, and "causal", is off the chain: see :func:`check`."""
    wrong: dict[str, str]
    """The rivals that are further off than allowed, which are not timed, and by how much."""


def usable(contender: str, device: torch.device) -> str | None:
    import treegrpo_kernels as tk

    return tk.backends(device)["gather"] if contender == "chain_varlen" else None


def check(net: Trainee, problem: Problem) -> tuple[dict[str, Errors], dict[str, str]]:
    """Log-probs, loss and gradient of each contender against the chain's: (errors, what is off by more than rounding).
    Raises where the tree is.

    In float32 that is 1e-4. In bfloat16 how much it is depends on the layout (the chain rounds a shared token once a
    leaf), so what a causal mask does to the same step is measured beside it: a contender must be a third as far off at
    most, and its gradient no more than GRADIENT_CAP.
    """
    logp, loss = problem.logp(net, "chain"), float(gradients(net, problem, "chain"))
    gradients(net, problem, "chain", clips=False)
    want = [p.grad.clone() for p in net.model.parameters()]
    norm = sum(float(g.float().norm()) ** 2 for g in want) ** 0.5
    assert norm > 0, "the gradient is zero: nothing is compared"
    num_trained = sum(int(row.batch.leaf_mask.sum()) for row in problem.chain_rows)

    def distance(name: str) -> Errors:
        off = sum(float((a - b).abs().sum()) for a, b in zip(problem.logp(net, name), logp, strict=True)) / num_trained
        loss_off = abs(float(gradients(net, problem, name)) - loss)
        gradients(net, problem, name, clips=False)
        pairs = zip(net.model.parameters(), want, strict=True)
        squares = [float((p.grad.float() - g.float()).norm()) ** 2 for p, g in pairs]
        return Errors(sum(squares) ** 0.5 / norm, off, loss_off)

    others = [name for name in CONTENDERS if name != "chain" and usable(name, problem.device) is None]
    errors = {"chain": Errors(), **{name: distance(name) for name in others}}
    with causal(problem.tree_rows):
        errors["causal"] = distance("tree")
    allowed = Errors(1e-4, 1e-4, 1e-4)
    if next(net.model.parameters()).dtype == torch.bfloat16:
        wrong_mask = errors["causal"]
        allowed = Errors(min(wrong_mask.gradient / 3, GRADIENT_CAP), wrong_mask.logp / 3, LOSS_SLACK)
    assert exceeds(errors["causal"], allowed), f"a causal mask would pass: {errors['causal']}, allowed are {allowed}"
    wrong = {name: f"off: {', '.join(found)}" for name in others if (found := exceeds(errors[name], allowed))}
    assert "tree" not in wrong, f"the tree is {wrong['tree']}"
    return errors, wrong


def exceeds(errors: Errors, allowed: Errors) -> list[str]:
    """What is further off than allowed."""
    return [
        f"{name} by {value:.1e}, allowed are {getattr(allowed, name):.1e}"
        for name, value in vars(errors).items()
        if not value <= getattr(allowed, name)
    ]


def timed_contenders(case: Case, names: list[str], is_long: bool) -> list[str]:
    """The slower chain is timed where it tells something new: not under checkpointing, not for every model, not where
    it takes seconds."""
    return names if case.model in ("1.5b", "tiny") and not case.checkpointing and not is_long else names[:2]


def measure(case: Case, device: torch.device, *, tiny: bool, rounds: int) -> tuple[Problem, Outcome]:
    """All contenders of a case, checked, then timed in turn: a round is STEPS steps, one after the other, and counts as
    their mean. A long case has FEWEST_ROUNDS."""
    problem = Problem(case, device, tiny)
    net = trainee(case.model, device)
    net.set_checkpointing(case.checkpointing)
    problem.prepare(net)
    errors, wrong = check(net, problem)
    # the first step makes the moments, which is no part of a later one
    net.optimiser.step()
    is_long = problem.cost.chain.training > LONG_FLOPS
    names = timed_contenders(case, [name for name in CONTENDERS if name in errors and name not in wrong], is_long)
    on_gpu = device.type == "cuda"
    watch = Stopwatch(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)

    def steps(name: str) -> None:
        for _ in range(STEPS):
            step(net, problem, name)

    for _ in range(min(rounds, FEWEST_ROUNDS) if is_long else rounds):
        for name in names:
            net.optimiser.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            seconds[name] += [spent / STEPS for spent in watch.once(lambda name=name: steps(name))]
            peaks[name] = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return problem, Outcome(seconds, peaks, errors, wrong)


def info_of(case: Case, problem: Problem, outcome: Outcome, contender: str) -> dict[str, object]:
    """What a row of the table says."""
    cost = problem.cost.tree if contender == "tree" else problem.cost.chain
    timed = spread(outcome.seconds[contender])
    chains = {name: spread(times)["median_s"] for name, times in outcome.seconds.items() if name != "tree"}
    best = min(chains, key=chains.get)
    info = dict(
        suite="real_step",
        contender=contender,
        workload=case.workload,
        model=case.model,
        checkpointing=case.checkpointing,
        tokens=cost.tokens,
        pairs=cost.pairs,
        head_rows=cost.head_rows,
        rows=len(problem.rows(contender)),
        flops=cost.training,
        executed_flops=executed_flops(cost, contender, case.checkpointing),
        peak_bytes=outcome.peak_bytes[contender],
        mfu=cost.training / timed["median_s"] / PEAK_FLOPS,
        gradient_error=outcome.errors[contender].gradient,
        logp_error=outcome.errors[contender].logp,
        causal_gradient_error=outcome.errors["causal"].gradient,
        causal_logp_error=outcome.errors["causal"].logp,
        **timed,
    )
    if contender == "tree":
        ratio = chains[best] / timed["median_s"]
        flop_ratio = problem.cost.flop_ratio
        info |= dict(best_chain=best, time_ratio=ratio, flop_ratio=flop_ratio, time_over_flop_ratio=ratio / flop_ratio)
    return info
