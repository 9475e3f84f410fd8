"""How an equation is evaluated: the split and merged strategies, what is disturbed in training, and who decides between them."""

from .choice import Choice, Strategy, costs
from .evaluate import choice_for, equations_now, evaluate, merged_bias, merged_matrix, strategy
from .fitting import fitted

__all__ = [
    "Choice",
    "Strategy",
    "choice_for",
    "costs",
    "equations_now",
    "evaluate",
    "fitted",
    "merged_bias",
    "merged_matrix",
    "strategy",
]
