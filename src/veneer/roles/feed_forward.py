"""Feed-forwards: layers that widen before one that narrows by as much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..form import Form
from .role import MLP, Role, is_called, up


def feed_forward(modules: Mapping[str, nn.Module], free: Mapping[str, Form]) -> Iterator[Role]:
    """Layers that widen before one that narrows by as much, at most two names below the module that holds both."""
    inside: dict[str, list[str]] = {}
    for path in free:
        for holder in (up(path, 1), up(path, 2)):
            if holder is not None:
                inside.setdefault(holder, []).append(path)
    left = dict(free)
    for holder in sorted(inside, key=lambda h: -h.count(".") if h else 1):
        named = is_called(holder, modules[holder], "mlp", "expert", "ffn", "feed")
        for i, down in enumerate(inside[holder]):
            found = _widening(down, inside[holder][:i], inside[holder][i + 1 :], left, named=named) if down in left else []
            for role in [*found, *([Role(down, "mlp.down")] if found else [])]:
                del left[role.path]
                yield role


def _widening(down: str, before: list[str], after: list[str], left: Mapping[str, Form], *, named: bool) -> list[Role]:
    """What widens for `down`: one layer, a gate and one, or both in one."""
    narrow = left[down]
    before = [u for u in before if u in left and left[u].in_ == narrow.out]
    ups = [u for u in before if left[u].out == narrow.in_][-2:]
    if len(ups) == 1:
        ups += [u for u in after if u in left and left[u] == left[ups[0]] and up(u, 1) == up(down, 1)][:1]
    siblings = all(up(u, 1) == up(down, 1) for u in ups)
    if ups and (narrow.in_ > narrow.out or (siblings and (named or len(ups) > 1))):
        return _gated(ups)
    fused = [u for u in before if left[u].out == 2 * narrow.in_]
    return [Role(fused[-1], "mlp", MLP[:2])] if fused and not ups else []


def _gated(ups: list[str]) -> list[Role]:
    """Of two layers of one shape, the gate is the one that says so, or the first."""
    if len(ups) < 2:
        return [Role(ups[0], "mlp.up")]
    names = [u.rpartition(".")[2] for u in ups]
    gate = 1 if "gate" in names[1] or "up" in names[0] else 0
    return [Role(ups[gate], "mlp.gate"), Role(ups[1 - gate], "mlp.up")]
