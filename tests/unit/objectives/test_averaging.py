"""Several times for each pair: the mean of their losses, or the loss of their mean margin."""

from dataclasses import replace

import pytest
import torch

from capo.errors import InputError
from capo.objectives import PairErrors, capo, dpo, ipo, margin, mean_over_times, requirements, requires, sft
from capo.objectives.averaging import check_reduction

T = 4


def errors_at(times: int = T, pairs: int = 5) -> PairErrors:
    """Random errors and weights, B T each; the gap is that of the pair."""
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(6, pairs * times, generator=draw, dtype=torch.float64)
    values[5] = values[5, :pairs].repeat_interleave(times)
    return PairErrors(*values)


def test_the_margin_is_the_mean_of_the_margins():
    given = errors_at()
    mean = mean_over_times(given, T)
    assert torch.allclose(margin(mean), margin(given).view(-1, T).mean(1), rtol=1e-12)
    assert torch.equal(mean.gap, given.gap[::T]) and mean.weight.shape == (5,)
    # weighted means of the errors: errors still, between the smallest and the largest
    for name in ("policy_winner", "reference_loser"):
        among = getattr(given, name).view(-1, T)
        assert ((getattr(mean, name) > among.amin(1)) & (getattr(mean, name) < among.amax(1))).all()


def test_weighted_means_by_hand():
    # weights 1 and 3: errors 0.2 and 0.6 become (0.2 + 1.8) / 4 = 0.5, the weight 2
    pair = [torch.tensor(values) for values in ([0.2, 0.6],) * 4]
    mean = mean_over_times(PairErrors(*pair, torch.tensor([1.0, 3.0]), torch.tensor([0.4, 0.4])), 2)
    assert mean.policy_winner.item() == pytest.approx(0.5) and mean.weight.item() == 2
    assert margin(mean).item() == 0  # policy = reference stays exact


def test_outside_less_inside_is_the_variance_of_the_margin():
    given, beta = errors_at(), 30.0
    outside = capo(given, beta=beta).view(-1, T).mean(1)
    inside = capo(mean_over_times(given, T), beta=beta)
    variance = margin(given).view(-1, T).var(1, correction=0)
    assert torch.allclose(outside - inside, beta**2 * variance, rtol=1e-9) and (variance > 0).all()


@pytest.mark.parametrize("objective", [dpo, ipo, capo])
def test_inside_is_below_outside(objective):
    given = errors_at()
    outside = objective(given, beta=5.0).view(-1, T).mean(1)
    assert (objective(mean_over_times(given, T), beta=5.0) < outside).all()  # Jensen: all three are convex


def test_one_time_changes_rounding_at_most():
    given = errors_at(times=1)
    assert torch.allclose(margin(mean_over_times(given, 1)), margin(given), rtol=1e-12)


def test_inside_is_refused_without_a_margin():
    reads_predictions = requires(predictions=True)(lambda errors, *, beta: errors.policy_winner)
    for objective in (sft, reads_predictions):
        check_reduction("outside", requirements(objective))
        with pytest.raises(InputError, match="reduction must be outside, since"):
            check_reduction("inside", requirements(objective))
    check_reduction("inside", requirements(capo))
    with pytest.raises(InputError, match="reduction must be one of outside, inside, got 'mean'"):
        check_reduction("mean", requirements(capo))


def test_a_missing_field_is_an_error():
    with pytest.raises(ValueError, match="no reference_winner"):
        mean_over_times(replace(errors_at(), reference_winner=None), T)
