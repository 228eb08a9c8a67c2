"""Linear-DPO: DPO whose factor of the gradient is a line within bounds."""

import dataclasses
import math

import pytest
import torch

from capo.errors import InputError
from capo.objectives import PairErrors, Requirements, dpo, ipo, linear_dpo, margin, requirements
from capo.objectives.averaging import mean_over_times


def errors_of(spread: float, seed: int = 0) -> PairErrors:
    """50 pairs in float64 whose policy is up to `spread` from the reference, with gradients."""
    draw = torch.Generator().manual_seed(seed)
    reference, apart = torch.rand(2, 2, 50, generator=draw, dtype=torch.float64)
    weight, gap = torch.rand(2, 50, generator=draw, dtype=torch.float64)
    policy = reference + spread * (2 * apart - 1)
    return PairErrors(
        policy_winner=policy[0].clone().requires_grad_(),
        reference_winner=reference[0],
        policy_loser=policy[1].clone().requires_grad_(),
        reference_loser=reference[1],
        weight=weight + 0.1,
        gap=gap,
    )


def gradients(losses, errors):
    return torch.stack(torch.autograd.grad(losses.sum(), (errors.policy_winner, errors.policy_loser)))


def test_hand_worked():
    # R+ = -0.5 (0.2 - 0.3) = 0.05, R- = -0.5 (0.6 - 0.4) = -0.1, h = 0.15; w (m+ - m-) = -0.2
    one = PairErrors(*torch.tensor([[0.2], [0.3], [0.6], [0.4], [0.5], [0.25]], dtype=torch.float64))
    assert linear_dpo(one, beta=10.0).item() == pytest.approx((0.5 - 0.2 * 1.5) * -0.2)
    assert linear_dpo(one, beta=100.0, eta=0.01).item() == pytest.approx(0.01 * -0.2)  # at the lower bound
    assert linear_dpo(one, beta=100.0, eta=0.0).item() == 0
    worse = dataclasses.replace(one, policy_loser=torch.tensor([0.1], dtype=torch.float64))  # h = -0.1
    assert linear_dpo(worse, beta=100.0, eta=0.01).item() == pytest.approx(0.99 * 0.05)  # at the upper one


def test_the_start_is_half_the_difference_with_the_gradient_of_dpo_over_beta():
    errors = errors_of(0.0)
    losses = linear_dpo(errors, beta=30.0)
    torch.testing.assert_close(losses, 0.5 * errors.weight * (errors.policy_winner - errors.policy_loser))
    expected = gradients(dpo(errors, beta=30.0), errors) / 30
    torch.testing.assert_close(gradients(losses, errors), expected, rtol=1e-13, atol=0)


def test_within_the_bounds_the_gradient_is_that_of_ipo():
    errors = errors_of(0.3)
    beta = 2.0
    factor = 0.5 - 0.2 * beta * margin(errors)
    assert factor.min() > 0.01 and factor.max() < 0.99 and factor.std() > 0.02
    expected = gradients(ipo(errors, beta=0.4 * beta), errors) / (1.6 * beta)
    torch.testing.assert_close(
        gradients(linear_dpo(errors, beta=beta, eta=0.01), errors), expected, rtol=1e-12, atol=0
    )


def test_beyond_the_bounds_the_gradient_is_constant():
    errors, eta = errors_of(0.3), 0.05
    h = margin(errors).detach()
    found = gradients(linear_dpo(errors, beta=1e3, eta=eta), errors)
    far = h.abs() > 2.5e-3  # |0.2 beta h| > 0.5
    factor = torch.where(h > 0, eta, 1 - eta)
    expected = torch.stack([factor * errors.weight, -factor * errors.weight])
    assert far.sum() > 40 and (h[far] > 0).any() and (h[far] < 0).any()
    torch.testing.assert_close(found[:, far], expected[:, far])
    assert gradients(linear_dpo(errors, beta=1e3, eta=0.0), errors)[:, far & (h > 0)].abs().max() == 0


def test_the_mean_over_times_is_one_of_margin_and_difference():
    errors = errors_of(0.1)
    found = linear_dpo(mean_over_times(errors, 5), beta=20.0)
    h, difference = (
        value.view(-1, 5).mean(1)
        for value in (margin(errors), errors.weight * (errors.policy_winner - errors.policy_loser))
    )
    torch.testing.assert_close(found, (0.5 - 4 * h).clamp(1e-3, 1 - 1e-3) * difference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    errors = errors_of(0.1)
    small = PairErrors(**{name: v.detach().to(dtype) for name, v in vars(errors).items() if v is not None})
    found = linear_dpo(small, beta=3.0)
    assert found.dtype == dtype and found.shape == (50,)


def test_what_it_reads_and_refuses():
    errors = errors_of(0.1)
    assert requirements(linear_dpo) == Requirements(reference=True, predictions=False, loser=True)
    assert linear_dpo(dataclasses.replace(errors, gap=None), beta=1.0).shape == (50,)
    with pytest.raises(ValueError, match="no reference_winner"):
        linear_dpo(dataclasses.replace(errors, reference_winner=None), beta=1.0)
    for beta in (None, 0.0, math.nan):
        with pytest.raises(InputError, match="beta must be a positive number"):
            linear_dpo(errors, beta=beta)
    for eta in (-0.1, 0.5, math.nan):
        with pytest.raises(InputError, match=r"eta must be a number from 0 to less than 0\.5"):
            linear_dpo(errors, beta=1.0, eta=eta)
