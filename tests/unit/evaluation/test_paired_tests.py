"""Paired tests, Holm, prompts needed and seeds: by hand, against exact enumeration, and by simulation."""

import itertools
import math

import numpy as np
import pytest
import torch

from capo.evaluation import statistics
from capo.evaluation.statistics import OverSeeds, bootstrap_interval, holm, prompts_needed, sign_flip_p


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_the_p_of_few_prompts_is_exact():
    differences = drawn(8)
    means = [
        abs(float((torch.tensor(signs) * differences).mean()))
        for signs in itertools.product([1.0, -1.0], repeat=8)
    ]
    seen = abs(float(differences.mean()))
    assert sign_flip_p(differences, 0) == pytest.approx(np.mean([mean >= seen - 1e-12 for mean in means]))


def test_nothing_differs_from_itself_and_one_prompt_says_nothing():
    assert sign_flip_p(torch.zeros(20), 0) == 1.0 and sign_flip_p(torch.tensor([0.5]), 0) == 1.0
    assert prompts_needed(torch.zeros(20)) is None and prompts_needed(torch.tensor([0.5])) is None


def test_swapping_the_sides_gives_the_same_p_and_a_seed_the_same_twice():
    differences = drawn(60) + 0.2
    assert sign_flip_p(differences, 1) == pytest.approx(sign_flip_p(-differences, 1), abs=0.02)
    assert sign_flip_p(differences, 1) == sign_flip_p(differences, 1)
    assert sign_flip_p(drawn(60) + 1, 0) == pytest.approx(2 / 10_000)  # never 0


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_so_many_prompts_find_the_effect_in_four_cases_of_five():
    differences = torch.tensor([0.3, -0.1] * 50, dtype=torch.float64)  # mean 0.1, s 0.201
    needed = prompts_needed(differences)
    assert needed == math.ceil((2.80159 * differences.std().item() / 0.1) ** 2) == 32
    draw, spread = np.random.default_rng(0), differences.std().item()
    found = [
        abs(values.mean()) > 1.959964 * spread / math.sqrt(needed)
        for values in draw.normal(0.1, spread, (2000, needed))
    ]
    assert 0.77 < np.mean(found) < 0.83


def test_seeds_by_hand():
    rates = torch.tensor([[0.5, 0.7], [0.6, 0.8]])  # means 0.6 and 0.7; prompts 0.55 and 0.75
    found = OverSeeds.of(rates)
    assert found.means == pytest.approx((0.6, 0.7)) and found.mean == pytest.approx(0.65)
    assert found.spread == pytest.approx(math.sqrt(0.005)) and found.error == pytest.approx(0.1)
    half = 2 * math.sqrt(0.005 / 2 + 0.01)
    assert found.interval == pytest.approx((0.65 - half, 0.65 + half))
    for shape in ((1, 5), (5, 1), (4,)):
        with pytest.raises(ValueError, match=r"seeds need \(S, P\)"):
            OverSeeds.of(torch.zeros(shape))


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.0, math.nan])])
def test_what_is_no_list_of_differences_is_refused(bad):
    for function in (lambda: sign_flip_p(bad, 0), lambda: prompts_needed(bad)):
        with pytest.raises(ValueError, match=r"needs \(P,\) finite numbers"):
            function()


def win_rates(draw, prompts, images=4):
    """Win-rates of a policy that does not differ from its base: prompts differ, images vary within them."""
    level = draw.normal(size=(prompts, 1))
    ours, theirs = (level + draw.normal(size=(prompts, images)) for _ in range(2))
    return torch.from_numpy((ours[:, :, None] > theirs[:, None]).mean((1, 2)))


@pytest.mark.slow
def test_type_1_error_of_the_paired_test_is_5_percent(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 999)  # ten times as fast
    draw = np.random.default_rng(0)
    rejected = np.mean([sign_flip_p(win_rates(draw, 96) - 0.5, trial) < 0.05 for trial in range(4000)])
    print(f"type I error of the paired test at 5 %: {100 * rejected:.2f} %")
    assert 0.04 < rejected < 0.06


@pytest.mark.slow
def test_coverage_of_the_interval_is_95_percent():
    draw = np.random.default_rng(1)
    covered = []
    for trial in range(4000):
        low, high = bootstrap_interval(win_rates(draw, 96), trial, 1000)
        covered.append(low <= 0.5 <= high)
    print(f"coverage of the 95 % interval: {100 * np.mean(covered):.2f} %")
    assert 0.93 < np.mean(covered) < 0.97
