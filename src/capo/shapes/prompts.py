"""Prompt grammar of the shapes world: categories of increasing difficulty, and disjoint splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from capo.data.prompts import Prompt, make_prompt
from capo.errors import InputError
from capo.shapes.captions import caption, parse
from capo.shapes.render import render
from capo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    UNUSUAL,
    Group,
    Request,
    realize,
)


def _pick(rng: np.random.Generator, options) -> str:
    return str(rng.choice(list(options)))


def _background(rng: np.random.Generator) -> str | None:
    return _pick(rng, BACKGROUNDS) if rng.random() < 0.5 else None


def _colored(rng: np.random.Generator, shape: str, **rest) -> Group:
    """Make a group with a usual color for its shape; unusual combinations are reserved for test prompts."""
    usual = [color for color in COLORS if (color, shape) not in UNUSUAL]
    return Group(shape, color=_pick(rng, usual), **rest)


def _two_shapes(rng: np.random.Generator) -> list[str]:
    return [str(shape) for shape in rng.permutation(list(SHAPES))[:2]]


def single(rng):
    """Draw one shape: `a circle on a grey background`."""
    return Request((Group(_pick(rng, SHAPES)),), background=_pick(rng, BACKGROUNDS))


def colors(rng):
    """Draw one colored shape: `a large red circle`."""
    size = _pick(rng, SIZES) if rng.random() < 0.4 else None
    return Request((_colored(rng, _pick(rng, SHAPES), size=size),), background=_background(rng))


def texture(rng):
    """Draw a textured shape: `a striped red circle`."""
    group = _colored(rng, _pick(rng, SHAPES), texture=_pick(rng, TEXTURES))
    return Request((group,), background=_background(rng))


def two(rng):
    """Draw two shapes: `a circle and a square`."""
    return Request(tuple(Group(shape) for shape in _two_shapes(rng)), background=_background(rng))


def counting(rng):
    """Draw several equal shapes: `two red stars`; one in four has three."""
    shape, count = _pick(rng, SHAPES), 3 if rng.random() < 0.25 else 2
    group = _colored(rng, shape, count=count) if rng.random() < 0.6 else Group(shape, count)
    return Request((group,), background=_background(rng))


def position(rng):
    """Draw a place or a relation: `a red circle in the top left corner`, `a circle above a square`."""
    if rng.random() < 0.5:
        return Request(
            (_colored(rng, _pick(rng, SHAPES)),), place=_pick(rng, PLACES), background=_background(rng)
        )
    return Request(
        tuple(Group(shape) for shape in _two_shapes(rng)), _pick(rng, RELATIONS), background=_background(rng)
    )


def binding(rng):
    """Draw two colored shapes: `a red circle and a blue square`, `a red circle above a blue square`."""
    groups = tuple(_colored(rng, shape) for shape in _two_shapes(rng))
    return Request(
        groups, _pick(rng, RELATIONS) if rng.random() < 0.35 else None, background=_background(rng)
    )


def unusual(rng):
    """Draw a combination in no training caption: `a red circle and a green star`."""
    color, shape = sorted(UNUSUAL)[int(rng.integers(len(UNUSUAL)))]
    odd = Group(shape, color=color)
    other = _colored(rng, _pick(rng, [s for s in SHAPES if s != shape]))
    return Request((odd,) if rng.random() < 0.5 else (odd, other), background=_background(rng))


Category = Callable[[np.random.Generator], Request]
# The names are stored with the prompts of pools and results, so their spelling stays.
CATEGORIES: dict[str, Category] = {
    "single": single,
    "colours": colors,
    "texture": texture,
    "position": position,
    "two": two,
    "counting": counting,
    "binding": binding,
    "unusual": unusual,
}
TRAINING = tuple(name for name in CATEGORIES if name != "unusual")


EXHAUSTED = 300  # draws in a row without a new sentence, after which a category counts as exhausted


def split_of(text: str) -> str:
    """Return the split of a sentence by its hash: train for 6 of 10, validation for 1, test for 3."""
    digit = (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4, person=b"shapes-split").digest(), "big")
        % 10
    )
    return "train" if digit < 6 else "validation" if digit == 6 else "test"


def training_request(rng: np.random.Generator, categories: tuple[str, ...] = TRAINING) -> Request:
    """Draw a request that may be used in training: no test prompt and no unusual combination."""
    while True:
        request = CATEGORIES[_pick(rng, categories)](rng)
        if split_of(caption(request)) != "test":
            return request


def _draw_split(split: str, count: int, seed: int) -> list[Prompt]:
    names = list(CATEGORIES) if split == "test" else list(TRAINING)
    salt = int.from_bytes(split.encode()[:4], "big")
    rng = np.random.default_rng([seed, salt])
    found: dict[str, Prompt] = {}
    misses = dict.fromkeys(names, 0)  # in a row
    while len(found) < count:
        if not names:
            raise InputError(
                f"prompts.{split}={count}: the shapes grammar has only about {len(found)} such prompts; "
                "ask for fewer"
            )
        name = names[len(found) % len(names)]
        text = caption(CATEGORIES[name](rng))
        if text not in found and split_of(text) == split:
            found[text] = make_prompt(text, category=name)
            misses[name] = 0
            continue
        misses[name] += 1
        if misses[name] == EXHAUSTED:
            names.remove(name)
    return list(found.values())


def prompt_sets(train: int, validation: int, test: int, seed: int = 0) -> dict[str, list[Prompt]]:
    """Draw disjoint prompt sets from a seed, the categories in turn, so that any prefix of a set is balanced.

    Raises InputError for a count that the grammar cannot provide.
    """
    draw = partial(_draw_split, seed=seed)
    return {
        "train": draw("train", train),
        "validation": draw("validation", validation),
        "test": draw("test", test),
    }


def known_scenes(count: int = 8) -> list[tuple[Image.Image, str]]:
    """Render the first `count` validation prompts in the clean style; return (picture, prompt) pairs."""
    prompts = _draw_split("validation", count, seed=0)
    rng = np.random.default_rng(0)
    return [(Image.fromarray(render(realize(parse(prompt.text), rng))), prompt.text) for prompt in prompts]
