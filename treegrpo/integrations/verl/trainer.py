"""``trainer.v1.trainer_mode=tree_sync``: verl's synchronous trainer, groups kept on one rank, tree advantages."""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.seqlen_balancing import log_seqlen_unbalance

from treegrpo.integrations.verl.advantages import ESTIMATOR_NAMES, Rows, known_rows
from treegrpo.integrations.verl.micro_batches import by_rank


@register_trainer("tree_sync")
class TreePPOTrainerSync(PPOTrainerSync):
    """``PPOTrainerSync`` that keeps a prompt's rows on one data-parallel rank, and next to each other there.

    verl deals rows out by length, which tears siblings apart, and what they share would be computed on each rank.
    Raises ``ValueError`` for ``actor.shuffle=True``, which would tear them apart again.
    """

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        if self.config.actor_rollout_ref.actor.shuffle:
            raise ValueError("actor_rollout_ref.actor.shuffle=True tears groups apart: set it to False")
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        num_ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        lengths = [int(tag["seq_len"]) for tag in batch.tags]
        ranks = by_rank([session_of(key)[0] for key in batch.keys], lengths, num_ranks)
        batch.reorder([row for rank in ranks for row in rank])
        prefix = kwargs.get("logging_prefix", "global_seqlen")
        metrics.update(log_seqlen_unbalance(seqlen_list=lengths, partitions=ranks, prefix=prefix))
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self.config.algorithm.adv_estimator not in ESTIMATOR_NAMES:
            return super()._compute_advantage(batch, metrics)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts", "responses"])
        prompts, responses = ([row.tolist() for row in data[name].unbind()] for name in ("prompts", "responses"))
        with known_rows(Rows(prompts, responses, [session_of(key)[1] for key in batch.keys])):
            return super()._compute_advantage(batch, metrics)


def session_of(key: str) -> tuple[str, str]:
    """(uid, session) of a sample's key ``{uid}_{session}_{index}``; ValueError for another form."""
    parts = key.rsplit("_", 2)
    if len(parts) != 3:
        raise ValueError(f"sample key {key!r} is not of the form uid_session_index: verl of another version?")
    return parts[0], parts[1]
