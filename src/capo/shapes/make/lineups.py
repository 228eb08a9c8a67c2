"""Line-ups for training rewards: similar pictures and captions with labels known by construction.

A line-up has four captions (one request and three variations of it) and four pictures (each drawn for one of
them, some with a simulated failure). Which caption holds for which picture follows from what was drawn, not
from a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from capo.backbones.models import Autoencoder
from capo.runtime.files import fresh_folder
from capo.shapes.captions import caption
from capo.shapes.make.autoencoder import to_tensor
from capo.shapes.make.failures import failed, flawed_style, odd_outline, uneven, warped
from capo.shapes.make.scenery import allowed, wrong_request
from capo.shapes.prompts import training_request
from capo.shapes.rating import rating
from capo.shapes.render import render
from capo.shapes.reward_networks import LENGTH
from capo.shapes.rewards import tokens
from capo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIDE,
    TEXTURES,
    Request,
    Thing,
    assertions,
    realize,
)

SIZE = 4  # pictures, and captions, of a line-up
OWN = (0, 0, 2, 3)  # index of the caption that each picture is drawn for
THINGS = 6  # objects recorded at most
FAILED = 0.4  # share of pictures with a failure


def swapped(request: Request, rng: np.random.Generator) -> Request:
    """Exchange the colors or shapes of the first two groups: the classical failures of binding.

    A relation between them then has its sides exchanged.
    """
    if len(request.groups) < 2:
        return request
    first, second, *rest = request.groups
    if first.color and second.color and rng.random() < 0.6:
        pair = replace(first, color=second.color), replace(second, color=first.color)
    else:
        pair = replace(first, shape=second.shape), replace(second, shape=first.shape)
    return replace(request, groups=(*pair, *rest))


def changed(request: Request, rng: np.random.Generator) -> Request:
    """Vary one or two attributes of a request; the result may be used in training (`allowed`)."""
    for _ in range(50):
        wrong = float(rng.choice([0.15, 0.3, 0.5]))
        other = swapped(request, rng) if rng.random() < 0.2 else wrong_request(request, wrong, rng)
        if other.background and rng.random() < 0.15:
            other = replace(other, background=str(rng.choice(list(BACKGROUNDS))))
        if other != request and allowed(other):
            return other
    return training_request(rng)


def recorded(things: Sequence[Thing]) -> np.ndarray:
    """Encode objects as (THINGS, 6) float32.

    The columns are x, y, radius and the indices of shape (8: none of SHAPES), color and texture; -1 is
    padding.
    """
    table = np.full((THINGS, 6), -1, dtype=np.float32)
    for row, thing in zip(table, things, strict=False):
        shape = SHAPES.index(thing.shape) if thing.shape in SHAPES else len(SHAPES)
        texture = ("solid", *TEXTURES).index(thing.texture)
        row[:] = thing.x, thing.y, thing.radius, shape, list(COLORS).index(thing.color), texture
    return table


def _wrong_words(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 1 for each word of a caption that differs from the true caption, else 0.

    All are -1 if the two cannot be compared word by word.
    """
    if ((said > 0) != (true > 0)).any():
        return np.full(LENGTH, -1, dtype=np.int8)
    return (said != true).astype(np.int8)


def lineup(index: int, seed: int) -> dict[str, np.ndarray]:
    """Draw line-up `index`.

    Returns:
        Pictures, objects, words and ratings; and for picture i and caption j the share of assertions that
        hold and which words are wrong.
    """
    rng = np.random.default_rng([seed, 3, index])
    requests = [training_request(rng)]
    while len(requests) < SIZE:
        requests.append(changed(requests[0], rng))
    words = tokens([caption(request) for request in requests]).numpy()
    pictures, things, share = [], [], np.zeros((SIZE, SIZE), dtype=np.float32)
    wrong = np.full((SIZE, SIZE, LENGTH), -1, dtype=np.int8)
    for i, own in enumerate(OWN):
        scene = realize(requests[own], rng, flawed_style(rng))
        fails = rng.random() < FAILED
        scene = failed(scene, rng) if fails else scene
        picture = render(scene, odd_outline)
        picture = warped(picture, rng) if rng.random() < 0.3 else picture
        pictures.append(uneven(picture, rng) if rng.random() < 0.25 else picture)
        things.append(recorded(scene.things))
        for j, request in enumerate(requests):
            share[i, j] = np.mean(assertions(request, scene.things, scene.background))
            if not fails:
                wrong[i, j] = 0 if share[i, j] == 1 else _wrong_words(words[j], words[own])
    ratings = np.array([rating(picture) for picture in pictures], dtype=np.float32)
    return {
        "pictures": np.stack(pictures),
        "things": np.stack(things),
        "words": words,
        "share": share,
        "wrong": wrong,
        "ratings": ratings,
        "kept": np.ones(SIZE, dtype=bool),
    }


