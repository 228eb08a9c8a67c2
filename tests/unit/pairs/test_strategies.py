import functools
import math

import moocore
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from capo.calibration import calibrate
from capo.errors import InputError
from capo.pairs import PairSets, best_worst, combined_rewards, frontiers, fronts, frs, random_pair, reward_sum
from fixtures.random_scores import random_scores

STRATEGIES = [reward_sum, frs, random_pair, functools.partial(frs, lower="all_dominated")]


def win_rates(scores: torch.Tensor) -> torch.Tensor:
    rewards = scores.shape[-1]
    return calibrate(scores, ["identity"] * rewards, [1.0] * rewards)


def one_hot(*rows: int, candidates: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), candidates).bool()


# ---- frontiers


def test_hand_worked_frontiers():
    # two rewards:   a (3, 0)  b (0, 3)  c (2, 2)  d (1, 1)  e (0, 0)  f (1, 1) again
    # c > d, f, e; d, f > e; a, b > e. F+ = {a, b, c}, dominating none: F- = {e} only, since a and b dominate
    # e
    scores = torch.tensor([[[3.0, 0], [0, 3], [2, 2], [1, 1], [0, 0], [1, 1]]])
    upper, lower = frontiers(scores)
    assert upper.tolist() == [[True, True, True, False, False, False]]
    assert lower.tolist() == [[False, False, False, False, True, False]]
    # without e: a and b dominate none and are dominated by none, so they are on both and leave both
    upper, lower = frontiers(scores[:, [0, 1, 2, 3, 5]])
    assert upper.tolist() == [[False, False, True, False, False]]
    assert lower.tolist() == [[False, False, False, True, True]]  # both duplicates


def test_duplicates_do_not_dominate_each_other():
    upper, lower = fronts(torch.ones(1, 3, 2))
    assert upper.all() and lower.all()
    upper, lower = frontiers(torch.ones(1, 3, 2))
    assert not upper.any() and not lower.any()


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
@pytest.mark.parametrize(
    ("candidates", "rewards"), [(2, 1), (5, 2), (16, 1), (16, 2), (16, 3), (16, 5), (40, 3)]
)
def test_agrees_with_an_independent_library(kind, candidates, rewards):
    scores = random_scores(kind, 60, candidates, rewards)
    upper, lower = fronts(scores)
    for prompt, best, worst in zip(scores.double().numpy(), upper, lower, strict=True):
        assert np.array_equal(best, moocore.is_nondominated(prompt, maximise=True, keep_weakly=True))
        assert np.array_equal(worst, moocore.is_nondominated(prompt, maximise=False, keep_weakly=True))


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
def test_agrees_with_the_definition_across_blocks(kind):
    scores = random_scores(kind, 5000, 16, 3)  # more than a block
    as_good = (scores[:, :, None] >= scores[:, None]).all(-1)  # [p, i, j]: i is as good as j
    better = (scores[:, :, None] > scores[:, None]).any(-1)
    dominates = as_good & better
    upper, lower = fronts(scores)
    assert torch.equal(upper, ~dominates.any(1))
    assert torch.equal(lower, ~dominates.any(2))
    positive, negative = frontiers(scores)
    assert torch.equal(positive, upper & ~lower) and torch.equal(negative, lower & ~upper)


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
def test_increasing_maps_change_nothing(kind):
    scores = random_scores(kind, 200, 16, 3).double()
    maps = [torch.exp, lambda s: s**3, lambda s: 100 * s - 7]
    mapped = torch.stack([change(scores[..., reward]) for reward, change in enumerate(maps)], dim=-1)
    for before, after in zip(fronts(scores), fronts(mapped), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
def test_negating_swaps_the_frontiers(kind):
    scores = random_scores(kind, 200, 16, 3)
    upper, lower = fronts(scores)
    negated_upper, negated_lower = fronts(-scores)
    assert torch.equal(negated_upper, lower) and torch.equal(negated_lower, upper)


def test_one_reward_without_ties_gives_the_best_and_the_worst():
    scores = random_scores("random", 100, 16, 1)
    upper, lower = frontiers(scores)
    best, worst = best_worst(scores, win_rates(scores))
    assert torch.equal(upper, best) and torch.equal(lower, worst)
    assert (upper.sum(1) == 1).all() and (lower.sum(1) == 1).all()


def nearly_equal() -> torch.Tensor:
    """The first two differ by 1e-8, which their float32 win-rates cannot show."""
    scores = torch.tensor([[[1e-8], [0.0], [1.0]]])
    rates = win_rates(scores)
    assert rates[0, 0] == rates[0, 1]
    return scores


def test_domination_sees_what_win_rates_cannot():
    assert frontiers(nearly_equal())[1].tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_dtypes_do_not_matter(dtype):
    scores = random_scores("tied", 100, 16, 3)
    for expected, found in zip(frontiers(scores), frontiers(scores.to(dtype)), strict=True):
        assert torch.equal(expected, found)


def test_frontiers_refuse_what_has_no_order():
    scores = random_scores("random", 4, 5, 3)
    scores[2, 1, 0] = math.nan
    with pytest.raises(InputError, match="prompt 2, candidate 1, reward 0: score nan"):
        frontiers(scores)
    with pytest.raises(ValueError, match=r"\(P, N, L\).*\(4, 5\)"):
        frontiers(torch.ones(4, 5))


# ---- strategies


def test_best_worst_takes_the_extremes_of_the_raw_score_and_the_first_of_equals():
    scores = torch.tensor([[1.0, 5, 5, 0, 0], [2, 2, 2, 2, 2]])[..., None]
    winners, losers = best_worst(scores, win_rates(scores))
    assert torch.equal(winners, one_hot(1, 0, candidates=5))
    assert torch.equal(losers, one_hot(3, 0, candidates=5))
    # the win-rates of the first two are equal, but the second has the lower score
    assert torch.equal(best_worst(nearly_equal(), win_rates(nearly_equal())).losers, one_hot(1, candidates=3))


def test_best_worst_refuses_several_rewards():
    scores = random_scores("random", 4, 5, 3)
    with pytest.raises(
        InputError, match=r"^best_worst orders the candidates by one reward, but scores \(4, 5, 3\) have 3"
    ):
        best_worst(scores, win_rates(scores))


def test_reward_sum_takes_the_extremes_of_the_mean():
    # means of the first prompt: 0.4, 0.45, 0.65, 0.5; of the second: 0.5 throughout, so the first twice
    calibrated = torch.tensor([[[0.1, 0.7], [0.4, 0.5], [0.9, 0.4], [0.6, 0.4]], [[0.25, 0.75]] * 4])
    winners, losers = reward_sum(torch.zeros(2, 4, 2), calibrated)
    assert torch.equal(winners, one_hot(2, 0, candidates=4))
    assert torch.equal(losers, one_hot(0, 0, candidates=4))


def test_reward_sum_weighs():
    # weights 1 and 3: (0.1 + 2.1) / 4 = 0.55, (0.4 + 1.5) / 4 = 0.475, (0.9 + 1.2) / 4 = 0.525, (0.6 + 1.2) /
    # 4 = 0.45
    calibrated = torch.tensor([[[0.1, 0.7], [0.4, 0.5], [0.9, 0.4], [0.6, 0.4]]])
    assert torch.allclose(combined_rewards(calibrated, [1, 3]), torch.tensor([[0.55, 0.475, 0.525, 0.45]]))
    winners, losers = reward_sum(torch.zeros(1, 4, 2), calibrated, weights=[1, 3])
    assert torch.equal(winners, one_hot(0, candidates=4))
    assert torch.equal(losers, one_hot(3, candidates=4))


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [1.0, -0.5], [0, 0], [1, math.nan], [1, math.inf]])
def test_weights_must_fit(weights):
    with pytest.raises(InputError, match=r"^weights must be 2 finite numbers.*, got \["):
        reward_sum(torch.zeros(1, 4, 2), torch.full((1, 4, 2), 0.5), weights=weights)


