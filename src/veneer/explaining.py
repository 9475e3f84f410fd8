"""What the engine would multiply with what, layer by layer, as a table to read before training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .engine import Choice, Evaluation, choice_for, costs, meeting_tokens
from .inject import adapted_modules, record


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
    rows = []
    for path, module in adapted_modules(base):
        for tensor, kind in module.veneer_kinds.items():
            adapters = list(module.adapters(tensor))
            W = kind.plain(module) if kind.called else None
            shape = (kind.form(module).out, kind.form(module).in_)
            methods = ", ".join(type(a.method).__name__ for a in adapters)
            if W is None or len(adapters) != 1:
                rows.append(Row(path, methods, shape, None, {}))
                continue
            ((equation, noise),) = module.equations(tensor)
            p = noise.input if module.training else 0.0
            g, R, delta = meeting_tokens(equation, W.dtype)
            at = Evaluation(tokens, shape, W.device, W.dtype, module.training, W.dtype.itemsize >= 4 and not p)
            rows.append(Row(path, methods, shape, choice_for(at, g is not None, R, delta), costs(at, g is not None, R, delta)))
    return Explanation(tokens, rows)
