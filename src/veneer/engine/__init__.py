"""How an equation is evaluated: the split and merged strategies, what is disturbed in training, and who decides between them."""

from .assignment import BASE, Assignment, put_together
from .batches import Batches
from .choice import Choice, Strategy, costs
from .evaluate import choice_for, equations_now, evaluate, merged_bias, merged_matrix, strategy
from .fitting import fitted
from .mixed import alone, evaluate_mixed

__all__ = [
    "BASE",
    "Assignment",
    "Batches",
    "Choice",
    "Strategy",
    "alone",
    "choice_for",
    "costs",
    "equations_now",
    "evaluate",
    "evaluate_mixed",
    "fitted",
    "merged_bias",
    "merged_matrix",
    "put_together",
    "strategy",
]
