"""What a method is: named parameters with shapes and inits, and an equation on W. It sees the form of the weight and nothing else.

A method holds numbers (rank, scale) and no tensors; the tensors belong to the adapted layer and come back as `p`. So `equation` is a pure
function, a combinator such as DoRA wraps any other method, and the number of trainable parameters is known without building anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .. import inits
from ..errors import StateError
from ..form import Form

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Adapted


@dataclass(frozen=True)
class Facts:
    """What a method says about itself; documentation, listings and tests read it."""

    title: str
    equation: str
    arxiv: str
    equation_number: str
    year: int
    parameters: str
    """The number of trainable parameters of an (out × in) layer, as a formula."""
    learning_rate: float
    """A good AdamW learning rate for vision transformers, used as the method's preset."""
    mergeable: bool = True
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Options that the image application sets otherwise than the format's defaults."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of a method.

    Args:
        name: its attribute name in the equation's `p` and in the adapted layer.
        key: its name in the adapter file, behind the layer's path; empty for a tensor that no file holds.
        shape: its shape in the equation.
        init: fills the stored tensor in place.
        stored: its shape in the layer and in the file, where that is another.
        order: the stored tensor holds the equation's dimensions in this order.
        trainable: False for a constant.
        state: a constant that training changes, so that a checkpoint keeps it.
        dtype: the constant's number type by name, where it is not the adapter's.
        still: fills the tensor so that, with all others filled so, W' = W; None where no value does.
        grows: dimensions of `shape` along which further numbers of `still` leave W' as it is, such as the rank's.
        scaled: the change is proportional to it, so that a factor of the method's scale can be put into it.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    init: Callable[[Tensor], Any]
    stored: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    trainable: bool = True
    state: bool = False
    dtype: str | None = None
    still: Callable[[Tensor], Any] | None = inits.zeros
    grows: tuple[int, ...] = ()
    scaled: bool = False

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)

    def view(self, t: Tensor) -> Tensor:
        """The stored tensor as the equation reads it."""
        if self.stored is None:
            return t
        if self.order is None:
            return t.reshape(self.shape)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return t.reshape([self.shape[i] for i in self.order]).permute(inverse)

    def laid(self, t: Tensor) -> Tensor:
        """The equation's tensor as it is stored; undoes `view`."""
        if self.stored is None:
            return t
        return (t if self.order is None else t.permute(self.order)).reshape(self.stored)


@dataclass(frozen=True)
class Noise:
    """What a method disturbs at random while training, and with which probability; the engine does it, in the same way for every method.

    Args:
        input: each number of the change's input is zeroed, and the rest scaled up.
        rows: each row of Δ is zeroed.
        rescale_rows: the rows that stay are divided by the share that stayed.
        whole: all of Δ is left out.
        blocks: this share of a rotation's blocks becomes the identity.
    """

    input: float = 0.0
    rows: float = 0.0
    rescale_rows: bool = True
    whole: float = 0.0
    blocks: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.input or self.rows or self.whole or self.blocks)


SILENT = Noise()


class Schedule:
    """What a method does around every step of the optimiser, with all the layers of one adapter at once.

    The layers are given with the method's stored tensors as attributes.
    """

    def before_step(self, layers: Sequence[Any]) -> None:
        """After gradients were accumulated, unscaled and clipped, before the step."""

    def after_step(self, layers: Sequence[Any]) -> None:
        """After the step, before gradients are cleared."""


class Method:
    """One adapter of one layer, as mathematics."""

    def parameters(self, form: Form) -> list[Parameter]:
        """The tensors for a layer whose weight has this form; of independent experts, those of one expert unless the method says `of_experts`."""
        raise NotImplementedError

    def of_experts(self, form: Form) -> list[Parameter]:
        """The tensors for `form.experts` independent maps: by default those of one map, stacked."""
        assert form.experts is not None
        return [stacked(p, form.experts) for p in self.parameters(form)]

    def why_not(self, form: Form) -> str | None:
        """Why a layer of this form cannot have this method, as the end of a sentence; None where it can."""
        return None

    def equation(self, W: Adapted, p: Any) -> Adapted:
        """W' from W and the parameters `p`, whose attributes are named as in `parameters`."""
        raise NotImplementedError

    def finish(self, W: Adapted, p: Any) -> None:
        """Set what depends on W, once all parameters have their first values."""

    @property
    def noise(self) -> Noise:
        """What is disturbed while training."""
        return SILENT

    @property
    def shifts(self) -> bool:
        """Whether the equation changes the layer's bias."""
        return False

    @property
    def scale(self) -> float | None:
        """The number that the change is multiplied with, s; None where the equation has none."""
        return getattr(self, "s", None)

    @property
    def rank(self) -> int | None:
        """The rank r; None where the equation has none."""
        return getattr(self, "r", None)

    def weighted(self, weight: float) -> Method:
        """The same method with `weight` times its scale.

        Raises:
            StateError: the equation has no scale.
        """
        if weight == 1:
            return self
        if self.scale is None:
            raise StateError(f"{type(self).__name__} has no scale, so it cannot be weighted by {weight}; switch it on or off instead")
        return replace(self, s=weight * self.scale)  # type: ignore[type-var]  # methods are dataclasses

    @property
    def loose(self) -> frozenset[str]:
        """Fields in which two adapters may differ while one's tensors fit the other's equation: what their shapes say, a scale, and what only training reads."""
        return frozenset({"r", "s", "init", "dropout", "noise"})

    def all_parameters(self, form: Form) -> list[Parameter]:
        """`parameters`, or `of_experts`, as the form asks."""
        return self.parameters(form) if form.experts is None else self.of_experts(form)

    def count(self, form: Form) -> int:
        """The number of trainable parameters for a layer of this form."""
        return sum(p.numel for p in self.all_parameters(form) if p.trainable)


class EachExpert:
    """An init applied to every expert's own tensor."""

    def __init__(self, init: Callable[[Tensor], Any]) -> None:
        self.init = init

    def __call__(self, t: Tensor) -> None:
        for one in t:
            self.init(one)


def stacked(p: Parameter, experts: int) -> Parameter:
    """The same tensor for each of several experts, in a new first dimension."""
    stored = None if p.stored is None else (experts, *p.stored)
    still = p.still and EachExpert(p.still)
    grows = tuple(d + 1 for d in p.grows)
    return replace(p, shape=(experts, *p.shape), init=EachExpert(p.init), stored=stored, still=still, grows=grows)
