"""Line-ups for the rewards: pictures and captions of nearly the same content, with labels known by
construction.

One line-up is four captions (one request and three changes of it) and four pictures (each drawn for one of
them, some with a failure on purpose). Which caption holds for which picture follows from what was drawn;
nothing is measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from capo.shapes.captions import caption
from capo.shapes.make.autoencoder import to_tensor
from capo.shapes.make.scenery import allowed, random_style, wrong_request
from capo.shapes.prompts import training_request
from capo.shapes.rating import rating
from capo.shapes.render import render, signed_distance
from capo.shapes.rewards import LENGTH, tokens
from capo.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    TEXTURES,
    Request,
    Scene,
    Thing,
    assertions,
    realise,
)

SIZE = 4  # pictures, and captions, of a line-up
THINGS = 6  # most things that are recorded
FAILED = 0.35  # share of pictures with a failure


def odd_outline(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distances of shapes that are none: `a/b/t` lies between two shapes, `a!turn!cut` lacks a piece."""
    if "/" in shape:
        first, second, share = shape.split("/")
        t = float(share)
        return (1 - t) * signed_distance(first, u, v, radius) + t * signed_distance(second, u, v, radius)
    if "!" in shape:
        whole, turn, cut = shape.split("!")
        side = np.cos(float(turn)) * u + np.sin(float(turn)) * v - float(cut) * radius
        return np.maximum(signed_distance(whole, u, v, radius), side)
    return signed_distance(shape, u, v, radius)


def _odd_shape(shape: str, rng: np.random.Generator) -> str:
    other = str(rng.choice([s for s in SHAPES if s != shape]))
    if rng.random() < 0.6:
        return f"{shape}/{other}/{rng.uniform(0.35, 0.65):.2f}"
    return f"{shape}!{rng.uniform(0, 6.28):.2f}!{rng.uniform(-0.1, 0.35):.2f}"


def failed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing missing, added, malformed or run into another, as an unready base model draws
    it.
    """
    things, pick = list(scene.things), int(rng.integers(len(scene.things)))
    kind = rng.choice(["missing", "extra", "merged", "odd", "odd", "odd"])
    if kind == "missing" and len(things) > 1:
        del things[pick]
    elif kind == "merged" and len(things) > 1:
        other = things[pick - 1]
        turn, gap = rng.uniform(0, 6.28), rng.uniform(0.5, 1.0) * other.radius
        x, y = np.clip([other.x + gap * np.cos(turn), other.y + gap * np.sin(turn)], 8, SIDE - 8)
        things[pick - 1] = replace(
            other, shape=f"{other.shape}/{other.shape}/0.5"
        )  # covered in part: no whole shape
        moved = replace(things[pick], x=float(x), y=float(y))
        if moved.colour == other.colour:  # the two are one blob
            moved = replace(moved, shape=f"{moved.shape}/{moved.shape}/0.5")
        things = [thing for i, thing in enumerate(things) if i != pick] + [moved]
    elif kind == "extra" and len(things) < 5:
        radius = float(rng.uniform(6.5, 8.5))
        for _ in range(40):
            x, y = rng.uniform(9, SIDE - 9, size=2)
            if all(np.hypot(t.x - x, t.y - y) > t.radius + radius + 2 for t in things):
                like = things[pick]
                shape = like.shape if rng.random() < 0.5 else str(rng.choice(SHAPES))
                colour = like.colour if rng.random() < 0.5 else str(rng.choice(list(COLOURS)))
                things.append(Thing(shape, colour, "solid", radius, float(x), float(y)))
                break
    else:
        things[pick] = replace(things[pick], shape=_odd_shape(things[pick].shape, rng))
    return replace(scene, things=tuple(things))


def swapped(request: Request, rng: np.random.Generator) -> Request:
    """Two groups exchange their colours or shapes, or a relation its two sides: the classical failures of
    binding.
    """
    if len(request.groups) < 2:
        return request
    first, second, *rest = request.groups
    if first.colour and second.colour and rng.random() < 0.6:
        pair = replace(first, colour=second.colour), replace(second, colour=first.colour)
    else:
        pair = replace(first, shape=second.shape), replace(second, shape=first.shape)
    return replace(request, groups=(*pair, *rest))


def changed(request: Request, rng: np.random.Generator) -> Request:
    """A request that differs in an attribute or two and may be trained on."""
    for _ in range(50):
        wrong = float(rng.choice([0.15, 0.3, 0.5]))
        other = swapped(request, rng) if rng.random() < 0.2 else wrong_request(request, wrong, rng)
        if other.background and rng.random() < 0.15:
            other = replace(other, background=str(rng.choice(list(BACKGROUNDS))))
        if other != request and allowed(other) and len({g.shape for g in other.groups}) == len(other.groups):
            return other
    return training_request(rng)


def _warped(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outlines a little uneven, as a sampler draws them: pixels move by a smooth field of less than a pixel."""
    shift = gaussian_filter(rng.normal(size=(2, SIDE, SIDE)), (0, 4, 4))
    shift *= rng.uniform(0.2, 0.8) / (shift.std() + 1e-6)
    where = np.mgrid[0:SIDE, 0:SIDE] + shift
    return np.stack(
        [map_coordinates(picture[..., c], where, order=1, mode="nearest") for c in range(3)], axis=-1
    )


