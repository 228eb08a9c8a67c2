"""The guard of the winner's error (Diffusion-SDPO), and its gradients in the space of predictions."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from capo.errors import InputError
from capo.objectives import (
    PairErrors,
    Predictions,
    Requirements,
    capo,
    dpo,
    guarded,
    kto,
    requirements,
    sdpo,
    sft,
)
from capo.objectives.base import beta_of
from capo.objectives.guarded import loser_share, overlap


def errors_of(policy: torch.Tensor, target: torch.Tensor) -> PairErrors:
    """Errors of B pairs from predictions (B, 2, 1, 3, 3); the reference's are those of another prediction."""
    winner, loser = (policy - target).square().mean(dim=(2, 3, 4)).unbind(1)
    frozen = (policy.detach() + 0.02 - target).square().mean(dim=(2, 3, 4))
    weight, gap = torch.tensor([[0.3, 0.9, 0.5], [0.2, 0.4, 0.6]], dtype=torch.float64)
    return PairErrors(
        winner, frozen[:, 0], loser, frozen[:, 1], weight, gap, Predictions(policy, target, policy.detach())
    )


@pytest.fixture
def pairs():
    """Three pairs whose errors overlap nearly whole, not at all, and against each other."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(3, 2, 1, 3, 3, generator=draw, dtype=torch.float64)
    shared, own = torch.randn(2, 3, 1, 3, 3, generator=draw, dtype=torch.float64)
    losers = torch.stack([shared[0] + 0.1 * own[0], own[1], -shared[2]])
    apart = torch.stack([shared, losers], dim=1)
    apart[1, 1] -= (apart[1, 0] * apart[1, 1]).sum() / apart[1, 0].square().sum() * apart[1, 0]
    policy = (target + 0.3 * apart).requires_grad_()
    return policy, target


def gradients(objective, pairs, **arguments):
    policy, target = pairs
    errors = errors_of(policy, target)
    loss = objective(errors, **arguments)
    return loss, torch.autograd.grad(loss.sum(), policy)[0], errors


def test_hand_worked_share():
    # e+ = (1, 2), e- = (3, 1): m+ = 5/2, c = 5/2; at mu 0.9 the share is 0.1
    apart = torch.tensor([[[[[1.0, 2.0]]], [[[3.0, 1.0]]]]], dtype=torch.float64)
    errors = PairErrors(
        torch.tensor([2.5], dtype=torch.float64),
        policy_loser=torch.tensor([5.0], dtype=torch.float64),
        predictions=Predictions(apart, torch.zeros_like(apart)),
    )
    assert overlap(errors).item() == 2.5
    assert loser_share(errors, 0.9).item() == pytest.approx(0.1)
    assert loser_share(errors, 0.0).item() == 1.0


@pytest.mark.parametrize("objective", [dpo, capo])
@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9, 1.0])
def test_the_value_is_as_wrapped_and_the_winners_gradient_too(pairs, objective, mu):
    plain, slope, errors = gradients(objective, pairs, beta=30.0)
    held, guarded_slope, _ = gradients(guarded(objective, mu=mu), pairs, beta=30.0)
    assert torch.equal(held, plain) and torch.equal(guarded_slope[:, 0], slope[:, 0])
    share = loser_share(errors, mu)[:, None, None, None]
    assert torch.allclose(guarded_slope[:, 1], share * slope[:, 1], rtol=1e-12, atol=1e-16)
    assert share.flatten()[1:].tolist() == [1.0, 1.0]  # orthogonal and opposite errors


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_step_keeps_mu_of_the_winners_progress(mu):
    """For the plain errors: `<-g+ + share g-, g+> <= -mu |g+|^2`, with both gradients on one prediction.

    Under a prediction that winner and loser share, as weights do, the step is -g+ + share g-.
    """
    draw = torch.Generator().manual_seed(1)
    target = torch.randn(200, 2, 1, 2, 2, generator=draw, dtype=torch.float64)
    shared = torch.randn(200, 1, 1, 2, 2, generator=draw, dtype=torch.float64)
    policy = shared.expand_as(target)
    g = 2 * (policy - target) / 4  # of the mean over four elements
    errors = PairErrors(
        (policy - target)[:, 0].square().mean((1, 2, 3)), predictions=Predictions(policy, target)
    )
    share = loser_share(errors, mu)[:, None, None, None]
    ahead = ((-g[:, 0] + share * g[:, 1]) * g[:, 0]).sum((1, 2, 3))
    assert (ahead <= -mu * g[:, 0].square().sum((1, 2, 3)) + 1e-14).all()
    unguarded = ((-g[:, 0] + g[:, 1]) * g[:, 0]).sum((1, 2, 3))
    assert (unguarded > 0).any()  # without the guard the winner's error rises in some pairs


def test_at_mu_1_a_loser_that_overlaps_pulls_on_nothing(pairs):
    _, slope, errors = gradients(partial(sdpo, mu=1.0), pairs, beta=30.0)
    c = overlap(errors)
    assert c[0] > 0 and abs(c[1]) < 1e-15 and c[2] < 0
    assert slope[0, 1].abs().max() == 0 and slope[0, 0].abs().max() > 0 and slope[2, 1].abs().max() > 0


def test_sdpo_is_guarded_dpo(pairs):
    one, slope, _ = gradients(partial(sdpo, mu=0.9), pairs, beta=30.0)
    other, expected, _ = gradients(guarded(dpo, mu=0.9), pairs, beta=30.0)
    assert torch.equal(one, other) and torch.equal(slope, expected)
    at_start = errors_of(*pairs)
    at_start = replace(
        at_start, policy_winner=at_start.reference_winner, policy_loser=at_start.reference_loser
    )
    assert torch.allclose(sdpo(at_start, beta=30.0, mu=0.9), torch.full((3,), math.log(2)).double())


def test_what_the_guard_reads():
    needs = Requirements(reference=True, predictions=True, loser=True, shared_noise=True)
    assert requirements(sdpo) == requirements(guarded(capo, mu=0.5)) == needs
    assert beta_of(partial(guarded(capo, mu=0.5), beta=3.0)) == 3.0


@pytest.mark.parametrize("mu", [-0.1, 1.1, math.nan])
def test_mu_is_a_share(mu):
    with pytest.raises(InputError, match="mu must be a number from 0 to 1"):
        guarded(dpo, mu=mu)


@pytest.mark.parametrize("objective", [sft, kto])
def test_only_a_pair_has_a_loser_to_guard(objective):
    with pytest.raises(ValueError, match="loser's gradient"):
        guarded(objective, mu=0.5)


def test_missing_predictions_are_named(pairs):
    with pytest.raises(ValueError, match="no predictions"):
        sdpo(replace(errors_of(*pairs), predictions=None), beta=1.0, mu=0.9)
