"""TRL's GRPOTrainer with every completion's shared beginnings computed once, and trees grown through its generation.

from treegrpo.integrations.trl import TreeGRPOConfig, TreeGRPOTrainer
args = TreeGRPOConfig(num_trees=2, num_expansions=2, num_generations=6, ...)
trainer = TreeGRPOTrainer(model, reward_funcs, args=args, train_dataset=..., tools=[...])

config.py    TreeGRPOConfig: GRPOConfig with the shape of trees, the estimator and the row's budget
checks.py    what is refused before a model is loaded
trainer.py   TreeGRPOTrainer: what of GRPOTrainer is replaced
rows.py      a micro-batch's rows -> packed rows; the router loss of mixtures of experts on them
grow.py      initialise-then-expand through TRL's back-ends, tools and environments
serve.py     what is asked of a vLLM server, by any number of processes
search.py    a rollout_func over treegrpo.rollout: its engines and environments under TRL's trainer
credit.py    rewards of a group's leaves -> advantages per token
loss.py      shared_tokens under TRL's own loss
async_op.py  AsyncGRPOTrainer's packed rows through our attention
"""

from treegrpo.integrations.trl.async_op import async_tree_attention, plan_of_row, use_tree_op
from treegrpo.integrations.trl.config import TreeGRPOConfig
from treegrpo.integrations.trl.rows import packed
from treegrpo.integrations.trl.search import tree_rollouts
from treegrpo.integrations.trl.trainer import TreeGRPOTrainer, take

__all__ = [
    "TreeGRPOConfig",
    "TreeGRPOTrainer",
    "async_tree_attention",
    "packed",
    "plan_of_row",
    "take",
    "tree_rollouts",
    "use_tree_op",
]
