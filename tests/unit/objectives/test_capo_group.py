"""CaPO on groups of candidates, against the sum over pairs."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from capo.errors import InputError
from capo.objectives import Group, PairErrors, Requirements, capo, capo_group, ipo, requirements
from capo.objectives.base import at_reference

BETA = 9.0


def errors_of(k: int, prompts: int = 20) -> PairErrors:
    """Random errors, rewards and weights of groups of k, in float64."""
    values = torch.rand(3, prompts, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    group, weight = Group(*values), values.mean((0, 2))
    return pair_of(group, weight, 0, -1)


def pair_of(group: Group, weight: torch.Tensor, i: int, j: int) -> PairErrors:
    """Candidates i and j of each group as a pair."""
    return PairErrors(
        group.policy[:, i],
        group.reference[:, i],
        group.policy[:, j],
        group.reference[:, j],
        weight,
        group.rewards[:, i] - group.rewards[:, j],
        group=group,
    )


def test_a_group_of_two_is_a_quarter_of_capo():
    errors = errors_of(2)
    assert torch.allclose(capo_group(errors, beta=BETA), capo(errors, beta=BETA) / 4, rtol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5, 16])
def test_any_group_is_half_the_mean_over_its_ordered_pairs(k):
    errors = errors_of(k)
    pairs = [
        capo(pair_of(errors.group, errors.weight, i, j), beta=BETA) for i, j in product(range(k), repeat=2)
    ]
    assert torch.allclose(capo_group(errors, beta=BETA), torch.stack(pairs).mean(0) / 2, rtol=1e-12)


def test_the_level_of_the_rewards_changes_nothing():
    errors = errors_of(5)
    shifted = replace(errors, group=replace(errors.group, rewards=errors.group.rewards + 3.0))
    assert torch.allclose(capo_group(shifted, beta=BETA), capo_group(errors, beta=BETA), rtol=1e-12)


def test_at_the_start_it_is_the_variance_of_the_rewards():
    errors = at_reference(errors_of(5))
    assert torch.allclose(
        capo_group(errors, beta=BETA), errors.group.rewards.var(1, correction=0), rtol=1e-12
    )


def test_a_step_lowers_the_errors_of_those_above_the_mean():
    errors = at_reference(errors_of(5))
    policy = errors.group.policy.clone().requires_grad_()
    errors = replace(errors, group=replace(errors.group, policy=policy))
    (slope,) = torch.autograd.grad(capo_group(errors, beta=BETA).sum(), policy)
    rewards = errors.group.rewards
    centered = rewards - rewards.mean(1, keepdim=True)
    # d/dm_i of the mean of (Rc - beta tc)^2 with t = -w (m - r) is 2 beta w Rc_i / k
    assert torch.allclose(slope, 2 * BETA * errors.weight[:, None] * centered / 5, rtol=1e-10, atol=1e-14)


def test_what_it_reads():
    assert requirements(capo_group) == Requirements(True, False, True, group=True)
    assert requirements(ipo).group is False
    errors = errors_of(3)
    with pytest.raises(ValueError, match="no group"):
        capo_group(replace(errors, group=None), beta=1.0)
    with pytest.raises(ValueError, match="no weight"):
        capo_group(replace(errors, weight=None), beta=1.0)
    with pytest.raises(InputError, match="beta must be a positive number"):
        capo_group(errors, beta=0.0)
