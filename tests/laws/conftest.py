"""The table of instances: every law runs on every row. A new method, kind, storage or option is a new row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, PeftConfig, PeftModel, get_peft_model

PATH = "layer"


def lora_dense(W: Tensor, t: dict[str, Tensor], s: float) -> Tensor:
    return W + s * torch.einsum("or,ri->oi", t["lora_B.weight"], t["lora_A.weight"])


def dora_dense(W: Tensor, t: dict[str, Tensor], s: float) -> Tensor:
    V = lora_dense(W, t, s)
    return t["lora_magnitude_vector"][:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()


@dataclass(frozen=True)
class Instance:
    """One row: a configuration, a layer, and the weight it must act as, from the file's tensors alone."""

    id: str
    config: Callable[..., PeftConfig]
    options: dict[str, Any]
    dense: Callable[[Tensor, dict[str, Tensor]], Tensor]
    count: int
    fresh_is_base: bool = True
    bias: bool = True
    in_out: tuple[int, int] = (12, 9)
    extra: dict[str, Any] = field(default_factory=dict)

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        layer = nn.Linear(*self.in_out, bias=self.bias)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        return nn.ModuleDict({PATH: layer, "other": nn.Linear(3, 3)}).to(dtype)

    def make(self, dtype: torch.dtype = torch.float32, *, random: bool = True, **options: Any) -> PeftModel:
        config = self.config(target_modules=[PATH], **self.options | options)
        model = get_peft_model(_Callable.of(self.base(dtype)), config)
        if random:
            randomise(model)
        return model

    def x(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*(shape or (4, 5)), self.in_out[0], generator=torch.Generator().manual_seed(3)).to(dtype)


class _Callable(nn.Module):
    """A model with one adapted layer and one that nothing touches."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.layer, self.other = parts[PATH], parts["other"]

    @classmethod
    def of(cls, parts: nn.Module) -> _Callable:
        assert isinstance(parts, nn.ModuleDict)
        return cls(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every trainable parameter random values of a size that a trained adapter has."""
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.copy_(p * (1 + 0.3 * noise) if "magnitude" in name else 0.4 * noise)


IN, OUT = 12, 9
INSTANCES = [
    Instance("lora", LoraConfig, {"r": 4, "lora_alpha": 6}, lambda W, t: lora_dense(W, t, 1.5), 4 * (IN + OUT)),
    Instance("lora-no-bias", LoraConfig, {"r": 3}, lambda W, t: lora_dense(W, t, 8 / 3), 3 * (IN + OUT), bias=False),
    Instance("lora-rank-stabilised", LoraConfig, {"r": 4, "use_rslora": True}, lambda W, t: lora_dense(W, t, 4.0), 4 * (IN + OUT)),
    Instance("lora-gaussian", LoraConfig, {"r": 2, "init_lora_weights": "gaussian"}, lambda W, t: lora_dense(W, t, 4.0), 2 * (IN + OUT)),
    Instance(
        "lora-orthogonal",
        LoraConfig,
        {"r": 4, "init_lora_weights": "orthogonal"},
        lambda W, t: lora_dense(W, t, 2.0),
        4 * (IN + OUT),
        fresh_is_base=False,
    ),
    Instance(
        "lora-random",
        LoraConfig,
        {"r": 4, "init_lora_weights": False},
        lambda W, t: lora_dense(W, t, 2.0),
        4 * (IN + OUT),
        fresh_is_base=False,
    ),
    Instance(
        "lora-rank-pattern",
        LoraConfig,
        {"rank_pattern": {PATH: 2}, "alpha_pattern": {PATH: 3}},
        lambda W, t: lora_dense(W, t, 1.5),
        2 * (IN + OUT),
    ),
    Instance("lora-trained-bias", LoraConfig, {"r": 2, "bias": "lora_only"}, lambda W, t: lora_dense(W, t, 4.0), 2 * (IN + OUT) + OUT),
    Instance("dora", LoraConfig, {"r": 4, "use_dora": True}, lambda W, t: dora_dense(W, t, 2.0), 4 * (IN + OUT) + OUT),
    Instance(
        "dora-no-bias",
        LoraConfig,
        {"r": 4, "use_dora": True, "use_rslora": True},
        lambda W, t: dora_dense(W, t, 4.0),
        4 * (IN + OUT) + OUT,
        bias=False,
    ),
    Instance("lora-wide", LoraConfig, {"r": 20}, lambda W, t: lora_dense(W, t, 0.4), 20 * (IN + OUT)),
    Instance("lora-one-output", LoraConfig, {"r": 1}, lambda W, t: lora_dense(W, t, 8.0), IN + 1, in_out=(IN, 1)),
]


@pytest.fixture(params=INSTANCES, ids=lambda i: i.id)
def case(request: pytest.FixtureRequest) -> Instance:
    """One row of the table."""
    return request.param
