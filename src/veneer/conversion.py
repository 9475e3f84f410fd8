"""An adapter as plain LoRA: the file that every reader understands.

What counts is W' − W of each weight, whatever made it. Where its structure gives factors they are taken as they are; elsewhere the best ones of a
given rank, or of the lowest rank within a tolerance, with the error that they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import PREFIX, PeftConfig, check_whole, config_classes
from .errors import ConfigError, StateError
from .files import entries
from .form import Form
from .inject import adapter_of, check_names, record
from .layers import AdaptedModule, places
from .naming import exactly
from .operators import LowRank, Operator, truncated, widest
from .planning import Site
from .targets import base_modules

_INSIDE = ".base_layer."
"""Between a module's path and that of a weight inside which is adapted with it, as the format spells it."""


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to one weight.

    Args:
        layer: the path of the layer as the file spells it.
        S: W' − W; None where nothing changes.
        shift: b' − b, where the bias changes.
    """

    layer: str
    S: Operator | None
    shift: Tensor | None


@dataclass(frozen=True, eq=False)
class Factored:
    """A change as factors.

    Args:
        S: B A, without directions that contribute nothing, so perhaps of rank 0.
        error: ‖W' − W − B A‖ / ‖W' − W‖.
        shift: b' − b, where the bias changes.
    """

    S: LowRank
    error: float
    shift: Tensor | None

    @property
    def squared(self) -> float:
        """‖W' − W‖²; the best approximation leaves a rest that is orthogonal to it."""
        return float(self.S.squared_row_norms().double().sum()) / (1 - self.error**2)


@torch.no_grad()
def changes(model: nn.Module, name: str) -> Iterator[Change]:
    """What one attached adapter does to each weight, one after the other; the parts of a fused layer are one change of the whole.

    Raises:
        StateError: a weight that LoRA's file has no place for, or weights that hold merged adapters; before the first change is made.
    """
    found = _by_layer(check_names(model, [name]).plans[name].sites)
    for sites in found.values():
        _refuse(model, sites[0])
    for layer, sites in found.items():
        module, kind = _module(model, sites[0]), sites[0].kind.whole
        equation = module.equation_of(name, kind.tensor)
        assert equation is not None
        before = kind.bias(module)
        after = equation.bias(before)
        same = after is None or after is before
        yield Change(layer, equation.change(), None if same else after if before is None else after - before)  # type: ignore[operator]


@torch.no_grad()
def factored(change: Change, form: Form, rank: int | None, tolerance: float | None, equation: str) -> Factored:
    """A change as factors: without a rank or a tolerance only where that is exact.

    Raises:
        StateError: neither was given, and the change has no exact factors.
    """
    if change.S is None:
        return Factored(LowRank(torch.zeros(form.out, 0), torch.zeros(0, form.in_)), 0.0, change.shift)
    wide = change.S.to(widest(change.S))
    if rank is None and tolerance is None and wide.low_rank() is None:
        raise StateError(
            f"{change.layer}: {equation} is no change of low rank there, so no plain LoRA equals it; give a rank or a tolerance for the nearest one. "
            "Nothing was written"
        )
    S, error = truncated(wide, rank, tolerance)
    used = S.A.square().sum(-1) * S.B.square().sum(-2) > 0
    return Factored(LowRank(S.B[:, used], S.A[used]), error, change.shift)


def checked(rank: int | None, tolerance: float | None) -> None:
    """Raise ConfigError for a rank or a tolerance that is none, or both."""
    if rank is not None and tolerance is not None:
        raise ConfigError("give rank or tolerance, not both: each decides the other")
    if rank is not None:
        check_whole("rank", rank)
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance: a share of the change from 0 to less than 1, got {tolerance!r}")


def factors(
    model: nn.Module, name: str, rank: int | None = None, tolerance: float | None = None, *, progress: bool = False
) -> dict[str, Factored]:
    """The changes of one attached adapter as factors, by layer.

    Args:
        model: a model with adapters.
        name: the adapter's.
        rank, tolerance: the highest rank, or the highest relative error of a layer; with neither, all of it.
        progress: show a bar, if it takes more than two seconds.

    Raises:
        ConfigError: a rank or a tolerance that is none, or both.
        StateError: a change that has no exact factors where neither was given, or a weight that LoRA's file has no place for.
    """
    checked(rank, tolerance)
    note = check_names(model, [name])
    forms = {layer: _form(model, sites[0]) for layer, sites in _by_layer(note.plans[name].sites).items()}
    equation = note.configs[name].facts().equation
    each = tqdm(changes(model, name), desc="converting", unit="layer", total=len(forms), disable=not progress, delay=2)
    return {c.layer: factored(c, forms[c.layer], rank, tolerance, equation) for c in each}


