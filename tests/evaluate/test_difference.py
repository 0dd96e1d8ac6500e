"""Better, worse, or cannot be told."""

import pytest

from anchorembed.evaluate.difference import FEWEST, difference


def items(*values: float) -> dict[str, float]:
    return {str(number): value for number, value in enumerate(values)}


def test_a_clear_difference_has_its_sign() -> None:
    low, high = items(*[0.1, 0.2, 0.3] * 10), items(*[0.4, 0.4, 0.6] * 10)
    better = difference(high, low)
    assert better.word == "better"
    assert better.value == pytest.approx(0.8 / 3)
    assert 0 < better.low < better.value < better.high
    assert difference(low, high).word == "worse"


def test_a_handful_of_queries_tells_nothing_however_clear() -> None:
    assert FEWEST == 6
    for count, word in ((FEWEST - 1, "cannot be told"), (FEWEST, "better")):
        assert difference(items(*[1.0] * count), items(*[0.0] * count)).word == word
    assert difference(items(*[1.0] * 10), items(*[0.0] * 10)).word == "better"


def test_no_difference_and_a_small_one_cannot_be_told() -> None:
    assert difference(items(*[0.5] * 50), items(*[0.5] * 50)).word == "cannot be told"
    assert difference(items(*[0.0, 1.0] * 25, 1.0), items(*[1.0, 0.0] * 25, 0.0)).word == "cannot be told"


def test_other_items_are_a_fault() -> None:
    with pytest.raises(ValueError, match="in one arm only"):
        difference(items(1, 2), items(1, 2, 3))
