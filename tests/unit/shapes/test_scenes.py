import math

import numpy as np
import pytest

from capo.shapes.prompts import CATEGORIES
from capo.shapes.scenes import (
    UNUSUAL,
    Group,
    Request,
    Thing,
    assertions,
    at_place,
    in_relation,
    of_size,
    realize,
)


def thing(shape="circle", color="red", texture="solid", radius=8.0, x=32.0, y=32.0):
    return Thing(shape, color, texture, radius, x, y)


@pytest.mark.parametrize(
    ("x", "y", "place", "holds"),
    [
        (26.0, 60.0, "on the left", True),  # 26 / 64 = 0.406 < 0.42
        (27.0, 60.0, "on the left", False),  # 0.422
        (38.0, 5.0, "on the right", True),  # 0.594 > 0.58
        (37.0, 5.0, "on the right", False),  # 0.578
        (20.0, 20.0, "in the top left corner", True),
        (20.0, 44.0, "in the top left corner", False),
        (20.0, 44.0, "in the bottom left corner", True),
        (43.5, 32.0, "in the centre", True),  # |0.680 - 0.5| = 0.1797 <= 0.18
        (43.6, 32.0, "in the centre", False),  # 0.1813
        (32.0, 43.6, "in the centre", False),
    ],
)
def test_places_are_thirds(x, y, place, holds):
    assert at_place(x, y, place) is holds


def test_a_relation_needs_a_gap_and_to_lie_more_along_than_across():
    below = thing(y=40.0)
    assert in_relation(thing(y=33.0), below, "above")  # 7 > 6
    assert not in_relation(thing(y=34.5), below, "above")  # 5.5
    assert not in_relation(thing(x=40.0, y=33.0), below, "above")  # 8 across, 7 above
    assert in_relation(below, thing(y=33.0), "below")
    assert in_relation(thing(x=10.0), thing(x=30.0), "to the left of")
    assert not in_relation(thing(x=10.0), thing(x=30.0), "to the right of")


def test_between_small_and_large_is_neither():
    assert [of_size(r, "small") for r in (11.0, 11.1)] == [True, False]
    assert [of_size(r, "large") for r in (13.9, 14.0)] == [False, True]


def test_assertions_of_a_full_request():
    request = Request(
        (Group("circle", color="blue", texture="striped", size="small"),), None, "on the left", "grey"
    )
    held = assertions(request, [thing(color="blue", texture="dotted", radius=12, x=10)], "grey")
    # shape, color, texture, size, place, count, background
    assert held == [True, True, False, False, True, True, True]


def test_a_missing_thing_fails_each_of_its_attributes_and_the_count():
    request = Request((Group("circle", color="red"), Group("square", color="blue")))
    assert sorted(assertions(request, [thing()], "white")) == [False, False, False, True, True]
    assert assertions(request, [], "white") == [False] * 5


def test_a_thing_that_nobody_asked_for_fails_the_count_alone():
    request = Request((Group("circle"),))
    assert assertions(request, [thing(), thing("star", x=10)], "white") == [True, False]


def test_things_are_assigned_so_that_most_holds():
    request = Request((Group("circle", color="red"), Group("circle", color="blue")), "above")
    things = [thing(color="blue", y=50.0), thing(color="red", y=10.0)]
    assert all(assertions(request, things, "white"))
    swapped = [thing(color="blue", y=10.0), thing(color="red", y=50.0)]
    # the colors are right, the relation is not
    assert assertions(request, swapped, "white").count(False) == 1


def test_a_swap_of_colors_is_no_alignment():
    request = Request((Group("circle", color="red"), Group("square", color="blue")))
    things = [thing("circle", "blue", x=15), thing("square", "red", x=48)]
    held = assertions(request, things, "white")
    assert held.count(False) == 2 and held[-1]  # both shapes or both colors are wrong, the number is right


def test_realized_scenes_hold_what_was_asked_apart_and_inside():
    rng = np.random.default_rng(0)
    for draw in CATEGORIES.values():
        for _ in range(25):
            request = draw(rng)
            scene = realize(request, rng)
            assert all(assertions(request, scene.things, scene.background)), request
            for i, a in enumerate(scene.things):
                assert a.radius + 1 <= min(a.x, a.y) and max(a.x, a.y) <= 63 - a.radius
                assert all(math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius for b in scene.things[:i])


def test_the_same_generator_realizes_the_same_scene():
    request = Request((Group("star", 3),))
    scenes = [realize(request, np.random.default_rng(seed)) for seed in (4, 4, 5)]
    assert scenes[0] == scenes[1] != scenes[2]


def test_every_shape_and_color_has_one_unusual_partner():
    colors, shapes = zip(*UNUSUAL, strict=True)
    assert len(set(colors)) == len(set(shapes)) == 8


def test_no_texture_comes_unasked_and_sizes_are_kept():
    rng = np.random.default_rng(3)
    asked = [Group("star", count) for count in (1, 2, 3)]
    for group in [
        *asked,
        Group("star", size="small"),
        Group("star", size="large"),
        Group("star", texture="dotted"),
    ]:
        for _ in range(20):
            things = realize(Request((group,)), rng).things
            assert {thing.texture for thing in things} == {group.texture or "solid"} and len(
                things
            ) == group.count
            assert group.size is None or all(of_size(thing.radius, group.size) for thing in things)
