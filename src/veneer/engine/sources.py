"""What a layer's input was made from: saved for backward in place of the input itself.

Most adapted inputs are outputs of a normalisation or an activation, which keep their own input for their own backward. A forward hook on these modules notes it
on their output; an adapted layer then saves that same tensor, which costs nothing, and makes its input again in backward, once for all layers that read it
(query, key and value). The note is made only where autograd's graph shows that one known operation made the output from exactly that input, or where the module is one of
transformers' own RMSNorms; everything else is saved as usual, so a gradient is never wrong. A product of two tensors that autograd keeps both (SwiGLU's and GeGLU's, and every
activation written out in arithmetic) needs no note: its own node in the graph has the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NODES = {"NativeLayerNormBackward0", "GeluBackward0", "SiluBackward0", "FusedRmsNormBackward0"}
"""Operations that keep their own input, have one output, and draw no random numbers."""

_NOTE = "_veneer_source"


class Source:
    """A pure function of tensors that autograd keeps anyway, and how often backward will ask for its output. The tensors are left to autograd's keeping.

    Args:
        function: outside autograd.
        by_rows: whether each row of the output is made from that row of the tensors alone.
    """

    def __init__(self, function: Callable[..., Tensor], by_rows: bool) -> None:
        self.function, self.by_rows = function, by_rows
        self.uses = 0
        self.made: Tensor | None = None

    def alone(self) -> bool:
        """Whether nobody else will ask."""
        return self.uses == 1 and self.made is None

    def pure(self, *origins: Tensor) -> Tensor:
        """The output from these tensors."""
        return self.function(*origins)

    def make(self, *origins: Tensor) -> Tensor:
        """The output again; kept until every layer that reads it has asked."""
        self.uses -= 1
        made = self.pure(*origins) if self.made is None else self.made
        self.made = made if self.uses > 0 else None
        return made

    def make_pieces(self, origins: Sequence[Tensor], pieces: Iterable[slice]) -> Iterator[tuple[slice, Tensor]]:
        """The output again for its only reader, some rows at a time, each forgotten before the next."""
        self.uses -= 1
        for rows in pieces:
            yield rows, self.pure(*(t[rows] for t in origins))


def of_module(module: nn.Module) -> Source:
    """The forward of a module of one tensor, without its hooks."""
    # The parameters as they are now: an edit of `.data` before backward is seen by nobody, and the output was what it was.
    frozen = object.__new__(type(module))
    frozen.__dict__.update(module.__dict__)
    frozen._parameters = {n: None if p is None else nn.Parameter(p.detach().clone(), False) for n, p in module._parameters.items()}

    def pure(origin: Tensor) -> Tensor:
        with torch.no_grad():
            return type(frozen).forward(frozen, origin)

    return Source(pure, by_rows=len(getattr(module, "normalized_shape", ())) < 2)


def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: remember on `output` that it is `module` of its input."""
    if torch.compiler.is_compiling() or len(args) != 1 or not isinstance(output, Tensor) or output.grad_fn is None:
        return
    x, node = args[0], output.grad_fn
    if not isinstance(x, Tensor) or output._version:
        return
    if any(p is not None and p.dtype != x.dtype for p in module._parameters.values()):
        return  # autocast brought them to one type, which is off when the output is made again
    if _composed(module):
        setattr(output, _NOTE, (of_module(module), (x,)))
        return
    if node.name() not in NODES:
        return
    made_by = node.next_functions[0][0]
    leaf = getattr(made_by, "variable", None)
    if (x.grad_fn is not None and made_by is x.grad_fn) or (x.grad_fn is None and leaf is x):
        setattr(output, _NOTE, (of_module(module), (x,)))


def _composed(module: nn.Module) -> bool:
    """Whether the module is one of transformers' RMSNorms, several operations without a node of their own, and pure by their definition."""
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("RMSNorm")


def source_of(x: Tensor) -> tuple[Source, tuple[Tensor, ...]] | None:
    """How `x`, or the tensor that it is a view of, was made and from what, if that was noted or is a product, and it is still the same."""
    whole = x if x._base is None else x._base
    if whole._version or x.numel() != whole.numel() or not (x.is_contiguous() and whole.is_contiguous()):
        return None
    found = getattr(whole, _NOTE, None)
    if found is None:
        factors = _factors(whole)
        if factors is not None:
            found = Source(_product, by_rows=True), factors
            setattr(whole, _NOTE, found)  # for the next reader
    return found


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.detach() * b.detach()


def _factors(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two tensors of which x is the product, of its shape and type, where autograd keeps both."""
    node = x.grad_fn
    # Hooks on what is saved may have packed the two: unpacking would fetch them back, or run a checkpoint again.
    if node is None or node.name() != "MulBackward0" or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    a, b = node._saved_self, node._saved_other  # type: ignore[attr-defined]  # of this node
    if a is None or b is None or not a.shape == b.shape == x.shape or not a.dtype == b.dtype == x.dtype:
        return None
    return a, b


def watch(model: nn.Module) -> list[Any]:
    """Note the outputs of the model's normalisations and activations from now on; returns the hooks, for removal."""
    words = ("norm", "gelu", "silu", "swish")
    return [
        m.register_forward_hook(note)
        for m in model.modules()
        if next(m.children(), None) is None and any(w in type(m).__name__.lower() for w in words)
    ]
