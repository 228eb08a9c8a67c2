import math

import numpy as np
import pytest

from capo.shapes.render import OUTLINES, render, signed_distance
from capo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, Style, Thing

CLEAN = Style()


def scene(shape="circle", texture="solid", style=CLEAN, seed=0, radius=12.0, background="white"):
    return Scene((Thing(shape, "red", texture, radius, 32.0, 32.0),), background, style, seed)


def coverage(pixels):
    """Return the object's area in pixels, from the share of red in each."""
    white, red = np.array(BACKGROUNDS["white"], dtype=float), np.array(COLORS["red"], dtype=float)
    return ((pixels - white) @ (red - white) / ((red - white) @ (red - white))).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_drawn_area_is_that_of_the_outline(shape):
    if shape == "circle":
        area = math.pi * 12**2
    elif shape == "ring":
        area = math.pi * (12**2 - (0.52 * 12) ** 2)  # 0.76 +- 0.24 of the radius
    else:
        x, y = (OUTLINES[shape] * 12).T  # shoelace formula
        area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    assert coverage(render(scene(shape))) == pytest.approx(area, rel=0.02)


def test_distances_of_a_square():
    u, v = np.array([[0.0, 10.0, 8.6, 11.6]]), np.array([[0.0, 0.0, 8.6, 12.6]])  # half a side is 0.86 * 10
    expected = np.array([[-8.6, 1.4, 0.0, 5.0]])  # (3, 4) -> 5
    assert signed_distance("square", u, v, 10.0) == pytest.approx(expected, abs=1e-6)


def test_colors_of_thing_and_background():
    pixels = render(scene(background="beige"))
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[32, 32]) == COLORS["red"] and tuple(pixels[2, 2]) == BACKGROUNDS["beige"]


def test_a_ring_is_hollow():
    pixels = render(scene("ring"))
    assert tuple(pixels[32, 32]) == BACKGROUNDS["white"] and tuple(pixels[32, 32 + 9]) == COLORS["red"]


def test_stripes_change_from_row_to_row_and_not_along_them():
    inside = render(scene("square", "striped"))[24:40, 26:38].astype(float)
    assert inside.std(axis=0).mean() > 20 and inside.std(axis=1).max() < 1


def test_dots_change_both_ways():
    inside = render(scene("square", "dotted"))[24:40, 26:38].astype(float)
    assert inside.std(axis=0).mean() > 10 and inside.std(axis=1).mean() > 10


def test_contrast_moves_colors_toward_the_background():
    pixels = render(scene(style=Style(contrast=0.5)))
    middle = (np.array(COLORS["red"]) + BACKGROUNDS["white"]) / 2
    assert pixels[32, 32] == pytest.approx(middle, abs=1)
    assert tuple(pixels[2, 2]) == BACKGROUNDS["white"]


def test_blur_keeps_the_mean_and_softens_the_outline():
    sharp, soft = (render(scene(style=style)).astype(float) for style in (Style(), Style(blur=1.0)))
    assert soft.mean() == pytest.approx(sharp.mean(), abs=0.2)
    assert np.abs(np.diff(soft, axis=1)).max() < 0.6 * np.abs(np.diff(sharp, axis=1)).max()


def test_shade_is_a_slope_over_the_background():
    pixels = render(scene(style=Style(shade=1.0), background="grey")).astype(float)[..., 0]
    corners = pixels[0, 0], pixels[0, 63], pixels[63, 0], pixels[63, 63]
    assert max(corners) - min(corners) > 60
    assert corners[0] + corners[3] == pytest.approx(corners[1] + corners[2], abs=2)  # a plane


def test_clutter_is_small_and_seeded():
    plain, first, again, other = (
        render(scene(style=Style(clutter=n), seed=s)) for n, s in ((0, 1), (6, 1), (6, 1), (6, 2))
    )
    assert (first == again).all() and (first != other).any()
    assert 6 < (first != plain).any(-1).sum() < 200
