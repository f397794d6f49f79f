"""Which sparsity meets a budget, and what limits leave to each layer: found from surveys, without pruning.

A survey's tables bound how many weights every layer keeps at any sparsity (`dimap._C.Counts`). So one
survey brackets the sparsity that a budget asks for, and further ones, through windows around the cuts,
close the bracket; all integers, the same wherever the weights lie.

`asked` (budgets and limits), `costs` (what they bound), `tables` (surveys), `search` (the sparsity).
"""

from __future__ import annotations

from .asked import Budgets
from .costs import costs_of
from .search import STEPS, Solved, solve
from .tables import ALL, Tables, Weights

__all__ = ["ALL", "STEPS", "Budgets", "Solved", "Tables", "Weights", "costs_of", "solve"]
