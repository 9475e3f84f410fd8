"""What a storage answers: how the numbers of one parameter are packed, read, multiplied with, and packed again with the same settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Storage:
    """How the numbers of one parameter lie in memory; a storage holds no state of a layer."""

    name: str
    plain: bool = False
    """Whether the parameter is a tensor of numbers that can be multiplied as it stands."""

    def matches(self, layer: nn.Module, tensor: str) -> bool:
        """Whether the parameter is packed like this."""
        raise NotImplementedError

    def shape(self, layer: Any, tensor: str) -> torch.Size:
        """The shape of the numbers, unpacked."""
        return layer._parameters[tensor].shape

    def dtype(self, layer: Any, tensor: str) -> torch.dtype:
        """The type in which the numbers were packed: what is rounded to this type before it is packed loses nothing more by that."""
        return layer._parameters[tensor].dtype

    def read(self, layer: Any, tensor: str) -> Tensor:
        """The numbers as a plain tensor in the layer's own shape."""
        raise NotImplementedError

    def times(self, layer: Any, tensor: str, x: Tensor) -> Tensor:
        """x Wᵀ for a matrix W, outside autograd; storages that can multiply without unpacking do."""
        W = self.read(layer, tensor)
        return x.to(W.dtype) @ W.mT

    def packed(self, layer: Any, tensor: str) -> Tensor:
        """The tensor of the packed numbers: another one, or another version of it, once they are others."""
        return layer._parameters[tensor].detach()

    def pack(self, layer: Any, tensor: str, value: Tensor) -> nn.Parameter:
        """A new parameter that holds these numbers, packed as the layer's own is; the layer stays as it is."""
        raise NotImplementedError

    def take(self, layer: Any, tensor: str) -> nn.Parameter:
        """The layer's own parameter with everything that belongs to it, so that `put` can give it back."""
        return layer._parameters[tensor]

    def put(self, layer: Any, tensor: str, parameter: nn.Parameter) -> None:
        """Make a parameter that was packed or taken the layer's own."""
        layer._parameters[tensor] = parameter

    def write(self, layer: Any, tensor: str, value: Tensor) -> None:
        """Replace the numbers."""
        self.put(layer, tensor, self.pack(layer, tensor, value))

    def device(self, parameter: nn.Parameter) -> torch.device:
        """Where what a taken parameter holds is."""
        return parameter.device

    def move(self, parameter: nn.Parameter, device: torch.device) -> None:
        """Move what a taken parameter holds to another device; the object stays."""
        parameter.data = parameter.data.to(device)