@torch.inference_mode()
def _decoded(pictures: np.ndarray, vae: Autoencoder, rng: torch.Generator) -> np.ndarray:
    """Autoencode pictures (B, 64, 64, 3).

    Some latents get a little noise, as those of sampled images have.
    """
    z = vae.encode(to_tensor(pictures)).latent_dist.mean
    strength = torch.rand(len(z), 1, 1, 1, generator=rng).sub(0.4).clamp(min=0) * 0.5
    z = z + strength * z.std() * torch.randn(z.shape, generator=rng)
    x = vae.decode(z).sample.add(1).mul(127.5).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _kept(before: np.ndarray, after: np.ndarray, things: np.ndarray) -> bool:
    """Return whether a picture (64, 64, 3) shows its objects (n, 6) and their textures after autoencoding.

    If not, its content is uncertain, and whether a caption holds for it is left out of training.
    """
    before, after = before.astype(np.float32), after.astype(np.float32)
    ground = np.median(before[:2].reshape(-1, 3), axis=0)
    for x, y, radius, _, _, texture in things[things[:, 0] >= 0]:
        inside = texture > 0  # a texture is judged inside the outline
        reach = (0.55 if inside else 1.1) * radius
        box = tuple(slice(int(max(0, c - reach)), int(c + reach) + 1) for c in (y, x))
        level = before[box].mean((0, 1)) if inside else ground
        shown, off = ((before[box] - level) ** 2).sum(), ((after[box] - before[box]) ** 2).sum()
        if off > (0.45 if inside else 0.2) * shown:
            return False
    return True


def _decode_half(tables: dict[str, np.ndarray], vae: Autoencoder, seed: int) -> None:
    """Autoencode two pictures of each line-up in place, and rate them again."""
    rng = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, len(tables["pictures"]), 50), "decoded", mininterval=5):
        here = slice(start, start + 50), slice(1, 3)
        drawn = tables["pictures"][here].reshape(-1, SIDE, SIDE, 3)
        got, things = _decoded(drawn, vae, rng), tables["things"][here].reshape(len(drawn), THINGS, 6)
        kept = [_kept(*one) for one in zip(drawn, got, things, strict=True)]
        tables["kept"][here] = np.reshape(kept, (-1, 2))
        tables["ratings"][here] = np.reshape([rating(picture) for picture in got], (-1, 2))
        tables["pictures"][here] = got.reshape(-1, 2, SIDE, SIDE, 3)


def _draw(count: int, seed: int, workers: int) -> dict[str, np.ndarray]:
    with Pool(workers) as pool:
        drawing = pool.imap(partial(lineup, seed=seed), range(count), 50)
        drawn = list(tqdm(drawing, "line-ups", total=count, mininterval=5))
    return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}


def _write(tables: dict[str, np.ndarray], folder: Path) -> None:
    with fresh_folder(folder, "*.npy") as part:
        for name, table in tables.items():
            np.save(part / f"{name}.npy", table)


def _read(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def make_lineups(work: Path, count: int, seed: int, vae: Autoencoder, workers: int) -> dict[str, np.ndarray]:
    """Draw line-ups, or load them from `work/lineups`: arrays by name, leading axis `count`.

    The second and third picture of each are autoencoded; the originals are kept in `work/drawn`.
    """
    if not (work / "lineups").exists():
        if not (work / "drawn").exists():
            _write(_draw(count, seed, workers), work / "drawn")
        tables = _read(work / "drawn")
        _decode_half(tables, vae, seed)
        _write(tables, work / "lineups")
    return _read(work / "lineups")
