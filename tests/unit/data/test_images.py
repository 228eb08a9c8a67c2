import math

import pytest
import torch

from capo.data.images import latent_diversity


def test_diversity_is_the_mean_root_mean_square_distance_of_all_pairs():
    # two values a latent: (0,0), (2,0), (0,4). Distances sqrt(4/2), sqrt(16/2), sqrt((4+16)/2)
    latents = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]).view(3, 1, 1, 2)
    expected = (math.sqrt(2) + math.sqrt(8) + math.sqrt(10)) / 3
    assert latent_diversity(latents) == pytest.approx(expected, abs=1e-12)
    assert latent_diversity(latents.half()) == pytest.approx(expected, abs=1e-12)  # as pools store them


def test_diversity_of_copies_and_of_independent_latents():
    noise = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert latent_diversity(noise[:1].expand(4, -1, -1, -1)) == 0
    assert latent_diversity(noise) == pytest.approx(math.sqrt(2), abs=0.01)
