"""The card's figures on tables small enough to work out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capo.data.prompts import make_prompt
from capo.shapes.make import card

BIAS = 0.5


class Guesser:
    """A backbone whose denoiser takes every latent for the number in its text; the empty text holds 0."""

    denoiser = None

    def encode_prompts(self, prompts):
        return {"number": torch.tensor([float(prompt) for prompt in prompts])}

    def unconditional(self, count):
        return {"number": torch.zeros(count)}

    def timesteps(self, u, draw):
        assert draw == "uniform"
        return u

    def weight(self, t, bias):
        return (t > bias).float()  # the later half counts

    def add_noise(self, latents, noise, t):
        return latents + noise

    def target(self, latents, noise, t):
        return noise

    def predict(self, denoiser, noisy, t, text):
        return noisy - text["number"][:, None, None, None]


def latents(*values):
    return torch.tensor(values)[..., None, None, None].expand(*np.shape(values), 2, 3, 3)


def test_the_gain_is_the_fall_of_the_error_weighted_over_times():
    gain = card.caption_gain(Guesser(), ["2", "1"], latents([2.0, 0.5], [0.0, 1.0]), "uniform", BIAS)
    # errors x^2 without and (x - number)^2 with the caption, at 8 of 16 times
    assert gain == pytest.approx(8 * np.array([[4 - 0, 0.25 - 2.25], [0 - 1, 1 - 0]]), rel=1e-4)


def test_extremes_are_the_best_and_the_worst_where_they_differ():
    rows, columns = card.extremes(np.array([[0.5, 1.0, 0.0], [1.0, 1.0, 1.0], [0.2, 0.1, 0.9]]))
    assert rows.tolist() == [0, 2] and columns.tolist() == [[1, 2], [2, 1]]


def test_tunability_is_the_share_of_pairs_in_which_the_caption_favors_the_best():
    drawn = latents([2.0, 0.0, 9.0], [1.0, 0.0, 9.0], [1.0, 2.0, 9.0], [0.0, 0.0, 0.0])
    measured = np.array([[1.0, 0.5, 0.7], [0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    prompts = [make_prompt(text, category="single") for text in ("2", "1", "1.5", "3")]
    found = SimpleNamespace(prompts=prompts, oracle={"assertions": measured}, latents=drawn)
    # 2 against 0 under "2": yes; 1 against 0 under "1", the other way round: no; 1 against 2 under "1.5",
    # where the gains are 0.75 and 3.75 and the worst is in the middle: no; the last has no pair
    assert card.tunability(found, Guesser(), "uniform", BIAS) == pytest.approx(1 / 3)
    assert card.tunability(found, Guesser(), "uniform", BIAS, batch=1) == pytest.approx(1 / 3)
    none = SimpleNamespace(prompts=prompts, oracle={"assertions": np.ones((4, 3))}, latents=drawn)
    assert np.isnan(card.tunability(none, Guesser(), "uniform", BIAS))


def test_a_missed_band_is_reported_as_missed():
    assert card.Row("figure", 0.5, 0.4, 0.6).line() == "| figure | 0.500 | 0.4 to 0.6 | yes |"
    assert all(
        "**missed**" in card.Row("figure", value, 0.4, 0.6).line() for value in (0.39, 0.61, float("nan"))
    )
