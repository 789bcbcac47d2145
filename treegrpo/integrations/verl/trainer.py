"""``trainer.v1.trainer_mode=tree_sync``: verl's synchronous trainer, groups kept on one rank, tree advantages."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.seqlen_balancing import log_seqlen_unbalance

from treegrpo.integrations.verl.advantages import ESTIMATOR_NAMES, NEED_LOGPROBS, Rows, known_rows
from treegrpo.integrations.verl.micro_batches import by_rank, row_costs


@register_trainer("tree_sync")
class TreePPOTrainerSync(PPOTrainerSync):
    """``PPOTrainerSync`` that keeps a prompt's rows on one data-parallel rank, and next to each other there.

    verl deals rows out by length, which tears siblings apart, and what they share would be computed on each rank.
    Raises ``ValueError`` for ``actor.shuffle=True``, which would tear them apart again. Sets ``trainer_mode`` in
    ``config`` to "sync".
    """

    def __init__(self, config: DictConfig) -> None:
        if config.actor_rollout_ref.actor.shuffle:
            raise ValueError("actor_rollout_ref.actor.shuffle=True tears groups apart: set it to False")
        # verl gives any other mode the replay buffer, prefetching and checkpoints of its asynchronous trainers
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        was_at = {key: row for row, key in enumerate(batch.keys)}
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        # as the rows came, verl's padding behind them: no mini-batch is all padding
        batch.reorder(sorted(range(len(batch.keys)), key=lambda row: was_at.get(batch.keys[row], len(was_at))))
        num_ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        lengths, prompts = ([int(tag[name]) for tag in batch.tags] for name in ("seq_len", "prompt_len"))
        groups, sessions, _ = zip(*map(sample_of, batch.keys), strict=True)
        costs = row_costs(groups, sessions, prompts, lengths)
        # verl's padding rows are all alike: they fill ranks up
        is_padding = [tag.get("is_padding", False) for tag in batch.tags]
        keys = [key if pad else group for key, group, pad in zip(batch.keys, groups, is_padding, strict=True)]
        costs = [0 if pad else cost for cost, pad in zip(costs, is_padding, strict=True)]
        ranks = by_rank(keys, costs, num_ranks)
        batch.reorder([row for rank in ranks for row in rank])
        prefix = kwargs.get("logging_prefix", "global_seqlen")
        balance = log_seqlen_unbalance(seqlen_list=lengths, partitions=ranks, prefix=prefix)
        # the others describe the order before, and stand already
        metrics.update({name: value for name, value in balance.items() if "/balanced_" in name})
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self.config.algorithm.adv_estimator not in ESTIMATOR_NAMES:
            return super()._compute_advantage(batch, metrics)
        fields = ["prompts", "responses", "response_mask"]
        if self.config.algorithm.adv_estimator in NEED_LOGPROBS:
            fields.append("old_log_probs")
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        prompts, responses, masks, *logprobs = ([row.tolist() for row in data[name].unbind()] for name in fields)
        _, sessions, numbers = zip(*map(sample_of, batch.keys), strict=True)
        with known_rows(Rows(prompts, responses, masks, sessions, numbers, *logprobs)):
            return super()._compute_advantage(batch, metrics)


def sample_of(key: str) -> tuple[str, str, int]:
    """(uid, session, number) of a sample's key ``{uid}_{session}_{number}``; ValueError for another form."""
    parts = key.rsplit("_", 2)
    if len(parts) != 3 or not parts[2].isdecimal():
        raise ValueError(f"sample key {key!r} is not of the form uid_session_number: verl of another version?")
    return parts[0], parts[1], int(parts[2])
