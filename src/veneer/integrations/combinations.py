"""Saved adapters, combined into one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import files
from ..cards import Card
from ..combining.options import Options, check_weights
from ..config import PeftConfig
from ..disk import locate
from ..errors import ConfigError
from ..foreign import is_foreign
from ..inject import record
from ..saving import write_adapter
from .bases import held

_NEW = "combined"


@dataclass(frozen=True)
class Combination:
    """What was combined and what came out; printing it tells.

    Args:
        output: the new adapter's directory.
        adapters: each adapter and its weight.
        combination_type: how.
        base: the base model.
        method: of the new adapter.
        rank: its highest rank; None where it has none.
        layers: how many it adapts.
        parameters: the numbers in its file.
    """

    output: str
    adapters: list[tuple[str, float]]
    combination_type: str
    base: str
    method: str
    rank: int | None
    layers: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return vars(self) | {"adapters": [{"adapter": a, "weight": w} for a, w in self.adapters]}

    def __str__(self) -> str:
        terms = " ".join(f"{'+-'[w < 0]} {abs(w):g} · {a}" for a, w in self.adapters).removeprefix("+ ")
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.output}: {self.method}{rank} of {self.layers} weights, {self.parameters:,} numbers\n{terms} ({self.combination_type}), for {self.base}"


def combine(
    adapters: Mapping[str, float] | Iterable[tuple[str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    combination_type: str = "linear",
    progress: bool = False,
    local_files_only: bool = False,
    **options: Any,
) -> Combination:
    """Write the weighted sum of saved adapters as one adapter, W' = W + Σ wᵢ (W'ᵢ − W).

    Args:
        adapters: {adapter: weight}, or pairs of the two; each a directory, or `owner/name` on the hub.
        output: a directory, made if needed; none of the adapters' own.
        model: the base model, which is left as it is; or its folder or name; None for the one that the adapters name.
        combination_type, options: as for `PeftModel.add_weighted_adapter`.
        progress: show a bar.
        local_files_only: ask no hub.

    Raises:
        ConfigError: options or weights that do not go together, or adapters of several base models; nothing was written.
        AdapterFileError: no adapter there, or one that does not fit the model; nothing was written.
        StateError: changes that this type cannot combine; nothing was written.
    """
    pairs = [(str(a), w) for a, w in (adapters.items() if isinstance(adapters, Mapping) else adapters)]
    how = Options(combination_type, **options)
    check_weights([a for a, _ in pairs], [w for _, w in pairs])
    places = [Path(a) if is_foreign(a) else locate(a, local_files_only=local_files_only) for a, _ in pairs]
    configs = [PeftConfig() if is_foreign(p) else PeftConfig.read(p) for p in places]
    for (adapter, _), place, config in zip(pairs, places, configs, strict=True):
        if Path(output).exists() and Path(output).resolve() == place.resolve():
            raise ConfigError(f"output: {output} is one of the adapters; give another directory")
        if config.bias != "none":
            raise ConfigError(f"{adapter} trains the base's own biases (bias={config.bias!r}), which have no place in a sum; leave it out")
    base = model if model is not None else _common_base([a for a, _ in pairs], configs)
    # The one that brings a head says which class the model has.
    first = next((i for i, c in enumerate(configs) if c.modules_to_save), 0)
    names = ["default" if i == first else f"adapter_{i}" for i in range(len(pairs))]
    with held(places[first], base, local_files_only=local_files_only) as one:
        network = one.model.get_base_model()
        total = sum(p.numel() for n, p in network.named_parameters() if ".veneer." not in n)
        for name, place in zip(names, places, strict=True):
            if name != "default":
                one.model.load_adapter(place, name)
        one.model.add_combination(names, [w for _, w in pairs], _NEW, how, progress=progress)
        config, plan = one.model.peft_config[_NEW], record(network).plans[_NEW]
        tensors = {k: t.detach() for k, t in files.entries(network, _NEW, shared=config.writes_shared).items()}
        of_parts = any(s.is_part for s in plan.sites)
        card = replace(Card.of(network, _NEW, config, total=total), name="default")
        write_adapter(Path(output), config.to_json(of_parts=of_parts), tensors, {}, card)
    ranks = [s.method.rank for s in plan.sites if s.method.rank is not None]
    numbers = sum(t.numel() for t in tensors.values())
    called = config.base_model_name_or_path or type(network).__name__
    title = " and ".join(f.title for f in [*config.combinators, config.facts()])
    return Combination(str(output), pairs, combination_type, called, title, max(ranks, default=None), len(plan.sites), numbers)


def _common_base(adapters: list[str], configs: list[PeftConfig]) -> str:
    """The base model that the adapters name."""
    named = {c.base_model_name_or_path: a for a, c in zip(adapters, configs, strict=True) if c.base_model_name_or_path}
    if not named:
        raise ConfigError(f"{adapters[0]} does not say which model it is for; give the model")
    if len(named) > 1:
        said = ", ".join(f"{a} is for {base}" for base, a in named.items())
        raise ConfigError(
            f"the adapters are for different base models: {said}. If these are copies of one model, give it (model=…, --model)"
        )
    return next(iter(named))
