"""Published scores of four public pictures, with which a reward's own are compared.

The pictures are 1.webp to 4.webp of `assets/images` in zai-org/ImageReward (512 x 512, Apache-2.0). They are
not part of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from capo.errors import InputError
from capo.rewards.reward import Reward
from capo.rewards.selfcheck import FAILED, PASSED, WARNING, Finding

NAMES = ("1.webp", "2.webp", "3.webp", "4.webp")
SIDE = 512  # pixels
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
WHERE = "assets/images of zai-org/ImageReward"
# Largest difference, as a share of the published scores' spread, that precision and libraries explain.
SHARE = 0.02
DIFFSYNTH = "modelscope/DiffSynth-Studio, examples/QualityMetric/README.md"


@dataclass(frozen=True)
class Figures:
    """Published scores of the four pictures, on this package's scale.

    Attributes:
        scores: one for each picture.
        source: where they stand.
        made: how they were made, where that differs from this package; such scores may differ.
        remedy: what to try where they differ.
    """

    scores: tuple[float, float, float, float]
    source: str
    made: str = ""
    remedy: str = "compare weights, tokenizer and image processor with the source's"


PUBLISHED = {
    "imagereward": Figures((0.5812, 0.2745, -1.4132, -2.0296), "the README of zai-org/ImageReward"),
    "pickscore": Figures((20.737, 20.444, 20.661, 19.426), f"{DIFFSYNTH} (times 100)"),
    "laion_aes": Figures((5.9009, 5.7766, 5.7999, 5.0520), DIFFSYNTH),
    "hpsv2": Figures(
        (0.2321, 0.2023, 0.1978, 0.1923),
        DIFFSYNTH,
        remedy="try hpsv2.scorer.antialias=false (or true): the one that agrees is what the published scores "
        "were made with",
    ),
    "mps": Figures(
        (10.92, 10.72, 10.58, 9.25), DIFFSYNTH, "in float16, with a condition without its last '.'"
    ),
}


def pictures(folder: Path) -> list[Image.Image]:
    """Read the four pictures; raise InputError if one is missing, unreadable or not 512 x 512."""
    return [_picture(folder / name) for name in NAMES]


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise InputError(
            f"--published {path.parent}: no picture {path.name} ({error}); the folder must hold "
            f"{', '.join(NAMES)} of {WHERE}"
        ) from error
    if image.size != (SIDE, SIDE):
        raise InputError(
            f"--published {path.parent}: {path.name} has {image.width} x {image.height} pixels, the "
            f"published picture {SIDE} x {SIDE}; take it from {WHERE}"
        )
    return image


def check_known(rewards: Sequence[Reward]) -> None:
    """Raise InputError if none of `rewards` has published scores."""
    if not any(reward.name in PUBLISHED for reward in rewards):
        raise InputError(
            f"--published: no published scores of {', '.join(reward.name for reward in rewards)} are known; "
            f"there are of {', '.join(PUBLISHED)}"
        )


def compared(reward: Reward, images: Sequence[Image.Image], device: torch.device) -> Finding:
    """Score the four pictures on `device` and judge the scores by the published ones.

    Raises InputError as `Reward.setup` and `Reward.score` do.
    """
    if reward.name not in PUBLISHED:
        return Finding("published scores", PASSED, "none are known: not compared")
    figures = PUBLISHED[reward.name]
    reward.setup(device)
    try:
        scores = reward.score(images, [PROMPT] * len(images)).tolist()
    finally:
        reward.offload()
    most = SHARE * (max(figures.scores) - min(figures.scores))
    gap = max(abs(score - known) for score, known in zip(scores, figures.scores, strict=True))
    found = "; ".join(
        f"{name} {score:.4f}, published {known:g}"
        for name, score, known in zip(NAMES, scores, figures.scores, strict=True)
    )
    found += f" ({figures.source}{', ' + figures.made if figures.made else ''}): off by up to {gap:.2g}"
    if gap <= most:
        return Finding("published scores", PASSED, f"{found}, within {most:.2g}")
    return Finding(
        "published scores",
        WARNING if figures.made else FAILED,
        f"{found}, above {most:.2g}",
        f"{figures.remedy}{'; part of it is how they were made' if figures.made else ''}",
    )
