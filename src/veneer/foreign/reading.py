"""Read such a file for a model: as one of our methods where it is one, as LoRA where it is not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..conversion import Change, Factored, checked, factored, lora_of
from ..errors import AdapterFileError
from ..files import finite, read_safetensors
from ..form import Form
from ..layers import places
from ..operators import Operator
from ..targets import base_modules
from .algorithms import Algorithm, Parts, algorithm_of, change_of
from .keys import grouped, of_prefix, resolved
from .native import native


@dataclass(frozen=True)
class Foreign:
    """A file of LyCORIS's or kohya's, read for one model.

    Args:
        title: its algorithms.
        config: of the adapter that stands for it.
        tensors: of that adapter's file.
        factors: path → the change as factors, where it was made LoRA; empty where the method is the same.
    """

    title: str
    config: PeftConfig
    tensors: dict[str, Tensor] = field(repr=False)
    factors: dict[str, Factored] = field(repr=False)


def is_foreign(source: str | os.PathLike[str]) -> bool:
    """Whether this names one tensor file rather than an adapter's directory."""
    return Path(source).is_file() and Path(source).suffix == ".safetensors"


@torch.no_grad()
def read_foreign(
    model: nn.Module, file: str | os.PathLike[str], *, prefix: str | None = None, rank: int | None = None, tolerance: float | None = None
) -> Foreign:
    """Read a LyCORIS or kohya file for a model, which stays as it is.

    LoRA (LoCon, also in Tucker form), DoRA, LoHa and LoKr are those methods here. A file of several algorithms, or of factors that the public format cannot say, becomes LoRA:
    exactly where its change has low rank. Rotations of the output become the nearest LoRA of a rank or within a tolerance.

    Args:
        model: the base model, whose module paths the file's keys are matched with.
        file: a `.safetensors` file.
        prefix: which part of a pipeline the model is, such as "lora_unet", where the file is for several.
        rank, tolerance: make it LoRA, as for `convert`.

    Raises:
        AdapterFileError: no such file, names that mean no layer or several, tensors that do not fit; or a change that is no LoRA and no method here,
            where neither rank nor tolerance was given.
    """
    checked(rank, tolerance)
    layers = grouped(read_safetensors(Path(file)), str(file))
    flat = of_prefix(layers, prefix, str(file))
    by_path = {path: layers[name] for name, path in resolved(model, flat, str(file)).items()}
    modules = dict(base_modules(model))
    forms = {path: places(modules[path])[0].kind.form(modules[path]) for path in by_path}
    kinds = {path: _algorithm(path, parts, str(file)) for path, parts in by_path.items()}
    titles = list(dict.fromkeys(a.title for a in kinds.values()))
    if len(titles) == 1 and rank is None and tolerance is None:
        same = native(model, next(iter(kinds.values())), by_path, forms)
        if same is not None:
            return Foreign(titles[0], *same, {})
    found = {path: _as_factors(path, modules[path], parts, kinds[path], forms[path], rank, tolerance) for path, parts in by_path.items()}
    like = PeftConfig(base_model_name_or_path=getattr(model, "name_or_path", None) or None)
    return Foreign(" and ".join(titles), *lora_of(model, {p: f.S for p, f in found.items()}, like), found)


def _algorithm(path: str, parts: Parts, origin: str) -> Algorithm:
    bad = next((n for n, t in parts.items() if t.is_floating_point() and not finite(t)), None)
    if bad is not None:
        raise AdapterFileError(f"{origin}: {bad} of {path} holds NaN or infinite numbers; use an earlier checkpoint")
    found = algorithm_of(parts)
    if found is None:
        raise AdapterFileError(f"{origin}: {path} has {', '.join(sorted(parts))}, which together are no algorithm that is read here")
    return found


def _as_factors(
    path: str, module: nn.Module, parts: Parts, algorithm: Algorithm, form: Form, rank: int | None, tolerance: float | None
) -> Factored:
    kind = places(module)[0].kind
    W = kind.matrix(module).detach()
    wide = {n: t.to(torch.promote_types(t.dtype, torch.float32)).to(W.device) for n, t in parts.items()}
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    try:
        change: Operator = change_of(wide, algorithm, W, form)
    except (RuntimeError, KeyError) as e:
        raise AdapterFileError(f"{path}: the tensors of {algorithm.title} do not fit together ({str(e).splitlines()[0]})") from None
    if change.shape != (form.out, form.in_):
        raise AdapterFileError(
            f"{path}: the file changes {change.shape[0]} × {change.shape[1]}, and the layer is {form}; it is of a model of another size"
        )
    lengths = ", with trained lengths" if "dora_scale" in parts else ""
    return factored(Change(path, change, None), form, rank, tolerance, f"{algorithm.title} in such a file{lengths}")
