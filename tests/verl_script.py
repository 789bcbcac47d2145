"""verl's ``main_ppo`` on a CPU, its sampler replaced by a script: named in VERL_USE_EXTERNAL_MODULES.

Everything else is verl's: task runner, trainer, Ray workers, TransferQueue, padding rows, checkpoints.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import verl_cpu  # noqa: F401

# isort: split
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

SESSIONS = 4


def _say_what_it_is(trainer: PPOTrainerSync) -> None:
    found = dict(trainer=type(trainer).__name__, buffer=type(trainer.replay_buffer).__name__)
    Path(os.environ["VERL_FILE_LOGGER_PATH"]).with_suffix(".json").write_text(json.dumps(found))


# no servers, and so no weights to send them
PPOTrainerSync._enable_hybrid_replicas = False
PPOTrainerSync.on_init_end = _say_what_it_is
PPOTrainerSync.on_step_end = PPOTrainerSync.on_sample_end = lambda self: None
RolloutReplicaRegistry.register("script", lambda: RolloutReplica)


class ScriptedAgentLoops:
    """What AgentLoopManagerTQ and its workers leave in TransferQueue, made up from the prompt alone."""

    @classmethod
    def create(cls, config: Any, **kwargs: Any) -> ScriptedAgentLoops:
        return cls()

    def generate_sequences(self, prompts: TensorDict) -> None:
        for messages, uid in zip(prompts["raw_prompt"], prompts["uid"], strict=True):
            prompt = [int(word[1:]) for word in messages[0]["content"].split()]
            rows = [row for session in sessions_of(prompt) for row in session]
            keys, fields, tags = zip(*(sample(uid, *row) for row in rows), strict=True)
            tq.kv_batch_put(
                keys=list(keys), fields=list_of_dict_to_tensordict(list(fields)), tags=list(tags), partition_id="train"
            )
            tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})


def sessions_of(prompt: list[int]) -> list[list[tuple]]:
    """(session, number, prompt, response, mask, reward) of every row: responses begin alike two and two; one session
    is two calls of the model, one two calls between which the agent forgot its prompt, one uses a tool."""
    draw = random.Random(str(prompt))
    words = lambda n: [draw.randrange(2, 61) for _ in range(n)]  # noqa: E731
    halves = [words(4), words(4)]
    found = []
    for session in range(SESSIONS):
        response = halves[session // 2] + words(draw.randrange(2, 6))
        mask = [1] * len(response)
        calls = [(prompt, response, mask)]
        if session == 1:
            first = response[:3]
            calls = [(prompt, first, [1] * 3), (prompt + first + words(2), response[3:], mask[3:])]
        elif session == 2:
            calls = [(prompt, response, mask), (words(4), words(3), [1] * 3)]
        elif session == 3:
            mask[3:5] = [0, 0]
        reward = float(draw.randrange(3))
        found.append([(session, number, *call, reward) for number, call in enumerate(calls)])
    return found


def sample(
    uid: str, session: int, number: int, prompt: list[int], response: list[int], mask: list[int], reward: float
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(key, fields, tags) of a row, as AgentLoopWorkerTQ makes them."""
    ids, trained = torch.tensor(prompt + response), torch.tensor(mask)
    scores = torch.zeros(len(response))
    scores[-1] = reward
    noise = torch.rand(len(response), generator=torch.Generator().manual_seed(session))
    fields = dict(
        uid=uid,
        prompts=ids[: len(prompt)],
        responses=ids[len(prompt) :],
        response_mask=trained,
        loss_mask=trained,
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        multi_modal_inputs={},
        rm_scores=scores,
        rollout_log_probs=-2 - noise,
        num_turns=2,
        extra_fields={},
    )
    tags = dict(status="success", prompt_len=len(prompt), response_len=len(response), seq_len=len(ids))
    return f"{uid}_{session}_{number}", fields, tags | dict(global_steps=1, min_global_steps=0, max_global_steps=0)
