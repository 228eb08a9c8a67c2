"""Conversion between requests and captions: one sentence for each request, one request for each sentence."""

from __future__ import annotations

import re

from capo.errors import InputError
from capo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Request,
)

_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
WORDS = sorted(
    {
        *SHAPES,
        *_PLURALS.values(),
        *COLORS,
        *BACKGROUNDS,
        *TEXTURES,
        *SIZES,
        *COUNTS.values(),
        "an",
        "and",
        ",",
        "background",
    }
    | {word for phrase in (*PLACES, *RELATIONS) for word in phrase.split()}
)


def _noun(group: Group) -> str:
    words = [word for word in (group.size, group.texture, group.color) if word]
    words.append(group.shape if group.count == 1 else _PLURALS[group.shape])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article if group.count == 1 else COUNTS[group.count], *words])


def caption(request: Request) -> str:
    """Return the sentence for a request, e.g. `two striped red stars and a circle on a grey background`."""
    nouns = [_noun(group) for group in request.groups]
    if request.relation:
        text = f"{nouns[0]} {request.relation} {nouns[1]}"
    else:
        text = nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"
    text += f" {request.place}" if request.place else ""
    return text + (f" on a {request.background} background" if request.background else "")


def _one_of(words) -> str:
    return "|".join(re.escape(word) for word in words)


_GROUP = (
    rf"(?P<count>an?|two|three) (?:(?P<size>{_one_of(SIZES)}) )?(?:(?P<texture>{_one_of(TEXTURES)}) )?"
    rf"(?:(?P<color>{_one_of(COLORS)}) )?(?P<shape>{_one_of([*_PLURALS.values(), *SHAPES])})"
)
_BACKGROUND = re.compile(rf" on a (?P<background>{_one_of(BACKGROUNDS)}) background$")
_PLACE = re.compile(rf" (?P<place>{_one_of(PLACES)})$")
_RELATION = re.compile(rf" (?P<relation>{_one_of(RELATIONS)}) ")
_NUMBERS = {"a": 1, "an": 1, **{word: number for number, word in COUNTS.items()}}
_SINGULAR = {plural: shape for shape, plural in _PLURALS.items()}


def _group(text: str, whole: str) -> Group:
    match = re.fullmatch(_GROUP, text)
    if not match:
        raise InputError(
            f"prompt {whole!r}: {text!r} is not a noun of the shapes world; its grammar is in docs/shapes.md"
        )
    shape = match["shape"]
    return Group(
        _SINGULAR.get(shape, shape), _NUMBERS[match["count"]], match["color"], match["texture"], match["size"]
    )


def parse(text: str) -> Request:
    """Return the request of a sentence, as the exact inverse of `caption`.

    Raises InputError for a sentence outside the grammar.
    """
    rest, background, place, relation = text, None, None, None
    if match := _BACKGROUND.search(rest):
        rest, background = rest[: match.start()], match["background"]
    if match := _PLACE.search(rest):
        rest, place = rest[: match.start()], match["place"]
    if match := _RELATION.search(rest):
        relation = match["relation"]
        nouns = [rest[: match.start()], rest[match.end() :]]
    else:
        nouns = re.split(r", | and ", rest)
    request = Request(tuple(_group(noun, text) for noun in nouns), relation, place, background)
    if caption(request) != text or len(request.slots) > MAX_OBJECTS:
        raise InputError(
            f"prompt {text!r} is not a sentence of the shapes world (did you mean {caption(request)!r}?)"
        )
    return request
