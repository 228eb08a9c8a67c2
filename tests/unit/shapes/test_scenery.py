"""What the base learns from: how often captions are wrong, which may be said, and how scenes are drawn."""

import numpy as np
import pytest

from capo.shapes.captions import parse
from capo.shapes.make.failures import flawed_style
from capo.shapes.make.scenery import allowed, random_style, said_request, training_scene, wrong_request
from capo.shapes.prompts import training_request
from capo.shapes.scenes import Style

STATED = ("relation", "place", "background")  # beside what groups state


def attributes(request):
    """All that a request states beside its counts, in order."""
    named = [
        getattr(group, name) for group in request.groups for name in ("shape", "color", "texture", "size")
    ]
    return [*named, *(getattr(request, name) for name in STATED)]


def test_each_stated_attribute_is_wrong_at_the_rate_asked_and_nothing_else_changes():
    rng, asked = np.random.default_rng(0), parse("a red circle above a blue square on a grey background")
    assert wrong_request(asked, 0.0, rng) == asked
    found = [attributes(wrong_request(asked, 0.25, rng)) for _ in range(2000)]
    for index, stated in enumerate(attributes(asked)):
        rate = np.mean([said[index] != stated for said in found])
        kept = stated is None or stated == "grey"  # backgrounds are told rightly
        assert rate == 0 if kept else rate == pytest.approx(0.25, abs=0.04), (index, stated)
    everything = attributes(wrong_request(asked, 1.0, rng))
    pairs = list(zip(everything, attributes(asked), strict=True))
    assert all((said is None) == (stated is None) for said, stated in pairs)
    assert all(said is None or said != stated for said, stated in pairs[:-1]) and everything[-1] == "grey"


def test_counts_are_wrong_too():
    rng, asked = np.random.default_rng(1), parse("two circles")
    counts = [wrong_request(asked, 0.25, rng).groups[0].count for _ in range(2000)]
    assert set(counts) == {2, 3} and np.mean(np.array(counts) == 3) == pytest.approx(0.25, abs=0.04)


def test_what_may_not_be_said_makes_captions_no_truer():
    rng = np.random.default_rng(2)
    asked = [training_request(rng) for _ in range(1500)]
    said = [said_request(request, 0.25, rng) for request in asked]
    assert all(allowed(request) for request in said)
    pairs = [
        pair
        for a, b in zip(asked, said, strict=True)
        for pair in zip(attributes(a)[:-1], attributes(b), strict=False)
        if pair[0]
    ]
    assert np.mean([stated != told for stated, told in pairs]) == pytest.approx(0.25, abs=0.03)
    unchanged = np.mean([a == b for a, b in zip(asked, said, strict=True)])
    drawn = np.mean([wrong_request(request, 0.25, rng) == request for request in asked])
    assert unchanged == pytest.approx(drawn, abs=0.05)


@pytest.mark.parametrize("text", ["a green heart", "a red circle and a blue circle"])
def test_unusual_and_repeated_shapes_may_not_be_said(text):
    assert not allowed(parse(text))


def test_scenes_are_clean_but_for_the_contrast():
    rng = np.random.default_rng(3)
    styles = [random_style(rng) for _ in range(400)]
    contrasts = np.array([style.contrast for style in styles])
    assert all(style == Style(contrast=style.contrast) for style in styles)
    assert (
        (contrasts == 1).mean() == pytest.approx(0.25, abs=0.07)
        and contrasts.min() >= 0.4
        and contrasts.std() > 0.1
    )


def test_the_rewards_see_worse_pictures_than_the_base():
    rng = np.random.default_rng(4)
    styles = [flawed_style(rng) for _ in range(400)]
    clean = np.mean([style == Style(contrast=style.contrast) for style in styles])
    assert (
        0.5 < clean < 0.65
    )  # half, and those of the others that none of three flaws hit: 0.5 (0.5 0.5 0.6) more
    assert all(any(getattr(style, flaw) for style in styles) for flaw in ("blur", "clutter", "shade"))


def test_the_scene_shows_what_was_asked_whatever_its_caption_says():
    request, scene, _ = training_scene(3, seed=0)
    assert [thing.shape for thing in scene.things] == [group.shape for group in request.slots]
