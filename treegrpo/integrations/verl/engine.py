"""The engine: verl's FSDP engine, with the rows of a micro-batch as one packed tree.

Loading, sharding, optimiser, checkpoints and weight export stay verl's. Replaced are the forward of a micro-batch,
which forwards each token once however many rows begin with it, and the choice of its rows, which keeps siblings
together. The model is entered through ``module(...)``, so that FSDP's hooks see an ordinary forward.

Shape legend: B rows, L tokens of all rows (one jagged dimension), T unique tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import detach_tree, postprocess_batch_func

from treegrpo.dropout import check_dropout
from treegrpo.hf import check_model, use_tree_attention
from treegrpo.integrations.verl import micro_batches
from treegrpo.logprobs import token_logprobs
from treegrpo.packing import TreeBatch, pack
from treegrpo.tree import Trajectory, build_tree

VENDOR = "treegrpo"


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor=VENDOR)
class TreeFSDPEngine(FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` on packed trees, chosen by the environment variable VERL_ENGINE_VENDOR=treegrpo.

    ``max_token_len_per_gpu`` bounds the unique tokens of a micro-batch, not the sum of its rows' lengths.

    Raises ``ValueError`` for what packed rows cannot do (sequence parallelism, fused or Liger kernels, static padding,
    several temperatures in a micro-batch, images, distillation from top-k) and for models ``treegrpo.hf.check_model``
    refuses.
    """

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        refused = {
            "ulysses_sequence_parallel_size > 1": engine_config.ulysses_sequence_parallel_size > 1,
            "use_fused_kernels=True": model_config.use_fused_kernels,
            # its kernels want a GPU, and the check of the model runs where verl loads it, on the host
            "use_liger=True": model_config.use_liger,
            "pad_to_length=True": engine_config.pad_to_length,
            "tiled_mlp": model_config.tiled_mlp.get("enabled", False),
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ValueError(f"{setting} does not go with trees: turn it off, or unset VERL_ENGINE_VENDOR")
        super().__init__(model_config, engine_config, *args, **kwargs)

    def _build_module(self) -> torch.nn.Module:
        module = use_tree_attention(super()._build_module(), check=False)
        # verl's override stands in the config itself, and what is saved with it loads nowhere else
        vars(module.config).pop("attn_implementation", None)
        # processes but the first may hold no weights yet
        if not any(p.is_meta for p in module.parameters()):
            check_model(module)
        return module

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        module = super()._build_lora_module(module)
        # an adapter that is trained on brings a dropout of its own
        check_dropout(module)
        return module

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """verl's: outputs, losses and metrics of all micro-batches; gradients too unless ``forward_only``."""
        group = self.get_data_parallel_group()
        num_tokens = data["loss_mask"].sum().to(get_device_id())
        torch.distributed.all_reduce(num_tokens, group=group)
        tu.assign_non_tensor(data, sp_size=1, batch_num_tokens=num_tokens.item(), dp_size=self.get_data_parallel_size())
        keeps_output = forward_only or tu.get_non_tensor_data(data, key="return_model_output", default=False)
        chosen = self._choose_micro_batches(data)
        outputs = []
        for number, rows in enumerate(chosen):
            is_last = number == len(chosen) - 1
            sync = nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=is_last)
            span = torch.profiler.record_function(f"micro_batch{number}")
            with torch.set_grad_enabled(not forward_only), sync, span:
                loss, output = self.forward_step(tu.index_select_tensor_dict(data, rows), loss_function, forward_only)
                if not forward_only:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if not keeps_output:
                del output["model_output"]
            outputs.append(output)
        # rows come back in their own order, which verl does where micro-batches were of no fixed size
        settings = tu.get_tensordict({}, non_tensor_dict=dict(use_dynamic_bsz=True))
        return postprocess_batch_func(output_lst=outputs, indices=chosen, data=settings)

    def _choose_micro_batches(self, data: TensorDict) -> list[list[int]]:
        """Row indices of each micro-batch, equally many on every process."""
        keys = group_keys(data)
        groups = micro_batches.groups_of(keys)
        if not tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True):
            size = data["micro_batch_size_per_gpu"] * tu.get_non_tensor_data(data, key="force_group_size", default=1)
            return micro_batches.by_count(groups, size)
        found = micro_batches.by_budget(rows_of(data["input_ids"]), groups, int(data["max_token_len_per_gpu"]))
        count = torch.tensor([len(found)], device=get_device_name())
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())
        return micro_batches.fill_up(found, int(count))

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, {model_output, loss, metrics}) of one micro-batch."""
        _refuse(micro_batch)
        # rows come in host memory: packed there, while the device is still at the micro-batch before
        batch = packed(micro_batch["input_ids"], get_device_id())
        micro_batch = micro_batch.to(get_device_id())
        dtype, device = self._autocast_dtype, get_device_name()
        with nullcontext() if dtype == torch.float32 else torch.autocast(device_type=device, dtype=dtype):
            model_output = self.score(micro_batch, batch)
            if loss_function is None:
                loss, metrics = torch.tensor(1.0, device=device), {}
            else:
                loss, metrics = loss_function(
                    model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group()
                )
            # the supervised loss has no metrics, and its trainer takes no lists
            if metrics and not forward_only:
                metrics["packing_ratio"] = batch.token_ratio
        return loss, {"model_output": detach_tree(model_output), "loss": loss.detach().item(), "metrics": metrics}

    def score(self, micro_batch: TensorDict, batch: TreeBatch) -> dict[str, Tensor]:
        """log_probs (and entropy where asked for) of the rows packed in ``batch``, jagged [B, j] as verl lays them out:
        at a token what is known of the next one, over prompts too; 0 at the last token of a row, where verl has what
        nobody reads."""
        ids = micro_batch["input_ids"]
        with_entropy = tu.get_non_tensor_data(micro_batch, key="calculate_entropy", default=False)
        scored = token_logprobs(
            self.module, batch, temperature=_one_temperature(micro_batch["temperature"]), entropy=with_entropy
        )
        found = {}
        for name, x in zip(("log_probs", "entropy"), scored if with_entropy else (scored,), strict=False):
            # the first token of a row is scored by nobody, so that what rolls around is 0
            stream = torch.roll(batch.expand(x), -1)
            found[name] = torch.nested.nested_tensor_from_jagged(stream, ids.offsets())
        return found


def packed(ids: Tensor, device: Any = "cpu") -> TreeBatch:
    """Rows, jagged [B, j], as one packed tree on ``device``, every token but the first of a row scored. Leaves keep the
    rows' order, and their stream is the rows' tokens in order."""
    leaves = []
    for row in rows_of(ids):
        mask = [0] + [1] * (len(row) - 1)
        leaves.append(Trajectory(row, mask, reward=0.0))
    (batch,) = pack([build_tree(leaves)], device=device)
    return batch


def rows_of(ids: Any) -> list[Any]:
    """The rows of a jagged tensor [B, j] as int64 arrays; one copy to the host."""
    offsets = ids.offsets().tolist()
    values = ids.values().cpu().numpy()
    return [values[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def group_keys(data: TensorDict) -> list[Any]:
    """What siblings have in common: verl's uid, else their prompt's tokens, else nothing."""
    num_rows = len(data)
    uid = data.get("uid", None)
    if uid is not None:
        return [str(x) for x in (uid.tolist() if hasattr(uid, "tolist") else uid)]
    prompts = data.get("prompts", None)
    if prompts is not None and prompts.is_nested:
        return [tuple(row.tolist()) for row in rows_of(prompts)]
    return list(range(num_rows))


def _one_temperature(temperature: float | Tensor) -> float:
    if not isinstance(temperature, Tensor):
        return float(temperature)
    values = temperature.unique().tolist()
    if len(values) != 1:
        raise ValueError(f"temperatures {values} in one micro-batch: rows that share tokens need the same one")
    return values[0]


def _refuse(micro_batch: TensorDict) -> None:
    for key in ("distillation_use_topk", "distillation_only", "calculate_sum_pi_squared"):
        if tu.get_non_tensor_data(micro_batch, key=key, default=False):
            raise ValueError(f"{key} needs every token's logits, which a packed tree never has at once: turn it off")
    if not micro_batch["input_ids"].is_nested:
        raise ValueError("input_ids must be jagged rows: set use_remove_padding=True")
    # every row of verl's has a dict, an empty one where it is text
    if micro_batch["position_ids"].dim() == 3 or extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs", [])):
        raise ValueError("trees of text only: images and videos cannot be packed")
