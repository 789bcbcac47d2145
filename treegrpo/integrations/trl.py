"""TRL's GRPOTrainer with every completion's shared beginnings computed once.

    from treegrpo.integrations.trl import TreeGRPOTrainer
    trainer = TreeGRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=...)

and AsyncGRPOTrainer, which packs trees itself, with our attention in place of its gathered keys and values (no kernel
from a hub, no copies, any GPU from sm_80 and the CPU):

    trainer = AsyncGRPOTrainer(...)
    treegrpo.integrations.trl.use_tree_op()

In ``TreeGRPOTrainer`` one method is replaced, the one TRL asks for log-probs of the policy, the old policy and the
reference: the rows of a micro-batch become one packed tree. Loss, divergence, importance sampling and metrics stay
TRL's, and see the same numbers: the prompt that a group's completions share, and whatever else they begin with, is
forwarded once.

Shape legend: B rows, S columns of prompt and completion, C completion columns, L tokens of all rows, T unique tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from trl import GRPOTrainer

import treegrpo_kernels as tk
from treegrpo.hf import use_tree_attention
from treegrpo.logprobs import token_logprobs
from treegrpo.packing import TreeBatch, pack
from treegrpo.tree import Trajectory, build_tree

# forward keywords of TRL's method that only vision models have
VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "mm_token_type_ids",
    "image_position_ids",
)


class TreeGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` on packed trees; constructor and configuration are TRL's.

    A group's completions are kept in one micro-batch, where their prompt is forwarded once, so
    ``per_device_train_batch_size`` must be a multiple of ``num_generations``. Adds the metrics ``tree/unique_tokens``,
    ``tree/chain_tokens`` and ``batch/packing_ratio`` (their quotient).

    Raises ``ValueError`` for a batch size that tears groups apart, and for models tree attention does not suit
    (``treegrpo.hf.check_model``), vision inputs and router losses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size, group = self.args.per_device_train_batch_size, self.num_generations
        if size % group:
            raise ValueError(
                f"per_device_train_batch_size={size} tears groups of num_generations={group} apart, and what they share"
                " would be computed again: give a multiple, with gradient_accumulation_steps for the rest"
            )
        if self.aux_loss_enabled:
            raise ValueError(
                "router_aux_loss_coef asks for a load-balancing loss, which a packed row would compute over unique"
                " tokens: set it to 0"
            )
        use_tree_attention(self.accelerator.unwrap_model(self.model))
        if self.ref_model is not None:
            use_tree_attention(self.accelerator.unwrap_model(self.ref_model))

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(log-probs [B, C], entropies [B, C] or None, None); 0 where a completion has ended.

        ``batch_size`` rows make a packed row, as they make a forward in TRL.
        """
        given = [name for name in VISION if inputs.get(name) is not None]
        if given or compute_aux_loss:
            raise ValueError(f"trees of text only: {', '.join(given) or 'a router loss'} cannot be packed")
        logps, entropies = [], []
        for ids, mask in zip(
            *(x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask)), strict=True
        ):
            batch = packed(ids, mask, logits_to_keep)
            with self.accelerator.autocast():
                scored = token_logprobs(model, batch, temperature=self.temperature, entropy=compute_entropy)
            streams = [batch.expand(x) for x in (scored if compute_entropy else (scored,))]
            # the rows' tokens in their order are the stream of the leaves
            rows = [x.new_zeros(mask.shape).masked_scatter(mask.bool(), x) for x in streams]
            logps.append(rows[0][:, -logits_to_keep:])
            entropies.append(rows[-1][:, -logits_to_keep:])
            self._count(batch)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's schedule of generations and micro-batches, but groups are shuffled, not their completions."""
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (steps * self.num_iterations) == 0:
            scored = self._generate_and_score_completions(generation_batch)
            groups = torch.randperm(len(scored["prompt_ids"]) // self.num_generations)
            order = (groups[:, None] * self.num_generations + torch.arange(self.num_generations)).flatten()
            self._buffered_inputs = [take(scored, part) for part in order.chunk(steps)]
        return self._buffered_inputs[self._step % steps]

    def _count(self, batch: TreeBatch) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["tree/unique_tokens"].append(batch.num_tokens)
        metrics["tree/chain_tokens"].append(batch.num_chain_tokens)
        metrics["batch/packing_ratio"].append(batch.token_ratio)


def packed(input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> TreeBatch:
    """Rows [B, S], padded anywhere, as one packed tree on their device; trained is what of the last ``logits_to_keep``
    columns is no padding. Leaves keep the rows' order, and their stream is the rows' tokens in order."""
    device, mask = input_ids.device, attention_mask.bool()
    trained = mask.clone()
    trained[:, :-logits_to_keep] = False
    # one copy to the host; the trie is built there
    ids, mask, trained = torch.stack([input_ids.long(), mask.long(), trained.long()]).cpu().numpy()
    leaves = [
        Trajectory(row[kept], targets[kept], reward=0.0)
        for row, kept, targets in zip(ids, mask.astype(bool), trained, strict=True)
    ]
    (batch,) = pack([build_tree(leaves)], device=device)
    return batch


def take(scored: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The given rows of everything TRL keeps per completion; what is not per completion stays as it is."""
    number = len(scored["prompt_ids"])

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == number:
            return value[rows.to(value.device)]
        if isinstance(value, list) and len(value) == number:
            return [value[i] for i in rows.tolist()]
        return value

    return {name: part(value) for name, value in scored.items()}


def use_tree_op() -> None:
    """From now on models of attention ``tree_fa3``, TRL's name in AsyncGRPOTrainer, run through our op.

    Call it after the trainer is built: its constructor registers TRL's own function under that name.
    """
    from trl.experimental.async_grpo.packing import TREE_ATTENTION

    AttentionInterface.register(TREE_ATTENTION, async_tree_attention)


def async_tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    tree_max_seqlen_q: int,
    tree_max_seqlen_k: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """TRL's ``tree_attention`` of a packed row: query [1, Hq, T, D] -> (out [1, T, Hq, Dv], None).

    The keywords are those of ``TreeRow.pack``; of them the boundaries alone are read, once a row.
    """
    plan = getattr(tree_cu_seqlens_q, "treegrpo_plan", None)
    if plan is None:
        # kept on the tensor, which every layer of a forward and its recomputation is given
        plan = tree_cu_seqlens_q.treegrpo_plan = plan_of_row(tree_cu_seqlens_q, tree_cu_seqlens_k)
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        out = tk.tree_attention(q, k, v, plan, scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out.unsqueeze(0), None


def plan_of_row(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tk.TreePlan:
    """The plan of a TreeRow from its segments' boundaries in the row and in their paths, int32 [S + 1] each.

    Segments lie in depth-first order, and a path is what lies above its segment, and the segment: so the tokens above
    tell where the subtree of each segment before it ends.
    """
    starts, paths = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    above = [b - a - own for a, b, own in zip(paths, paths[1:], lengths, strict=False)]
    ends, opened = [starts[-1]] * len(lengths), []
    for segment, depth in enumerate(above):
        while opened and depth < above[opened[-1]] + lengths[opened[-1]]:
            ends[opened.pop()] = starts[segment]
        opened.append(segment)
    subtree_end = torch.repeat_interleave(torch.tensor(ends), torch.tensor(lengths))
    return tk.TreePlan.build(subtree_end, device=cu_seqlens_q.device)
