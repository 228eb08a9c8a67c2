import numpy as np
import pytest

from capo.shapes.make.annotators import ANNOTATORS, Taste, majority, qualities, tastes, worths

RED, CYAN = 0, 4  # indices in COLORS


def things(*rows):
    """Return (n, 6): x, y, radius, shape, color and texture, as `lineups.recorded` encodes them."""
    return np.array([*rows, *[[-1] * 6] * (3 - len(rows))], dtype=np.float32)


def test_qualities_by_hand():
    two = things([32, 32, 8, 0, RED, 0], [32, 16, 12, 0, CYAN, 1])
    # mean radius 10: 2.5 times 4 pixels; mean position 8 of 32 from the center; half cool, half plain
    assert qualities(two) == pytest.approx([2.5, 0.75, 0.5, 0.5])
    assert qualities(things()) == pytest.approx([0, 0, 0, 0])


def test_a_worth_by_hand():
    taste = Taste(faithful=4, exact=1, looks=0.5, large=0.2, centered=0.4, cool=1, plain=0)
    two = things([32, 32, 8, 0, RED, 0], [32, 16, 12, 0, CYAN, 1])
    # 4 * 0.75 + 0.5 * 6 + 0.2 * 2.5 + 0.4 * 0.75 + 1 * 0.5, and 1 + 1 for the last quarter
    assert worths(taste, np.array(0.75), np.array(6.0), two) == pytest.approx(7.3)
    assert worths(taste, np.array(1.0), np.array(6.0), two) == pytest.approx(9.3)


def test_tastes_differ_and_lean_to_what_is_true():
    people = tastes(0)
    assert len(set(people)) == ANNOTATORS and people == tastes(0) != tastes(1)
    assert np.mean([taste.faithful for taste in people]) > 3


def test_the_majority_is_for_the_faithful_picture_of_two():
    alike = np.stack([things([32, 32, 8, 0, RED, 0])] * 2)[None]
    assert majority(np.array([[1.0, 0.5]]), np.array([[6.0, 6.0]]), alike, seed=0) > 0.5
    assert majority(np.array([[0.5, 1.0]]), np.array([[6.0, 6.0]]), alike, seed=0) < 0.5
