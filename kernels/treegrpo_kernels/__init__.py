"""Prefix-tree attention for training: tensors in, tensors out. Knows tokens and intervals, nothing of rollouts.

import treegrpo_kernels as tk
plan = tk.TreePlan.build(subtree_end)          # once per packed row
out = tk.tree_attention(q, k, v, plan)         # every layer, forward and backward
"""

from . import reference
from .api import Backend, backends, tree_attention
from .plan import TileLists, TreePlan

__all__ = ["Backend", "TileLists", "TreePlan", "backends", "reference", "tree_attention"]
