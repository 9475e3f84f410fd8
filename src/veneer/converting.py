"""`convert`: an adapter of any method becomes LoRA, with a report of what that costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapting import put_on
from .cards import Card
from .config import PREFIX, PeftConfig
from .conversion import Factored, factors, lora_of, rest
from .errors import ConfigError
from .files import load
from .inject import activate, record
from .listing import aligned, together
from .saving import write_adapter


@dataclass(frozen=True)
class LayerConversion:
    """How well one layer's change became factors.

    Args:
        rank: of B A; 0 where the change is none, and the layer no target.
        error: ‖W' − W − B A‖ / ‖W' − W‖ in the Frobenius norm.
        norm: ‖W' − W‖.
    """

    rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class Conversion:
    """A LoRA that stands for another adapter; printing it shows a table.

    Args:
        method: of the adapter that it was made from.
        layers: path → rank and error.
        config: the LoRA's.
        tensors: its file's.
        notes: what some readers of LoRA refuse about it.
    """

    method: str
    layers: dict[str, LayerConversion]
    config: PeftConfig
    tensors: dict[str, Tensor] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Of all layers together: the root of the sum of squared differences, over that of the changes."""
        whole = sum(c.norm**2 for c in self.layers.values())
        return sqrt(sum((c.error * c.norm) ** 2 for c in self.layers.values()) / whole) if whole else 0.0

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max(c.rank for c in self.layers.values())

    @property
    def parameters(self) -> int:
        """The numbers in its file."""
        return sum(t.numel() for t in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything that the table says, as plain values."""
        layers = {path: {"rank": c.rank, "error": c.error, "norm": c.norm} for path, c in self.layers.items()}
        whole = {"rank": self.rank, "error": self.error, "parameters": self.parameters}
        return {"from": self.method, **whole, "layers": layers, "notes": self.notes}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        each = list(self.layers.values())
        rows = [("layer", "rank", "layers", "‖ΔW‖", "error")]
        for path, at in together(self.layers):
            ranks = sorted({each[i].rank for i in at})
            rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
            norm = sqrt(sum(each[i].norm ** 2 for i in at))
            error = sqrt(sum((each[i].error * each[i].norm) ** 2 for i in at)) / norm if norm else 0.0
            rows.append((path, rank, str(len(at)), f"{norm:.3g}", shown(error)))
        norm = sqrt(sum(c.norm**2 for c in each))
        rows.append((f"{self.method} as LoRA", f"≤ {self.rank}", str(len(each)), f"{norm:.3g}", shown(self.error)))
        return "\n".join([aligned(rows, right=[1, 2, 3, 4]), *(f"note: {n}" for n in self.notes)])


def shown(error: float) -> str:
    """A relative error for people: exact, or a percentage."""
    return "exact" if error == 0 else f"{100 * error:.2g} %"


def convert(
    model: nn.Module,
    adapter_name: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    *,
    save_directory: str | os.PathLike[str] | None = None,
    new_name: str | None = None,
    uniform: bool = False,
    progress: bool = False,
) -> Conversion:
    """A LoRA with the same change as an attached adapter of any method, or with the nearest one of a lower rank.

    LoRA, AdaLoRA, VeRA, LoHa, LoKr and HRA are low-rank changes, and become exactly that if neither `rank` nor `tolerance` is given. Of every other method,
    and below the exact rank, it is the best one in the Frobenius norm (Eckart and Young).

    Args:
        model: a model with adapters; it stays as it is, but for `new_name`.
        adapter_name: the first active one if None.
        rank: the highest rank of a layer.
        tolerance: the lowest rank of each layer whose relative error is at most this, such as 0.05.
        save_directory: write the LoRA there; files already there are replaced whole or not at all.
        new_name: attach the LoRA under this name, inactive.
        uniform: give all layers one rank, with zeros, for readers that know no `rank_pattern`.
        progress: show a bar, if it takes more than two seconds.

    Raises:
        ConfigError: a rank or tolerance that is none, or both; the name is taken.
        StateError: no such adapter, a change that no plain LoRA equals where neither was given, or a layer that LoRA's file has no place for;
            nothing was written.

    >>> import torch, veneer
    >>> model = veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), veneer.OFTConfig(r=2, oft_block_size=0, target_modules=["0"], init_weights=False))
    >>> veneer.convert(model, tolerance=0.5, new_name="as_lora").error <= 0.5, list(model.peft_config)
    (True, ['default', 'as_lora'])
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # a PeftModel's
    note = record(base)
    name = adapter_name or (note.active[0] if note.active else next(iter(note.plans)))
    note.check([name])
    if new_name in note.plans:
        raise ConfigError(f"an adapter called {new_name!r} is attached already; choose another new_name")
    old = note.configs[name]
    found = factors(base, name, rank, tolerance, progress=progress)
    shifts = {layer: f.shift for layer, f in found.items() if f.shift is not None}
    config, tensors = lora_of(base, {layer: f.S for layer, f in found.items()}, old, shifts=shifts, uniform=uniform)
    done = Conversion(title_of(old), layers_of(found), config, tensors | rest(base, name), notes_of(config, tensors))
    if save_directory is not None:
        total = sum(p.numel() for p in base.parameters())
        card = replace(Card.of(base, name, old, total=total), config=config, name="default", parameters=done.parameters, of_parts=False)
        write_adapter(Path(save_directory), config.to_json(), done.tensors, {}, card)
    if new_name is not None:
        _attach(model, base, new_name, done)
    return done


def _attach(model: nn.Module, base: nn.Module, name: str, done: Conversion) -> None:
    """Put the LoRA on the model as another adapter."""
    active = record(base).active
    put_on(base, done.config, name, fresh=False)
    load(base, name, done.tensors, Path(name))
    record(base).trainable.add(name)
    activate(base, active)
    held = getattr(model, "peft_config", None)
    if isinstance(held, dict):
        held[name] = done.config


def title_of(config: PeftConfig) -> str:
    """What a person calls a configuration's method."""
    return " and ".join(f.title for f in [*config.combinators, config.facts()])


def layers_of(found: Mapping[str, Factored]) -> dict[str, LayerConversion]:
    """How well each layer's change became factors."""
    return {layer: LayerConversion(f.S.rank, f.error, sqrt(f.squared)) for layer, f in found.items()}


def notes_of(config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """What vLLM refuses of a LoRA; it takes `lora_A` and `lora_B` of linear layers, of any ranks up to its own limit."""
    notes = []
    if config.modules_to_save:
        notes.append(f"whole modules are saved with it ({', '.join(config.modules_to_save)}), which vLLM refuses")
    if config.bias != "none" or getattr(config, "lora_bias", False):
        notes.append("it changes biases, which vLLM refuses")
    other = [k for k, t in tensors.items() if "lora_embedding" in k or ("lora_A" in k and t.dim() != 2)]
    if other:
        notes.append(
            f"it changes embeddings or convolutions, such as {other[0].removeprefix(PREFIX).rpartition('.lora')[0]}, which vLLM refuses"
        )
    return notes
