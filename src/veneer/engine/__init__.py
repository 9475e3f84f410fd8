"""How an equation is evaluated: the split and merged strategies, what is disturbed in training, and who decides between them."""

from .choice import Choice, Evaluation, Strategy, costs
from .evaluate import choice_for, evaluate, meeting_tokens, merged_bias, merged_matrix, strategy

__all__ = [
    "Choice",
    "Evaluation",
    "Strategy",
    "choice_for",
    "costs",
    "evaluate",
    "meeting_tokens",
    "merged_bias",
    "merged_matrix",
    "strategy",
]
