"""A module's own weight, as what an equation calls W."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..form import Form
from ..operators import Dense, Operator
from .base import LayerKind


class Frozen:
    """A module's own weight, as the linear map W of an equation."""

    def __init__(self, kind: LayerKind, module: nn.Module) -> None:
        self.kind, self.module = kind, module

    @property
    def form(self) -> Form:
        return self.kind.form(self.module)

    def dense(self) -> Tensor:
        return self.kind.matrix(self.module).detach()

    def operator(self) -> Operator:
        found = self.kind.packed(self.module)
        if found is not None:
            return found
        W = self.dense()
        return Dense(W.to(torch.promote_types(W.dtype, torch.float32)))