def lora_of(
    model: nn.Module,
    factors: Mapping[str, LowRank],
    like: PeftConfig,
    *,
    shifts: Mapping[str, Tensor] | None = None,
    uniform: bool = False,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration and the file tensors of the LoRA whose changes are these, each of its own rank.

    Args:
        model: the base model, with or without adapters.
        factors: path of a layer → its change B A, scaled already; those of rank 0 are left out. A weight inside a `MultiheadAttention` is
            `….base_layer.out_proj`, as in the file.
        like: the configuration that names the base model, the task, and what else is saved.
        shifts: path of a layer → what is added to its bias.
        uniform: give all layers the highest rank, the new directions zero, for readers that know one rank only.

    Raises:
        StateError: nothing changes, or a bias changes of a layer for which the format has no word.
    """
    shifts, bases = shifts or {}, dict(base_modules(model))
    # The keys of trained biases say which layers are adapted, so none may go missing.
    keep = like.bias != "none"
    wanted = {layer: S for layer, S in factors.items() if S.rank or layer in shifts or keep}
    owners = dict.fromkeys(layer.partition(_INSIDE)[0] for layer in wanted)
    if not wanted:
        raise StateError("the adapter changes nothing, so there is no LoRA to write")
    ranks = {owner: max(1, *(S.rank for layer, S in wanted.items() if layer.partition(_INSIDE)[0] == owner)) for owner in owners}
    highest = max(ranks.values())
    if uniform:
        ranks = dict.fromkeys(ranks, highest)
    others = {f"^{re.escape(owner)}": r for owner, r in ranks.items() if r != highest}
    lora = config_classes()["LORA"]
    new = lora.from_dict(
        {
            "peft_type": lora.PEFT_TYPE,
            "r": highest,
            "lora_alpha": highest,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "lora_bias": bool(shifts),
            "target_modules": exactly(list(owners), bases),
            "modules_to_save": like.modules_to_save,
            "bias": vars(lora)["BIAS_ONLY"] if like.bias.endswith("_only") else like.bias,
            "task_type": like.task_type,
            "base_model_name_or_path": like.base_model_name_or_path,
            "revision": like.revision,
        }
    )
    tensors: dict[str, Tensor] = {}
    for owner, r in ranks.items():
        for place in places(bases[owner]):
            layer, inner = f"{owner}.{place.key}".rstrip("."), f"{owner}.{place.inner}" if place.inner else owner
            form = place.kind.form(bases[inner])
            values = {"lora_A": _rows(wanted[layer].A, r), "lora_B": _rows(wanted[layer].B.mT, r).mT} if layer in wanted else {}
            for spec in new.method(owner).parameters(form):
                value = values.get(spec.name, shifts.get(layer) if spec.name not in ("lora_A", "lora_B") else None)
                value = torch.zeros(spec.shape) if value is None else value
                tensors[f"{PREFIX}{owner}.{place.key}{spec.key}"] = value.reshape(spec.stored or spec.shape)
    return new, tensors


def rest(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What one attached adapter saves beside the changes: whole modules and trained biases."""
    sites = record(model).plans[name].sites
    own = {f"{PREFIX}{s.path}.{s.key}{key}" for s in sites for key in adapter_of(model, s, name).file_tensors()}
    return {k: t for k, t in entries(model, name, shared=False).items() if k not in own}


def _rows(t: Tensor, r: int) -> Tensor:
    """(n, …) with rows of zeros up to r."""
    return torch.cat([t, t.new_zeros(r - len(t), t.shape[1])]) if len(t) < r else t


def _module(model: nn.Module, site: Site) -> AdaptedModule:
    module = model.get_submodule(site.module)
    assert isinstance(module, AdaptedModule)
    return module


def _form(model: nn.Module, site: Site) -> Form:
    return site.kind.whole.form(_module(model, site))


def _by_layer(sites: list[Site]) -> dict[str, list[Site]]:
    """The sites of each layer by its path in the file of a LoRA of whole layers."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.module if site.is_part else f"{site.path}.{site.key}".rstrip("."), []).append(site)
    return found


def _refuse(model: nn.Module, site: Site) -> None:
    """Raise StateError where no plain LoRA can stand for the change of a weight."""
    module, kind = _module(model, site), site.kind.whole
    if module.veneer_merged:
        raise StateError(f"{site.module} holds merged adapters, so W is not at hand; call unmerge_adapter() first")
    owner = site.module if site.is_part else site.path
    if not any(p.kind.tensor == kind.tensor and p.key == site.key for p in places(model.get_submodule(owner))):
        raise StateError(f"{site.weight} is a bare parameter, for which plain LoRA's file has no place; nothing was written")
    if getattr(module, "groups", 1) > 1:
        raise StateError(
            f"{site.path} is a convolution in {module.groups} groups, where readers of LoRA disagree on the shapes; leave it out of the adapter, or merge it. "
            "Nothing was written"
        )
