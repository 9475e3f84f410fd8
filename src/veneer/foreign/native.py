"""Layers of such a file that are one of our methods, tensor by tensor, so that nothing is computed and writing them back gives the same file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PREFIX, PeftConfig, config_classes
from ..form import Form
from ..naming import exactly
from ..targets import base_modules
from .algorithms import LOCON, LOHA, LOKR, Algorithm, Parts, full_kronecker, lengths_of_rows, merged_core, scale


@dataclass(frozen=True)
class Native:
    """One of our methods behind an algorithm of such files.

    Args:
        peft_type: of the method.
        alpha: the field that holds α.
        names: their tensors' names → ours in the adapter file.
        options: (layers, forms) → the configurations' other fields that might fit them, the likeliest first.
    """

    peft_type: str
    alpha: str
    names: Mapping[str, str]
    options: Callable[[Mapping[str, Parts], Mapping[str, Form]], Iterator[dict[str, Any]]]


def _lora(layers: Mapping[str, Parts], forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    rows = all(lengths_of_rows(p, forms[path]) for path, p in layers.items() if "dora_scale" in p)
    if rows:
        yield {"use_dora": any("dora_scale" in p for p in layers.values())}


def _loha(layers: Mapping[str, Parts], forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    yield {"use_effective_conv2d": any("hada_t1" in p for p in layers.values())}


def _lokr(layers: Mapping[str, Parts], forms: Mapping[str, Form]) -> Iterator[dict[str, Any]]:
    # One kernel dimension and a full second factor is the one place where the public format means another order of the factors.
    if any("lokr_w2" in p and len(forms[path].kernel) == 1 for path, p in layers.items()):
        return
    first = [p["lokr_w1"].shape if "lokr_w1" in p else (len(p["lokr_w1_a"]), p["lokr_w1_b"].shape[1]) for p in layers.values()]
    core, both = (any(name in p for p in layers.values()) for name in ("lokr_t2", "lokr_w1_a"))
    for factor in dict.fromkeys([-1, *sorted((n for shape in first for n in shape if n > 1), reverse=True)]):
        yield {"use_effective_conv2d": core, "decompose_both": both, "decompose_factor": factor}


_SAME = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
NATIVES: dict[str, Native] = {
    LOCON.title: Native(
        "LORA",
        "lora_alpha",
        {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"},
        _lora,
    ),
    LOHA.title: Native("LOHA", "alpha", {n: n for n in LOHA.parts if n.startswith("hada_")}, _loha),
    LOKR.title: Native("LOKR", "alpha", {n: n for n in _SAME}, _lokr),
}


def native(
    model: nn.Module, algorithm: Algorithm, layers: Mapping[str, Parts], forms: Mapping[str, Form]
) -> tuple[PeftConfig, dict[str, Tensor]] | None:
    """The configuration and the file tensors of our own method for these layers; None where it has no words for one of them.

    Args:
        layers: path → the tensors there.
        forms: path → the weight's form.
    """
    known = NATIVES.get(algorithm.title)
    if known is None:
        return None
    layers = {path: merged_core(parts) for path, parts in layers.items()}
    ranks = {path: _rank(algorithm, parts) for path, parts in layers.items()}
    alphas = {path: r if full_kronecker(layers[path]) else scale(layers[path], r) * r for path, r in ranks.items()}
    common, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    fields = {
        "peft_type": known.peft_type,
        "r": common,
        known.alpha: alpha,
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != common},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
        "target_modules": exactly(list(layers), (p for p, _ in base_modules(model))),
    }
    cls = config_classes()[known.peft_type]
    for options in known.options(layers, forms):
        config = cls.from_dict(fields | options)
        tensors = _fitted(config, known, layers, forms)
        if tensors is not None:
            return config, tensors
    return None


def _rank(algorithm: Algorithm, parts: Parts) -> int:
    """r; of two full factors, which have none, one that makes our method leave them full."""
    r = algorithm.rank(parts)
    if not full_kronecker(parts):
        return r
    largest = max(*parts["lokr_w1"].shape, *parts["lokr_w2"].shape[:2])
    return max(r, -(-largest // 2))


def _fitted(config: PeftConfig, known: Native, layers: Mapping[str, Parts], forms: Mapping[str, Form]) -> dict[str, Tensor] | None:
    """The tensors as our file has them, if they are what the configuration asks for."""
    found: dict[str, Tensor] = {}
    for path, parts in layers.items():
        wanted = {s.key: s.stored or s.shape for s in config.method(path).parameters(forms[path]) if s.key}
        own = {known.names.get(n, n): t for n, t in parts.items() if n != "alpha"}
        if set(own) != set(wanted) or any(_core(t.shape) != _core(wanted[k]) for k, t in own.items()):
            return None
        found |= {f"{PREFIX}{path}.{k}": t.reshape(wanted[k]) for k, t in own.items()}
    return found


def _core(shape: tuple[int, ...]) -> list[int]:
    """A shape without its ones, by which a 1 × 1 convolution and a linear layer differ."""
    return [n for n in shape if n != 1]


@dataclass(frozen=True)
class Spelt:
    """How a configuration's tensors are spelt in such a file."""

    native: Native

    def has(self, tensors: Mapping[str, Tensor], form: Form) -> bool:
        """Whether each of our tensors has a name there, and means the same."""
        swapped = len(form.kernel) == 1 and "lokr_w2" in tensors
        return set(tensors) <= set(self.native.names.values()) and not swapped

    def parts(self, tensors: Mapping[str, Tensor], form: Form, scale: float, rank: int) -> dict[str, Tensor]:
        """Their tensors of one layer, from ours by their name in the adapter file, with α beside them."""
        theirs = {ours: name for name, ours in self.native.names.items()}
        found = {theirs[k]: t for k, t in tensors.items()}
        if "dora_scale" in found:
            found["dora_scale"] = found["dora_scale"].reshape(form.out, 1, *(1 for _ in form.kernel))
        if full_kronecker(found):
            # Readers take the scale of two full factors for 1.
            found["lokr_w1"] = found["lokr_w1"] if scale == 1 else scale * found["lokr_w1"]
            scale = 1.0
        return found | {"alpha": torch.tensor(scale * rank)}


def spelling_of(peft_type: str) -> Spelt | None:
    """How a method's layers are spelt in such a file; None where they are not."""
    return next((Spelt(n) for n in NATIVES.values() if n.peft_type == peft_type), None)
