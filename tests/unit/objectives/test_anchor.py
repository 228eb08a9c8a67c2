"""The penalty on the winner's error above the reference's."""

from functools import partial

import pytest
import torch

from capo.errors import InputError
from capo.objectives import Anchor, PairErrors, anchor_penalty, capo, requirements, sft


def errors(*winners: float, reference: float = 0.25) -> PairErrors:
    """Errors whose winner's are given, with gradients; w = 0.5, reference 0.25 on both."""
    own = torch.tensor(winners, dtype=torch.float64, requires_grad=True)
    fixed = torch.full_like(own, reference).detach()
    loser = torch.full_like(own, 0.75).detach().requires_grad_()
    return PairErrors(own, fixed, loser, fixed, torch.full_like(fixed, 0.5), fixed)


def test_penalty_by_hand():
    # beta w (m+ - r+) = 8 * 0.5 * 0.25 = 1, and 0.5 is free; below the reference there is none
    found = anchor_penalty(errors(0.5, 0.0, 0.25), beta=8.0, slack=0.5)
    assert found.tolist() == [0.5, 0.0, 0.0]
    assert anchor_penalty(errors(0.5, 0.0, 0.25), beta=8.0).tolist() == [1.0, 0.0, 0.0]


def test_gradient_reaches_the_winner_alone_and_only_beyond_the_slack():
    given = errors(0.5, 0.26, 0.25, 0.2)  # excess 1, 0.04, 0 and -0.2
    anchor_penalty(given, beta=8.0, slack=0.1).sum().backward()
    assert given.policy_winner.grad.tolist() == [4.0, 0.0, 0.0, 0.0]  # beta w
    assert given.policy_loser.grad is None


def test_penalty_is_zero_at_the_start():
    assert anchor_penalty(errors(0.25, 0.25), beta=3000.0).tolist() == [0.0, 0.0]


def test_a_budget_without_end_leaves_the_loss_alone():
    given = errors(0.5, 0.9)
    anchor_penalty(given, beta=3000.0, slack=float("inf")).sum().backward()
    assert given.policy_winner.grad.tolist() == [0.0, 0.0]
    assert anchor_penalty(given, beta=3000.0, slack=float("inf")).tolist() == [0.0, 0.0]


def test_half_precision_is_computed_in_float32():
    half = PairErrors(*(torch.tensor([value], dtype=torch.bfloat16) for value in (0.5, 0.25, 1, 1, 0.5, 1)))
    found = anchor_penalty(half, beta=1000.3)  # 125.0375, which bf16 rounds to 125
    assert found.dtype == torch.bfloat16 and found.item() == 125.0


def test_a_negative_slack_is_refused():
    with pytest.raises(InputError, match="slack must be at least 0, got -1"):
        anchor_penalty(errors(0.5), beta=8.0, slack=-1)


@pytest.mark.parametrize(
    "objective, lacking",
    [(partial(sft, beta=None), "reference"), (partial(sft, beta=3.0), "reference"), (capo, "beta")],
)
def test_an_objective_without_reference_or_beta_is_refused(objective, lacking):
    beta = objective.keywords["beta"] if isinstance(objective, partial) else None
    Anchor(0.0, 1.0).check(requirements(objective), beta)
    with pytest.raises(InputError, match=f"weight must be 0, since the objective has no {lacking}"):
        Anchor(0.5).check(requirements(objective), beta)
