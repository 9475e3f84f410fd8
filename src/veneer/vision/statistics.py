"""Intervals for shares."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = correct / total, n = total and z = 1.96 (E. B. Wilson, JASA 22, 1927).

    Args:
        correct: successes, 0 to total.
        total: trials, at least 1.

    Returns:
        (low, high), shares from 0 to 1.

    Raises:
        ValueError: no trials, or more successes than trials.

    >>> [round(x, 3) for x in wilson_interval(98, 100)]
    [0.93, 0.994]
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"wilson_interval needs 0 <= correct <= total and total >= 1, got {correct} of {total}")
    p, z2 = correct / total, _Z95**2
    centre, spread = p + z2 / (2 * total), _Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, (centre - spread) / (1 + z2 / total)), min(1.0, (centre + spread) / (1 + z2 / total))
