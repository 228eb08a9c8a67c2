"""Background and foreground of a picture: the first step of the oracle and of the rating rule."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure, label

from capo.shapes.scenes import BACKGROUNDS, SIDE

SPECK = 36  # area in pixels, holes filled, below which a part is clutter
FAINT = 16.0  # least distance (RGB, 0-255) between an object and the background
CROSS = generate_binary_structure(2, 1)  # scipy's default, which it builds in every call
_AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)
_PLANE = np.stack(
    [np.broadcast_to(_AXIS, (SIDE, SIDE)), np.broadcast_to(_AXIS[:, None], (SIDE, SIDE))], axis=-1
)
_X, _Y = _PLANE[..., 0], _PLANE[..., 1]
_CURVES = np.stack([np.ones_like(_X), _X, _Y, _X * _X, _Y * _Y, _X * _Y], axis=-1)


def to_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert a picture to (64, 64, 3) float32, 0-255; raise ValueError for another size."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(
            f"the oracle measures pictures of {SIDE} x {SIDE} RGB pixels, this one has shape {pixels.shape}"
        )
    return pixels


def _bent(light: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Add to the background `light` (64, 64, 3) a smooth correction, quadratic in each channel.

    It is fitted to all pixels close to the background; `light` is returned unchanged if those are too few.
    """
    off = pixels - light
    near = np.linalg.norm(off, axis=-1)[::2, ::2] < FAINT
    if near.sum() < 200:
        return light
    coefficients = np.linalg.lstsq(_CURVES[::2, ::2][near], off[::2, ::2][near], rcond=None)[0]
    return light + np.clip(_CURVES @ coefficients, -FAINT, FAINT)


def fit_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name of the background and its color at every pixel, (64, 64, 3).

    The model is one color and a slope shared by the channels, fitted by reweighted least squares to the frame
    of the picture, two pixels wide: objects seldom touch the frame, and those that do are outliers. Values
    clipped at 0 or 255 carry no information about the slope and are left out.
    """
    return _fitted(np.ascontiguousarray(pixels, dtype=np.float32).tobytes())


@lru_cache(maxsize=256)  # shared by the oracle and the rating rule
def _fitted(content: bytes) -> tuple[str, np.ndarray]:
    pixels = np.frombuffer(content, dtype=np.float32).reshape(SIDE, SIDE, 3)
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[2:-2, 2:-2] = False
    values, where = pixels[frame][::2], _PLANE[frame][::2]
    inside = (values > 1) & (values < 254)
    inside = inside if inside.mean() > 0.2 else np.ones_like(inside)
    rows, channels = np.nonzero(inside)
    design = np.concatenate([np.eye(3, dtype=np.float32)[channels], where[rows]], axis=1)
    target = values[inside]
    weight = np.abs(target - np.median(values, axis=0)[channels]) < 70
    solution = np.zeros(5, dtype=np.float32)
    for scale in (60.0, 25.0, 12.0):
        weighted = design * weight[:, None]
        solution = np.linalg.solve(weighted.T @ design + 1e-2 * np.eye(5), weighted.T @ target)
        weight = 1 / (1 + ((target - design @ solution) / scale) ** 2) ** 2
    light = _bent(np.clip(solution[:3] + _PLANE @ solution[3:, None], 0, 255), pixels)
    names = list(BACKGROUNDS)
    nearest = (
        np.abs(np.array([BACKGROUNDS[n] for n in names]) - np.clip(solution[:3], 0, 255)).sum(-1).argmin()
    )
    return names[int(nearest)], light


def pieces(mask: np.ndarray, least: int) -> list[np.ndarray]:
    """Return the connected components of a mask that have at least `least` pixels, the largest first."""
    parts, count = cast(tuple[np.ndarray, int], label(mask, CROSS))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    return [parts == index + 1 for index in np.argsort(-sizes, kind="stable") if sizes[index] >= least]


def core(mask: np.ndarray) -> np.ndarray:
    """Return a mask without its outermost pixels, or as it is where fewer than 12 would be left."""
    inner = binary_erosion(mask, CROSS)
    return inner if inner.sum() >= 12 else mask


def halves(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask at its narrow places, if erosion leaves more than one core; return [] otherwise."""
    inner = mask
    for _ in range(4):
        inner = binary_erosion(inner, CROSS)
        cores = pieces(inner, 10)
        if len(cores) > 1:
            nearest = np.argmin([np.asarray(distance_transform_edt(~core)) for core in cores], axis=0)
            return [mask & (nearest == index) for index in range(len(cores))]
    return []