def test_combined_rewards_keep_ties_and_dtypes():
    calibrated = torch.rand(501, 7, 3, generator=torch.Generator().manual_seed(0))
    calibrated[:, 6] = calibrated[:, 2]
    combined = combined_rewards(calibrated, [0.3, 1.1, 0.7])
    assert torch.equal(combined[:, 6], combined[:, 2])
    assert combined_rewards(calibrated.bfloat16()).dtype == torch.float32
    assert combined_rewards(calibrated.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated"])
def test_frs_gives_the_frontiers_or_all_others(kind):
    scores = random_scores(kind, 100, 16, 3)
    upper, lower = frontiers(scores)
    assert all(
        torch.equal(*masks) for masks in zip(frs(scores, win_rates(scores)), (upper, lower), strict=True)
    )
    best, _ = fronts(scores)
    winners, losers = frs(scores, win_rates(scores), lower="all_dominated")
    assert torch.equal(winners, best) and torch.equal(losers, ~best)


def test_frs_refuses_an_unknown_lower_set():
    scores = random_scores("random", 2, 4, 3)
    with pytest.raises(InputError, match=r"^lower must be one of frontier, all_dominated, got 'dominated'"):
        frs(scores, win_rates(scores), lower="dominated")


def test_random_pair_leaves_everyone_in():
    sets = random_pair(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2))
    assert sets.winners.shape == sets.losers.shape == (3, 4)
    assert sets.winners.all() and sets.losers.all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_give_bool_masks_and_take_no_prompts(strategy):
    scores = random_scores("random", 3, 6, 2)
    sets = strategy(scores, win_rates(scores))
    assert isinstance(sets, PairSets)
    assert all(mask.dtype == torch.bool and mask.shape == (3, 6) for mask in sets)
    assert all(mask.shape == (0, 6) for mask in strategy(scores[:0], scores[:0]))


@pytest.mark.parametrize("strategy", [*STRATEGIES, best_worst])
def test_shapes_must_fit(strategy):
    with pytest.raises(ValueError, match=r"\(2, 4, 1\).*\(2, 3, 1\)"):
        strategy(torch.zeros(2, 4, 1), torch.zeros(2, 3, 1))


def test_strategies_bind_through_hydra():
    scores = random_scores("random", 3, 6, 2)
    for node, direct in [
        (
            {"_target_": "capo.pairs.reward_sum", "weights": [1, 3]},
            functools.partial(reward_sum, weights=[1, 3]),
        ),
        (
            {"_target_": "capo.pairs.frs", "lower": "all_dominated"},
            functools.partial(frs, lower="all_dominated"),
        ),
    ]:
        strategy = instantiate({**node, "_partial_": True})
        for found, expected in zip(
            strategy(scores, win_rates(scores)), direct(scores, win_rates(scores)), strict=True
        ):
            assert torch.equal(found, expected)
