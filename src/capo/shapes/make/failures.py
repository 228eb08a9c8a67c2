"""Simulated failures of a weak base model: malformed objects, blobs, stains and uneven outlines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from capo.shapes.make.scenery import random_style
from capo.shapes.render import signed_distance
from capo.shapes.scenes import COLORS, SHAPES, SIDE, Scene, Style, Thing


def odd_outline(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Return signed distances for SHAPES and for malformed shapes.

    `a/b/t` is interpolated between two shapes, `a!turn!cut` has a piece cut off, `blob?seed` is a random
    blob.
    """
    if "?" in shape:
        return _blob(int(shape.split("?")[1]), u, v, radius)
    if "/" in shape:
        first, second, share = shape.split("/")
        t = float(share)
        return (1 - t) * signed_distance(first, u, v, radius) + t * signed_distance(second, u, v, radius)
    if "!" in shape:
        whole, turn, cut = shape.split("!")
        side = np.cos(float(turn)) * u + np.sin(float(turn)) * v - float(cut) * radius
        return np.maximum(signed_distance(whole, u, v, radius), side)
    return signed_distance(shape, u, v, radius)


def _blob(seed: int, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Return the approximate distance of a closed curve whose radius varies around 0.8 of `radius`."""
    waves = np.arange(1, 7)
    height, phase = np.random.default_rng(seed).uniform([[0.0], [0.0]], [[0.35], [2 * np.pi]], size=(2, 6))
    turn = np.arctan2(v, u)[..., None]
    return np.hypot(u, v) - radius * (0.8 + (height / np.sqrt(waves) * np.sin(waves * turn + phase)).sum(-1))


def _odd_shape(shape: str, rng: np.random.Generator) -> str:
    other = str(rng.choice([s for s in SHAPES if s != shape]))
    kind = rng.random()
    if kind < 0.4:
        return f"blob?{rng.integers(2**31)}"
    if kind < 0.8:
        return f"{shape}/{other}/{rng.uniform(0.35, 0.65):.2f}"
    return f"{shape}!{rng.uniform(0, 6.28):.2f}!{rng.uniform(-0.1, 0.35):.2f}"


def flawed_style(rng: np.random.Generator) -> Style:
    """Draw a style as the base's scenes have it, or in half of the cases one with further flaws.

    Those are blur, clutter and uneven light, each independently.
    """
    style = random_style(rng)
    if rng.random() < 0.5:
        return style
    blur = float(rng.uniform(0.4, 1.1)) if rng.random() < 0.5 else 0.0
    clutter = int(rng.integers(1, 8)) if rng.random() < 0.5 else 0
    shade = float(rng.uniform(0.2, 1.0)) if rng.random() < 0.4 else 0.0
    return replace(style, blur=blur, clutter=clutter, shade=shade)


def _merged(things: list[Thing], pick: int, rng: np.random.Generator) -> list[Thing]:
    """Move one object onto another, so that the covered one is no complete shape any more.

    If both have the same color, neither is.
    """
    other, moved = things[pick - 1], things[pick]
    turn, gap = rng.uniform(0, 6.28), rng.uniform(0.5, 1.0) * other.radius
    x, y = np.clip([other.x + gap * np.cos(turn), other.y + gap * np.sin(turn)], 8, SIDE - 8)
    moved = replace(moved, x=float(x), y=float(y))
    if moved.color == other.color:
        moved = replace(moved, shape=f"{moved.shape}/{moved.shape}/0.5")
    covered = replace(other, shape=f"{other.shape}/{other.shape}/0.5")
    return [thing for thing in things if thing not in (other, things[pick])] + [covered, moved]


def _with_another(things: list[Thing], like: Thing, rng: np.random.Generator) -> list[Thing]:
    """Add a small object where there is room, often with the color or shape of `like`."""
    radius = float(rng.uniform(6.5, 8.5))
    for _ in range(40):
        x, y = rng.uniform(9, SIDE - 9, size=2)
        if all(np.hypot(t.x - x, t.y - y) > t.radius + radius + 2 for t in things):
            shape = like.shape if rng.random() < 0.5 else str(rng.choice(SHAPES))
            color = like.color if rng.random() < 0.5 else str(rng.choice(list(COLORS)))
            return [*things, Thing(shape, color, "solid", radius, float(x), float(y))]
    return things


def failed(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene as a weak base model would draw it.

    An object is missing, added, malformed or merged with another, or no object has a proper shape.
    """
    things, pick = list(scene.things), int(rng.integers(len(scene.things)))
    kind = rng.choice(["missing", "extra", "merged", "odd", "odd", "odd", "none"])
    if kind == "missing" and len(things) > 1:
        del things[pick]
    elif kind == "merged" and len(things) > 1:
        things = _merged(things, pick, rng)
    elif kind == "extra" and len(things) < 5:
        things = _with_another(things, things[pick], rng)
    else:
        picked = range(len(things)) if kind == "none" else [pick]
        for i in picked:
            things[i] = replace(things[i], shape=_odd_shape(things[i].shape, rng))
    return replace(scene, things=tuple(things))


def uneven(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add soft stains, of up to about 25 of 255, to a picture (64, 64, 3)."""
    stains = gaussian_filter(rng.normal(size=(SIDE, SIDE, 3)), (rng.uniform(5, 12),) * 2 + (0,))
    stains *= rng.uniform(2, 9) / (stains.std() + 1e-6)
    return np.clip(np.round(picture + stains), 0, 255).astype(np.uint8)


def warped(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort the outlines of a picture slightly, by a smooth displacement of less than a pixel."""
    shift = gaussian_filter(rng.normal(size=(2, SIDE, SIDE)), (0, 4, 4))
    shift *= rng.uniform(0.2, 0.8) / (shift.std() + 1e-6)
    where = np.mgrid[0:SIDE, 0:SIDE] + shift
    channels = [map_coordinates(picture[..., c], where, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, axis=-1)
