"""Diffusion-KTO, whose samples are single candidates."""

import math
from dataclasses import replace

import pytest
import torch

from capo.errors import InputError
from capo.objectives import Group, PairErrors, Requirements, kto, requirements
from capo.objectives.base import at_reference


def errors_of(policy, rewards, kl=0.0, reference=0.3) -> PairErrors:
    policy, rewards = (torch.tensor(value, dtype=torch.float64) for value in (policy, rewards))
    group = Group(policy, rewards, torch.full_like(policy, reference))
    kl = torch.full((len(policy),), kl, dtype=torch.float64)
    return PairErrors(
        policy[:, 0], group.reference[:, 0], policy[:, -1], group.reference[:, -1], group=group, kl=kl
    )


def test_hand_worked_loss():
    # gains 0.1 and -0.1, good and bad, kl 0.02, beta 20: the sigmoids of 20 (0.1 - 0.02) = 1.6 and of
    # -20 (-0.1 - 0.02) = 2.4
    loss = kto(errors_of([[0.2, 0.4]], [[0.9, 0.1]], kl=0.02), beta=20.0).item()
    wrong = [1 - 1 / (1 + math.exp(-1.6)), 1 - 1 / (1 + math.exp(-2.4))]
    assert loss == pytest.approx(sum(wrong) / 2, rel=1e-14)


def test_the_loss_is_one_half_at_the_start_and_its_slope_a_quarter_of_beta():
    errors = errors_of([[0.3, 0.3]] * 3, [[0.9, 0.1], [0.9, 0.6], [0.4, 0.5]])
    policy = errors.group.policy.requires_grad_()
    loss = kto(errors, beta=40.0)
    assert loss.tolist() == [0.5] * 3
    # the mean over the six samples: d/dm of 1 - sigmoid(y beta (r - m)) is y beta / 4
    (slope,) = torch.autograd.grad(loss.mean(), policy)
    y = torch.tensor([[1, -1], [1, 1], [-1, 0]], dtype=torch.float64)
    assert torch.allclose(6 * slope, 10.0 * y)


def test_a_mean_gain_is_taken_off_and_a_mean_loss_is_not():
    at = [kto(errors_of([[0.2, 0.4]], [[0.9, 0.1]], kl=kl), beta=20.0).item() for kl in (-0.3, 0.0, 0.05)]
    assert at[0] == at[1] != at[2]


def test_kl_has_no_gradient():
    errors = errors_of([[0.2, 0.4]], [[0.9, 0.1]], kl=0.02)
    kl = errors.kl.requires_grad_()
    policy = errors.group.policy.requires_grad_()
    found = torch.autograd.grad(kto(errors, beta=20.0).sum(), (policy, kl), allow_unused=True)
    assert found[0].abs().min() > 0 and found[1] is None


def test_a_group_may_have_more_candidates():
    one, other = ([[0.2, 0.4]], [[0.9, 0.1]]), ([[0.1, 0.35]], [[0.8, 0.7]])
    both = errors_of([one[0][0] + other[0][0]], [one[1][0] + other[1][0]])
    parts = [kto(errors_of(*part), beta=20.0).item() for part in (one, other)]
    assert kto(both, beta=20.0).item() == pytest.approx(sum(parts) / 2, rel=1e-14)


def test_what_kto_reads():
    assert requirements(kto) == Requirements(True, False, True, group=True, kl=True)
    errors = errors_of([[0.2, 0.4]], [[0.9, 0.1]], kl=0.3)
    for lacking in ({"group": None}, {"group": replace(errors.group, reference=None)}):
        with pytest.raises(ValueError, match="no group with a reference"):
            kto(replace(errors, **lacking), beta=1.0)
    with pytest.raises(ValueError, match="no kl"):
        kto(replace(errors, kl=None), beta=1.0)
    assert kto(at_reference(errors), beta=9.0).item() == 0.5
    half = errors_of([[0.2, 0.4]], [[0.9, 0.1]])
    half = replace(half, policy_winner=half.policy_winner.bfloat16())
    assert kto(half, beta=1.0).dtype == torch.bfloat16


@pytest.mark.parametrize("beta", [None, 0.0, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(InputError, match="beta must be a positive number"):
        kto(errors_of([[0.2, 0.4]], [[0.9, 0.1]]), beta=beta)
