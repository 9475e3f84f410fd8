"""Layers of every kind for the law table: how to make one, what to feed it, and how its weights look as matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from dense import Dense, Where
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """One weight of a layer.

    Args:
        name: its path from the layer.
        prefix: of its tensors' names in the file, behind the layer's path.
        where: as a matrix.
        to_matrix: its own shape to (out, in), or to (experts, out, in).
        back: the other way.
        bias: the bias that goes with it.
        rows: of the matrix, where this is a part of a fused weight.
    """

    name: str
    where: Where
    to_matrix: Callable[[Tensor], Tensor] = lambda w: w
    back: Callable[[Tensor], Tensor] = lambda m: m
    prefix: str = ""
    bias: str | None = None
    experts: int | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of layer."""

    make: Callable[[], nn.Module]
    weights: tuple[Weight, ...]
    feed: Callable[[Sequence[int]], Tensor]
    """An input with these leading dimensions, as far as the kind takes them."""
    target: dict[str, Any]
    called: bool = True


class Experts(nn.Module):
    """A mixture of experts that reads its stacked weights expert by expert, as transformers' do."""

    def __init__(self, experts: int, in_: int, mid: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.zeros(experts, in_, mid) if transposed else torch.zeros(experts, mid, in_))
        self.down = nn.Parameter(torch.zeros(experts, mid, in_) if transposed else torch.zeros(experts, in_, mid))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            up, down = self.up[e], self.down[e]
            if not self.is_transposed:
                up, down = up.mT, down.mT
            y = y + F.gelu(x @ up) @ down
        return y


class Reader(nn.Module):
    """A module that reads a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.mT


class Attention(nn.MultiheadAttention):
    """Self-attention on one input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one input, one output
        return super().forward(x, x, x, need_weights=False)[0]


def conv(kind: type[nn.Module], channels: int, out: int, kernel: tuple[int, ...], size: tuple[int, ...], **options: Any) -> Kind:
    def make() -> nn.Module:
        return kind(channels, out, kernel, **options)

    def feed(lead: Sequence[int]) -> Tensor:
        return torch.randn(*lead[:1], channels, *size)

    in_ = channels // options.get("groups", 1) * torch.Size(kernel).numel()
    weight = Weight(
        "weight",
        Where(out, in_, kernel),
        lambda w: w.flatten(1),
        lambda m: m.reshape(out, -1, *kernel),
        bias="bias" if options.get("bias", True) else None,
    )
    return Kind(make, (weight,), feed, {"target_modules": ["layer"]})


def linear(in_: int = 12, out: int = 8, *, bias: bool = True) -> Kind:
    weight = Weight("weight", Where(out, in_), bias="bias" if bias else None)
    return Kind(lambda: nn.Linear(in_, out, bias=bias), (weight,), lambda lead: torch.randn(*lead, in_), {"target_modules": ["layer"]})


def transposed_linear() -> Kind:
    from transformers.pytorch_utils import Conv1D

    weight = Weight("weight", Where(8, 12), lambda w: w.T, lambda m: m.T, bias="bias")
    return Kind(lambda: Conv1D(8, 12), (weight,), lambda lead: torch.randn(*(lead or [1]), 12), {"target_modules": ["layer"]})


def embedding() -> Kind:
    weight = Weight("weight", Where(12, 10, lookup=True), lambda w: w.T, lambda m: m.T)
    return Kind(lambda: nn.Embedding(10, 12), (weight,), lambda lead: torch.randint(10, tuple(lead)), {"target_modules": ["layer"]})


def attention() -> Kind:
    weights = (
        Weight("in_proj_weight", Where(24, 8), bias="in_proj_bias"),
        Weight("out_proj.weight", Where(8, 8), prefix="base_layer.out_proj.", bias="out_proj.bias"),
    )

    def feed(lead: Sequence[int]) -> Tensor:
        return torch.randn(lead[0] if lead else 2, max(lead[1], 1) if len(lead) > 1 else 3, 8)

    return Kind(lambda: Attention(8, 2, batch_first=True), weights, feed, {"target_modules": ["layer"]}, called=False)


