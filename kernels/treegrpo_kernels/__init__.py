"""Prefix-tree attention for training: tensors in, tensors out. Knows tokens and intervals, nothing of rollouts.

import treegrpo_kernels as tk
plan = tk.TreePlan.build(subtree_end)          # once per packed row
out = tk.tree_attention(q, k, v, plan)         # every layer, forward and backward
"""

from . import reference
from .api import Backend, backends, tree_attention
from .conv import tree_conv1d
from .plan import TileLists, TreePlan
from .recurrence import tree_gated_delta_rule, tree_gated_linear_attention

__all__ = [
    "Backend",
    "TileLists",
    "TreePlan",
    "backends",
    "reference",
    "tree_attention",
    "tree_conv1d",
    "tree_gated_delta_rule",
    "tree_gated_linear_attention",
]
