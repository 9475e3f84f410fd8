"""What an adapter does to the layers: how large its change is, in how many directions, and how orthogonal its rotations are.

The effective rank is e to the entropy of the singular values divided by their sum (Roy and Vetterli, EUSIPCO 2007): r for r equal ones, and between 1 and the rank for
others, without a threshold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PREFIX, PeftConfig
from ..converting import title_of
from ..errors import VeneerError
from ..files import read_safetensors, read_tensors
from ..foreign import is_foreign
from ..foreign.algorithms import algorithm_of
from ..foreign.keys import grouped
from ..inject import adapted_modules, record
from ..listing import aligned, together
from ..operators import Adapted, ByRows, Diagonal, Operator, widest
from .bases import held
from .diagnosis import Diagnosis
from .doctor import diagnose
from .unplaced import equations_of_files


@dataclass(frozen=True)
class LayerMeasure:
    """One layer's change.

    Args:
        parameters: of the adapter there.
        norm: ‖W' − W‖ in the Frobenius norm; None where it needs a W that is not at hand.
        ratio: ‖W' − W‖ / ‖W‖.
        effective_rank: of W' − W.
        orthogonality_error: ‖Rᵀ R − I‖ of the rotations; None where there is none.
    """

    parameters: int
    norm: float | None = None
    ratio: float | None = None
    effective_rank: float | None = None
    orthogonality_error: float | None = None


@dataclass(frozen=True)
class Measured:
    """An adapter in numbers; printing it shows a table.

    Args:
        adapter: where it was read from.
        method: its method.
        model: the class of the base model, or None.
        why_not: why there is no base model, and so nothing that needs its weights.
        parameters: of the adapter, whole modules among them.
        targets: the names of the adapted layers.
        layers: path → numbers.
        options: numbers of the method.
    """

    adapter: str
    method: str
    model: str | None
    why_not: str | None
    parameters: int
    targets: str | list[str] | None
    layers: dict[str, LayerMeasure]
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything that the table says, as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        options = ", ".join(k if v is True else f"{k}={v}" for k, v in self.options.items())
        targets = ", ".join(self.targets) if isinstance(self.targets, list) else str(self.targets or "not named")
        head = [
            ("adapter", self.adapter),
            ("method", ": ".join(s for s in (self.method, options) if s)),
            ("base", self.model or f"not at hand: {self.why_not}"),
            ("targets", targets),
            ("parameters", f"{self.parameters:,}"),
        ]
        return "\n".join([*(f"{name:10}  {text}" for name, text in head), "", self._table()])

    def _table(self) -> str:
        each = list(self.layers.values())
        rows = [("layer", "layers", "parameters", "‖ΔW‖", "‖ΔW‖/‖W‖", "effective rank", "‖RᵀR − I‖")]
        # Flattened paths of a file that no model has resolved have their numbers between underscores.
        paths = [p if "." in p else re.sub(r"_(\d+)(?=_)", r".\1.", p).replace("._", ".") for p in self.layers]
        groups = together(paths, alike=[c.parameters for c in each])
        for path, at in [*groups, ("all", list(range(len(each))))]:
            own = [each[i] for i in at]
            rows.append(
                (
                    path,
                    str(len(own)),
                    f"{sum(c.parameters for c in own):,}",
                    _span([c.norm for c in own]),
                    _span([c.ratio for c in own]),
                    _span([c.effective_rank for c in own]),
                    _span([c.orthogonality_error for c in own]),
                )
            )
        kept = [i for i in range(len(rows[0])) if i < 3 or any(row[i] != "–" for row in rows[1:])]
        return aligned([[row[i] for i in kept] for row in rows], right=range(1, len(kept)))


def _span(values: list[float | None]) -> str:
    """The middle of some numbers, with the least and the largest where they differ."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return "–"
    low, middle, high = (f"{v:.3g}" for v in (known[0], known[len(known) // 2], known[-1]))
    return middle if low == high else f"{middle} ({low}–{high})"


@torch.no_grad()
def measure(adapter: str | os.PathLike[str], model: nn.Module | str | None = None, *, prefix: str | None = None, **hub: Any) -> Measured:
    """How large an adapter's change of each layer is, in how many directions, and how orthogonal its rotations are.

    Args:
        adapter: a directory, `owner/name` on the hub, or one `.safetensors` file of LyCORIS's or kohya's.
        model: the base model, which is left as it is; or its folder or name; None for the one that the adapter names. Without any, there is what the files alone say.
        prefix: which model of a pipeline such a file is for, as for `load_lycoris`.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        AdapterFileError: no adapter there, or, of a model that was given, one that does not fit.
    """
    try:
        with held(adapter, model, prefix=prefix, tolerance=None, **hub) as it:
            base = it.model.get_base_model()
            config = it.model.peft_config["default"]
            layers = dict(_of_layers(base))
            parameters = record(base).plans["default"].trainable + sum(
                base.get_parameter(b).numel() for b in record(base).plans["default"].biases
            )
            found = None if it.directory is None else diagnose(it.directory)
            return _told(str(adapter), config, type(base).__name__, None, parameters, layers, found)
    except (VeneerError, OSError, ValueError) as e:
        if model is not None:
            raise
        return _from_files(adapter, str(e).strip().splitlines()[0], hub)


def _told(
    adapter: str,
    config: PeftConfig,
    model: str | None,
    why: str | None,
    parameters: int,
    layers: dict[str, LayerMeasure],
    found: Diagnosis | None,
) -> Measured:
    options = {} if found is None else found.options
    return Measured(adapter, title_of(config), model, why, parameters, config.target_modules or config.target_parameters, layers, options)


def _of_layers(base: nn.Module) -> Iterator[tuple[str, LayerMeasure]]:
    """Every adapted weight of a model."""
    for path, module in adapted_modules(base):
        for tensor, kind in module.veneer_kinds.items():
            equation = module.equation_of("default", tensor)
            if equation is not None:
                parameters = sum(s.numel for _, a in module._adapters_of(module.at("default"), tensor) for s in a.specs if s.trainable)
                yield path if kind.called else f"{path}.{tensor}", measured(equation, parameters, W=equation.W.dense())


def measured(equation: Adapted | ByRows, parameters: int, W: Tensor | None) -> LayerMeasure:
    """One equation in numbers; without W those that need none."""
    errors = [R.orthogonality_error() for R in _rotations(equation)]
    error = sqrt(sum(e * e for e in errors)) if errors else None
    additive = isinstance(equation, Adapted) and equation.additive
    change = equation.change() if W is not None or additive else None
    if change is None:
        return LayerMeasure(parameters, 0.0 if W is not None else None, 0.0 if W is not None else None, None, error)
    change = change.to(widest(change))
    if any(t.dim() > 2 for t in change.tensors()) and change.dense().dim() > 2:
        norm = float(change.dense().norm())
        return LayerMeasure(parameters, norm, None if W is None else norm / float(W.float().norm()), None, error)
    s = change.spectrum().s.double()
    norm = float(s.norm())
    return LayerMeasure(parameters, norm, None if W is None else norm / float(W.float().norm()), effective_rank(s), error)


def effective_rank(s: Tensor) -> float:
    """e to the entropy of singular values divided by their sum; 0 of none.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    p = s / s.sum() if bool(s.any()) else s
    p = p[p > 0]
    return float((-(p * p.log()).sum()).exp()) if len(p) else 0.0


def _rotations(equation: Adapted | ByRows) -> list[Operator]:
    """The maps that turn the input or the output; scales of single numbers are none."""
    whole = [equation] if isinstance(equation, Adapted) else [e for _, e in equation.parts]
    sides = [S for e in whole for S in (e.R, e.L) if S is not None]
    return [f for S in sides for f in S.factors() if not isinstance(f, Diagonal)]


def _from_files(adapter: str | os.PathLike[str], why: str, hub: dict[str, Any]) -> Measured:
    """What an adapter's files say without a model."""
    if is_foreign(adapter):
        from pathlib import Path

        tensors = read_safetensors(Path(adapter))
        layers = grouped(tensors, str(adapter))
        titles = dict.fromkeys(a.title if (a := algorithm_of(p)) else "unknown" for p in layers.values())
        counted = {name: LayerMeasure(sum(t.numel() for n, t in p.items() if n != "alpha")) for name, p in layers.items()}
        total = sum(c.parameters for c in counted.values())
        return Measured(str(adapter), " and ".join(titles), None, why, total, None, counted)
    from ..disk import locate

    directory = locate(adapter, **hub)
    config, tensors = PeftConfig.read(directory), read_tensors(directory)
    found = diagnose(directory)
    numbers = {
        path.removeprefix(PREFIX): LayerMeasure(parameters) if equation is None else measured(equation, parameters, None)
        for path, equation, parameters in equations_of_files(config, tensors)
    }
    return _told(str(adapter), config, None, why, sum(t.numel() for t in tensors.values()), numbers, found)