def _record(things: Sequence[Thing]) -> np.ndarray:
    """(THINGS, 6) float32: x, y, radius, and the numbers of shape (8 is none of them), colour, texture; -1
    beyond the last.
    """
    table = np.full((THINGS, 6), -1, dtype=np.float32)
    for row, thing in zip(table, things):
        shape = SHAPES.index(thing.shape) if thing.shape in SHAPES else len(SHAPES)
        texture = ("solid", *TEXTURES).index(thing.texture)
        row[:] = thing.x, thing.y, thing.radius, shape, list(COLOURS).index(thing.colour), texture
    return table


def _wrong_words(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """1 where a caption differs from the true one word for word, 0 where it agrees, -1 where they cannot be
    compared.
    """
    if ((said > 0) != (true > 0)).any():
        return np.full(LENGTH, -1, dtype=np.int8)
    return (said != true).astype(np.int8)


def lineup(index: int, seed: int) -> dict[str, np.ndarray]:
    """Line-up `index`: pictures, things, words, and for picture i and caption j the share of assertions that
    holds.
    """
    rng = np.random.default_rng([seed, 3, index])
    requests = [training_request(rng)]
    while len(requests) < SIZE:
        requests.append(changed(requests[0], rng))
    words = tokens([caption(request) for request in requests]).numpy()
    pictures, things, share = [], [], np.zeros((SIZE, SIZE), dtype=np.float32)
    wrong = np.full((SIZE, SIZE, LENGTH), -1, dtype=np.int8)
    for i in range(SIZE):
        own = 0 if i == 1 else i  # two pictures for the first request, one for each of two others
        scene = realise(requests[own], rng, random_style(rng))
        fails = rng.random() < FAILED
        scene = failed(scene, rng) if fails else scene
        picture = render(scene, odd_outline)
        pictures.append(_warped(picture, rng) if rng.random() < 0.3 else picture)
        things.append(_record(scene.things))
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
    }


@torch.inference_mode()
def _decoded(pictures: np.ndarray, vae: torch.nn.Module, rng: torch.Generator) -> np.ndarray:
    """Pictures (B, 64, 64, 3) after the autoencoder, with a little noise on some latents, as sampled ones
    have.
    """
    z = vae.encode(to_tensor(pictures)).latent_dist.mean
    strength = torch.rand(len(z), 1, 1, 1, generator=rng).sub(0.4).clamp(min=0) * 0.5
    z = z + strength * z.std() * torch.randn(z.shape, generator=rng)
    x = vae.decode(z).sample.add(1).mul(127.5).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _decode_half(tables: dict[str, np.ndarray], vae: torch.nn.Module, seed: int) -> None:
    """Put the second and third picture of each line-up through the autoencoder, and rate them as they then
    look.
    """
    rng = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, len(tables["pictures"]), 50), "decoded", mininterval=5):
        part = tables["pictures"][start : start + 50, 1:3]
        got = _decoded(part.reshape(-1, SIDE, SIDE, 3), vae, rng)
        tables["pictures"][start : start + 50, 1:3] = got.reshape(part.shape)
        tables["ratings"][start : start + 50, 1:3] = np.reshape(
            [rating(picture) for picture in got], part.shape[:2]
        )


def make_lineups(
    work: Path, count: int, seed: int, vae: torch.nn.Module, workers: int
) -> dict[str, np.ndarray]:
    """Draw line-ups, or find them in `work/lineups`: arrays by name, leading axis `count`.

    The second and third picture of each have been through the autoencoder.
    """
    folder = work / "lineups"
    if not folder.exists():
        with Pool(workers) as pool:
            drawn = list(
                tqdm(
                    pool.imap(partial(lineup, seed=seed), range(count), 50),
                    "line-ups",
                    total=count,
                    mininterval=5,
                )
            )
        tables = {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}
        _decode_half(tables, vae, seed)
        part = folder.with_name("lineups.part")
        part.mkdir(exist_ok=True)
        for name, table in tables.items():
            np.save(part / f"{name}.npy", table)
        os.replace(part, folder)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
