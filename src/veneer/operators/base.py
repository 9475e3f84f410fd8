"""What every operator knows: shape, apply, transpose, dense, cost, and how to stand in a batch.

An operator S is an (out × in) linear map held as a few small tensors. It acts on the *last* dimension of its argument,
`S.apply(x) = x Sᵀ`, so one rule serves images, sequences and single rows. Operators are values: they are built afresh in every forward from
the parameters of the moment, because a cached one would keep tensors that `.to()` or FSDP2 have since replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .low_rank import LowRank
    from .truncation import Spectrum


@dataclass(slots=True)
class Cost:
    """Floating-point operations and bytes moved; costs of successive steps add."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Operator:
    """An (out × in) linear map; subclasses are dataclasses whose fields are tensors, operators or plain numbers."""

    by_pieces: ClassVar[bool] = False
    """Whether `gradients` costs no more when it is summed over pieces of the tokens: where no dense matrix is made on the way."""
    keeps: ClassVar[int] = 0
    """How many tensors `accumulate` returns."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """x Sᵀ: (…, in) → (…, out)."""
        raise NotImplementedError

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x Sᵀ. May overwrite y, which the caller gives away."""
        return y + self.apply(x)

    def overwrite(self, x: Tensor) -> Tensor:
        """x Sᵀ outside autograd, for a contiguous x (tokens, in) that the caller gives away."""
        return self.apply(x)

    def transpose(self) -> Operator:
        """Sᵀ, an (in × out) operator."""
        raise NotImplementedError

    def scaled(self, s: float) -> Operator:
        """s · S, with the number folded into the smallest factor."""
        raise NotImplementedError

    def rows_scaled(self, d: Tensor) -> Operator:
        """diag(d) S, with d (out,) multiplied into a factor where there is one."""
        from .diagonal import Diagonal
        from .products import Product

        return Product(Diagonal(d), self)

    def dense(self) -> Tensor:
        """S as an (out, in) tensor."""
        raise NotImplementedError

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        """What `apply` costs on `tokens` rows of numbers of `itemsize` bytes."""
        raise NotImplementedError

    def row_dot(self, W: Operator | Tensor) -> Tensor:
        """Σ_j S_ij W_ij for every row i: (out,)."""
        return (self.dense() * (W if isinstance(W, Tensor) else W.dense())).sum(-1)

    def squared_row_norms(self) -> Tensor:
        """Σ_j S_ij² for every row i: (out,)."""
        return self.dense().square().sum(-1)

    def columns(self, ids: Tensor) -> Tensor:
        """The columns of S with these numbers: (…) → (…, out)."""
        return F.embedding(ids, self.dense().mT)

    def low_rank(self) -> LowRank | None:
        """The same map as B A, where its structure gives factors without loss."""
        return None

    def spectrum(self) -> Spectrum:
        """Its singular values, and the vectors to them; of one map, not of a batch."""
        from .truncation import of_dense, of_factors

        factors = self.low_rank()
        return of_dense(self.dense()) if factors is None or factors.rank >= min(self.shape) else of_factors(factors)

    def minus_identity(self) -> Operator:
        """S − I."""
        from .dense import Dense

        M = self.dense()
        return Dense(M - torch.eye(self.shape[0], dtype=M.dtype, device=M.device))

    def factors(self) -> tuple[Operator, ...]:
        """The maps that S is the product of, from left to right."""
        return (self,)

    def orthogonality_error(self) -> float:
        """‖Sᵀ S − I‖ in the Frobenius norm, for a square S."""
        from .rotations import gram_error

        return gram_error(self.dense())

    def for_tokens(self) -> Operator:
        """The same map by the tensors that meet the tokens: what is small is multiplied out here, once, and not in every product."""
        return self

    def holding(self) -> Operator:
        """The same map, which holds what W' and its gradients both need."""
        return self

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Add x Sᵀ to y in place, outside autograd; returns what `gradients` wants to see again.

        Args:
            y: (tokens, out).
            x: (tokens, in).
        """
        y += self.apply(x)
        return ()

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """The gradients of Σ dy ∘ (x Sᵀ), outside autograd: those of S's tensors, in their order, are returned; that of x is added to dx in place.

        The way that every operator has: autograd over `apply`, once more.

        Args:
            x: (tokens, in).
            dy: (tokens, out).
            dx: (tokens, in), or None where it is not wanted.
            kept: what `accumulate` returned.
        """
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in self.tensors()]
            x = x.detach().requires_grad_(dx is not None)
            y = self.with_tensors(leaves).apply(x)
        found = torch.autograd.grad(y, leaves if dx is None else [*leaves, x], dy)
        if dx is not None:
            dx += found[-1]
        return found[: len(leaves)]

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        """The gradients of Σ G ∘ S with respect to S's tensors, in their order, outside autograd; G is (out, in), and the caller gives it away."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in self.tensors()]
            M = self.with_tensors(leaves).dense()
        return torch.autograd.grad(M, leaves, G)

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        """M + S as an (out, in) tensor; a new one, unless M is the caller's own, to be overwritten outside autograd."""
        return M.add_(self.dense()) if own else M + self.dense()

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        """What `added_to` costs."""
        out, in_ = self.shape
        return self.cost(in_, itemsize) + Cost(out * in_, 3 * itemsize * out * in_)

    def cost_of_dx(self, tokens: int, itemsize: int = 4) -> Cost:
        """What the gradient of x costs in `gradients`, beyond those of S's tensors."""
        return self.transpose().cost(tokens, itemsize) + Cost(0, itemsize * tokens * self.shape[1])

    def cost_of_again(self, tokens: int, itemsize: int = 4) -> Cost:
        """What `gradients` costs more where `accumulate` did not run, so that nothing was kept from it."""
        return Cost(0, 0)

    def tensors(self) -> tuple[Tensor, ...]:
        """S's tensors, in the order of its fields."""
        return tuple(_tensors(self.parts()))

    def signature(self) -> tuple[Hashable, ...]:
        """What its costs depend on: its class, the shapes of its tensors and its plain fields."""
        return type(self), *(_signature(value) for value in self.parts())

    def parts(self) -> list[Any]:
        """The values of its fields, in their order."""
        return [getattr(self, name) for name in self.__match_args__]  # type: ignore[attr-defined]  # subclasses are dataclasses

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """The same operator with other tensors, in the order of `tensors()`."""
        left = iter(tensors)
        return self.map(lambda _: next(left))

    def drop_blocks(self, p: float) -> Operator:
        """The same rotation with a share p of its blocks, drawn at random, replaced by the identity."""
        return self

    def left_of(self, M: Tensor) -> Tensor:
        """S M for a dense (in, n) matrix M."""
        return self.apply(M.mT).mT

    def right_of(self, M: Tensor) -> Tensor:
        """M S for a dense (n, out) matrix M."""
        return self.transpose().apply(M)

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same operator with f applied to each of its tensors."""
        return type(self)(*[_map(value, f) for value in self.parts()])

    def to(self, dtype: torch.dtype) -> Self:
        """The same operator in another number type; the one dtype boundary of the engine."""
        return self.map(lambda t: cast(t, dtype))

    def __add__(self, other: Operator) -> Operator:
        from .sums import Sum

        return Sum((self, other))

    def __rmul__(self, s: float) -> Operator:
        return self.scaled(s)


def traced() -> bool:
    """Whether a compiler or a function transform looks on, which follow autograd's own operations only."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), whose call alone takes as long as ten comparisons."""
    return t if t.dtype is dtype else t.to(dtype)


