import math

import pytest
import scipy.stats
import torch

from capo.errors import InputError
from capo.win_rates import win_rate


def scores(prompts: int, images: int, seed: int) -> torch.Tensor:
    """Scores with many ties: whole numbers from 0 to 4."""
    return torch.randint(5, (prompts, images), generator=torch.Generator().manual_seed(seed)).float()


def test_hand_worked_win_rates():
    # first prompt:  3 beats 1 and 2, 1 ties with 1 and loses to 2: (1 + 1 + 1/2 + 0) / 4 = 0.625
    # second prompt: all four tie: 0.5;  third: all lost: 0
    policy = torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.0, 1.0]])
    base = torch.tensor([[1.0, 2.0], [2.0, 2.0], [5.0, 6.0]])
    assert win_rate(policy, base).tolist() == [0.625, 0.5, 0.0]


def test_agrees_with_mann_whitney():
    policy, base = scores(20, 6, seed=0), scores(20, 4, seed=1)
    expected = [scipy.stats.mannwhitneyu(p, b).statistic / 24 for p, b in zip(policy, base, strict=True)]
    assert win_rate(policy, base).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("images", [1, 3, 4, 7])
def test_a_model_against_itself_is_exactly_a_half(images):
    same = scores(101, images, seed=0)
    assert (win_rate(same, same) == 0.5).all()


def test_swapping_gives_the_complement():
    policy, base = scores(50, 3, seed=0), scores(50, 3, seed=1)
    assert torch.allclose(win_rate(policy, base), 1 - win_rate(base, policy), atol=1e-7)


def test_dtypes():
    policy, base = scores(5, 3, seed=0), scores(5, 3, seed=1)
    assert win_rate(policy, base).dtype == torch.float32
    assert win_rate(policy.double(), base.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.int64):
        assert torch.equal(win_rate(policy.to(dtype), base.to(dtype)), win_rate(policy, base))


def test_win_rate_refuses_what_it_cannot_compare():
    bad = scores(5, 3, seed=0)
    bad[4, 1] = math.nan
    with pytest.raises(InputError, match="base scores: prompt 4, image 1: nan"):
        win_rate(scores(5, 3, seed=1), bad)
    with pytest.raises(ValueError, match=r"policy \(5, 3\) and base \(4, 3\)"):
        win_rate(scores(5, 3, seed=0), scores(4, 3, seed=0))
    with pytest.raises(ValueError, match=r"\(5, 0\)"):
        win_rate(torch.empty(5, 0), scores(5, 3, seed=0))
