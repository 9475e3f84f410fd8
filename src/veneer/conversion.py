"""An adapter as plain LoRA, where its change has low rank: the smallest file that every reader of LoRA understands."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from .config import PREFIX, PeftConfig, config_classes
from .errors import StateError
from .files import entries
from .inject import adapter_of, record
from .layers import AdaptedModule
from .naming import exactly
from .operators import ByRows, LowRank
from .planning import Site
from .targets import base_modules


@torch.no_grad()
def to_lora(model: nn.Module, name: str, config: PeftConfig) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration and the file tensors of a LoRA adapter that gives the same outputs as an attached one.

    Parts of a fused layer become one change of the whole layer.
    Directions that contribute nothing (pruned triplets) are left out, so ranks differ from layer to layer, and a layer without any is no target.

    Raises:
        StateError: a change that is no sum of low-rank maps, or a layer that LoRA's file has no place for.
    """
    plan = record(model).plans[name]
    factors: dict[str, LowRank] = {}
    for path, sites in _by_layer(plan.sites).items():
        module, first = model.get_submodule(sites[0].module), sites[0]
        assert isinstance(module, AdaptedModule)
        equation = module.equation_of(name, first.kind.tensor)
        if isinstance(equation, ByRows):
            equation = equation.joined()
        change = equation.delta.low_rank() if equation is not None and equation.delta is not None and equation.additive else None
        if change is None or equation is None or equation.shift is not None:
            raise StateError(
                f"{first.path}: W' = {config.facts().equation} is no change of low rank there, so it is no plain LoRA; nothing was written"
            )
        if first.form.kernel or first.form.lookup or not first.kind.called:
            raise StateError(
                f"{first.path} is a {first.kind.name}; only linear layers are written as plain LoRA so far; nothing was written"
            )
        used = change.A.square().sum(-1) * change.B.square().sum(-2) > 0
        if bool(used.any()):
            factors[path] = LowRank(change.B[:, used], change.A[used])
    if not factors:
        raise StateError("the adapter changes nothing, so there is no LoRA to write")
    ranks = {path: f.rank for path, f in factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != common}
    new = config_classes()["LORA"].from_dict(
        {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "target_modules": exactly(list(factors), (p for p, _ in base_modules(model))),
            "modules_to_save": config.modules_to_save,
            "bias": config.bias,
            "task_type": config.task_type,
            "base_model_name_or_path": config.base_model_name_or_path,
            "revision": config.revision,
        }
    )
    own = {f"{PREFIX}{s.path}.{s.key}{key}" for s in plan.sites for key in adapter_of(model, s, name).file_tensors()}
    tensors = {k: t for k, t in entries(model, name, shared=False).items() if k not in own}
    for path, f in factors.items():
        tensors |= {f"{PREFIX}{path}.lora_A.weight": f.A, f"{PREFIX}{path}.lora_B.weight": f.B}
    return new, tensors


def _by_layer(sites: list[Site]) -> dict[str, list[Site]]:
    """The sites of each layer by its path; parts of a fused layer are one LoRA of the whole, their factors in blocks."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.module if site.is_part else site.path, []).append(site)
    return found
