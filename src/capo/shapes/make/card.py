"""World card: measurements of a base model and of the rewards, beside the bands they should lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.stats import rankdata, spearmanr

from capo.backbones import Backbone
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages
from capo.data.prompts import Prompt
from capo.rewards import Reward
from capo.shapes import oracle
from capo.shapes.captions import parse
from capo.shapes.make.annotators import majority
from capo.shapes.make.autoencoder import to_tensor
from capo.shapes.make.lineups import recorded
from capo.shapes.prompts import training_request
from capo.shapes.render import render
from capo.shapes.scenes import realize

RENDERS = 300


@dataclass(frozen=True)
class Row:
    """One figure of the card and its band."""

    what: str
    measured: float
    low: float
    high: float

    def line(self) -> str:
        """Format the row in Markdown; NaN (nothing to measure) counts as missed."""
        met = "yes" if self.low <= self.measured <= self.high else "**missed**"
        return f"| {self.what} | {self.measured:.3f} | {self.low:g} to {self.high:g} | {met} |"


@dataclass(frozen=True)
class Measured:
    """A base model's images of P prompts x K: reward scores, oracle measures (P, K) and detected objects."""

    prompts: Sequence[Prompt]
    scores: dict[str, np.ndarray]
    oracle: dict[str, np.ndarray]
    things: np.ndarray  # (P, K, n, 6) as `recorded` encodes them


def measure_base(
    spec: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward], measures: Sequence[Reward]
) -> Measured:
    """Generate the images of `spec`, or find them in the pool, and score and measure them."""
    drawn = GeneratedImages.fill(spec, generator, [*rewards, *measures], progress=True)
    side = drawn.side(rewards, measures)
    things = np.stack(
        [
            [recorded(oracle.measure(image)[0]) for image in drawn.images(row)]
            for row in range(len(spec.prompts))
        ]
    )
    return Measured(
        spec.prompts,
        {name: scores.numpy() for name, scores in side.scores.items()},
        {name: values.numpy() for name, values in side.measures.items()},
        things,
    )


def within_prompt(
    statistic: Callable[[np.ndarray, np.ndarray], float], first: np.ndarray, second: np.ndarray
) -> float:
    """Average a statistic of two (P, K) tables over the prompts for which both vary; NaN if there is none."""
    values = [statistic(a, b) for a, b in zip(first, second, strict=True) if a.std() > 0 and b.std() > 0]
    return float(np.mean(values)) if values else float("nan")


def area_under_curve(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the chance that a true candidate scores above a false one; ties count 1/2."""
    ranks, positive = rankdata(scores), truth > 0.5
    return (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    return float(cast(Any, spearmanr(first, second)).statistic)


def kept_by_autoencoder(backbone: Backbone, seed: int = 1) -> float:
    """Return the share of clean renders whose assertions all hold after encoding and decoding."""
    rng = np.random.default_rng([seed, 11])
    requests = [training_request(rng) for _ in range(RENDERS)]
    pictures = np.stack([render(realize(request, rng)) for request in requests])
    decoded = [
        image
        for part in to_tensor(pictures).split(50)
        for image in backbone.decode(backbone.encode_images(part))
    ]
    held = [
        [all(_holds(request, image)) for request, image in zip(requests, images, strict=True)]
        for images in (pictures, decoded)
    ]
    return sum(held[1]) / sum(held[0])


def _holds(request, image) -> list[bool]:
    things, background = oracle.measure(image)
    return oracle.assertions(request, things, background)


def agreement(found: Measured, seed: int = 0) -> float:
    """Return the share of pairs of a prompt's images that `preference` orders like most annotators."""
    right = total = 0
    for first in range(found.things.shape[1]):
        for second in range(first):
            pair = [first, second]
            share = majority(
                found.oracle["assertions"][:, pair],
                found.oracle["looks"][:, pair],
                found.things[:, pair],
                seed,
            )
            decided = np.abs(share - 0.5) > 1e-9
            ours = found.scores["preference"][:, first] > found.scores["preference"][:, second]
            right, total = right + ((share > 0.5) == ours)[decided].sum(), total + decided.sum()
    return float(right / total)


def card(found: Measured, backbone: Backbone) -> list[Row]:
    """Return all rows."""
    objects = np.array([len(parse(prompt.text).slots) for prompt in found.prompts])
    aligned, scores = found.oracle["alignment"], found.scores
    between = {
        pair: within_prompt(rank_correlation, scores[pair[0]], scores[pair[1]])
        for pair in (("alignment", "looks"), ("preference", "alignment"), ("preference", "looks"))
    }
    return [
        Row(
            "oracle alignment of the base, prompts of one object",
            float(aligned[objects == 1].mean()),
            0.7,
            0.9,
        ),
        Row(
            "oracle alignment of the base, prompts of two objects",
            float(aligned[objects == 2].mean()),
            0.4,
            0.7,
        ),
        Row(
            "clean renders that keep their alignment after encode and decode",
            kept_by_autoencoder(backbone),
            0.98,
            1,
        ),
        Row(
            "`alignment`: mean minus the oracle's",
            float(scores["alignment"].mean() - aligned.mean()),
            -0.05,
            0.05,
        ),
        Row(
            "`alignment`: AUC against the oracle within a prompt",
            within_prompt(area_under_curve, scores["alignment"], aligned),
            0.8,
            1,
        ),
        Row(
            "`looks`: rank correlation with the rating rule",
            rank_correlation(scores["looks"].ravel(), found.oracle["looks"].ravel()),
            0.8,
            0.95,
        ),
        Row("`preference`: pairs ordered as the annotators' majority", agreement(found), 0.7, 0.85),
        Row("within a prompt, `alignment` with `looks`", between["alignment", "looks"], -0.3, 0.1),
        Row("within a prompt, `preference` with `alignment`", between["preference", "alignment"], 0.2, 0.7),
        Row("within a prompt, `preference` with `looks`", between["preference", "looks"], 0.2, 0.7),
    ]


def by_category(found: Measured) -> list[str]:
    """Return Markdown rows of the oracle's alignment and share of assertions by category, easiest first."""
    names = sorted({prompt.category for prompt in found.prompts})
    rows = {name: [prompt.category == name for prompt in found.prompts] for name in names}
    figures = {
        name: [float(found.oracle[measure][rows[name]].mean()) for measure in ("alignment", "assertions")]
        for name in names
    }
    ordered = sorted(names, key=lambda name: -figures[name][0])
    return [f"| {name} | {figures[name][0]:.3f} | {figures[name][1]:.3f} |" for name in ordered]


def markdown(found: Measured, backbone: Backbone) -> str:
    """Format the whole card."""
    head = ["| figure | measured | band | met |", "|---|---|---|---|"]
    categories = ["", "| category | all assertions hold | share that holds |", "|---|---|---|"]
    return "\n".join(
        [*head, *(row.line() for row in card(found, backbone)), *categories, *by_category(found)]
    )
