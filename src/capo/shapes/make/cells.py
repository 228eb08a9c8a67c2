"""Auxiliary task of the denoiser's tokens: which shape a token's cell shows, and where its center is.

Scenes are rendered by a program, so this is known of every training scene. A denoiser that represents it in
its middle layers knows which outline to draw (compare representation alignment, Yu et al. 2024, which
predicts an encoder's features).
"""

from __future__ import annotations

from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capo.shapes.make.scenery import training_scene
from capo.shapes.scenes import MAX_OBJECTS, SHAPES, SIDE

GRID = 8  # cells per side
MARGIN = 4.0  # pixels around an object within which cells still belong to it
KINDS = len(SHAPES) + 1  # number 0: none


def things_of(index: int, seed: int) -> np.ndarray:
    """Return the objects of training scene `index` as (MAX_OBJECTS, 4) float32.

    The columns are the shape's number (0: no object), x, y and radius in pixels.
    """
    _, scene, _ = training_scene(index, seed)
    found = np.zeros((MAX_OBJECTS, 4), np.float32)
    for row, thing in enumerate(scene.things):
        found[row] = SHAPES.index(thing.shape) + 1, thing.x, thing.y, thing.radius
    return found


def all_things(work: Path, count: int, seed: int, workers: int) -> Tensor:
    """Return the objects (count, MAX_OBJECTS, 4) of all training scenes, cached in `work`."""
    path = work / "things.npy"
    if not path.exists():
        with Pool(workers) as pool:
            np.save(
                work / "things.part.npy",
                np.stack(pool.map(partial(things_of, seed=seed), range(count), chunksize=500)),
            )
        (work / "things.part.npy").rename(path)
    return torch.from_numpy(np.load(path))


def cells(things: Tensor) -> tuple[Tensor, Tensor]:
    """Assign the nearest object to each cell, from objects (B, T, 4) as in `things_of`.

    Returns:
        The shape numbers (B, GRID^2), 0 where no object reaches the cell; and (B, GRID^2, 3): how far the
        cell's center is to the right of and below the object's center, in cells, and the object's radius,
        normalized.
    """
    kind, x, y, radius = things.unbind(-1)
    middle = (torch.arange(GRID) + 0.5) * SIDE / GRID
    down, across = (axis.flatten() for axis in torch.meshgrid(middle, middle, indexing="ij"))
    right, below = across[None, :, None] - x[:, None], down[None, :, None] - y[:, None]  # (B, cells, T)
    beyond = torch.maximum(right.abs(), below.abs()) - radius[:, None]
    beyond = beyond.masked_fill((kind == 0)[:, None], torch.inf)
    nearest = beyond.argmin(-1, keepdim=True)

    def chosen(of: Tensor) -> Tensor:
        return of.expand_as(beyond).gather(-1, nearest)[..., 0]

    found = torch.where(chosen(beyond) < MARGIN, chosen(kind[:, None]).long(), 0)
    scale = SIDE / GRID
    return found, torch.stack(
        [chosen(right) / scale, chosen(below) / scale, chosen(radius[:, None]) / 6 - 2], dim=-1
    )


class Teller(nn.Module):
    """Auxiliary head: predicts from tokens (B, GRID^2, width) each cell's shape and its offset and radius."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, KINDS + 3)
        )

    def loss(self, tokens: Tensor, things: Tensor) -> Tensor:
        """Return the cross-entropy of the shapes plus the squared error of the offsets where there is one."""
        told, (kind, where) = self.layers(tokens), cells(things)
        missed = (told[..., KINDS:] - where).square().mean(-1) * (kind > 0)
        return F.cross_entropy(told[..., :KINDS].flatten(0, 1), kind.flatten()) + missed.mean()
