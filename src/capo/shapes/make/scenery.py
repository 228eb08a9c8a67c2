"""Training scenes of the base models, deliberately imperfect in their pictures and in their captions."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from capo.shapes.captions import caption
from capo.shapes.prompts import split_of, training_request
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

WRONG = 0.06  # chance that an attribute of a caption contradicts the picture


def random_style(rng: np.random.Generator) -> Style:
    """Draw a style: a third clean, the rest independently pale, blurred, cluttered or unevenly lit."""
    if rng.random() < 0.33:
        return Style()
    contrast = float(rng.uniform(0.4, 1.0)) if rng.random() < 0.6 else 1.0
    blur = float(rng.uniform(0.4, 1.1)) if rng.random() < 0.4 else 0.0
    clutter = int(rng.integers(1, 8)) if rng.random() < 0.5 else 0
    shade = float(rng.uniform(0.2, 1.0)) if rng.random() < 0.35 else 0.0
    return Style(contrast, blur, clutter, shade)


def _wrong_group(group: Group, wrong: float, rng: np.random.Generator) -> Group:
    swaps = {"shape": SHAPES, "color": list(COLORS), "texture": TEXTURES, "size": SIZES}
    changed = {
        name: str(rng.choice([o for o in options if o != getattr(group, name)]))
        for name, options in swaps.items()
        if getattr(group, name) and rng.random() < wrong
    }
    return replace(group, **changed)


def wrong_request(request: Request, wrong: float, rng: np.random.Generator) -> Request:
    """Change each attribute stated by `request`, independently, with probability `wrong`."""
    groups = [_wrong_group(group, wrong, rng) for group in request.groups]
    if len(groups) == 1 and groups[0].count > 1 and rng.random() < 2 * wrong:
        groups[0] = replace(
            groups[0], count=int(rng.choice([n for n in COUNTS if n not in (1, groups[0].count)]))
        )
    relation, place = request.relation, request.place
    if relation and rng.random() < wrong:
        relation = str(rng.choice([r for r in RELATIONS if r != relation]))
    if place and rng.random() < wrong:
        place = str(rng.choice([p for p in PLACES if p != place]))
    return Request(tuple(groups), relation, place, request.background)


def allowed(request: Request) -> bool:
    """Return whether a caption may be used in training: no test prompt and no unusual combination."""
    odd = any((group.color, group.shape) in UNUSUAL for group in request.groups)
    return not odd and len(request.slots) <= MAX_OBJECTS and split_of(caption(request)) != "test"


def training_scene(index: int, seed: int) -> tuple[Request, Scene, np.random.Generator]:
    """Draw training scene `index`: its request, the scene, and the generator that its caption uses next."""
    rng = np.random.default_rng([seed, index])
    request = training_request(rng)
    return request, realize(request, rng, random_style(rng)), rng


def captioned_scene(index: int, seed: int) -> tuple[np.ndarray, str]:
    """Render training scene `index`: its picture (64, 64, 3) uint8 and caption."""
    request, scene, rng = training_scene(index, seed)
    picture = render(scene)
    said = wrong_request(request, WRONG, rng)
    return picture, caption(said if allowed(said) else request)


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
    (work / "captions.part").write_text(json.dumps(captions))
    os.replace(work / "captions.part", work / "captions.json")
