"""Scenes of the shapes world, requests for scenes, and whether a scene satisfies a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
COLORS = {
    "red": (214, 36, 40),
    "orange": (247, 132, 16),
    "yellow": (248, 214, 28),
    "green": (34, 156, 60),
    "cyan": (40, 200, 210),
    "blue": (36, 78, 214),
    "purple": (132, 52, 176),
    "pink": (250, 130, 184),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (140, 140, 140),
    "black": (12, 12, 12),
    "beige": (236, 216, 176),
}
TEXTURES = ("striped", "dotted")
SIZES = ("small", "large")
COUNTS = {1: "a", 2: "two", 3: "three"}
MAX_OBJECTS = 3
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# place -> (column, row), each -1, 0, 1, or None if the place does not specify it
PLACES = {
    "on the left": (-1, None),
    "on the right": (1, None),
    "at the top": (None, -1),
    "at the bottom": (None, 1),
    "in the centre": (0, 0),
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
}
# Combinations in test prompts only: in no training caption of the base models, the rewards or the tuning.
UNUSUAL = frozenset(
    {
        ("green", "heart"),
        ("blue", "star"),
        ("orange", "ring"),
        ("pink", "cross"),
        ("cyan", "triangle"),
        ("yellow", "diamond"),
        ("purple", "square"),
        ("red", "circle"),
    }
)


@dataclass(frozen=True)
class Group:
    """`count` equal objects of a request; an attribute that is None is unspecified."""

    shape: str
    count: int = 1
    color: str | None = None
    texture: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Request:
    """Content of a prompt; `relation` is between its first two groups, `place` is the first group's."""

    groups: tuple[Group, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None

    @property
    def slots(self) -> list[Group]:
        """The group of each object requested, one entry per object."""
        return [group for group in self.groups for _ in range(group.count)]


@dataclass(frozen=True)
class Thing:
    """One object of a scene, drawn or detected; center and radius (half the longer side) in pixels."""

    shape: str
    color: str
    texture: str  # "solid" or one of TEXTURES
    radius: float
    x: float
    y: float
    angle: float = 0.0  # radians


@dataclass(frozen=True)
class Style:
    """Rendering quality of a scene; (1, 0, 0, 0) is clean. Training scenes are imperfect on purpose."""

    contrast: float = 1.0  # 1: full colors, 0: the background's
    blur: float = 0.0  # sigma in pixels
    clutter: int = 0  # specks and scratches
    shade: float = 0.0  # strength of an uneven light over the background


@dataclass(frozen=True)
class Scene:
    """Objects on a background, and the seed of all randomness in the rendering."""

    things: tuple[Thing, ...]
    background: str
    style: Style = Style()
    seed: int = 0


def at_place(x: float, y: float, place: str, edge: float = 0.42) -> bool:
    """Return whether (x, y) in pixels lies at the named place: a third of the picture in each direction.

    `edge` is where the outer thirds end, as a share of the side.
    """
    return all(
        wanted is None
        or (
            value < edge
            if wanted < 0
            else value > 1 - edge
            if wanted > 0
            else abs(value - 0.5) <= edge - 0.24
        )
        for value, wanted in zip((x / SIDE, y / SIDE), PLACES[place], strict=True)
    )


def in_relation(first: Thing, second: Thing, relation: str, gap: float = 6.0) -> bool:
    """Return whether `first` is, e.g., above `second`.

    The offset in the relation's direction must exceed both `gap` pixels and the offset across it.
    """
    dx, dy = RELATIONS[relation]
    along = (first.x - second.x) * dx + (first.y - second.y) * dy
    across = abs((first.x - second.x) * dy) + abs((first.y - second.y) * dx)
    return along > gap and along > across


def of_size(radius: float, size: str) -> bool:
    """Return whether a radius has the named size: small up to 11 pixels, large from 14 pixels."""
    return radius <= 11.0 if size == "small" else radius >= 14.0


def _hits(group: Group, thing: Thing) -> list[bool]:
    hits = [thing.shape == group.shape]
    hits += [thing.color == group.color] if group.color else []
    hits += [thing.texture == group.texture] if group.texture else []
    hits += [of_size(thing.radius, group.size)] if group.size else []
    return hits


def _arrangement(request: Request, chosen: tuple[Thing | None, ...]) -> list[bool]:
    """Check the assertions about place and relation for one assignment of objects to slots."""
    out = []
    if request.place:
        out.append(chosen[0] is not None and at_place(chosen[0].x, chosen[0].y, request.place))
    if request.relation:
        first, second = chosen[0], chosen[request.groups[0].count]
        out.append(first is not None and second is not None and in_relation(first, second, request.relation))
    return out


def assertions(request: Request, things: list[Thing] | tuple[Thing, ...], background: str) -> list[bool]:
    """Check every assertion of the request against the objects present.

    There is one entry for each attribute of each requested object, one for the number of objects (none
    missing, none unrequested), and one each for place, relation and background if requested. Objects are
    assigned to slots so that most assertions hold; of more than six objects only the six largest are
    considered.
    """
    slots = request.slots
    largest = sorted(things, key=lambda thing: -thing.radius)[:6]
    padded = list(largest) + [None] * max(0, len(slots) - len(largest))
    best: list[bool] = []
    for chosen in set(permutations(padded, len(slots))):
        held: list[bool] = []
        for group, thing in zip(slots, chosen, strict=True):
            held += _hits(group, thing) if thing else [False] * len(_hits(group, _NOTHING))
        held += _arrangement(request, chosen)
        if not best or sum(held) > sum(best):
            best = held
    counted = [*best, len(things) == len(slots)]
    return counted + ([background == request.background] if request.background else [])


_NOTHING = Thing("", "", "", 0.0, 0.0, 0.0)


_TEXTURE_RADIUS = 10.0  # smaller objects show too few stripes or dots to tell them apart


def _radius(rng: np.random.Generator, group: Group, total: int) -> float:
    low, high = {1: (11.0, 17.0), 2: (10.5, 13.5), 3: (9.0, 10.5)}[total]
    if group.size == "small":
        low, high = 9.0, 10.5
    elif group.size == "large":
        low, high = (14.7, 17.0) if total == 1 else (14.3, 14.8)
    if group.texture:
        low = min(max(low, _TEXTURE_RADIUS), high)
    return float(rng.uniform(low, high))


def _free(things: list[Thing]) -> bool:
    """Return whether no two objects touch: their circumscribed circles, slightly shrunk, are separate."""
    return all(
        math.hypot(a.x - b.x, a.y - b.y) > 1.02 * (a.radius + b.radius) + 1.5
        for i, a in enumerate(things)
        for b in things[:i]
    )


def _arranged(request: Request, things: list[Thing]) -> bool:
    clear = request.place is None or at_place(things[0].x, things[0].y, request.place, edge=0.38)
    if clear and request.relation:
        clear = in_relation(things[0], things[request.groups[0].count], request.relation, gap=10.0)
    return clear and _free(things)


def realize(request: Request, rng: np.random.Generator, style: Style = Style()) -> Scene:
    """Draw a scene that satisfies `request`; unspecified attributes are random, but textures are solid.

    Raises ValueError if no arrangement of the objects is found.
    """
    slots = request.slots
    things = []
    for group in slots:
        radius = _radius(rng, group, len(slots))
        color, turn = group.color or str(rng.choice(list(COLORS))), float(rng.uniform(-0.15, 0.15))
        things.append(Thing(group.shape, color, group.texture or "solid", radius, 0.0, 0.0, turn))
    for attempt in range(1, 2000):
        placed = []
        for thing in things:
            x, y = rng.uniform(thing.radius + 1.5, SIDE - thing.radius - 1.5, size=2)
            placed.append(replace(thing, x=float(x), y=float(y)))
        if _arranged(request, placed):
            break
        if attempt % 100 == 0:  # too crowded: shrink all objects without a requested size or a texture
            things = [
                replace(t, radius=t.radius if g.size or t.texture != "solid" else max(7.0, 0.94 * t.radius))
                for t, g in zip(things, slots, strict=True)
            ]
    else:
        raise ValueError(f"no arrangement found for {request}")
    background = request.background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(tuple(placed), background, style, int(rng.integers(2**31)))
