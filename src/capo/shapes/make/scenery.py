"""Training scenes of the base models, deliberately imperfect in their pictures and in their captions."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from capo.runtime.files import write_whole
from capo.shapes.captions import caption
from capo.shapes.make import PLACE
from capo.shapes.prompts import TRAINING, split_of, training_request
from capo.shapes.render import render
from capo.shapes.scenes import (
    COLORS,
    COUNTS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    UNUSUAL,
    Group,
    Request,
    Scene,
    Style,
    realize,
)

WRONG = 0.25  # chance that an attribute of a caption contradicts the picture
# categories that scenes are drawn from, so that two thirds show one object
OFTEN = (*TRAINING, "colours", "colours", "texture", "position")
PALE = 0.75  # share of scenes whose colors lie between the full ones and the background


def random_style(rng: np.random.Generator) -> Style:
    """Draw a clean style, with a contrast of 0.4 to 1 in three scenes of four; captions do not tell it."""
    return Style(contrast=float(rng.uniform(0.4, 1.0)) if rng.random() < PALE else 1.0)


def _wrong_group(group: Group, wrong: float, rng: np.random.Generator) -> Group:
    swaps = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "size": SIZES}
    changed = {
        name: _other(getattr(group, name), options, rng)
        for name, options in swaps.items()
        if getattr(group, name) and rng.random() < wrong
    }
    return replace(group, **changed)


def _other(value, options, rng: np.random.Generator):
    return rng.choice([option for option in options if option != value]).item()


def wrong_request(request: Request, wrong: float, rng: np.random.Generator) -> Request:
    """Change each attribute stated by `request`, except the background, with probability `wrong`."""
    groups = [_wrong_group(group, wrong, rng) for group in request.groups]
    if len(groups) == 1 and groups[0].count > 1 and rng.random() < wrong:
        groups[0] = replace(groups[0], count=_other(groups[0].count, [n for n in COUNTS if n > 1], rng))
    changed = {
        name: _other(getattr(request, name), options, rng)
        for name, options in (("relation", RELATIONS), ("place", PLACES))
        if getattr(request, name) and rng.random() < wrong
    }
    return replace(request, groups=tuple(groups), **changed)


def allowed(request: Request) -> bool:
    """Return whether a caption may be trained on: no test prompt or unusual combination, each shape once."""
    odd = any((group.color, group.shape) in UNUSUAL for group in request.groups)
    repeated = len({group.shape for group in request.groups}) < len(request.groups)
    if odd or repeated or len(request.slots) > MAX_OBJECTS:
        return False
    return split_of(caption(request)) != "test"


def said_request(request: Request, wrong: float, rng: np.random.Generator) -> Request:
    """Draw what a caption says of a scene: `request` with attributes wrong at the rate `wrong`, and allowed.

    Whether anything is wrong is drawn once, so that rejected sentences do not make captions truer.
    """
    said = wrong_request(request, wrong, rng)
    if said == request:
        return request
    for _ in range(100):
        if said != request and allowed(said):
            return said
        said = wrong_request(request, wrong, rng)
    return request


def training_scene(index: int, seed: int) -> tuple[Request, Scene, np.random.Generator]:
    """Draw training scene `index`: its request, the scene, and the generator that its caption uses next."""
    rng = np.random.default_rng([seed, index])
    request = training_request(rng, OFTEN)
    return request, realize(request, rng, random_style(rng)), rng


def captioned_scene(index: int, seed: int) -> tuple[np.ndarray, str]:
    """Render training scene `index`: its picture (64, 64, 3) uint8 and caption."""
    request, scene, rng = training_scene(index, seed)
    picture = render(scene)
    return picture, caption(said_request(request, WRONG, rng))


def make_scenes(work: Path, count: int, seed: int, workers: int) -> None:
    """Write `scenes.npy` (count, 64, 64, 3) uint8 and `captions.json` to `work`, if not there yet."""
    if (work / "captions.json").exists():
        return
    pictures = np.lib.format.open_memmap(work / "scenes.npy", "w+", np.uint8, (count, 64, 64, 3))
    captions = []
    with Pool(workers) as pool:
        drawn = pool.imap(partial(captioned_scene, seed=seed), range(count), chunksize=200)
        for index, (picture, text) in enumerate(tqdm(drawn, "scenes", total=count, mininterval=5)):
            pictures[index] = picture
            captions.append(text)
    pictures.flush()
    write_whole(work / "captions.json", json.dumps(captions), remedy=PLACE)
