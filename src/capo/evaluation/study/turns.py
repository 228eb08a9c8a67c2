"""Which pairs a rater sees in which order, and which image stands on the left: functions of the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from capo.errors import InputError
from capo.evaluation.study.store import FIRST, SECOND, Pair

if TYPE_CHECKING:  # the page is served without the libraries that pools need
    from capo.data.prompts import Prompt


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()


def pair_name(seed: int, prompt: str, check: bool) -> str:
    """Name of a pair, 12 hex digits: it tells a rater nothing of the prompt's place or of a check."""
    return _digest(seed, "check" if check else "pair", prompt).hex()[:12]


def chosen_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Draw `count` prompts without replacement; they keep their order.

    Whether a prompt is drawn before another depends on the two and the seed alone. Raises InputError if there
    are fewer prompts.
    """
    if count > len(prompts):
        raise InputError(
            f"study.prompts={count}: there are {len(prompts)} test prompts; give "
            f"study.prompts={len(prompts)} or less"
        )
    first = sorted(prompts, key=lambda prompt: _digest(seed, "prompt", prompt.id))[:count]
    drawn = {prompt.id for prompt in first}
    return [prompt for prompt in prompts if prompt.id in drawn]


def order(pairs: Sequence[Pair], seed: int, rater: str) -> list[Pair]:
    """Return the pairs in the order of one rater: shuffled, with the checks spread evenly.

    Of C checks among N pairs, one stands at a random place within each N / C of them, so that a rater who
    stops early has met some.
    """
    shuffled = sorted(pairs, key=lambda pair: _digest(seed, "order", rater, pair.name))
    plain = [pair for pair in shuffled if not pair.check]
    checks = [pair for pair in shuffled if pair.check]
    share = len(plain) / max(len(checks), 1)
    places = []
    for number, check in enumerate(checks):
        draw = int.from_bytes(_digest(seed, "place", rater, check.name)[:8]) / 2**64
        places.append(int((number + draw) * share))
    for place, check in sorted(zip(places, checks, strict=True), key=lambda found: found[0], reverse=True):
        plain.insert(place, check)
    return plain


def left_side(seed: int, rater: str, pair: str) -> str:
    """FIRST or SECOND: the image that this rater sees on the left, each as often as not."""
    return FIRST if _digest(seed, "left", rater, pair)[0] % 2 else SECOND


def choice_of(answer: str, left: str) -> str:
    """Translate an answer of the page (`left`, `right` or `tie`) to the image that it is for.

    Raises ValueError for another answer.
    """
    if answer not in ("left", "right", "tie"):
        raise ValueError(f"an answer is left, right or tie; got {answer!r}")
    if answer == "tie":
        return answer
    return left if answer == "left" else (SECOND if left == FIRST else FIRST)
