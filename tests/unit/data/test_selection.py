from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from capo.calibration import calibrate
from capo.data.selection import Selection, count_pairs, draw_pair, pair_matrix, select
from capo.errors import InputError
from capo.pairs import (
    PairSets,
    argument,
    best_worst,
    combined_rewards,
    declaration,
    declares,
    frs,
    random_pair,
    reward_sum,
)

STRATEGIES = [
    reward_sum,
    frs,
    random_pair,
    partial(frs, lower="all_dominated"),
    partial(reward_sum, weights=[1, 0, 5]),
]


def independent_scores(prompts: int, candidates: int, rewards: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N, L) independent normal scores and their win-rates."""
    scores = torch.randn(prompts, candidates, rewards, generator=torch.Generator().manual_seed(0))
    return scores, calibrate(scores, ["identity"] * rewards, [1.0] * rewards)


# X+ = {0, 1}, X- = {2, 3}; rewards 0.6, 0.3, 0.3, 0.1
# dR > 0 for 0-2 (0.3), 0-3 (0.5) and 1-3 (0.2), not for 1-2 (0)
WINNERS = torch.tensor([True, True, False, False])
REWARDS = torch.tensor([0.6, 0.3, 0.3, 0.1])
PAIRS = [(0, 2), (0, 3), (1, 3)]


def test_hand_worked_pairs():
    matrix = pair_matrix(WINNERS, ~WINNERS, REWARDS)
    assert matrix.nonzero().tolist() == [list(pair) for pair in PAIRS]
    sets = PairSets(WINNERS.expand(2, 4), torch.stack([~WINNERS, ~WINNERS]))
    # second prompt: all rewards equal, so there is no pair
    counts = count_pairs(sets, torch.stack([REWARDS, torch.full((4,), 0.5)]))
    assert counts.tolist() == [3, 0] and counts.dtype == torch.int64


def test_every_pair_is_drawn_by_exactly_one_number():
    # uniform numbers 0 ... n - 1 thus give uniform pairs
    asked = []
    drawn = []
    for number in range(3):
        drawn.append(draw_pair(WINNERS, ~WINNERS, REWARDS, lambda n, k=number: (asked.append(n), k)[1]))
    assert drawn == PAIRS and asked == [3, 3, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drawing_reaches_all_pairs_with_a_positive_gap_and_no_other(strategy):
    selection = select(strategy, *independent_scores(40, 8, 3))
    for prompt in selection.usable.nonzero().flatten().tolist():
        count = int(selection.pairs[prompt])
        drawn = {selection.draw(prompt, lambda n, k=number: k) for number in range(count)}
        assert len(drawn) == count
        for winner, loser in drawn:
            assert selection.winners[prompt, winner] and selection.losers[prompt, loser]
            assert selection.rewards[prompt, winner] - selection.rewards[prompt, loser] > 0


def test_draws_with_a_numpy_generator_are_uniform_and_repeatable():
    def draws(seed: int) -> Counter:
        generator = np.random.default_rng(seed)
        return Counter(draw_pair(WINNERS, ~WINNERS, REWARDS, generator.integers) for _ in range(600))

    found = draws(0)
    assert set(found) == set(PAIRS)
    # 200 each, standard deviation sqrt(600 * 1/3 * 2/3) = 11.5
    assert all(abs(count - 200) < 5 * 11.5 for count in found.values())
    assert draws(0) == found and draws(1) != found


def test_a_prompt_without_a_pair_is_not_drawn_from():
    with pytest.raises(ValueError, match="no pair with dR > 0"):
        draw_pair(WINNERS, ~WINNERS, torch.full((4,), 0.5), lambda n: 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_counts_are_those_of_the_matrix_across_blocks(strategy):
    scores, calibrated = independent_scores(5000, 8, 3)
    scores[::2] = scores[::2].round()  # with ties in every second prompt
    calibrated = calibrate(scores, ["identity"] * 3, [1.0] * 3)
    sets, rewards = strategy(scores, calibrated), combined_rewards(calibrated)
    assert torch.equal(count_pairs(sets, rewards), pair_matrix(*sets, rewards).sum((1, 2)))


def test_weights_of_the_strategy_are_those_of_the_gap():
    scores, calibrated = independent_scores(20, 8, 2)
    plain, weighted = (
        select(reward_sum, scores, calibrated),
        select(partial(reward_sum, weights=[1, 3]), scores, calibrated),
    )
    assert torch.allclose(plain.rewards, calibrated.mean(-1))
    assert torch.allclose(weighted.rewards, (calibrated[..., 0] + 3 * calibrated[..., 1]) / 4)
    assert (weighted.usable == weighted.winners.ne(weighted.losers).any(1)).all()


def own_weights(scores, calibrated, *, weights=(1.0, 9.0)):
    return reward_sum(scores, calibrated, weights=weights)


def test_the_declared_argument_weighs_the_gap():
    node = {"_target_": "capo.pairs.reward_sum", "_partial_": True, "weights": [1, 3]}
    for strategy in (partial(partial(reward_sum, weights=[1, 1]), weights=[1, 3]), instantiate(node)):
        assert list(argument(strategy, declaration(strategy).weights)) == [1, 3]
    none, calibrated = torch.zeros(1, 2, 2), torch.tensor([[[0.2, 0.7], [0.8, 0.3]]])
    assert torch.allclose(
        select(own_weights, none, calibrated).rewards, calibrated.mean(-1)
    )  # nothing is guessed from names
    declared = declares(weights="weights")(own_weights)
    assert torch.allclose(
        select(declared, none, calibrated).rewards, (calibrated[..., 0] + 9 * calibrated[..., 1]) / 10
    )
    assert argument(frs, declaration(frs).weights) is None and declaration(partial(frs)).lower_set == "lower"


def test_selection_without_prompts_finds_what_does_not_fit():
    none = torch.empty(0, 16, 3)
    assert select(frs, none, none).pairs.shape == (0,)
    with pytest.raises(InputError, match="best_worst"):
        select(best_worst, none, none)
    with pytest.raises(InputError, match="weights"):
        select(partial(reward_sum, weights=[1, 2]), none, none)


def whole(scores, calibrated):
    return PairSets(calibrated > 0.5, calibrated < 0.5)


def plain_tuple(scores, calibrated):
    return calibrated[..., 0] > 0.5, calibrated[..., 0] < 0.5


def numbers(scores, calibrated):
    return PairSets(calibrated[..., 0], calibrated[..., 0] < 0.5)


def lists(scores, calibrated):
    return PairSets((calibrated[..., 0] > 0.5).tolist(), calibrated[..., 0] < 0.5)


def raises(scores, calibrated):
    raise ZeroDivisionError("no scores")


@declares(weights="share")
def undeclared(scores, calibrated):
    return random_pair(scores, calibrated)


@pytest.mark.parametrize("prompts", [0, 2])
@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (whole, r"returned winners of shape \(\d, 4, 2\), torch.bool, on cpu; it must return .*\(\d, 4\)"),
        (plain_tuple, r"returned a tuple; it must return capo.pairs.PairSets\(winners, losers\)"),
        (
            numbers,
            r"returned winners of shape \(\d, 4\), torch.float32, on cpu; it must return .* bool masks",
        ),
        (lists, "returned winners that are a list; it must return"),
        (raises, r"on scores and .* of shape \(\d, 4, 2\) failed \(ZeroDivisionError: no scores\).*HYDRA"),
        (undeclared, r"failed \(KeyError: 'share'\)"),
    ],
)
def test_what_a_strategy_may_not_return_is_named(strategy, message, prompts):
    scores, calibrated = independent_scores(2, 4, 2)
    with pytest.raises(InputError, match=rf"^the pairs strategy \S+\.{strategy.__name__} .*{message}"):
        select(partial(strategy), scores[:prompts], calibrated[:prompts])


def test_a_strategy_that_writes_on_what_it_is_given_changes_no_rewards():
    def sorting(scores, calibrated):
        sets = best_worst(scores, calibrated)
        scores.zero_(), calibrated.zero_()
        return sets

    scores = torch.rand(3, 4, 1, generator=torch.Generator().manual_seed(0))
    calibrated = scores.clone()
    found, expected = select(sorting, scores, calibrated), select(best_worst, scores, calibrated)
    assert torch.equal(found.rewards, expected.rewards) and found.pairs.tolist() == [1, 1, 1]


def test_hand_worked_statistics():
    # sizes of X+: 2 and 1, of X-: 2 and 3, of 4 candidates; the second prompt has no pair
    selection = Selection(
        winners=torch.tensor([[True, True, False, False], [True, False, False, False]]),
        losers=torch.tensor([[False, False, True, True], [False, True, True, True]]),
        rewards=torch.stack([REWARDS, torch.full((4,), 0.5)]),
        pairs=torch.tensor([3, 0]),
    )
    assert selection.usable.tolist() == [True, False]
    found = selection.statistics()
    assert (found.prompts, found.usable, found.skipped_share, found.pairs) == (2, 1, 0.5, 3.0)
    assert (found.winners, found.losers) == (1.5, 2.5)
    with pytest.raises(ValueError, match="no prompts"):
        select(frs, torch.empty(0, 4, 2), torch.empty(0, 4, 2)).statistics()


def shares(rewards: int, lower: str, correlation: float = 0.0) -> tuple[float, float]:
    """N = 16: share of X+ x X- with dR <= 0, mean over prompts, and share of prompts without a pair."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4000, 16, rewards, generator=generator) * (1 - correlation) ** 0.5
    scores += torch.randn(4000, 16, 1, generator=generator) * correlation**0.5
    calibrated = calibrate(scores, ["identity"] * rewards, [1.0] * rewards)
    selection = select(partial(frs, lower=lower), scores, calibrated)
    allowed = selection.winners.sum(1) * selection.losers.sum(1)
    wrong = 1 - (selection.pairs / allowed)[allowed > 0].mean().item()
    return wrong, selection.statistics().skipped_share


def test_known_shares():
    # 0.6 % and 0.04 % of the pairs of three rewards have dR <= 0 (independent; correlation 0.5) ...
    assert 0.004 < shares(3, "frontier")[0] < 0.009
    assert 0.0001 < shares(3, "frontier", 0.5)[0] < 0.001
    # ... an order of magnitude more with all dominated candidates as losers ...
    assert 0.03 < shares(3, "all_dominated", 0.5)[0] < shares(3, "all_dominated")[0] < 0.1
    # ... and of eight independent rewards 51 % of the prompts have no pair (standard error 0.8 %)
    assert shares(8, "frontier")[1] == pytest.approx(0.51, abs=0.025)
