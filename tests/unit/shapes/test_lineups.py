import numpy as np
import pytest

from capo.shapes.captions import WORDS, parse
from capo.shapes.make.failures import failed, odd_outline, uneven
from capo.shapes.make.lineups import SIZE, _kept, lineup, recorded
from capo.shapes.prompts import split_of
from capo.shapes.render import render, signed_distance
from capo.shapes.scenes import SHAPES, UNUSUAL, Scene, Thing, assertions

OWN = (0, 0, 2, 3)  # index of the caption that each picture was drawn for


@pytest.fixture(scope="module")
def lineups():
    return [lineup(index, seed=1) for index in range(12)]


def sentences(one):
    return [" ".join(WORDS[i - 1] for i in row if i).replace(" ,", ",") for row in one["words"]]


def test_no_sentence_is_a_test_prompt_or_names_an_unusual_combination(lineups):
    for text in {text for one in lineups for text in sentences(one)}:
        assert split_of(text) != "test"
        assert not any((group.color, group.shape) in UNUSUAL for group in parse(text).groups)


def test_what_holds_follows_from_what_was_drawn(lineups):
    faithful = [(one, i) for one in lineups for i in range(SIZE) if (one["wrong"][i, OWN[i]] >= 0).all()]
    assert 0.3 * 48 < len(faithful) < 0.9 * 48
    for one, i in faithful:
        assert one["share"][i, OWN[i]] == 1 and not one["wrong"][i, OWN[i]].any()
    others = [one["share"][i, j] for one in lineups for i in range(SIZE) for j in range(SIZE) if j != OWN[i]]
    assert np.mean(np.array(others) == 1) < 0.3 and min(others) >= 0


def test_a_lineup_is_a_function_of_index_and_seed(lineups):
    again, other = lineup(3, seed=1), lineup(3, seed=2)
    assert all(np.array_equal(again[name], lineups[3][name]) for name in again)
    assert not np.array_equal(other["pictures"], again["pictures"])


def test_outlines_between_cut_and_blobs():
    u, v = np.meshgrid(np.linspace(-12, 12, 49), np.linspace(-12, 12, 49))
    half = 0.5 * signed_distance("circle", u, v, 8.0) + 0.5 * signed_distance("star", u, v, 8.0)
    np.testing.assert_allclose(odd_outline("circle/star/0.5", u, v, 8.0), half)
    cut = odd_outline("circle!0!0", u, v, 8.0)  # nothing to the right of the center
    assert (cut[u > 0] > 0).all() and (cut[(u < 0) & (np.hypot(u, v) < 8)] < 0).all()
    inside = odd_outline("blob?7", u, v, 8.0) < 0
    assert 0.1 < inside.mean() * 24**2 / (np.pi * 64) < 2.5


def test_what_failed_no_longer_holds():
    rng = np.random.default_rng(0)
    things = (Thing("circle", "red", "solid", 9, 18, 18), Thing("star", "blue", "solid", 9, 46, 46))
    asked = parse("a red circle and a blue star")
    for _ in range(60):
        scene = failed(Scene(things, "grey"), rng)
        assert not all(assertions(asked, scene.things, "grey"))
        assert render(scene, odd_outline).shape == (64, 64, 3)


def test_a_lost_texture_is_noticed():
    dotted = Thing("square", "red", "dotted", 12, 32, 32)
    drawn, solid = (
        render(Scene((Thing("square", "red", t, 12, 32, 32),), "grey")) for t in ("dotted", "solid")
    )
    assert _kept(drawn, drawn, recorded([dotted])) and _kept(
        drawn, uneven(drawn, np.random.default_rng(0)), recorded([dotted])
    )
    assert not _kept(drawn, solid, recorded([dotted]))
    assert not _kept(drawn, np.full_like(drawn, 140), recorded([dotted]))


def test_things_are_recorded_by_number():
    table = recorded(
        [Thing("ring", "pink", "striped", 9.0, 10.0, 20.0), Thing("blob?1", "red", "solid", 7.0, 40.0, 41.0)]
    )
    assert table[0].tolist() == [10, 20, 9, SHAPES.index("ring"), 7, 1]
    assert table[1].tolist() == [40, 41, 7, len(SHAPES), 0, 0] and (table[2:] == -1).all()
