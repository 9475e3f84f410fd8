"""Write an attached adapter as such a file: the same method where there is one, else as LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conversion import Factored, checked, factors, rest
from ..disk import write_atomically
from ..errors import ConfigError, StateError
from ..files import serialise
from ..inject import adapter_of, check_names
from ..layers import places
from ..planning import Site
from ..targets import base_modules
from .native import Spelt, spelling_of


@torch.no_grad()
def save_foreign(
    model: nn.Module,
    file: str | os.PathLike[str],
    name: str,
    *,
    prefix: str = "lycoris",
    rank: int | None = None,
    tolerance: float | None = None,
) -> dict[str, Factored]:
    """Write an attached adapter as one file with LyCORIS's and kohya's keys.

    Args:
        model: the base model with the adapter.
        file: ends with `.safetensors`.
        name: the adapter's.
        prefix: in front of each module's path: "lycoris", or "lora_unet", "lora_te" … for the parts of a pipeline.
        rank, tolerance: make it LoRA, as for `convert`.

    Returns:
        The change of each layer as factors, where it was made LoRA; empty where the file says the same tensors.

    Raises:
        ConfigError: not the name of such a file.
        StateError: what such files have no word for: biases, whole modules, or a change of no low rank where neither rank nor tolerance was given;
            nothing was written.
    """
    if Path(file).suffix != ".safetensors":
        raise ConfigError(f"{file}: such an adapter is one file; give a name that ends with .safetensors")
    checked(rank, tolerance)
    note = check_names(model, [name])
    config, sites = note.configs[name], note.plans[name].sites
    over = list(rest(model, name))
    if over:
        raise StateError(f"such files hold changes of layers only, and the adapter also saves {over[0]}; nothing was written")
    spelt = spelling_of(str(config.peft_type))
    found: dict[str, Factored] = {}
    tensors: dict[str, Tensor] = {}
    if spelt is not None and rank is None and tolerance is None and all(_same(model, s, name, spelt) for s in sites):
        for site in sites:
            own = adapter_of(model, site, name)
            scale, r = own.method.scale, own.method.rank
            assert scale is not None and r is not None
            tensors |= _named(prefix, site.path, spelt.parts(own.file_tensors(), site.form, scale, r))
    else:
        found = factors(model, name, rank, tolerance)
        modules = dict(base_modules(model))
        for layer, f in found.items():
            tensors |= _named(prefix, layer, _as_lora(layer, modules.get(layer), f))
    target = Path(file)
    write_atomically(target.parent, {target.name: serialise(tensors)})
    return found


def _named(prefix: str, path: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_{path.replace('.', '_')}.{part}": t for part, t in parts.items()}


def _same(model: nn.Module, site: Site, name: str, spelt: Spelt) -> bool:
    """Whether such a file has a word for each of a layer's tensors."""
    own = adapter_of(model, site, name)
    plain = site.kind.called and not site.is_part and not site.form.lookup and all(s.key for s in own.specs)
    return plain and spelt.has(own.file_tensors(), site.form)


def _as_lora(layer: str, module: nn.Module | None, f: Factored) -> dict[str, Tensor]:
    """A change as LoRA's tensors; none where nothing changes."""
    kind = places(module)[0].kind if module is not None else None
    if module is None or kind is None or not kind.called or kind.form(module).lookup:
        raise StateError(f"{layer} is no linear layer and no convolution, and such files hold no others; nothing was written")
    if f.shift is not None:
        raise StateError(f"{layer}: the adapter changes its bias, for which such files have no word; nothing was written")
    form, r = kind.form(module), f.S.rank
    if not r:
        return {}
    down = f.S.A.reshape(r, form.channels, *form.kernel)
    up = f.S.B.reshape(form.out, r, *(1 for _ in form.kernel))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(r))}
