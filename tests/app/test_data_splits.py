"""The stratified split, held to its laws."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError, DataError
from veneer.vision.splits import stratified

FRACTIONS = st.floats(0.01, 0.99)
CLASSES = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(2, 40), min_size=1, max_size=5)


def items(counts: dict[str, int]) -> list[str]:
    return [name for name, count in counts.items() for _ in range(count)]


@given(counts=CLASSES, fraction=FRACTIONS, seed=st.integers(0, 9))
def test_every_item_once_every_class_on_both_sides_in_proportion(counts: dict[str, int], fraction: float, seed: int) -> None:
    classes = items(counts)
    train, val = stratified(classes, fraction, seed)
    assert sorted(train + val) == list(range(len(classes)))
    assert train == sorted(train) and val == sorted(val)
    chosen = Counter(classes[i] for i in val)
    for name, count in counts.items():
        assert 1 <= chosen[name] <= count - 1
        assert abs(chosen[name] - count * fraction) <= 1


@given(counts=CLASSES, fraction=FRACTIONS, seed=st.integers(0, 9))
def test_the_same_seed_gives_the_same_split(counts: dict[str, int], fraction: float, seed: int) -> None:
    assert stratified(items(counts), fraction, seed) == stratified(items(counts), fraction, seed)


def test_another_seed_gives_another_split() -> None:
    splits = {tuple(stratified(["cat"] * 30 + ["dog"] * 30, 0.3, seed)[1]) for seed in range(20)}
    assert len(splits) == 20


def test_the_split_is_the_same_on_every_machine_and_release() -> None:
    assert stratified(["cat"] * 10 + ["dog"] * 5, 0.2, seed=0)[1] == [5, 7, 11]


@given(counts=CLASSES, fraction=FRACTIONS, extra=st.integers(2, 9))
def test_a_class_is_divided_as_if_it_were_alone(counts: dict[str, int], fraction: float, extra: int) -> None:
    classes = items(counts)
    before = stratified(classes, fraction, 0)[1]
    after = stratified([*classes, *["a new class"] * extra], fraction, 0)[1]
    assert [i for i in after if i < len(classes)] == before


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), min_size=2), FRACTIONS)
def test_alike_items_stay_together_where_a_class_has_two_kinds(rows: list[tuple[str, int]], fraction: float) -> None:
    classes, alike = [name for name, _ in rows], [key for _, key in rows]
    if min(Counter(classes).values()) < 2:
        return
    train, val = stratified(classes, fraction, 0, alike)
    assert sorted(train + val) == list(range(len(rows)))
    for name in set(classes):
        sides = [{alike[i] for i in side if classes[i] == name} for side in (train, val)]
        assert all(sides)
        if len(sides[0] | sides[1]) > 1:
            assert not sides[0] & sides[1]


def test_a_class_with_a_single_picture_is_named() -> None:
    with pytest.raises(DataError, match=r'class "dog" has a single readable picture.*Add pictures'):
        stratified(["cat", "dog", "cat"], 0.5, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        stratified(["cat", "cat"], fraction, 0)
