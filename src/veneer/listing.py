"""Tables for people: aligned columns, and paths that differ in their numbers only on one line."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import product


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in columns, those of `right` to the right.

    >>> print(aligned([("a", "n"), ("bcd", "10")], right=[1]))
    a     n
    bcd  10
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def together(paths: Iterable[str], *, alike: Iterable[Hashable] = ()) -> list[tuple[str, list[int]]]:
    """Paths that differ in their numbers only as one, with the places of those it stands for; in the order of first appearance.

    Args:
        paths: dotted names.
        alike: for each path what else must be equal; nothing if omitted.

    >>> together(["a.0.q", "a.0.k", "a.1.q", "a.1.k", "a.3.q", "b"])
    [('a.{0..1,3}.q', [0, 2, 4]), ('a.{0..1}.k', [1, 3]), ('b', [5])]
    """
    paths = list(paths)
    others = list(alike) or [None] * len(paths)
    groups: dict[Hashable, list[int]] = {}
    for i, (path, other) in enumerate(zip(paths, others, strict=True)):
        groups.setdefault((tuple("#" if p.isdigit() else p for p in path.split(".")), other), []).append(i)
    found = [line for places in groups.values() for line in _lines([paths[i].split(".") for i in places], places)]
    return sorted(found, key=lambda line: line[1][0])


def _lines(split: list[list[str]], places: list[int]) -> list[tuple[str, list[int]]]:
    """One line where the numbers are every combination of some; else one for each value of the first number that varies."""
    values = [sorted({s[i] for s in split}, key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0)) for i in range(len(split[0]))]
    if len(set(product(*values))) == len(split):
        return [(".".join(v[0] if len(v) == 1 else "{" + _ranges([int(n) for n in v]) + "}" for v in values), places)]
    at = next(i for i, v in enumerate(values) if len(v) > 1)
    parts = [[k for k, s in enumerate(split) if s[at] == v] for v in values[at]]
    return [line for part in parts for line in _lines([split[k] for k in part], [places[k] for k in part])]


def _ranges(numbers: list[int]) -> str:
    """Numbers in order, runs as their ends."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("..".join(map(str, run)) for run in runs)
