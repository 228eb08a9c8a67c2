"""pairs.depth: further fronts, against a reference that follows the definition candidate by candidate."""

import functools
import math

import moocore
import numpy as np
import pytest
import torch

from capo.data.selection import select
from capo.errors import InputError
from capo.pairs import frontiers, frs
from capo.pairs.depth import crowding, deep_frontiers, ranks
from fixtures.random_scores import random_scores

KINDS = ["random", "tied", "duplicated"]


def dominates(a, b) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def reference_order(rows: list[list[float]], allowed: set[int]) -> list[int]:
    """Candidates in the order in which X+ takes them, by plain loops."""
    order, left = [], set(range(len(rows)))
    while left:
        front = sorted(i for i in left if not any(dominates(rows[j], rows[i]) for j in left))
        keys = {}
        for i in front:
            best, total = 0, 0.0
            for values in zip(*rows, strict=True):
                inside = [values[j] for j in front]
                if values[i] == max(inside):
                    best += 1
                    continue
                above = min(values[j] - values[i] for j in front if j != i and values[j] >= values[i])
                below = [values[i] - values[j] for j in front if j != i and values[j] <= values[i]]
                total += (above + (min(below) if below else above)) / (max(inside) - min(inside))
            keys[i] = (-best, -total, i)
        order += sorted(front, key=keys.__getitem__)
        left -= set(front)
    return [i for i in order if i in allowed]


def reference_set(rows: list[list[float]], own: list[bool], others: list[bool], depth: int) -> list[bool]:
    free = {i for i in range(len(rows)) if not own[i] and not others[i]}
    chosen = reference_order(rows, free)[: max(depth - sum(own), 0)]
    return [own[i] or i in chosen for i in range(len(rows))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("candidates", "rewards", "depth"), [(6, 2, 3), (8, 3, 4), (9, 6, 2), (5, 1, 4)])
def test_agrees_with_the_definition(kind, candidates, rewards, depth):
    scores = random_scores(kind, 40, candidates, rewards)
    upper, lower = frontiers(scores)
    winners, losers = deep_frontiers(scores, depth)
    for row, up, low, win, lose in zip(
        scores.double().tolist(), *(mask.tolist() for mask in (upper, lower, winners, losers)), strict=True
    ):
        assert win == reference_set(row, up, low, depth)
        assert lose == reference_set([[-value for value in values] for values in row], low, up, depth)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_with_an_independent_library(kind):
    scores = random_scores(kind, 50, 12, 3).double().numpy()
    found = ranks(scores.transpose(2, 1, 0))
    for prompt, rank in zip(scores, found.T, strict=True):
        assert np.array_equal(rank, moocore.pareto_rank(prompt, maximise=True))


def test_hand_worked_crowding():
    # a front of four by two rewards, and e:  a (0, 10)  b (2, 6)  c (3, 5)  d (10, 0)  e (1, 0)
    # first reward, extent 10: d is the best; a, the worst: 2 + 2; b: 1 + 2; c: 7 + 1
    # second, extent 10:       a is the best; d, the worst: 5 + 5; b: 4 + 1; c: 1 + 5
    scores = np.array([[0.0, 10], [2, 6], [3, 5], [10, 0], [1, 0]])
    columns = scores.T[:, :, None]
    rank = ranks(columns)
    assert rank[:, 0].tolist() == [0, 0, 0, 0, 1]
    best, distance = crowding(columns, rank)
    assert best[:, 0].tolist() == [1, 0, 0, 1, 2]
    assert distance[:, 0] == pytest.approx([0.4, 0.8, 1.4, 1.0, 0.0])
    # b, c and d dominate e, and a dominates none: F+ = {a, b, c, d}, F- = {a, e}, so X+ = {b, c, d}, X- = {e}
    tensor = torch.tensor(scores)[None]
    assert frontiers(tensor)[0].tolist() == [[False, True, True, True, False]]
    winners, losers = deep_frontiers(tensor, 3)
    assert winners.tolist() == [[False, True, True, True, False]]  # there are three already
    assert losers.tolist() == [[True, False, False, False, True]]  # the others win, so no more are left
    assert deep_frontiers(tensor, 4)[0].tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewards", [2, 8])
def test_sets_only_grow_and_stay_apart(kind, rewards):
    scores = random_scores(kind, 300, 16, rewards)
    upper, lower = frontiers(scores)
    winners, losers = deep_frontiers(scores, 4)
    assert (winners >= upper).all() and (losers >= lower).all()
    assert not (winners & lower).any() and not (losers & upper).any()
    for found, own, others in ((winners, upper, lower), (losers, lower, upper)):
        limit = torch.minimum(torch.tensor(4), 16 - others.sum(1)).maximum(own.sum(1))
        assert torch.equal(found.sum(1), limit)


def test_negated_scores_exchange_the_sets_and_affine_maps_keep_them():
    scores = random_scores("random", 200, 16, 8)
    winners, losers = deep_frontiers(scores, 4)
    negated = deep_frontiers(-scores, 4)
    assert torch.equal(negated[0], losers) and torch.equal(negated[1], winners)
    # powers of two, so that no distance is rounded
    scaled = deep_frontiers(scores * torch.tensor([0.5, 4.0] * 4), 4)
    assert torch.equal(scaled[0], winners) and torch.equal(scaled[1], losers)


def test_blocks_and_dtypes_do_not_change_the_sets():
    scores = random_scores("random", 700, 16, 6)  # more than a block
    together = deep_frontiers(scores, 5)
    for row in (0, 255, 256, 699):
        alone = deep_frontiers(scores[row : row + 1].double(), 5)
        assert torch.equal(alone[0][0], together[0][row]) and torch.equal(alone[1][0], together[1][row])


def test_many_rewards_have_pairs():
    scores = random_scores("random", 500, 16, 8)
    calibrated = scores.sigmoid()
    shares = {
        depth: select(functools.partial(frs, depth=depth), scores, calibrated).usable.float().mean().item()
        for depth in (None, 4)
    }
    assert shares[None] < 0.6 and shares[4] == 1


def test_default_is_the_frontiers():
    scores = random_scores("tied", 100, 8, 3)
    for found, expected in zip(frs(scores, scores), frontiers(scores), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"depth": 0}, "depth must be from 1 to 7: a prompt has 8 candidates, got 0"),
        ({"depth": 8}, "depth must be from 1 to 7: .*, got 8"),
        ({"depth": 2, "lower": "all_dominated"}, "depth must be null with lower=all_dominated, .*, got 2"),
    ],
)
def test_depth_is_refused(options, told):
    scores = torch.zeros(0, 8, 2)
    with pytest.raises(InputError, match=told):
        frs(scores, scores, **options)


def test_score_that_is_not_finite_is_named():
    scores = torch.zeros(2, 3, 2)
    scores[1, 2, 0] = math.nan
    with pytest.raises(InputError, match="prompt 1, candidate 2, reward 0"):
        frs(scores, scores, depth=2)
