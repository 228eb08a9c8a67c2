"""World card: measurements of a base model and of the rewards, beside the bands they should lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from capo.backbones import Backbone
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages
from capo.data.pool import PoolReader
from capo.data.prompts import Prompt
from capo.rewards import Reward
from capo.shapes import oracle
from capo.shapes.captions import caption, parse
from capo.shapes.make.annotators import majority
from capo.shapes.make.autoencoder import to_tensor
from capo.shapes.make.lineups import recorded
from capo.shapes.prompts import training_request
from capo.shapes.render import render
from capo.shapes.scenes import realize

RENDERS = 300
TIMES = 16  # at which a pair's errors are compared


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
    latents: torch.Tensor  # (P, K, C, h, w) as the denoiser sees them


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
    reader = PoolReader(drawn.pool)
    latents = torch.stack([reader.latents(place, range(spec.candidates)) for place in drawn.positions])
    return Measured(
        spec.prompts,
        {name: scores.numpy() for name, scores in side.scores.items()},
        {name: values.numpy() for name, values in side.measures.items()},
        things,
        latents,
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
    texts = [caption(request) for request in requests]
    before, after = (sum(map(oracle.alignment, images, texts)) for images in (pictures, decoded))
    return after / before


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


def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find rows (R,) of a table (P, K) with differing values, and their best and worst columns (R, 2)."""
    rows = np.flatnonzero(values.max(1) > values.min(1))
    return rows, np.stack([values[rows].argmax(1), values[rows].argmin(1)], axis=1)


@torch.inference_mode()
def caption_gain(
    backbone: Backbone, prompts: Sequence[str], latents: torch.Tensor, draw: str, bias: float
) -> torch.Tensor:
    """Measure how much the caption lowers the denoising error of latents (R, 2, C, h, w).

    Returns (R, 2), the sum over TIMES of the weighted differences: positive where the error with the caption
    is smaller than with the empty one. Times are spread evenly over what training draws from, weights are
    those of training, and the two images of a prompt share each noise.
    """
    text = backbone.encode_prompts(prompts)
    text = {name: value.repeat_interleave(2, 0) for name, value in text.items()}
    x, nothing = latents.flatten(0, 1).float(), backbone.unconditional(2 * len(prompts))
    noises, gain = torch.Generator().manual_seed(0), torch.zeros(len(x))
    for u in (torch.arange(TIMES) + 0.5) / TIMES:
        t = backbone.timesteps(u.expand(len(x)), draw)
        noise = torch.randn(len(prompts), *x.shape[1:], generator=noises).repeat_interleave(2, 0)
        noisy, target = backbone.add_noise(x, noise, t), backbone.target(x, noise, t)
        told, blind = (backbone.predict(backbone.denoiser, noisy, t, given) for given in (text, nothing))
        fall = (blind - target).square() - (told - target).square()
        gain += backbone.weight(t, bias) * fall.mean((1, 2, 3))
    return gain.view(-1, 2)


def tunability(found: Measured, backbone: Backbone, draw: str, bias: float, batch: int = 32) -> float:
    """Measure in which share of pairs the caption favors the better image; chance is 0.5.

    A pair is a prompt's best image by the oracle's assertions and its worst. The caption favors the image
    whose denoising error it lowers by more (`caption_gain`). Returns NaN if no prompt has such a pair.
    """
    rows, columns = extremes(found.oracle["assertions"])
    pairs = found.latents[rows[:, None], columns]
    favors = []
    for start in range(0, len(rows), batch):
        texts = [found.prompts[row].text for row in rows[start : start + batch]]
        gain = caption_gain(backbone, texts, pairs[start : start + batch], draw, bias)
        favors += (gain[:, 0] > gain[:, 1]).tolist()
    return float(np.mean(favors)) if favors else float("nan")


def card(found: Measured, backbone: Backbone, tunable: float) -> list[Row]:
    """Return all rows; `tunable` is the base's `tunability`."""
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
            0.55,
            0.75,
        ),
        Row(
            "oracle alignment of the base, prompts of two objects",
            float(aligned[objects == 2].mean()),
            0.3,
            0.6,
        ),
        Row("tunability: best and worst image by the oracle that the caption tells apart", tunable, 0.7, 1),
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
            0.85,
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


def markdown(found: Measured, backbone: Backbone, tunable: float) -> str:
    """Format the whole card; `tunable` is the base's `tunability`."""
    head = ["| figure | measured | band | met |", "|---|---|---|---|"]
    categories = ["", "| category | all assertions hold | share that holds |", "|---|---|---|"]
    rows = [row.line() for row in card(found, backbone, tunable)]
    return "\n".join([*head, *rows, *categories, *by_category(found)])
