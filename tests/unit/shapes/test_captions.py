import numpy as np
import pytest

from capo.errors import InputError
from capo.shapes.captions import WORDS, caption, parse
from capo.shapes.prompts import CATEGORIES
from capo.shapes.scenes import Group, Request


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request((Group("circle"),), background="grey"), "a circle on a grey background"),
        (Request((Group("ring", color="orange"),)), "an orange ring"),
        (Request((Group("cross", 2),)), "two crosses"),
        (Request((Group("star", 3, "pink", "striped", "small"),)), "three small striped pink stars"),
        (Request((Group("circle"), Group("square")), "to the left of"), "a circle to the left of a square"),
        (
            Request((Group("circle", color="red"), Group("heart", color="blue"), Group("star", 1, "green"))),
            "a red circle, a blue heart and a green star",
        ),
        (
            Request((Group("heart", color="cyan"),), None, "in the top left corner", "beige"),
            "a cyan heart in the top left corner on a beige background",
        ),
    ],
)
def test_sentences(request_, text):
    assert caption(request_) == text
    assert parse(text) == request_


def test_round_trip_over_the_grammar():
    rng = np.random.default_rng(1)
    for draw in CATEGORIES.values():
        for _ in range(100):
            request = draw(rng)
            assert parse(caption(request)) == request


def test_every_word_of_every_sentence_is_in_the_vocabulary():
    rng = np.random.default_rng(2)
    found = set()
    for draw in CATEGORIES.values():
        for _ in range(150):
            found |= set(caption(draw(rng)).replace(",", " ,").split())
    assert found == set(WORDS) - {","}  # a sentence may list three things, no category does


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red hexagon", "'a red hexagon' is not a noun"),
        ("", "is not a noun"),
        ("a red circle and", "is not a noun"),
        ("two circle", "did you mean 'two circles'"),
        ("an red circle", "did you mean 'a red circle'"),
        ("a circles", "did you mean 'a circle'"),
        ("three stars and a heart", "is not a sentence"),  # four things
        ("four hearts", "'four hearts' is not a noun"),
        ("a circle above a star above a ring", "is not a noun"),
        ("a circle on a pink background", "is not a noun"),
    ],
)
def test_other_sentences_are_refused_by_name(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse(text)
    assert repr(text) in str(error.value)
