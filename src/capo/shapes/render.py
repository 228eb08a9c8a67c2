"""Rendering of scenes: anti-aliased shapes from signed distances, textures and imperfections of style."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

from capo.shapes.scenes import BACKGROUNDS, COLORS, SIDE, Scene, Thing

# shape, offsets u and v, radius -> signed distance
Outline = Callable[[str, np.ndarray, np.ndarray, float], np.ndarray]


def _star() -> np.ndarray:
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.47)
    return np.stack([np.cos(turns) * radii, np.sin(turns) * radii], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16.0


_A = 0.34  # half the width of the cross's arms
# Outlines at radius 1, y downward, corners in order.
OUTLINES = {
    "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "triangle": np.array([(0.0, -0.95), (0.98, 0.78), (-0.98, 0.78)]),
    "diamond": np.array([(0.0, -1.05), (0.78, 0.0), (0.0, 1.05), (-0.78, 0.0)]),
    "cross": np.array(
        [
            (-_A, -1),
            (_A, -1),
            (_A, -_A),
            (1, -_A),
            (1, _A),
            (_A, _A),
            (_A, 1),
            (-_A, 1),
            (-_A, _A),
            (-1, _A),
            (-1, -_A),
            (-_A, -_A),
        ]
    ),
    "star": _star(),
    "heart": _heart(),
}


def _polygon_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return the signed distance (negative inside) of points (n, 2) to a simple polygon (k, 2)."""
    edge = np.roll(corners, -1, axis=0) - corners
    away = points[:, None] - corners[None]
    share = np.clip((away * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.sqrt(((away - share[..., None] * edge) ** 2).sum(-1)).min(1)
    below = corners[:, 1] <= points[:, None, 1]
    crosses = below != np.roll(below, -1, axis=1)
    left = edge[:, 0] * away[..., 1] - edge[:, 1] * away[..., 0] > 0
    inside = (crosses & (left == (edge[:, 1] > 0)[None])).sum(1) % 2 == 1
    return np.where(inside, -distance, distance)


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance in pixels, negative inside, of offsets (u, v) from an upright shape's center."""
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.76 * radius) - 0.24 * radius
    flat = np.stack([u.ravel(), v.ravel()], axis=1)
    return _polygon_distance(flat, OUTLINES[shape] * radius).reshape(u.shape)


def _paint(thing: Thing, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the color (h, w, 3) of an object before masking: plain, or with darker stripes or dots."""
    color = np.array(COLORS[thing.color], dtype=np.float32)
    dark = np.zeros_like(u)
    if thing.texture == "striped":
        period = 6.0
        dark = np.clip(0.5 + 1.6 * np.sin(2 * np.pi * (v / period + rng.random())), 0, 1)
    elif thing.texture == "dotted":
        spacing = 7.5
        nearest = [(w / spacing + rng.random() + 0.5) % 1.0 - 0.5 for w in (u, v)]
        dark = np.clip(2.6 - np.hypot(*nearest) * spacing, 0, 1)
    return color * (1 - 0.55 * dark[..., None])


def _draw(canvas: np.ndarray, thing: Thing, rng: np.random.Generator, outline: Outline) -> None:
    reach = thing.radius * 1.2 + 2
    x0, x1 = max(0, int(thing.x - reach)), min(SIDE, int(thing.x + reach) + 2)
    y0, y1 = max(0, int(thing.y - reach)), min(SIDE, int(thing.y + reach) + 2)
    dx = np.arange(x0, x1) + 0.5 - thing.x
    dy = np.arange(y0, y1) + 0.5 - thing.y
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    u = cos * dx[None] + sin * dy[:, None]
    v = -sin * dx[None] + cos * dy[:, None]
    cover = np.clip(0.5 - outline(thing.shape, u, v, thing.radius), 0, 1)[..., None]
    window = canvas[y0:y1, x0:x1]
    window += cover * (_paint(thing, u, v, rng) - window)


def _clutter(canvas: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Draw specks and short scratches of a muddy color, too small to be objects."""
    for _ in range(count):
        shade = rng.uniform(50, 200, size=3) * 0.5 + 60
        x, y = rng.uniform(1, SIDE - 1, size=2)
        turn, length = rng.uniform(0, np.pi), rng.uniform(0, 5)
        for step in np.linspace(-0.5, 0.5, 6):
            i, j = int(y + step * length * np.sin(turn)), int(x + step * length * np.cos(turn))
            canvas[max(i, 0) : i + 2, max(j, 0) : j + 2] = shade


def render(scene: Scene, outline: Outline = signed_distance) -> np.ndarray:
    """Render a scene as (64, 64, 3) uint8 RGB; the scene's seed determines texture phases and clutter.

    `outline` gives signed distances for the shape names in the scene, if they are not all in SHAPES.
    """
    rng = np.random.default_rng(scene.seed)
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    canvas = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
    for thing in scene.things:
        _draw(canvas, thing, rng, outline)
    style = scene.style
    canvas = background + style.contrast * (canvas - background)
    if style.shade:
        turn = rng.uniform(0, 2 * np.pi)
        slope = np.linspace(-1, 1, SIDE)
        canvas = canvas + 45 * style.shade * (
            np.cos(turn) * slope[None, :, None] + np.sin(turn) * slope[:, None, None]
        )
    _clutter(canvas, style.clutter, rng)
    if style.blur:
        canvas = gaussian_filter(canvas, (style.blur, style.blur, 0))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
