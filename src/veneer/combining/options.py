"""How adapters are combined: the types, and what each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from ..config import check_choice, check_whole
from ..errors import ConfigError, suggest

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("svd", "linear", "cat", *(name for kind in _PRUNING for name in (kind, f"{kind}_svd")))
"""The names of the types, those of the public format's usual library."""


@dataclass(frozen=True)
class Options:
    """One way to combine.

    Args:
        combination_type: "linear" and "cat" are the exact weighted sum of changes of low rank, `linear` without the directions that cancel or
            repeat; "svd" is its best approximation of a rank, for every method; "ties", "dare_linear", "dare_ties" and "magnitude_prune" prune the
            numbers first: those of the factors A and B, or with "_svd" behind them those of the changes.
        svd_rank: the rank of the result; the largest of the inputs if None. `linear` is cut to it as well.
        svd_clamp: clamp the factors to this quantile of their numbers.
        svd_full_matrices: accepted for scripts that give it; the first singular vectors are the same either way.
        svd_driver: cuSOLVER's, on CUDA devices.
        density: the share of the numbers that pruning keeps.
        majority_sign_method: how "ties" elects a sign: by the sum of the numbers ("total") or of their signs ("frequency").

    Raises:
        ConfigError: a type that there is not, or an option that the type does not take.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        kind = self.combination_type
        if kind not in TYPES:
            raise ConfigError(f"combination_type: {kind!r} is not one of {', '.join(TYPES)}.{suggest(str(kind), TYPES)}")
        if self.prunes and self.density is None:
            raise ConfigError(f"{kind} keeps a share of the numbers: give density, such as density=0.5")
        if not self.prunes and self.density is not None:
            raise ConfigError(f"density is for {', '.join(_PRUNING)} and their _svd forms; {kind} keeps all numbers")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density: a share above 0 and up to 1, got {self.density!r}")
        if self.svd_rank is not None:
            check_whole("svd_rank", self.svd_rank)
        if self.svd_rank is not None and not (self.through_svd or kind == "linear"):
            raise ConfigError(f"{kind} takes no svd_rank; use {f'{kind}_svd' if self.prunes else 'svd'}")
        if (self.svd_clamp is not None or self.svd_driver is not None) and not self.through_svd:
            raise ConfigError(f"svd_clamp and svd_driver are for svd and the _svd forms, not for {kind}")
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise ConfigError(f"svd_clamp: a quantile above 0 and up to 1, got {self.svd_clamp!r}")
        check_choice("majority_sign_method", self.majority_sign_method, ("total", "frequency"))
        if self.majority_sign_method != "total" and "ties" not in kind:
            raise ConfigError(f"majority_sign_method is for ties, which elects signs; {kind} does not")

    @property
    def through_svd(self) -> bool:
        """Whether the result is the best approximation of a rank of what was combined densely."""
        return self.combination_type.endswith("svd")

    @property
    def pruning(self) -> str:
        """How numbers are pruned and merged; the type without `_svd`."""
        return self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        """Whether numbers are pruned before they are added."""
        return self.pruning in _PRUNING

    def leaves_alone(self, weights: Sequence[float]) -> bool:
        """Whether the combination of what has these weights, none of them 0, is one adapter as it is."""
        return list(weights) == [1.0] and self.svd_rank is None and self.svd_clamp is None and self.density in (None, 1)


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse lists that do not go together.

    Raises:
        ConfigError: of different lengths, empty, all zero, or not numbers.
    """
    if not adapters:
        raise ConfigError("adapters: name at least one")
    if len(adapters) != len(weights):
        raise ConfigError(f"weights: one number for each of the {len(adapters)} adapters, got {len(weights)}")
    for name, w in zip(adapters, weights, strict=True):
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not isfinite(w):
            raise ConfigError(f"weights: the weight of {name!r} is {w!r}; give a finite number")
    if not any(weights):
        raise ConfigError("weights: all are 0, which leaves the base model; give at least one that is not")
