import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from capo.errors import InputError
from capo.shapes import oracle
from capo.shapes.captions import caption
from capo.shapes.foreground import fit_background, pieces
from capo.shapes.make.scenery import random_style
from capo.shapes.oracle import (
    UNKNOWN,
    alignment,
    alignments,
    assertion_share,
    assertion_shares,
    measure,
    ratings,
)
from capo.shapes.prompts import CATEGORIES
from capo.shapes.rating import rating
from capo.shapes.render import render
from capo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    TEXTURES,
    Group,
    Request,
    Scene,
    Style,
    Thing,
    realize,
)

CLEAN = Style()


def canvas(background="white"):
    image = Image.new("RGB", (64, 64), BACKGROUNDS[background])
    return image, ImageDraw.Draw(image)


def rendered(*things, background="white", style=CLEAN, seed=0):
    return render(Scene(tuple(things), background, style, seed))


def test_a_disc_drawn_by_hand_is_measured():
    image, draw = canvas("grey")
    draw.ellipse((10, 30, 30, 50), fill=COLORS["blue"])  # 21 pixels wide: pixels 10 to 30
    (thing,), background = measure(image)
    assert (thing.shape, thing.color, thing.texture, background) == ("circle", "blue", "solid", "grey")
    assert (thing.x, thing.y, thing.radius) == pytest.approx((20.5, 40.5, 10.5), abs=0.6)
    assert alignment(image, "a blue circle in the bottom left corner") == 1.0
    assert alignment(image, "a blue circle in the top left corner") == 0.0


def test_a_square_and_a_diamond_drawn_by_hand():
    image, draw = canvas()
    draw.rectangle((8, 8, 24, 24), fill=COLORS["green"])
    draw.polygon([(46, 34), (54, 46), (46, 58), (38, 46)], fill=COLORS["pink"])
    # 30 across, 30 above: not farther above than across
    assert alignment(image, "a green square above a pink diamond") == 0.0
    assert alignment(image, "a green square and a pink diamond on a white background") == 1.0
    assert alignment(image, "a green square and a pink circle on a white background") == 0.0
    # two shapes, two colors, count, background: one of six is wrong
    assert assertion_share(image, "a green square and a pink circle on a white background") == pytest.approx(
        5 / 6
    )


def test_something_more_breaks_alignment_and_a_speck_does_not():
    image, draw = canvas()
    draw.ellipse((17, 17, 47, 47), fill=COLORS["red"])
    draw.rectangle((4, 4, 6, 6), fill=(90, 90, 90))
    assert alignment(image, "a large red circle") == 1.0
    draw.rectangle((2, 50, 12, 60), fill=COLORS["red"])
    assert alignment(image, "a large red circle") == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_shape_at_known_place_and_size(shape, background):
    for radius, x, y, color in ((7.5, 20.3, 41.8, "purple"), (14.0, 35.1, 30.6, "cyan")):
        (thing,), seen = measure(
            rendered(Thing(shape, color, "solid", radius, x, y, 0.1), background=background)
        )
        assert (thing.shape, thing.color, thing.texture, seen) == (shape, color, "solid", background)
        assert math.dist((thing.x, thing.y), (x, y)) < 0.8 and thing.radius == pytest.approx(radius, rel=0.1)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("texture", TEXTURES)
def test_color_and_texture(color, texture):
    for background in BACKGROUNDS:
        for seed in range(3):
            (thing,), _ = measure(
                rendered(Thing("square", color, texture, 12.0, 30.0, 33.0), background=background, seed=seed)
            )
            assert (thing.color, thing.texture) == (color, texture)


def test_between_two_shapes_is_unknown_and_aligned_with_neither():
    image, draw = canvas()
    draw.rectangle((6, 28, 58, 34), fill=COLORS["red"])  # a bar is none of the shapes
    (thing,), _ = measure(image)
    assert thing.shape == UNKNOWN
    assert not any(alignment(image, f"a red {shape}") for shape in SHAPES)


def test_an_empty_picture():
    image, _ = canvas("black")
    assert measure(image) == ([], "black")
    assert rating(image) == 1.0 and alignment(image, "a circle") == 0.0


