"""The figure of docs/architecture.md is drawn from the import graph and changes with it."""

import pytest

from docs.figures.layers import FIGURE, arrows, draw, implied, layers


@pytest.fixture(scope="module")
def found():
    return arrows()


def test_the_committed_figure_is_that_of_the_code(found):
    assert FIGURE.read_text(encoding="utf-8") == draw(layers(), found), "run python docs/figures/layers.py"


def test_an_import_more_or_less_changes_the_figure(found):
    drawn = draw(layers(), found)
    assert draw(layers(), found - {("module", "metrics")}) != drawn
    assert draw(layers(), found | {("preflight", "rewards")}) != drawn
    # not drawn as an arrow, but named in the box's tooltip
    assert draw(layers(), found - {("module", "runtime")}) != drawn


def test_every_arrow_points_downwards(found):
    height = {name: number for number, row in enumerate(layers()) for name in row}
    assert ("data", "pairs") in found and [a for a in found if height[a[0]] >= height[a[1]]] == []


def test_dark_arrows_are_those_that_no_path_implies():
    chain = {("a", "b"), ("b", "c"), ("a", "c")}
    assert [arrow for arrow in sorted(chain) if implied(arrow, chain)] == [("a", "c")]


def test_a_package_without_a_place_is_an_error(found):
    with pytest.raises(ValueError, match=r"in no layer .*: elsewhere"):
        draw(layers(), found | {("cli", "elsewhere")})
    with pytest.raises(ValueError, match=r"no column .*: elsewhere"):
        draw([*layers(), ["elsewhere"]], found)
