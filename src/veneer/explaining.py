"""What the engine would multiply with what, layer by layer, as a table to read before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .engine import Choice, choice_for, costs, equations_now, fitted
from .inject import adapted_modules, record
from .layers import LayerKind
from .operators import Adapted, ByRows


@dataclass(frozen=True)
class Row:
    """One adapted layer.

    Args:
        forward, backward: what is chosen for the output and for the gradient of the input; None for a layer that is composed of autograd's own operations.
        work: the work beyond the frozen layer's own, in FLOPs of a large product that would take as long, by way.
    """

    path: str
    method: str
    shape: tuple[int, ...]
    choice: Choice | None
    work: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """The rows of all adapted layers; printing it shows a table."""

    tokens: int
    rows: list[Row]

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "method", "out × in", "output", "gradient", "split / merged, MFLOP", "gradient")]
        for r in self.rows:
            shape = " × ".join(map(str, r.shape))
            if r.choice is None:
                cells.append((r.path, r.method, shape, "as composed", "by autograd", "", ""))
                continue
            ways = [f"{r.work[f'{side}, split'] / 1e6:.0f} / {r.work[f'{side}, merged'] / 1e6:.0f}" for side in ("forward", "backward")]
            chosen = ["merged" if merged else "split" for merged in (r.choice.merged_forward, r.choice.merged_backward)]
            cells.append((r.path, r.method, shape, *chosen, *ways))
        widths = [max(len(c[i]) for c in cells) for i in range(7)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([f"{self.tokens:,} tokens", *lines])


def explain(model: nn.Module, tokens: int) -> Explanation:
    """What each adapted layer would do with so many tokens; changes nothing.

    Split means W x and the change's own products, merged means W' put together first. `veneer.strategy("split")` or `"merged"` chooses by hand.

    Args:
        model: a model with adapters, or the PeftModel around it.
        tokens: rows of a layer's input: pictures × patches, or texts × positions.

    Raises:
        StateError: no adapter is attached.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=2, target_modules=["0"]))
    >>> print(explain(model, 10_000))
    10,000 tokens
    layer  method  out × in  output  gradient  split / merged, MFLOP  gradient
    0      Lora    64 × 64   merged  merged    60 / 21                38 / 1
    """
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    record(base)
    lines = []
    for path, module in adapted_modules(base):
        for tensor, kind in module.veneer_kinds.items():
            found = equations_now(module, tensor, disturb=False)
            if not found:
                continue
            methods = ", ".join(dict.fromkeys(type(a.method).__name__ for a in module.adapters(tensor)))
            first, noise = found[0]
            # Parts that are evaluated one by one are a line each.
            names = {k.rows: f"{path}.{k.part_name}" for k in module.veneer_parts.values() if k.tensor == tensor}
            parts = first.parts if isinstance(first, ByRows) and len(found) == 1 else ()
            each: list[tuple[str, LayerKind, Adapted | ByRows]] = [(names[r], kind.part(r), e) for r, e in parts]
            for name, own, equation in each or [(path, kind, first)]:
                p = noise.input if module.training else 0.0
                f = fitted(module, own, equation, p, tokens, own.storage(module).dtype(module, tensor)) if len(found) == 1 else None
                form = own.form(module)
                work = {} if f is None else costs(f.at, f.g is not None, f.R, f.delta)
                lines.append(Row(name, methods, (form.out, form.in_), None if f is None else choice_for(f), work))
    return Explanation(tokens, lines)
