"""verl's FSDP engine with every sequence's shared beginnings computed once, and tree advantages in its trainer.

    VERL_ENGINE_VENDOR=treegrpo python -m verl.trainer.main_ppo \\
        +actor_rollout_ref.model.override_config.attn_implementation=treegrpo \\
        trainer.v1.trainer_mode=tree_sync algorithm.adv_estimator=tree_grpo ...

verl finds this module by its entry point ``verl.plugins`` (or VERL_USE_EXTERNAL_MODULES=treegrpo.integrations.verl) and
imports it in every process; importing registers everything and says so in one INFO line.

engine.py         the engine: vendor "treegrpo" of fsdp and fsdp2
micro_batches.py  which rows share a micro-batch, which a data-parallel rank
advantages.py     estimators under verl's registry
trainer.py        trainer_mode tree_sync: groups kept on one rank, token ids for the estimators
"""

import logging
from importlib.metadata import version

from treegrpo.hf import ATTENTION
from treegrpo.integrations.verl.advantages import ESTIMATOR_NAMES
from treegrpo.integrations.verl.engine import VENDOR, TreeFSDPEngine

__all__ = ["ATTENTION", "ESTIMATOR_NAMES", "TRAINER_MODE", "VENDOR", "TreeFSDPEngine"]

TRAINER_MODE = "tree_sync"

_log = logging.getLogger("treegrpo")


def _register_trainer() -> str:
    """Imports the trainer where its packages are; says what came of it."""
    try:
        from treegrpo.integrations.verl import trainer  # noqa: F401
    except ImportError as error:
        return f"trainer_mode {TRAINER_MODE} left out ({error})"
    return f"trainer_mode {TRAINER_MODE}"


# verl reports a plugin that fails to load at DEBUG only: no such line means no trees; verl sets all loggers to WARNING
_log.setLevel(logging.INFO)
_log.info(
    "verl %s: engine vendor %r for fsdp and fsdp2, adv_estimator %s, %s",
    version("verl"),
    VENDOR,
    ", ".join(ESTIMATOR_NAMES),
    _register_trainer(),
)
