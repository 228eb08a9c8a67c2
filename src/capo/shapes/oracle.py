"""Oracle: detects the objects in a picture from its pixels and checks the prompt's assertions.

Its measures are reported beside the rewards and never used in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    binary_fill_holes,
    distance_transform_edt,
    find_objects,
    gaussian_filter,
    map_coordinates,
)
from torch import Tensor

from capo.errors import InputError
from capo.shapes.captions import parse
from capo.shapes.foreground import CROSS, FAINT, SPECK, core, fit_background, halves, pieces, to_pixels
from capo.shapes.rating import rating
from capo.shapes.render import signed_distance
from capo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIDE, Request, Thing, assertions

UNKNOWN = "unknown"  # shape of an object that matches none of SHAPES
MATCH = 0.76  # least soft intersection over union with a template
PALE = 26.0  # distance from the background (RGB, 0-255) that most of an object must reach
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_CONTRASTS = np.linspace(0.28, 1.1, 13, dtype=np.float32)


def _color(away: np.ndarray, background: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Classify the color of pixels given as offsets (n, 3) from the background.

    Contrast c moves a color to c (color - background); before that, the dark parts of a texture have 0.45
    of the color. The color whose line between these two points is closest to most pixels is chosen.

    Returns:
        The index in the palette, and the offsets (3,) from the background of the color and of its dark shade.
    """
    away = away[:: max(1, len(away) // 32)]
    lit = _CONTRASTS[:, None, None] * (_PALETTE - background)
    dark = _CONTRASTS[:, None, None] * (0.45 * _PALETTE - background)
    line, offset = dark - lit, away[:, None, None] - lit
    share = np.clip((offset * line).sum(-1) / ((line**2).sum(-1) + 1e-6), 0, 1)
    distance = np.sqrt(((offset - share[..., None] * line) ** 2).sum(-1)) + 6.0 * share
    cost = np.partition(distance, int(0.55 * len(away)), axis=0)[: int(0.55 * len(away)) + 1].mean(0)
    contrast, color = np.unravel_index(cost.argmin(), cost.shape)
    return int(color), lit[contrast, color], dark[contrast, color]


def _belongs(away: np.ndarray, lit: np.ndarray, dark: np.ndarray) -> np.ndarray:
    """Return which offsets (..., 3) from the background are mixtures of background, color and dark shade."""
    plane, _ = np.linalg.qr(np.stack([lit, dark], axis=1))
    normal = np.cross(plane[:, 0], plane[:, 1])
    along = away @ lit / (lit @ lit)
    beside = np.linalg.norm(away - np.clip(along, 0, 1.2)[..., None] * lit, axis=-1)
    return (np.abs(away @ normal) < 26) & ((along > 0.05) | (away @ dark > 0)) | (beside < 30)


_GRID = 28  # cells per side of the frame in which outlines are compared
_REACH = 1.1  # half its side, in units of the square root of the outline's area
_TURNS = np.linspace(-0.24, 0.24, 7)


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Build the templates: outlines of all shapes at all angles, each sharp and blurred.

    The frame of a template has its origin at the centroid and the square root of the area as its unit.

    Returns:
        Templates (n, cells), their sums (n,), the area of each shape at radius 1, and the centroids (n, 2) at
        radius 1.
    """
    fine = (np.arange(200) + 0.5) / 200 * 2.6 - 1.3
    x, y = np.meshgrid(fine, fine)
    areas, templates, centers = [], [], []
    ticks = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _REACH
    for shape in SHAPES:
        inside = signed_distance(shape, x, y, 1.0) < 0
        area, center = inside.mean() * 2.6**2, (x[inside].mean(), y[inside].mean())
        areas.append(area)
        for turn in _TURNS:
            cos, sin = np.cos(turn), np.sin(turn)
            a, b = np.meshgrid(ticks * np.sqrt(area), ticks * np.sqrt(area))
            u, v = cos * a + sin * b + center[0], cos * b - sin * a + center[1]
            sharp = np.clip(0.5 - 9.0 * signed_distance(shape, u, v, 1.0), 0, 1)
            templates += [sharp.ravel(), gaussian_filter(sharp, 0.09 / (2 * _REACH / _GRID)).ravel()]
            centers += [(cos * center[0] - sin * center[1], sin * center[0] + cos * center[1])] * 2
    stack = np.array(templates, dtype=np.float32)
    return stack, stack.sum(1), np.array(areas), np.array(centers)


def _shape(cover: np.ndarray) -> tuple[str, float, float, float, float]:
    """Find the shape that matches a soft mask (h, w) best.

    Returns:
        Its name, the match (soft intersection over union), the radius, and x and y of the center in pixels.
    """
    area = cover.sum()
    x, y = cover.sum(0) @ np.arange(cover.shape[1]) / area, cover.sum(1) @ np.arange(cover.shape[0]) / area
    templates, sums, areas, centers = _templates()
    ticks = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _REACH * np.sqrt(area)
    grid = np.meshgrid(y + ticks, x + ticks, indexing="ij")
    seen = map_coordinates(cover, grid, order=1, mode="constant").ravel()
    both = np.minimum(templates, seen).sum(1)
    match = both / (sums + seen.sum() - both)
    best = int(match.argmax())
    shape = best // (len(match) // len(SHAPES))
    radius = float(np.sqrt(area / areas[shape]))
    x, y = x + 0.5 - radius * centers[best, 0], y + 0.5 - radius * centers[best, 1]
    return SHAPES[shape], float(match[best]), radius, float(x), float(y)


def _explained(values: np.ndarray, way: np.ndarray) -> float:
    """Return the share of the variance of `values` explained by position along `way`, in whole pixels."""
    bins = np.round(way - way.min()).astype(int)
    counts = np.bincount(bins)
    means = np.bincount(bins, values) / np.maximum(counts, 1)
    return float((counts * (means - values.mean()) ** 2).sum() / (len(values) * values.var() + 1e-9))


def _texture(shade: np.ndarray, body: np.ndarray) -> str:
    """Classify a texture as `solid`, `striped` or `dotted` from the darkness (h, w; 0 to 1) of an object.

    Variation with the distance from the outline is blur and is removed first. Stripes vary from row to row
    but not from column to column; dots vary alike in both.
    """
    depth = np.minimum(np.round(np.asarray(distance_transform_edt(body))).astype(int), 6)
    inside = depth >= (3 if (depth >= 3).sum() > 30 else 2)
    if inside.sum() < 12:
        return "solid"
    layers, values = depth[inside], shade[inside]
    values = values - (np.bincount(layers, values) / np.maximum(np.bincount(layers), 1))[layers]
    if values.std() < 0.13:
        return "solid"
    y, x = np.nonzero(inside)
    rows = max(_explained(values, y * np.cos(t) - x * np.sin(t)) for t in _TURNS)
    columns = max(_explained(values, x * np.cos(t) + y * np.sin(t)) for t in _TURNS)
    return "striped" if rows - columns > 0.35 else "dotted"


def _outline(own: np.ndarray, far: np.ndarray, level: float | np.floating) -> np.ndarray | None:
    """Return the soft mask (h, w) of the largest part of `own` whose distance `far` exceeds half of `level`.

    Small holes, which are specks on the object, are filled. Returns None if no part is large enough.
    """
    parts = pieces(own & (far > 0.5 * level), 12)
    if not parts:
        return None
    body = parts[0]
    holes = np.asarray(binary_fill_holes(body, CROSS)) & ~body
    for hole in pieces(holes, 1) if holes.any() else []:
        body = body | hole if hole.sum() <= 14 else body
    rim = body & np.logical_not(binary_erosion(body, CROSS, border_value=1))
    edge = np.logical_and(binary_dilation(body, CROSS), ~body)
    soft = np.clip(far / level, 0, 1)
    return np.where(rim, np.maximum(soft, 0.5), body) + np.where(edge, np.minimum(soft, 0.5), 0.0)


def _is_clutter(body: np.ndarray, far: np.ndarray, match: float) -> bool:
    """Return whether a body (h, w) is too small, too thin or too faint for an object.

    The least size is larger for a body that matches no shape.
    """
    filled = np.asarray(binary_fill_holes(body, CROSS))
    small = filled.sum() < (SPECK if match >= MATCH else 2 * SPECK)
    return (
        small or not binary_erosion(filled, CROSS, iterations=2).any() or np.percentile(far[body], 75) < PALE
    )


def _thing(
    mask: np.ndarray, away: np.ndarray, background: np.ndarray
) -> tuple[Thing | None, float, np.ndarray]:
    """Identify the object that most of a connected mask (h, w) shows.

    Returns:
        The object (None if there is none), its match, and the mask of the pixels that are not part of it.
    """
    color, lit, dark = _color(away[core(mask)], background)
    own = mask & _belongs(away, lit, dark)
    far = np.linalg.norm(away, axis=-1)
    best, body = ("", 0.0, 0.0, 0.0, 0.0), None
    for level in (np.linalg.norm(lit), min(np.linalg.norm(lit), np.linalg.norm(dark))):  # solid; textured
        cover = None if best[1] > 0.88 else _outline(own, far, level)
        if cover is not None and (matched := _shape(cover))[1] > best[1]:
            best, body = matched, cover >= 0.5
    if body is None:
        return None, 0.0, np.zeros_like(mask)
    rest = mask & np.logical_not(binary_dilation(body, CROSS, iterations=2))
    shape, match, radius, x, y = best
    if _is_clutter(body, far, match):
        return None, 0.0, rest
    line = dark - lit
    texture = _texture(np.clip((away - lit) @ line / (line @ line), 0, 1), body)
    name = shape if match >= MATCH else UNKNOWN
    return Thing(name, list(COLORS)[color], texture, radius, x, y), match, rest


def _look(
    mask: np.ndarray, away: np.ndarray, background: np.ndarray, depth: int = 0
) -> list[tuple[Thing, float]]:
    """Detect the objects in one connected part of the foreground; return each with its match."""
    window = tuple(
        slice(max(0, side.start - 2), side.stop + 2) for side in find_objects(mask.astype(np.int8))[0]
    )
    thing, match, rest = _thing(mask[window], away[window], background)
    found = []
    if thing:
        top, left = window[0].start, window[1].start
        found.append((replace(thing, x=thing.x + left, y=thing.y + top), match))
    if depth < 2:
        whole = np.zeros_like(mask)
        whole[window] = binary_erosion(rest, CROSS)
        for piece in pieces(whole, 12):
            found += _look(piece, away, background, depth + 1)
        if thing and match < 0.85:
            parts = [got for half in halves(mask) for got in _look(half, away, background, 2)]
            if len(parts) > 1 and min(m for _, m in parts) > max(match, MATCH):
                return parts
    return found


def measure(image: Image.Image | np.ndarray) -> tuple[list[Thing], str]:
    """Detect the objects in a picture (64, 64, 3) and the name of its background, from the pixels alone."""
    pixels = to_pixels(image)
    name, light = fit_background(pixels)
    away, color = pixels - light, np.array(BACKGROUNDS[name], dtype=np.float32)
    parts = pieces(np.linalg.norm(away, axis=-1) > FAINT, 20)
    return [thing for part in parts for thing, _ in _look(part, away, color)], name


@lru_cache(maxsize=256)
def _measured(pixels: bytes) -> tuple[list[Thing], str]:
    """Cache `measure`, so that all measures of a picture share one detection."""
    return measure(np.frombuffer(pixels, dtype=np.float32).reshape(SIDE, SIDE, 3))


def _request(prompt: str) -> Request:
    try:
        return parse(prompt)
    except InputError as error:
        raise InputError(f"{error}; evaluation.oracle=null leaves the oracle out") from error


def held(image: Image.Image | np.ndarray, prompt: str) -> list[bool]:
    """Check all assertions of the prompt on the picture; raise InputError for a prompt not in the grammar."""
    return assertions(_request(prompt), *_measured(to_pixels(image).tobytes()))


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError for a prompt that is not in the grammar."""
    for prompt in prompts:
        _request(prompt)


def alignment(image: Image.Image | np.ndarray, prompt: str) -> float:
    """Return 1.0 if all assertions hold and no other object is there (as strict as GenEval), else 0.0."""
    return float(all(held(image, prompt)))


def assertion_share(image: Image.Image | np.ndarray, prompt: str) -> float:
    """Return the share of the prompt's assertions that hold, in [0, 1]."""
    return float(np.mean(held(image, prompt)))


def alignments(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Return `alignment` of B pictures, (B,)."""
    return torch.tensor([alignment(*pair) for pair in zip(images, prompts, strict=True)])


def assertion_shares(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Return `assertion_share` of B pictures, (B,)."""
    return torch.tensor([assertion_share(*pair) for pair in zip(images, prompts, strict=True)])


for _measure in (alignments, assertion_shares):
    setattr(_measure, check_prompts.__name__, check_prompts)  # which a reward looks for


def ratings(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Return the rating of B pictures, (B,), from 1 to 10; the prompts are ignored."""
    return torch.tensor([rating(image) for image in images])
