"""Make a study of two sets of generated images: the pairs, the attention checks, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from capo.data.images import GeneratedImages
from capo.data.prompts import Prompt
from capo.errors import InputError
from capo.evaluation.study.store import FILE, FIRST, SECOND, Facts, Pair, Study, image_path
from capo.evaluation.study.turns import pair_name
from capo.runtime.files import whole_file

NOISE = 0.75  # share of noise in a damaged image


def damaged(image: Image.Image, seed: int) -> Image.Image:
    """Return the image under uniform noise, of which it is a quarter: nobody who looks can prefer it."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    noise = np.random.default_rng(seed).uniform(0, 255, pixels.shape)
    return Image.fromarray(((1 - NOISE) * pixels + NOISE * noise).round().astype(np.uint8))


def study_pairs(prompts: Sequence[Prompt], checks: int, seed: int) -> list[Pair]:
    """Return one pair for each prompt, and a check for each of the first `checks` of them.

    Raises InputError if there are more checks than prompts.
    """
    if checks > len(prompts):
        raise InputError(
            f"study.checks={checks}: a check is made of a pair, and there are {len(prompts)}; give "
            f"study.checks={len(prompts)} or fewer"
        )

    def pair(prompt: Prompt, check: bool) -> Pair:
        return Pair(pair_name(seed, prompt.id, check), prompt.id, prompt.text, prompt.category, check)

    return [
        *(pair(prompt, False) for prompt in prompts),
        *(pair(prompt, True) for prompt in prompts[:checks]),
    ]


def make_study(
    folder: str | Path,
    first: GeneratedImages,
    second: GeneratedImages,
    *,
    names: tuple[str, str],
    seed: int,
    checks: int,
    ties: bool,
) -> Study:
    """Write the study of two sides to `folder`, or open it if it is there; images are written once.

    Args:
        folder: the study's folder.
        first: images of the policy.
        second: images of what it is compared with, of the same prompts and seeds. The first image of each
            prompt is shown.
        names: names of both sides in tables.
        seed: seed of orders and sides.
        checks: number of attention checks: the second side's image of a prompt beside a damaged copy.
        ties: whether raters may call a pair a tie.

    Raises:
        InputError: `folder` holds a study of other images or settings, or there are too many checks.
    """
    folder, prompts = Path(folder), first.spec.prompts
    pairs = study_pairs(prompts, checks, seed)
    facts = Facts(
        names,
        seed,
        ties,
        first.generator.fingerprint,
        second.generator.fingerprint,
        first.spec.seed,
        tuple(pair.name for pair in pairs),
    )
    if not (folder / FILE).exists():
        return _written(folder, facts, pairs, first, second)
    study = Study(folder)
    if found := study.facts.differences(facts):
        study.close()
        raise InputError(
            f"{folder} holds another study:\n  "
            + "\n  ".join(found)
            + "\ngive the same values to continue it, or another hydra.run.dir"
        )
    return study


def _written(
    folder: Path, facts: Facts, pairs: Sequence[Pair], first: GeneratedImages, second: GeneratedImages
) -> Study:
    plain = [pair for pair in pairs if not pair.check]
    checks = {pair.prompt_id: pair for pair in pairs if pair.check}
    for row, pair in enumerate(plain):
        ours, theirs = first.images(row)[0], second.images(row)[0]
        _save(ours, image_path(folder, pair.name, FIRST))
        _save(theirs, image_path(folder, pair.name, SECOND))
        if check := checks.get(pair.prompt_id):
            _save(theirs, image_path(folder, check.name, FIRST))
            _save(damaged(theirs, facts.seed + row), image_path(folder, check.name, SECOND))
    return Study.create(folder, facts, pairs)  # last: it marks the images as complete


def _save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as unfinished:
        image.convert("RGB").save(unfinished, "PNG")