def experts(*, transposed: bool) -> Kind:
    def flip(w: Tensor) -> Tensor:
        return w.mT if transposed else w

    weights = (
        Weight("up", Where(6, 8), flip, flip, prefix="base_layer.", experts=3),
        Weight("down", Where(8, 6), flip, flip, experts=3),
    )
    targets = {"target_parameters": ["layer.up", "layer.down"], "target_modules": []}
    return Kind(lambda: Experts(3, 8, 6, transposed), weights, lambda lead: torch.randn(*lead, 8), targets, called=False)


def bare() -> Kind:
    targets = {"target_parameters": ["table"], "target_modules": []}
    return Kind(Reader, (Weight("table", Where(6, 8)),), lambda lead: torch.randn(*lead, 8), targets, called=False)


def fused(layer: Callable[[], nn.Module], layout: Any, rows: dict[str, list[int]], flip: Callable[[Tensor], Tensor]) -> Kind:
    weights = tuple(
        Weight("weight", Where(len(own), 8), flip, flip, prefix=f"{part}.", bias="bias", rows=tuple(own)) for part, own in rows.items()
    )
    target = {"target_modules": [f"layer.{part}" for part in rows], "fused_layouts": {"layer": layout}}
    return Kind(layer, weights, lambda lead: torch.randn(*(lead or [1]), 8), target)


def fused_transposed() -> Kind:
    from transformers.pytorch_utils import Conv1D

    rows = {"q": [0, 1, 6, 7], "v": [4, 5, 10, 11]}
    return fused(lambda: Conv1D(12, 8), {"groups": 2, "parts": ["q", "k", "v"]}, rows, lambda w: w.T)


def fused_attention() -> Kind:
    """The query and the value of `in_proj_weight`; its output projection is left alone."""
    weights = tuple(
        Weight("in_proj_weight", Where(8, 8), prefix=f"in_proj_weight.{part}.", bias="in_proj_bias", rows=tuple(range(at, at + 8)))
        for part, at in (("q", 0), ("v", 16))
    )
    whole = attention()
    return Kind(whole.make, weights, whole.feed, {"target_modules": ["in_proj_weight.q", "in_proj_weight.v"]}, called=False)


KINDS: dict[str, Kind] = {
    "linear": linear(),
    "transposed-linear": transposed_linear(),
    "conv1d": conv(nn.Conv1d, 4, 8, (3,), (9,), stride=2, padding=1),
    "conv2d": conv(nn.Conv2d, 4, 8, (3, 2), (7, 6), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv2d-groups": conv(nn.Conv2d, 8, 8, (3, 3), (6, 6), padding="same", groups=2, padding_mode="reflect"),
    "conv2d-1x1": conv(nn.Conv2d, 8, 4, (1, 1), (3, 4), bias=False),
    "conv3d": conv(nn.Conv3d, 2, 4, (2, 1, 2), (3, 3, 4), padding=1, padding_mode="circular"),
    "embedding": embedding(),
    "attention": attention(),
    "experts": experts(transposed=False),
    "experts-transposed": experts(transposed=True),
    "parameter": bare(),
    "fused": fused(lambda: nn.Linear(8, 14), {"q": 8, "k": 2, "v": 4}, {"q": [*range(8)], "v": [*range(10, 14)]}, lambda w: w),
    "fused-groups": fused_transposed(),
    "fused-attention": fused_attention(),
}


def adapted_weights(
    kind: Kind, dense: Dense, own: dict[str, Tensor], t: dict[str, Tensor], experts_of: Callable[[str, Tensor, int, int], Tensor]
) -> dict[str, Tensor]:
    """Every weight of the layer as the formula has it, in its own shape, in float64."""
    found = {}
    for w in kind.weights:
        longer = [o.prefix for o in kind.weights if o.prefix != w.prefix and o.prefix.startswith(w.prefix)]
        mine = {k.removeprefix(w.prefix): v for k, v in t.items() if k.startswith(w.prefix) and not any(k.startswith(p) for p in longer)}
        M = w.to_matrix(found.get(w.name, own[w.name]))
        if w.rows is not None:
            rows = torch.tensor(w.rows)
            found[w.name] = w.back(M.index_copy(0, rows, dense(M[rows], mine, w.where)))
        elif w.experts is None:
            found[w.name] = w.back(dense(M, mine, w.where))
        else:
            each = [dense(M[e], {k: experts_of(k, v, e, w.experts) for k, v in mine.items()}, w.where) for e in range(w.experts)]
            found[w.name] = w.back(torch.stack(each))
    return found
