"""Parts of a data set: what they are called, and how one part becomes two.

The split is ours rather than scikit-learn's for three reasons: every class must be on both sides however small it is; the choice within a
class must not change when another class gains a picture; and identical pictures must not land on both sides, or validation measures memory.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from veneer.errors import ConfigError, DataError

PART_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def part_of(name: str) -> str | None:
    """The part that a folder or a split column's value names: "train", "val", "test" or none of them.

    >>> part_of("Validation"), part_of("test"), part_of("cat")
    ('val', 'test', None)
    """
    return PART_NAMES.get(name.strip().lower())


def check_fraction(fraction: float) -> None:
    """Raise unless a fraction leaves something on both sides.

    Raises:
        ConfigError: not between 0 and 1.

    >>> check_fraction(0.2)
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction is {fraction!r}; it must lie between 0 and 1, such as 0.2 for a fifth.")


def stratified(classes: Sequence[str], fraction: float, seed: int, alike: Sequence[Hashable] | None = None) -> tuple[list[int], list[int]]:
    """Divide items in two so that every class is on both sides in the same proportion, as nearly as whole items allow.

    Of a class with n items, max(1, min(n − 1, round(n · fraction))) go to the second side. Items that are alike stay together where a class
    has at least two different ones, even at the cost of the proportion.

    Args:
        classes: one name per item.
        fraction: the second side's share, between 0 and 1.
        seed: the same seed gives the same division on every machine.
        alike: one key per item, equal for items to be kept together; None: all differ.

    Returns:
        The indices of the two sides, each ascending.

    Raises:
        DataError: a class has a single item.
        ConfigError: the fraction is not between 0 and 1.

    >>> stratified(["cat"] * 4 + ["dog"] * 2, 0.25, seed=0)
    ([0, 1, 2, 5], [3, 4])
    """
    check_fraction(fraction)
    members: dict[str, dict[Hashable, list[int]]] = {}
    for index, name in enumerate(classes):
        key = index if alike is None else alike[index]
        members.setdefault(name, {}).setdefault(key, []).append(index)
    second: set[int] = set()
    for name, groups in members.items():
        second.update(_second_side(name, list(groups.values()), fraction, seed))
    return [i for i in range(len(classes)) if i not in second], sorted(second)


def _second_side(name: str, groups: list[list[int]], fraction: float, seed: int) -> list[int]:
    count = sum(map(len, groups))
    if count < 2:
        raise DataError(
            f'The class "{name}" has a single readable picture, and one each is needed for training and for validation. '
            "Add pictures to it, remove the class, or give validation pictures of your own."
        )
    if len(groups) == 1:
        groups = [[index] for index in groups[0]]
    # Seeded by class, so that a class's own division does not depend on the others.
    random.Random(f"{seed}:{name}").shuffle(groups)
    wanted = max(1, min(count - 1, int(count * fraction + 0.5)))
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen += group
    return chosen or min(groups, key=len)
