"""Hold the layouts of fused projections against what the modules around them do.

A query moves the output of its own token and of no other; keys and values move that of many, values linearly. In a gated network one half acts linearly and the other
does not. So a layout that takes one part for another, or is cut in the wrong place, shows without reading a line of the module's code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TargetError
from .inject import RECORD, disable, enable
from .layers import Fused, fused_weights
from .operators import Rows


@dataclass(frozen=True)
class Probe:
    """What a change of one token's numbers in one part moves.

    Args:
        path: of the part, such as `layers.0.attn.qkv.q`.
        around: class of the module around the fused layer.
        tokens: how many of the module's output tokens move.
        linear: whether they move in proportion to the change.
        wrong: what speaks against the part's name, or "".
    """

    path: str
    around: str
    tokens: int
    linear: bool
    wrong: str = ""


@torch.no_grad()
def check_parts(model: nn.Module, /, *args: Any, fused_layouts: dict[str, Any] | None = None, **inputs: Any) -> list[Probe]:
    """Try out every known part of the model's fused layers on real inputs, once for each class and size; changes nothing.

    Args:
        model: the model, or the PeftModel around it; adapters are switched off meanwhile.
        args, inputs: what the model's forward takes.
        fused_layouts: as in a configuration, to try out one's own.

    Raises:
        TargetError: a part that does not act as its name says.

    >>> class Attention(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv = nn.Linear(8, 24)
    ...     def forward(self, x):
    ...         q, k, v = self.qkv(x).chunk(3, -1)
    ...         return nn.functional.scaled_dot_product_attention(q, k, v)
    >>> [(p.path, p.tokens, p.linear) for p in check_parts(nn.Sequential(Attention()), torch.randn(1, 5, 8), fused_layouts={"qkv": ["q", "k", "v"]})]
    [('0.qkv.q', 1, False), ('0.qkv.k', 5, False), ('0.qkv.v', 5, True)]
    """
    from .config import checked_layout

    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    said = {name: checked_layout(name, s) for name, s in (fused_layouts or {}).items()}
    first: dict[tuple[Any, ...], Fused] = {}
    for fused in fused_weights(base, said):
        if fused.path == fused.module:
            around = base.get_submodule(fused.path.rpartition(".")[0])
            first.setdefault((type(around), *fused.layout.parts.items()), fused)
    trained = disable(base) if RECORD in base.__dict__ else None
    modes = {m: m.training for m in base.modules()}
    base.eval()
    try:
        calls = _calls(base, list(first.values()), args, inputs)
        found = [probe for fused, call in calls for probe in _probe(base, fused, *call)]
    finally:
        for module, mode in modes.items():
            module.training = mode
        if trained is not None:
            enable(base, trained)
    wrong = next((p for p in found if p.wrong), None)
    if wrong is not None:
        raise TargetError(f"{wrong.path} in {wrong.around}: {wrong.wrong}; say where the parts lie with fused_layouts")
    return found


def _calls(base: nn.Module, wanted: list[Fused], args: Any, inputs: Any) -> list[tuple[Fused, tuple[Any, Any]]]:
    """What the modules around fused layers are called with."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = []
    for fused in wanted:

        def note(_: nn.Module, a: Any, k: Any, path: str = fused.path) -> None:
            seen.setdefault(path, copy.deepcopy((a, k)))

        hooks.append(base.get_submodule(fused.path.rpartition(".")[0]).register_forward_pre_hook(note, with_kwargs=True))
    try:
        base(*args, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [(fused, seen[fused.path]) for fused in wanted if fused.path in seen]


def _probe(base: nn.Module, fused: Fused, args: Any, kwargs: Any) -> list[Probe]:
    around, layer = base.get_submodule(fused.path.rpartition(".")[0]), base.get_submodule(fused.path)

    def run(change: Tensor | None) -> Tensor:
        a, k = copy.deepcopy((args, kwargs))
        hook = None if change is None else layer.register_forward_hook(lambda _m, _a, y: y + change.to(y.dtype).view(y.shape))
        try:
            return _first(around(*a, **k))
        finally:
            if hook is not None:
                hook.remove()

    sizes: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _a, y: sizes.append(y))
    plain = run(None)
    hook.remove()
    y = sizes[0].flatten(0, -2)

    def act(rows: Rows) -> tuple[int, bool] | None:
        # Not the same for all tokens: that, added to the keys, is what a softmax does not see.
        all_ = rows.spread(torch.randn(len(y), rows.count, generator=torch.Generator().manual_seed(0)).to(y)) * 2 * y.std()
        one = torch.zeros_like(y)
        one[len(y) // 2] = all_[
            len(y) // 2
        ]  # in the middle: a first token sees nothing else in a causal attention, a last one is seen by nobody
        moved = (run(one) - plain).flatten(0, -2).abs().amax(-1)
        once, twice = run(all_) - plain, run(2 * all_) - plain
        if twice.abs().max() <= 1e-3 * plain.abs().max():
            return None  # a saturated attention moves by rounding only, which says nothing
        linear = bool((twice - 2 * once).abs().max() <= 1e-3 * twice.abs().max())
        return int((moved > 1e-4 * moved.max()).sum()), linear

    # The first and the last row of a part by themselves show a part that is cut in the wrong place.
    acts = {name: [act(r) for r in (rows, replace(rows, width=1), replace(rows, start=rows.start + rows.width - 1, width=1))]
            for name, rows in fused.layout.parts.items()}  # fmt: skip
    many = max(s[0] for seen in acts.values() for s in seen if s) > 1
    found = []
    for name, seen in acts.items():
        wrong = next((w for s in seen if s and (w := _wrong(name, set(acts), fused.layout.linear, *s, many))), "")
        found.append(Probe(f"{fused.path}.{name}", type(around).__name__, *(seen[0] or (0, False)), wrong))
    return found


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else next(t for t in out if isinstance(t, Tensor))


def _wrong(name: str, names: set[str], linear_part: str, tokens: int, linear: bool, many: bool) -> str:
    """What speaks against a part's name.

    Args:
        many: whether any part moves more than one token: an attention may see one only.
    """
    attention = {"q", "k", "v"} >= names
    if (attention or linear_part) and linear != (name == ("v" if attention else linear_part)):
        return f"the output is {'' if linear else 'not '}linear in it"
    if attention and many and (tokens > 1) != (name != "q"):
        return f"one token's numbers there move {tokens} tokens of the output"
    return ""
