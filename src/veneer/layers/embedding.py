"""The kind of embeddings: a linear map of one-hot vectors, so the columns of W are the rows of the table."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..form import Form
from ..operators import Operator
from .base import LayerKind
from .storages import storage_of


class EmbeddingKind(LayerKind):
    """y = W e_id; a scale that a subclass multiplies its output with (`embed_scale`) multiplies the change too."""

    name = "embedding"
    offset = None
    rotates_input = False

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding) and storage_of(layer, self.tensor) is not None and layer.max_norm is None

    def form(self, layer: Any) -> Form:
        return Form(layer.embedding_dim, layer.num_embeddings, lookup=True)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def leading(self, layer: Any, x: Tensor) -> int:
        return x.dim()

    def apply(self, layer: Any, S: Operator, x: Tensor) -> Tensor:
        return self._scaled(layer, S.columns(x))

    def forward_with(self, layer: Any, matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return self._scaled(layer, F.embedding(x, matrix.mT)).to(layer._parameters["weight"].dtype)

    def _scaled(self, layer: Any, y: Tensor) -> Tensor:
        scale = getattr(layer, "embed_scale", None)
        return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
