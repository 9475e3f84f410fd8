"""The configuration and the file tensors of a weighted combination of attached adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import copysign, sqrt

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import PREFIX, PeftConfig
from ..conversion import Change, changes, lora_of, rest
from ..errors import ConfigError, StateError
from ..files import entries
from ..form import Form
from ..inject import Record, adapter_of, check_names
from ..layers import AdaptedModule, Frozen
from ..operators import Adapted, Dense, LowRank, Operator, Sum, truncated, widest
from ..planning import Site
from .options import Options, check_weights
from .vectors import merged

_Term = tuple[str, float, Change]
"""An adapter's name, its weight, and what it does to one weight of the model."""


@torch.no_grad()
def combined(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], options: Options, *, progress: bool = False
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The adapter W' = W + Σ wᵢ (W'ᵢ − W) of attached ones, as LoRA; where one of weight 1 is all there is, that adapter itself.

    Args:
        model: the base model, adapted in place; it stays as it is.
        adapters: their names.
        weights: wᵢ, negative ones take away; adapters of weight 0 count for nothing.
        options: how.
        progress: show a bar.

    Raises:
        ConfigError: weights that do not fit, ranks that cannot be combined so, or no rank where one is needed.
        StateError: unknown adapters, or changes that the type cannot combine.
    """
    check_weights(adapters, weights)
    note = check_names(model, adapters)
    used = [(n, float(w)) for n, w in zip(adapters, weights, strict=True) if w]
    for name, _ in used:
        if note.configs[name].bias != "none":
            raise StateError(
                f"{name!r} trains the base's own biases in place, where all adapters of the model see them, so they cannot be weighted; combine adapters with "
                "bias='none', which may train a bias of their own (lora_bias)"
            )
    if options.leaves_alone([w for _, w in used]) and _as_trained(model, note, used[0][0]):
        return _copy(model, note, used[0][0])
    heads = _heads(model, [n for n, _ in used])
    terms: dict[str, list[_Term]] = {}
    for name, w in used:
        for change in changes(model, name):
            terms.setdefault(change.layer, []).append((name, w, change))
    rank = _rank(terms, options) if options.through_svd else options.svd_rank
    factors, shifts = {}, {}
    for layer, own in tqdm(terms.items(), desc="combining", unit="layer", disable=not progress):
        S = _combined(model, note, layer, own, options, rank)
        shift = _shift(own, options)
        if shift is not None:
            shifts[layer] = shift
        factors[layer] = S
    return _written(model, note, used, factors, shifts, heads)


def _combined(model: nn.Module, note: Record, layer: str, terms: list[_Term], options: Options, rank: int | None) -> LowRank:
    """B A of one layer."""
    acting = [(n, w, c.S.to(widest(c.S))) for n, w, c in terms if c.S is not None]
    if not acting:
        return _none(model, note, terms[0][0], layer)
    if options.prunes and not options.through_svd:
        return _of_factors(model, note, layer, [(n, w) for n, w, _ in acting], options)
    if options.through_svd:
        if options.prunes:
            M = merged(
                [S.dense() for *_, S in acting], [w for _, w, _ in acting], options.pruning, _density(options), options.majority_sign_method
            )
            return _best(Dense(M), rank, options)
        return _best(_sum([_weighted(w, S) for _, w, S in acting]), rank, options)
    parts = []
    for name, w, S in acting:
        own = S.low_rank()
        if own is None:
            raise StateError(
                f"{layer}: the change of {name!r}, {note.configs[name].facts().equation}, has no low rank, so {options.combination_type} finds no factors; "
                "use combination_type='svd' with an svd_rank, which takes the nearest change of that rank"
            )
        parts.append(_weighted(w, own))
    whole = _sum(parts).low_rank()
    assert whole is not None
    if options.combination_type == "linear" and rank is not None and whole.rank > rank:
        whole = truncated(whole, rank)[0]
    elif options.combination_type == "linear" and len(parts) > 1:
        whole = _without_repetition(whole, parts)
    return _without_zeros(whole)


def _without_repetition(whole: LowRank, parts: Sequence[Operator]) -> LowRank:
    """The same map without directions that repeat or cancel; as it is where there are none.

    Args:
        parts: its terms, whose size says what is no more than rounding; what is left of a difference does not.
    """
    s = whole.spectrum().s
    size = sqrt(max(float(S.squared_row_norms().double().sum()) for S in parts))
    lossless = int((s > len(s) * torch.finfo(s.dtype).eps * size).sum())
    if lossless == 0:
        return LowRank(whole.B[:, :0], whole.A[:0])
    return truncated(whole, lossless)[0] if lossless < whole.rank else whole


def _best(S: Operator, rank: int | None, options: Options) -> LowRank:
    """The best approximation of a rank, its factors clamped where that is asked for."""
    if options.svd_clamp is None and options.svd_driver is None:
        return _without_zeros(truncated(S, rank)[0])
    if options.svd_driver is not None:
        M = S.dense()
        if M.device.type != "cuda":
            raise ConfigError(f"svd_driver={options.svd_driver!r} is cuSOLVER's, and this adapter is on {M.device.type}; leave it out")
        U, s, Vh = torch.linalg.svd(M, full_matrices=False, driver=options.svd_driver)
        U, Vh = U[:, :rank], Vh[:rank]
    else:
        found = S.spectrum()
        s = found.s
        U, Vh = found.vectors(min(rank or found.rank, found.rank))
    B, A = U * s[: U.shape[1]], Vh
    if options.svd_clamp is not None and B.numel():
        top = float(torch.cat([B.flatten(), A.flatten()]).double().quantile(options.svd_clamp))
        B, A = B.clamp(-top, top), A.clamp(-top, top)
    dtype = widest(S)
    return LowRank(B.to(dtype), A.to(dtype))


def _of_factors(model: nn.Module, note: Record, layer: str, terms: list[tuple[str, float]], options: Options) -> LowRank:
    """B and A combined each by itself, with √|wᵢ sᵢ| on both and the sign on A, so that one adapter's product has its weight."""
    raw = [_raw(model, note, name, layer, options) for name, _ in terms]
    if len({S.A.shape for S, _ in raw}) > 1:
        ranks = ", ".join(f"{name!r} has rank {S.rank}" for (name, _), (S, _) in zip(terms, raw, strict=True))
        raise ConfigError(
            f"{layer}: {ranks}; {options.combination_type} adds factors number by number, so ranks must be equal; use "
            f"combination_type='{options.combination_type}_svd'"
        )
    how = (options.pruning, _density(options), options.majority_sign_method)
    signs = [copysign(1.0, w * s) for (_, w), (_, s) in zip(terms, raw, strict=True)]
    roots = [sqrt(abs(w)) for _, w in terms]
    A = merged([sqrt(abs(s)) * S.A for S, s in raw], [g * r for g, r in zip(signs, roots, strict=True)], *how)
    B = merged([sqrt(abs(s)) * S.B for S, s in raw], roots, *how)
    return LowRank(B, A)


