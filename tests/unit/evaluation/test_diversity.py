"""Diversity and drift: hand-worked distances, exact zeros, and which reward's encoder measures them."""

import math

import pytest
import torch
from PIL import Image

from capo.errors import InputError
from capo.evaluation.diversity import (
    AUTO,
    cosine_distance,
    encoder_of,
    feature_distances,
    sampled_rows,
    spread,
    unit_vectors,
)
from capo.rewards import Reward


class Colors:
    """Scorer whose vectors are the colors of the first pixel."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images, prompts):
        return torch.zeros(len(images))

    def features(self, images):
        self.seen += len(images)
        return torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float32)


def plain(images, prompts):
    return torch.zeros(len(images))


def image(*color):
    return Image.new("RGB", (4, 4), color)


def test_distances_of_hand_worked_vectors():
    # angles of 90, 45 and 45 degrees: 1 - cos is 1, 1 - 1/sqrt 2, 1 - 1/sqrt 2
    ours = [image(255, 0, 0), image(0, 255, 0), image(100, 100, 0)]
    # to the base's at the same place: 0, 90 and 45 degrees
    base = [image(10, 0, 0), image(255, 0, 0), image(255, 0, 0)]
    reward = Reward("colors", Colors())
    found = feature_distances(reward, lambda row: (ours, base), [3])
    aslant = 1 - 1 / math.sqrt(2)
    assert found.policy.tolist() == pytest.approx([(1 + 2 * aslant) / 3], abs=1e-12)
    assert found.base.tolist() == pytest.approx([0], abs=1e-12)
    assert found.drift.tolist() == pytest.approx([(0 + 1 + aslant) / 3], abs=1e-12)


def test_equal_images_have_a_distance_of_exactly_zero_and_are_encoded_once():
    scorer = Colors()
    # 3, 5 and 7 have no exact length: products of normalized vectors would not be exactly 1
    vectors = unit_vectors(Reward("colors", scorer), [image(3, 5, 7), image(9, 5, 7), image(3, 5, 7)])
    assert scorer.seen == 2
    assert cosine_distance(vectors[0], vectors[2]) == 0 and cosine_distance(vectors[0], vectors[1]) > 0
    assert spread(vectors[[0, 2, 0]]) == 0


def test_the_encoder_is_the_one_that_is_named_or_the_first_that_can():
    rewards = [Reward("a", plain), Reward("b", Colors()), Reward("c", Colors())]
    assert encoder_of(AUTO, rewards) is rewards[1] and encoder_of("c", rewards) is rewards[2]
    assert encoder_of(None, rewards) is None and encoder_of(AUTO, rewards[:1]) is None
    with pytest.raises(InputError, match=r"evaluation\.diversity=a: its scorer has no method `features`"):
        encoder_of("a", rewards)
    with pytest.raises(InputError, match=r"evaluation\.diversity=d: no reward .* that name \(a, b, c\)"):
        encoder_of("d", rewards)


def test_a_sample_is_evenly_spaced_over_the_prompts():
    assert sampled_rows(10, 4) == [0, 2, 5, 7] and sampled_rows(3, 8) == [0, 1, 2]