def times(x: Tensor, M: Tensor) -> Tensor:
    """x Mᵀ on the last dimension: (…, in) → (…, out); the leading dimensions of a batch of matrices pair with those of x."""
    if M.dim() == 2 and x.dim() > 2:
        # One plain product: left to itself, matmul chooses by requires_grad, and a loaded adapter would differ in the last bit.
        return (x.flatten(0, -2) @ M.mT).unflatten(0, x.shape[:-1])
    if M.dim() == 2 or x.dim() == M.dim():
        return x @ M.mT
    first = M.dim() - 2
    return (x.flatten(first, -2) @ M.mT).unflatten(first, x.shape[first:-1])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two stacks of matrices; `matmul` asks questions for longer than a small product takes."""
    return torch.bmm(a, b) if a.dim() == b.dim() == 3 and len(a) == len(b) else a @ b


def pieces(*tensors: Tensor) -> Iterator[slice]:
    """The rows of tensors with as many rows in equal pieces that a processor's cache holds, so that what is made of them on the way never meets the memory.

    On other devices all rows at once.
    """
    rows, numbers = len(tensors[0]), max(t.numel() for t in tensors)
    count = -(-numbers // NUMBERS_IN_CACHE) if tensors[0].device.type == "cpu" else 1
    step = max(1, -(-rows // max(1, count)))
    yield from (slice(i, i + step) for i in range(0, rows, step))


NUMBERS_IN_CACHE = 1 << 21

T = TypeVar("T")


def _map(value: T, f: Callable[[Tensor], Tensor]) -> T:
    if isinstance(value, Tensor):
        return f(value)  # type: ignore[return-value]  # a tensor maps to a tensor
    if isinstance(value, Operator):
        return value.map(f)
    if isinstance(value, tuple):
        return tuple(_map(v, f) for v in value)  # type: ignore[return-value]  # a tuple maps to a tuple
    return value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Operator):
            yield from _tensors(value.parts())
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, Operator):
        return value.signature()
    return tuple(_signature(v) for v in value) if isinstance(value, tuple) else value


def stack(operators: Sequence[Operator]) -> Operator:
    """One operator with a leading batch dimension, from operators of one type and one shape.

    `stack([S₁ … S_n]).apply(x)` takes x of shape (n, …, in) and gives each x[i] S_iᵀ.

    >>> from veneer.operators import Diagonal
    >>> both = stack([Diagonal(torch.ones(2)), Diagonal(2 * torch.ones(2))])
    >>> both.apply(torch.ones(2, 1, 2)).tolist()
    [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    first = operators[0]
    if any(type(o) is not type(first) for o in operators):
        raise TypeError(f"stack needs operators of one type, got {sorted({type(o).__name__ for o in operators})}")
    return type(first)(*[_stack(list(values)) for values in zip(*(o.parts() for o in operators), strict=True)])


def _stack(values: list[T]) -> T:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values)  # type: ignore[arg-type, return-value]  # all are tensors
    if isinstance(first, Operator):
        return stack(values)  # type: ignore[arg-type, return-value]  # all are operators
    if isinstance(first, tuple):
        return tuple(_stack(list(v)) for v in zip(*values, strict=True))  # type: ignore[return-value]
    if any(v != first for v in values):
        raise ValueError(f"stack needs equal options, got {values}")
    return first