def share_aligned(style, count):
    rng = np.random.default_rng(11)
    found = []
    for index in range(count):
        request = list(CATEGORIES.values())[index % len(CATEGORIES)](rng)
        found.append(alignment(render(realize(request, rng, style(rng))), caption(request)))
    return np.mean(found)


def test_clean_renders_are_aligned():
    assert share_aligned(lambda rng: Style(), 90) >= 0.985


def test_imperfect_renders_are_aligned():
    assert share_aligned(random_style, 45) >= 0.93


def test_a_changed_attribute_is_noticed():
    rng = np.random.default_rng(12)
    for color, other in (
        ("red", "orange"),
        ("blue", "purple"),
        ("cyan", "green"),
        ("pink", "purple"),
        ("yellow", "orange"),
    ):
        thing = Thing("heart", color, "solid", 10.0, *rng.uniform(14, 50, size=2))
        picture = rendered(thing, background="beige")
        assert alignment(picture, f"a {color} heart") == 1.0
        assert alignment(picture, caption(Request((Group("heart", color=other),)))) == 0.0


def test_the_three_measures_look_at_a_picture_once(monkeypatch):
    image, draw = canvas()
    draw.ellipse((20, 20, 44, 44), fill=COLORS["red"])
    looked = []
    monkeypatch.setattr(oracle, "measure", lambda pixels: looked.append(1) or measure(pixels))
    asked = [image, image], ["a red circle", "a blue circle on a white background"]
    found = {scorer: scorer(*asked) for scorer in (alignments, assertion_shares, ratings)}
    assert found[alignments].tolist() == [1.0, 0.0]
    # of shape, color, count, background
    assert found[assertion_shares].tolist() == pytest.approx([1.0, 3 / 4])
    assert found[ratings].tolist() == pytest.approx([rating(image)] * 2)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert len(looked) <= 1  # 0 if another test has cached the same picture


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"64 x 64 RGB pixels, this one has shape \(32, 64, 3\)"):
        measure(Image.new("RGB", (64, 32)))
    with pytest.raises(InputError, match=r"a purple hexagon.*evaluation\.oracle=null"):
        alignments([Image.new("RGB", (64, 64))], ["a purple hexagon"])


def test_the_background_is_found_under_a_slope():
    ramp = np.linspace(-30, 30, 64)[None, :, None]
    pixels = np.clip(np.array(BACKGROUNDS["grey"]) + ramp + np.zeros((64, 1, 1)), 0, 255).astype(np.float32)
    name, light = fit_background(pixels)
    assert name == "grey" and light == pytest.approx(pixels, abs=1.0)


def test_pieces_come_largest_first():
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, :3], mask[4:6, :4], mask[7, 7] = True, True, True
    assert [part.sum() for part in pieces(mask, 2)] == [8, 3]


def looks(color="red", background="white", style=CLEAN, radius=13.0):
    return rating(
        rendered(
            Thing("circle", color, "solid", radius, 32.0, 32.0), background=background, style=style, seed=3
        )
    )


def test_the_rating_of_a_clean_red_disc_on_white():
    # distance from white: |(214 - 246, 36 - 246, 40 - 246)| = 296 > 160: vivid 1 (the outline a little less);
    # warm: 0.5 + (214 - 40) / 320 > 1; sharp 1; tidy 1;
    # large: pi 13^2 / 64^2 = 0.130, sqrt(0.130 / 0.15) = 0.93
    assert looks() == pytest.approx(1 + 9 * (0.30 + 0.25 + 0.20 + 0.15 + 0.10 * 0.93), abs=0.35)


def test_each_quality_counts():
    best = looks()
    assert looks(style=Style(contrast=0.45)) < best - 0.5  # vivid
    assert looks("blue") < best - 1.5  # warm: 0.25 * 9 = 2.25, of which blue keeps none
    assert looks(style=Style(blur=1.1)) < best - 0.4  # sharp
    assert looks(style=Style(clutter=7)) < best - 0.3  # tidy
    assert looks(radius=7.0) < best - 0.2  # large
    assert 1 <= looks("blue", style=Style(0.4, 1.1, 7, 1.0), radius=7.0) < looks(radius=15.0) <= 10
