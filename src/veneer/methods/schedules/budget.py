"""AdaLoRA's schedule: importance of every number, a shrinking budget of triplets, and the orthogonality penalty (arXiv:2303.10512, eq. 4 to 12).

The penalty's gradient is added just before the optimiser's step, so it counts once per step whatever the model returns, however many batches were
accumulated and however the loss was scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import StateError
from ..adalora import TRIPLETS
from ..base import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..adalora import AdaLoraConfig


class Budget(Schedule):
    """The schedule of one AdaLoRA adapter; what it learns lies in the layers' own buffers, so that checkpoints hold it."""

    def __init__(self, config: AdaLoraConfig) -> None:
        self.config = config

    def before_step(self, layers: Sequence[Any]) -> None:
        if self.config.total_step is None:
            raise StateError(
                "AdaLoRA needs the number of training steps before the first one: give AdaLoraConfig(total_step=…), or train with Trainer, or make a "
                "learning-rate scheduler that knows it (transformers' with num_training_steps, or OneCycleLR) before the first step"
            )
        weight = self.config.orth_reg_weight
        factors = [(getattr(layer, name), name == "lora_A") for layer in layers for name in ("lora_A", "lora_B")]
        factors = [(p, rows) for p, rows in factors if p.grad is not None and p.numel()]
        for p, rows in factors if weight else []:
            p.grad.add_(_like(_penalty_gradient(_whole(p), rows), p), alpha=weight / len(factors))

    def after_step(self, layers: Sequence[Any]) -> None:
        c = self.config
        assert c.total_step is not None
        for layer in layers:
            layer.step += 1
        t, last = int(layers[0].step.max()), c.total_step - c.tfinal
        if t > last:
            for layer in layers:
                layer.lora_E.mul_(_like((~layer.pruned).unsqueeze(-1), layer.lora_E))
            return
        if t < last:
            for layer in layers:
                self._weigh(layer)
        first = sum(layer.pruned.numel() for layer in layers)
        target = min(c.target_r * sum(layer.pruned.numel() // max(layer.pruned.shape[-1], 1) for layer in layers), first)
        if t <= c.tinit:
            return
        left = 1 - (t - c.tinit) / (last - c.tinit)
        budget = int((first - target) * left**3 + target)
        if t == last or t % c.deltaT == 0:
            self._prune(layers, first - budget)
        if t == last:
            for layer in layers:
                for name in TRIPLETS:
                    getattr(layer, f"{name}_importance").zero_()
                    getattr(layer, f"{name}_uncertainty").zero_()

    def _weigh(self, layer: Any) -> None:
        """Moving averages of |p · grad| and of its distance from them."""
        for name in TRIPLETS:
            p = getattr(layer, name)
            if p.grad is None:
                continue
            now = _whole((p.detach() * p.grad).abs())
            importance, uncertainty = getattr(layer, f"{name}_importance"), getattr(layer, f"{name}_uncertainty")
            importance.mul_(self.config.beta1).add_(now, alpha=1 - self.config.beta1)
            uncertainty.mul_(self.config.beta2).add_((now - importance).abs(), alpha=1 - self.config.beta2)

    def _prune(self, layers: Sequence[Any], count: int) -> None:
        """Zero the λ of the `count` least important triplets of all layers."""
        if count < 1:
            return
        scores = [_triplet_scores(layer) for layer in layers]
        device = scores[0].device
        threshold = torch.kthvalue(torch.cat([s.flatten().to(device) for s in scores]), count).values
        for layer, score in zip(layers, scores, strict=True):
            layer.pruned.copy_(score <= threshold.to(score.device))
            layer.lora_E.mul_(_like((~layer.pruned).unsqueeze(-1), layer.lora_E))


def _triplet_scores(layer: Any) -> Tensor:
    """The importance of λ_i plus the mean ones of the i-th row of Q and column of P: (…, r)."""
    A, E, B = (getattr(layer, f"{name}_importance") * getattr(layer, f"{name}_uncertainty") for name in TRIPLETS)
    return E.squeeze(-1) + A.mean(-1) + B.mean(-2)


def _penalty_gradient(p: Tensor, rows: bool) -> Tensor:
    """∇‖A Aᵀ − I‖_F = 2 (A Aᵀ − I) A / ‖A Aᵀ − I‖_F for the rows of A, or the same for the columns of B."""
    A = p if rows else p.mT
    C = A @ A.mT - torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    G = 2 * (C @ A) / torch.linalg.matrix_norm(C, keepdim=True).clamp_min(1e-12)
    return G if rows else G.mT


def _whole(t: Tensor) -> Tensor:
    """All of a tensor, gathered where FSDP2 has spread it."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _like(t: Tensor, p: Any) -> Tensor:
    """`t` in p's type, spread as p is."""
    t = t.to(p.dtype)
    if not hasattr(p, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
