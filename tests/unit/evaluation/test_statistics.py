import math

import numpy as np
import pytest
import scipy.stats
import torch

from capo.evaluation.statistics import bootstrap_interval


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
