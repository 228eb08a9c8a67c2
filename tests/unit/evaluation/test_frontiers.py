"""Frontiers: hand-computed hypervolumes, interpolation at equal strength, and intervals."""

import numpy as np
import pytest
import torch

from capo.evaluation.frontiers import Frontier, Point, hypervolume, hypervolumes, matched, place_at
from capo.evaluation.statistics import bootstrap_interval

PROMPTS = 400


def point(label, seeds=1, noise=0.0, **means):
    """A point whose quantities have these means over prompts, exactly."""
    generator = torch.Generator().manual_seed(int.from_bytes(label.encode()))
    measured = {}
    for name, mean in means.items():
        values = noise * torch.randn(seeds, PROMPTS, generator=generator, dtype=torch.float64)
        measured[name] = values - values.mean() + mean
    return Point(label, measured)


def line(name, *places, **options):
    """A frontier through (looks, alignment) places."""
    points = [point(f"{name}{n}", looks=x, alignment=y, **options) for n, (x, y) in enumerate(places)]
    return Frontier(name, points)


def test_hypervolumes_worked_by_hand():
    # one point of 0.7 and 0.6: 0.2 x 0.1 of 0.5 x 0.5
    assert hypervolume(np.array([[0.7, 0.6]])) == pytest.approx(0.02 / 0.25)
    # two: 0.4 x 0.1 and 0.2 x 0.3, of which 0.2 x 0.1 is common; one that both dominate adds nothing
    two = np.array([[0.9, 0.6], [0.7, 0.8]])
    assert hypervolume(two) == pytest.approx((0.04 + 0.06 - 0.02) / 0.25)
    assert hypervolume(np.array([*two, [0.6, 0.55]])) == pytest.approx(0.08 / 0.25)
    # below the base in one reward: nothing, alone or beside others
    assert hypervolume(np.array([[0.9, 0.49]])) == 0
    assert hypervolume(np.array([*two, [0.99, 0.49]])) == pytest.approx(0.08 / 0.25)
    # three rewards: 0.4 0.1 0.1 and 0.1 0.1 0.4, of which 0.1 0.1 0.1 is common
    three = np.array([[0.9, 0.6, 0.6], [0.6, 0.6, 0.9]])
    assert hypervolume(three) == pytest.approx((0.004 + 0.004 - 0.001) / 0.125)
    assert hypervolume(np.ones((1, 3))) == 1 and hypervolume(np.full((2, 3), 0.5)) == 0


def test_a_hypervolume_has_the_interval_of_its_prompts():
    noisy = line("a", (0.7, 0.7), noise=0.3)
    [(volume, beyond)] = hypervolumes([noisy], ["looks", "alignment"])
    assert volume.mean == pytest.approx(0.04 / 0.25) and beyond is None
    # the product of two independent means of 0.2, each with a standard error of 0.3 / 20 = 0.015, in units of
    # 0.25: sqrt(2) 0.2 0.015 / 0.25 = 0.017
    assert (volume.high - volume.low) / 4 == pytest.approx(0.017, rel=0.1)
    assert hypervolumes([noisy], ["looks", "alignment"]) == [
        (volume, None)
    ]  # the same seed, the same interval
    exact = hypervolumes([line("a", (0.7, 0.7), (0.6, 0.8))], ["looks", "alignment"])[0][0]
    assert exact.low == pytest.approx(exact.mean) == pytest.approx(exact.high)


def test_a_difference_of_hypervolumes_is_paired_over_prompts():
    one = line("a", (0.7, 0.7), (0.65, 0.75), noise=0.3)
    better = [
        Point(p.label, {name: values + 0.01 for name, values in p.measured.items()}) for p in one.points
    ]
    (first, _), (second, beyond) = hypervolumes([one, Frontier("b", better)], ["looks", "alignment"])
    assert beyond.mean == pytest.approx(second.mean - first.mean) and beyond.low > 0
    assert beyond.high - beyond.low < 0.2 * (first.high - first.low)
    same = hypervolumes([one, Frontier("b", one.points)], ["looks", "alignment"])[1][1]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_seeds_of_a_point_widen_the_interval():
    seeds = [point("a", looks=0.7, alignment=0.7), point("b", looks=0.6, alignment=0.6)]
    both = {name: torch.cat([p.measured[name] for p in seeds]) for name in ("looks", "alignment")}
    [(volume, _)] = hypervolumes([Frontier("", [Point("a", both)])], ["looks", "alignment"])
    # the mean is 0.15 squared; of four resamples of two seeds one is twice the first, one twice the second
    assert volume.mean == pytest.approx(0.15**2 / 0.25)
    assert (volume.low, volume.high) == pytest.approx((0.04, 0.16))
    estimate = Point("a", both).estimate("looks")
    assert (estimate.low, estimate.high) == pytest.approx(
        (0.65 - 0.1, 0.65 + 0.1)
    )  # s = 0.0707, 2 s / sqrt 2


