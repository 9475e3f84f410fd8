"""How an equation is evaluated: the split and merged strategies, what is disturbed in training, and who decides between them."""

from .choice import Strategy
from .evaluate import evaluate, merged_bias, merged_matrix, strategy

__all__ = ["Strategy", "evaluate", "merged_bias", "merged_matrix", "strategy"]
