import math

import numpy as np
import pytest
import scipy.stats
import torch

from capo.errors import InputError
from capo.evaluation.statistics import bootstrap_interval
from capo.metrics import WinRate
from capo.win_rates import win_rate


def scores(prompts: int, images: int, seed: int) -> torch.Tensor:
    """Scores with many ties: whole numbers from 0 to 4."""
    return torch.randint(5, (prompts, images), generator=torch.Generator().manual_seed(seed)).float()


# ---- win-rate


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
    metric = WinRate()
    metric.update(same, same)
    assert metric.compute().item() == 0.5


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


# ---- interval


def test_interval_agrees_with_scipy():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    found = bootstrap_interval(values, seed=1)
    expected = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    # a percentile of 10 000 resamples is uncertain by some 2 % of the standard error 0.29 / sqrt 200 = 0.02
    assert found == pytest.approx(tuple(expected), abs=2e-3)


def test_interval_by_hand():
    # P = 2 with values 0 and 1: the resampled mean is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert bootstrap_interval(torch.tensor([0.0, 1.0]), seed=0) == (0.0, 1.0)
    # P = 8 with a single 1: the number of ones is binomial(8, 1/8);
    # P(0) = 0.344, P(<= 2) = 0.933, P(<= 3) = 0.989
    assert bootstrap_interval(torch.tensor([1.0] + [0.0] * 7), seed=0) == (0.0, 3 / 8)
    assert bootstrap_interval(torch.full((5,), 0.25), seed=0) == (0.25, 0.25)


def test_interval_is_a_function_of_the_seed():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values.double(), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_interval_narrows_with_the_prompts():
    few = torch.rand(50, generator=torch.Generator().manual_seed(0))
    many = few.repeat(16)
    width = [high - low for low, high in (bootstrap_interval(values, seed=0) for values in (few, many))]
    assert width[0] / width[1] == pytest.approx(4.0, rel=0.06)  # sqrt 16


def test_chunks_cover_every_resample():
    # 3000 prompts take many chunks; a resample left out would be an uninitialized or zero mean
    values = 5 + torch.rand(3000, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values, seed=0, resamples=1000)
    standard_error = values.std().item() / 3000**0.5
    assert low == pytest.approx(values.mean().item() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert high == pytest.approx(values.mean().item() + 1.96 * standard_error, abs=0.3 * standard_error)


@pytest.mark.parametrize("values", [torch.empty(0), torch.ones(2, 2), torch.tensor([0.1, math.nan])])
def test_interval_refuses_what_it_cannot_resample(values):
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap_interval(values, seed=0)


# ---- metric


def test_metric_averages_prompts_over_batches_of_any_size():
    policy, base = scores(37, 4, seed=0), scores(37, 4, seed=1)
    metric = WinRate()
    for start, stop in [(0, 1), (1, 20), (20, 37)]:
        metric.update(policy[start:stop], base[start:stop])
    assert metric.compute().item() == pytest.approx(win_rate(policy, base).mean().item())


def test_metric_weighs_prompts_equally_whatever_their_images():
    metric = WinRate()
    metric.update(torch.ones(1, 8), torch.zeros(1, 8))  # 64 comparisons won
    metric.update(torch.zeros(3, 1), torch.ones(3, 1))  # three lost
    assert metric.compute().item() == 0.25


def test_processes_add_up():
    policy, base = scores(30, 4, seed=0), scores(30, 4, seed=1)
    whole, first, second = WinRate(), WinRate(), WinRate()
    whole.update(policy, base)
    first.update(policy[:7], base[:7])
    second.update(policy[7:], base[7:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item())
    first.reset()
    first.update(policy[:7], base[:7])
    assert first.compute().item() == pytest.approx(win_rate(policy[:7], base[:7]).mean().item())