def test_methods_are_compared_where_they_are_equal():
    one = line("a", (0.6, 0.58), (0.8, 0.52))
    two = line("b", (0.7, 0.6), (0.9, 0.5))
    found = matched(one, two, "looks", "alignment")
    # both reach 0.7 to 0.8; at 0.75, a has 0.52 + 0.06 / 4 = 0.535, b 0.6 - 0.1 / 4 = 0.575
    assert found.overlap == pytest.approx((0.7, 0.8)) and found.level == pytest.approx(0.75)
    assert found.values == pytest.approx((0.535, 0.575)) and found.difference.mean == pytest.approx(0.04)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.04, 0.04))
    assert matched(two, one, "looks", "alignment").difference.mean == pytest.approx(-0.04)


def test_ranges_that_do_not_overlap_are_not_compared():
    apart = matched(
        line("a", (0.6, 0.6), (0.7, 0.5)), line("b", (0.71, 0.6), (0.9, 0.5)), "looks", "alignment"
    )
    assert apart.overlap == pytest.approx((0.71, 0.7))
    assert apart.level is apart.values is apart.difference is None
    unordered = Frontier("c", line("c", (0.6, 0.6), (0.7, 0.5)).points, ordered=False)
    assert matched(unordered, line("d", (0.6, 0.6), (0.7, 0.5)), "looks", "alignment").level is None


def test_a_method_of_one_point_is_met_where_it_stands():
    found = matched(line("a", (0.6, 0.58), (0.8, 0.52)), line("b", (0.65, 0.6)), "looks", "alignment")
    assert found.level == pytest.approx(0.65) and found.values == pytest.approx((0.565, 0.6))
    outside = matched(line("a", (0.6, 0.58), (0.8, 0.52)), line("b", (0.85, 0.6)), "looks", "alignment")
    assert outside.level is None


def test_of_several_places_the_one_nearest_the_base_counts():
    # from the base's side: up to 0.8, and back
    turned = line("a", (0.7, 0.45), (0.8, 0.5), (0.6, 0.56))
    place = place_at(turned, "looks", 0.7, 0.5)
    assert (place.before.label, place.after.label, place.share) == ("a2", "a1", pytest.approx(0.5))
    assert place_at(turned, "looks", 0.55, 0.5) is None and place_at(turned, "looks", 0.81, 0.5) is None


@pytest.mark.parametrize("single", [False, True])
def test_the_interval_of_a_comparison_is_that_of_interpolating_anew_in_every_resample(single):
    # steep, so that the error of the level counts most
    one = line("a", (0.6, 0.8), (0.8, 0.4), noise=0.3)
    two = line("b", (0.7, 0.6), noise=0.3) if single else line("b", (0.62, 0.9), (0.82, 0.4), noise=0.3)
    found = matched(one, two, "looks", "alignment")
    rng, redone = np.random.default_rng(0), []

    def at(frontier, rows, level):
        (x0, y0), (x1, y1) = (
            (p.measured["looks"][0, rows].mean().item(), p.measured["alignment"][0, rows].mean().item())
            for p in frontier.points
        )
        return y0 + (y1 - y0) * (level - x0) / (x1 - x0)

    for _ in range(2000):
        rows = torch.from_numpy(rng.integers(PROMPTS, size=PROMPTS))
        if single:
            [only] = two.points
            level = only.measured["looks"][0, rows].mean().item()
            theirs = only.measured["alignment"][0, rows].mean().item()
        else:
            level, theirs = found.level, at(two, rows, found.level)
        redone.append(theirs - at(one, rows, level))
    low, high = np.percentile(redone, [2.5, 97.5])
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high), abs=0.01)
    assert high - low > 0.06


def test_a_comparison_of_seeds_counts_them():
    """Where the points differ between seeds alone, the interval is theirs."""
    shifts = torch.tensor([[-0.01], [0.01]], dtype=torch.float64)

    def shifted(frontier):
        return Frontier(
            frontier.name,
            [
                Point(
                    p.label,
                    {
                        "looks": p.measured["looks"].expand(2, -1),
                        "alignment": p.measured["alignment"] + shifts,
                    },
                )
                for p in frontier.points
            ],
        )

    one, two = (shifted(line(name, (0.6, y), (0.8, y))) for name, y in (("a", 0.55), ("b", 0.6)))
    found = matched(one, two, "looks", "alignment").difference
    # s^2 / 2 = 0.0001 at each of four ends, each with a share of a half: variance 4 x 0.0001 / 4
    assert found.high - found.mean == pytest.approx(2 * 0.0001**0.5)
    assert found.mean - found.low == pytest.approx(2 * 0.0001**0.5)
    alone = point("a", noise=0.1, looks=0.6)
    estimate = alone.estimate("looks")
    assert (estimate.low, estimate.high) == bootstrap_interval(alone.measured["looks"][0], 0)