def _raw(model: nn.Module, note: Record, name: str, layer: str, options: Options) -> tuple[LowRank, float]:
    """An adapter's factors at one layer without their scale, and the scale.

    Raises:
        StateError: its change is no single product of factors there.
    """
    site = next((s for s in note.plans[name].sites if f"{s.path}.{s.key}".rstrip(".") == layer and not s.is_part), None)
    if site is not None:
        adapter = adapter_of(model, site, name)
        s = adapter.method.scale
        method = adapter.method.weighted(1 / s) if s else adapter.method
        module = model.get_submodule(site.module)
        assert isinstance(module, AdaptedModule)
        found = method.equation(Adapted(Frozen(site.kind, module)), adapter.values())
        if found.additive and isinstance(found.delta, LowRank):
            return found.delta.to(widest(found.delta)), 1.0 if s is None else s
    raise StateError(
        f"{layer}: the change of {name!r}, {note.configs[name].facts().equation}, is no single product B A there, so it has no factors to prune; "
        f"use combination_type='{options.combination_type}_svd', which prunes the changes themselves"
    )


def _shift(terms: list[_Term], options: Options) -> Tensor | None:
    """What is added to the bias: combined as the weight is."""
    found = [(w, c.shift) for _, w, c in terms if c.shift is not None]
    if not found:
        return None
    if options.prunes:
        return merged([t for _, t in found], [w for w, _ in found], options.pruning, _density(options), options.majority_sign_method)
    return torch.stack([w * t for w, t in found]).sum(0)


