"""MaPO, which has no reference."""

import math

import pytest
import torch

from capo.errors import InputError
from capo.objectives import PairErrors, Requirements, mapo, requirements
from capo.objectives.reference_free import bernoulli


def pair(winner: float, loser: float) -> PairErrors:
    return PairErrors(
        torch.tensor([winner], dtype=torch.float64), policy_loser=torch.tensor([loser], dtype=torch.float64)
    )


def test_hand_worked_loss():
    def f(m):
        return 0.5 * m / (math.exp(0.5 * m) - 1)

    # 0.3 + 0.1 softplus(-1000 (f(0.3) - f(0.305)))
    behind = -1000 * (f(0.3) - f(0.305))
    assert mapo(pair(0.3, 0.305), beta=0.1).item() == pytest.approx(0.3 + 0.1 * math.log1p(math.exp(behind)))
    assert behind == pytest.approx(-1000 * 0.2375 * 0.005, rel=2e-3)


@pytest.mark.parametrize("m", [0.0, 0.3])
def test_equal_errors_leave_half_a_preference(m):
    assert mapo(pair(m, m), beta=0.1).item() == pytest.approx(m + 0.1 * math.log(2), rel=1e-14)


@pytest.mark.parametrize(("m", "slope"), [(0.0, -250.0), (0.3, -237.5)])
def test_slope_of_the_log_odds(m, slope):
    error = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    (1000 * bernoulli(0.5 * error)).backward()
    assert error.grad.item() == pytest.approx(slope, abs=0.01)


def test_the_series_meets_the_quotient():
    x = torch.tensor([0.0099999, 0.0100001], dtype=torch.float64, requires_grad=True)
    value = bernoulli(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    # both sides of 0.01 are a slope of -1/2 + x/6 apart
    assert (value[0] - value[1]).item() == pytest.approx(2e-7 * (0.5 - 0.01 / 6), rel=1e-6)
    assert slope.tolist() == pytest.approx([-0.5 + 0.01 / 6] * 2, rel=1e-6)
    tiny = torch.tensor([0.0, 1e-6, 1e-3, 0.02], requires_grad=True)  # where float32's quotient has no digits
    (slope,) = torch.autograd.grad(bernoulli(tiny).sum(), tiny)
    assert torch.allclose(slope, -0.5 + tiny.detach() / 6, atol=1e-4)


def test_the_winner_is_pulled_down_and_the_loser_up():
    errors = PairErrors(*torch.full((1, 4), 0.2), policy_loser=torch.full((4,), 0.2))
    errors.policy_winner.requires_grad_()
    errors.policy_loser.requires_grad_()
    winner, loser = torch.autograd.grad(
        mapo(errors, beta=0.1).sum(), (errors.policy_winner, errors.policy_loser)
    )
    assert (winner > 1).all() and (loser < 0).all()


def test_mapo_reads_no_reference():
    assert requirements(mapo) == Requirements(reference=False, predictions=False, loser=True)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": None}, {"scale": -1.0}, {"factor": math.nan}])
def test_parameters_must_be_positive(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be a positive number"):
        mapo(pair(0.1, 0.2), **{"beta": 0.1, **wrong})
