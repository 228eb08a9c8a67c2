"""Which pairs are pinned, and their loss by hand."""

import pytest
import torch

from capo.errors import ParameterError
from capo.objectives import PairErrors, Predictions, Requirements
from capo.objectives.pinned import check_pinned, pinned_loss, pinned_rows, select_rows


def predictions(apart):
    """Two pairs of latents 1x1x2; the policy is `apart` (2, 2, 2) from the reference."""
    reference = torch.full((2, 2, 1, 1, 2), 0.25)
    return Predictions(reference + apart.view(2, 2, 1, 1, 2), torch.zeros_like(reference), reference)


def test_loss_by_hand():
    apart = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.5], [0.0, 0.0]]])
    errors = PairErrors(
        policy_winner=torch.zeros(2), weight=torch.tensor([0.5, 1.0]), predictions=predictions(apart)
    )
    # (1 + 4) / 4 * 0.5 * 8 = 5, and (0.25 + 0.25) / 4 * 1 * 8 = 1
    assert pinned_loss(errors, 8.0).tolist() == [5.0, 1.0]
    assert pinned_loss(errors, None).tolist() == [0.625, 0.125]


def test_gradient_touches_the_policy_alone_and_is_0_at_the_reference():
    told = predictions(torch.zeros(2, 2, 2))
    policy = told.policy.clone().requires_grad_(True)
    errors = PairErrors(
        policy_winner=torch.zeros(2),
        weight=torch.ones(2),
        predictions=Predictions(policy, told.target, told.reference),
    )
    loss = pinned_loss(errors, 30.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and not policy.grad.any()


def test_without_predictions_it_is_refused():
    with pytest.raises(ValueError, match="predictions of policy and reference"):
        pinned_loss(PairErrors(policy_winner=torch.zeros(1), weight=torch.ones(1)), 1.0)


def test_the_share_is_met_at_all_times():
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert not pinned_rows(u, 0.0).any()
    for share in (0.1, 0.5, 0.9):
        rows = pinned_rows(u, share)
        assert torch.equal(rows, pinned_rows(u, share))
        for low in (0.0, 0.25, 0.5, 0.75):  # 5000 draws: a standard deviation of at most 0.0071
            within = rows[(u >= low) & (u < low + 0.25)].float().mean().item()
            assert within == pytest.approx(share, abs=0.03)
    assert not (pinned_rows(u, 0.1) & ~pinned_rows(u, 0.5)).any()  # a larger share keeps the smaller one's
    golden = torch.frac(torch.arange(20_000, dtype=torch.float64) * (5**0.5 - 1) / 2).float()
    assert pinned_rows(golden, 0.1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    # 4096 * 0.5 is whole, and 4096 * (0.5 + 2^-13) ends in .5
    assert pinned_rows(torch.tensor([0.5, 0.5 + 2**-13]), 0.5).tolist() == [True, False]


def test_rows_are_kept_in_every_field():
    told = predictions(torch.ones(2, 2, 2))
    errors = PairErrors(
        policy_winner=torch.tensor([1.0, 2.0]), gap=torch.tensor([3.0, 4.0]), predictions=told
    )
    kept = select_rows(errors, torch.tensor([False, True]))
    assert kept.policy_winner.tolist() == [2.0] and kept.gap.tolist() == [4.0] and kept.weight is None
    assert kept.predictions.policy.shape == (1, 2, 1, 1, 2) and kept.predictions.reference is not None
    winners = Predictions(told.policy, told.target)
    kept = select_rows(PairErrors(policy_winner=torch.ones(2), predictions=winners), torch.tensor([True] * 2))
    assert kept.predictions.reference is None


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_a_share_is_from_0_to_less_than_1(share):
    with pytest.raises(ParameterError, match="from 0 to less than 1"):
        check_pinned(share, Requirements(reference=True, predictions=False, loser=True))


def test_an_objective_without_a_reference_has_nothing_to_pin_to():
    needs = Requirements(reference=False, predictions=False, loser=False)
    check_pinned(0.0, needs)
    with pytest.raises(ParameterError, match="without a reference"):
        check_pinned(0.1, needs)
