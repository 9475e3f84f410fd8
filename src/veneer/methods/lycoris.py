"""What LoHa and LoKr share: the options of their configurations, and the Tucker form of a convolution's change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import inits
from ..config import PatternConfig, check_probability
from .base import Form, Noise, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Dense


@dataclass(kw_only=True)
class LycorisConfig(PatternConfig):
    """The options that LoHa and LoKr share.

    Args:
        alpha: α; the change is scaled by α / r.
        rank_dropout: probability of zeroing each row of the change while training.
        module_dropout: probability of leaving the whole change out while training.
        use_effective_conv2d: factor a convolution's kernel apart from its channels (FedPara's Proposition 3), where the kernel is not 1.
        init_weights: True starts at no change, False at a random one.
    """

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("rank_dropout", self.rank_dropout)
        check_probability("module_dropout", self.module_dropout)

    def noise(self, *, rescale_rows: bool) -> Noise:
        """Both dropouts as the engine takes them."""
        return Noise(rows=self.rank_dropout, rescale_rows=rescale_rows, whole=self.module_dropout)


def core(name: str, key: str, r: int, form: Form) -> Parameter:
    """The core t (r, r, kernel) of a Tucker form; the file has two kernel dimensions for a one-dimensional convolution too."""
    kernel = form.kernel if len(form.kernel) > 1 else (*form.kernel, 1)
    return Parameter(name, key, (r, r, form.in_ // form.channels), inits.kaiming, stored=(r, r, *kernel), grows=(0, 1))


def has_core(form: Form, wanted: bool) -> bool:
    """Whether a layer of this form takes the Tucker form: a convolution with a kernel other than 1."""
    return wanted and form.in_ != form.channels


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Dense:
    """M[p, (q, k)] = Σ_ij t[i, j, k] a[i, p] b[j, q], a convolution's weight from a core and two factors (arXiv:2108.06098, Prop. 3)."""
    import torch

    from ..operators import Dense

    return Dense(torch.einsum("ijk,ip,jq->pqk", t, a, b).flatten(-2))