def _rank(terms: Mapping[str, list[_Term]], options: Options) -> int:
    """The rank of the result: the one that was asked for, or the largest of the changes."""
    if options.svd_rank is not None:
        return options.svd_rank
    largest = 0
    for layer, own in terms.items():
        for name, _, change in own:
            S = None if change.S is None else change.S.low_rank()
            if change.S is not None and S is None:
                raise ConfigError(
                    f"{layer}: the change of {name!r} has no low rank, so it does not say which rank the result should have; give svd_rank"
                )
            largest = max(largest, 0 if S is None else S.rank)
    return max(1, largest)


def _heads(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The modules that the adapters train whole; the same one twice only with equal numbers."""
    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for name in names:
        for key, t in rest(model, name).items():
            if key in found and not torch.equal(found[key], t):
                module = key.removeprefix(PREFIX).rpartition(".")[0]
                raise StateError(
                    f"{owner[key]!r} and {name!r} each train {module} whole, with other numbers, and two heads have no sum that means anything; "
                    "combine adapters of which one trains it, or whose heads are the same"
                )
            found[key], owner[key] = t, owner.get(key, name)
    return found


def _written(
    model: nn.Module,
    note: Record,
    used: Sequence[tuple[str, float]],
    factors: Mapping[str, LowRank],
    shifts: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
) -> tuple[PeftConfig, dict[str, Tensor]]:
    configs = [note.configs[n] for n, _ in used]
    # Whose heads come along also says what the task is.
    like = copy.copy(next((note.configs[n] for n, _ in used if note.plans[n].saved), configs[0]))
    like.modules_to_save = sorted({m for c in configs for m in c.modules_to_save or []}) or None
    config, tensors = lora_of(model, factors, like, shifts=shifts)
    return config, tensors | dict(heads)


def _as_trained(model: nn.Module, note: Record, name: str) -> bool:
    """Whether an adapter runs with the weight 1 that its file says."""
    return all(adapter_of(model, s, name).weight == 1 for s in note.plans[name].sites)


def _copy(model: nn.Module, note: Record, name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    config = copy.deepcopy(note.configs[name])
    config.inference_mode = True
    return config, {k: t.detach().clone() for k, t in entries(model, name, shared=config.writes_shared).items()}


def _none(model: nn.Module, note: Record, name: str, layer: str) -> LowRank:
    site: Site = next(s for s in note.plans[name].sites if layer in (s.module, f"{s.path}.{s.key}".rstrip(".")))
    form: Form = site.kind.whole.form(model.get_submodule(site.module))
    return LowRank(torch.zeros(form.out, 0), torch.zeros(0, form.in_))


def _weighted(w: float, S: Operator) -> Operator:
    return S if w == 1 else S.scaled(w)


def _sum(terms: Sequence[Operator]) -> Operator:
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _without_zeros(S: LowRank) -> LowRank:
    used = S.A.square().sum(-1) * S.B.square().sum(-2) > 0
    return S if bool(used.all()) else LowRank(S.B[:, used], S.A[used])


def _density(options: Options) -> float:
    return 1.0 if options.density is None else options.density
