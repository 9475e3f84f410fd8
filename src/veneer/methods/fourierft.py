"""FourierFT: W' = W + s Re(F⁻¹(E)), E zero but for n trained entries at random places (arXiv:2405.03003, eq. 2 to 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_whole, pattern_value, register
from .base import Facts, Form, Method, Parameter

if TYPE_CHECKING:
    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class FourierFTConfig(BiasConfig):
    """Configuration of FourierFT; the fields are those of the public format.

    Args:
        n_frequency: n, the number of trained entries of the spectrum.
        n_frequency_pattern: {layer name or regular expression: n}.
        scaling: s.
        random_loc_seed: the seed of the entries' places.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_weights: True starts with a spectrum of zeros, False (the format's default) with a random one.
    """

    PEFT_TYPE: ClassVar[str] = "FOURIERFT"
    BIAS_ONLY: ClassVar[str] = "fourier_only"

    n_frequency: int = 1000
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        for n in (self.n_frequency, *self.n_frequency_pattern.values()):
            check_whole("n_frequency", n)

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            "FourierFT",
            "W' = W + s·Re(F⁻¹(E)), E sparse",
            "2405.03003",
            "eq. 2",
            2024,
            "n",
            learning_rate=5e-2,
            preset={"init_weights": True},
        )

    def method(self, path: str) -> Method:
        n = pattern_value(self.n_frequency_pattern, path, self.n_frequency)
        return FourierFT(n, self.scaling, self.random_loc_seed, self.init_weights)


@dataclass(frozen=True)
class FourierFT(Method):
    """FourierFT of n frequencies and scale s."""

    n: int
    s: float
    seed: int
    init: bool

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"n"}

    def why_not(self, form: Form) -> str | None:
        return (
            f"has {form.out * form.in_} entries in its spectrum, fewer than n_frequency={self.n}" if self.n > form.out * form.in_ else None
        )

    def parameters(self, form: Form) -> list[Parameter]:
        places = inits.drawn_places(form.out * form.in_, self.seed)
        return [
            Parameter(
                "spectrum", "fourierft_spectrum", (self.n,), inits.zeros if self.init else inits.normal(1.0), grows=(0,), scaled=True
            ),
            Parameter("places", "", (self.n,), places, trainable=False, dtype="int64"),
        ]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        import torch

        values = p.spectrum.to(torch.promote_types(p.spectrum.dtype, torch.float32))
        E = values.new_zeros(*values.shape[:-1], W.form.out * W.form.in_).scatter(-1, p.places, values)
        return W + self.s * op.Dense(torch.fft.ifft2(E.unflatten(-1, (W.form.out, W.form.in_))).real)
