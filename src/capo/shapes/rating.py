"""Rating rule: how good a picture looks to the simulated raters, independent of the prompt."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes

from capo.shapes.foreground import CROSS, FAINT, SPECK, fit_background, pieces, to_pixels


def _warmth(pixels: np.ndarray) -> np.ndarray:
    """Return the warmth of colors (n, 3) as (n,).

    It is 1 for red, orange and yellow, 0.7 for pink, about 0.4 for green and purple, 0 for cyan and blue.
    """
    return np.clip(0.5 + (pixels[:, 0] - pixels[:, 2]) / 320, 0, 1)


def _sharpness(pixels: np.ndarray, far: np.ndarray, things: np.ndarray) -> float:
    """Return 1 if outlines change from background to object within one pixel, 0 if they need four."""
    step = np.zeros_like(far)
    step[:, 1:] = np.linalg.norm(np.diff(pixels, axis=1), axis=-1)
    step[1:] = np.maximum(step[1:], np.linalg.norm(np.diff(pixels, axis=0), axis=-1))
    band = np.logical_and(binary_dilation(things, CROSS), np.logical_not(binary_erosion(things, CROSS)))
    ratio = np.percentile(step[band], 80) / np.percentile(far[things], 70)
    return float(np.clip((ratio - 0.25) / 0.5, 0, 1))


def rating(image: Image.Image | np.ndarray) -> float:
    """Rate the looks of a picture (64, 64, 3) from its pixels alone, in [1, 10].

        1 + 9 (0.30 vivid + 0.25 warm + 0.20 sharp + 0.15 tidy + 0.10 large)

    A picture without objects is rated 1. The terms, each in [0, 1]:

    - vivid: mean distance (RGB) of the objects from the background; 160 or more counts as 1.
    - warm: mean of red against blue over the objects.
    - sharp: steepness of the outlines.
    - tidy: exp(-clutter / 40 pixels); clutter is all foreground that is too small for an object.
    - large: square root of the objects' share of the picture; 0.15 or more counts as 1.
    """
    pixels = to_pixels(image)
    far = np.linalg.norm(pixels - fit_background(pixels)[1], axis=-1)
    stands_out = far > FAINT
    bodies = [
        part
        for part in pieces(stands_out, 20)
        if binary_erosion(binary_fill_holes(part, CROSS), CROSS, iterations=2).any() and part.sum() >= SPECK
    ]
    if not bodies:
        return 1.0
    things = np.any(bodies, axis=0)
    vivid = np.clip(far[things] / 160, 0, 1).mean()
    tidy = np.exp(-(stands_out & ~things).sum() / 40)
    large = min(1.0, np.sqrt(things.mean() / 0.15))
    sharp = _sharpness(pixels, far, things)
    warm = _warmth(pixels[things]).mean()
    return float(1 + 9 * (0.30 * vivid + 0.25 * warm + 0.20 * sharp + 0.15 * tidy + 0.10 * large))
