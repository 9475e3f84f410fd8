"""How an equation is evaluated: the split and merged strategies, dropout, and who decides between them."""

from .evaluate import Strategy, evaluate, strategy

__all__ = ["Strategy", "evaluate", "strategy"]
