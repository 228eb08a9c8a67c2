import dataclasses
import math
from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from capo.errors import InputError
from capo.objectives import (
    PairErrors,
    Requirements,
    capo,
    dmpo,
    dpo,
    hinge,
    implicit_rewards,
    ipo,
    margin,
    requirements,
    requires,
    sft,
    smpo,
)

PAIRWISE = [dpo, ipo, capo, hinge, dmpo, smpo]


def random_errors(seed: int = 0, count: int = 50, dtype: torch.dtype = torch.float64) -> PairErrors:
    """Errors in (0, 1), weights in (0, 1), gaps in (0, 1)."""
    values = torch.rand(6, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )
    return PairErrors(*values)


def tensors_of(errors: PairErrors) -> list[torch.Tensor]:
    return [value for value in vars(errors).values() if value is not None]


def at_start() -> PairErrors:
    """Policy = reference."""
    errors = random_errors()
    policy = {
        "policy_winner": errors.reference_winner.clone(),
        "policy_loser": errors.reference_loser.clone(),
    }
    return dataclasses.replace(errors, **policy)


def swap(errors: PairErrors) -> PairErrors:
    """Winner and loser exchanged, the gap negated."""
    return PairErrors(
        policy_winner=errors.policy_loser,
        reference_winner=errors.reference_loser,
        policy_loser=errors.policy_winner,
        reference_loser=errors.reference_winner,
        weight=errors.weight,
        gap=-errors.gap,
    )


# one pair: m+ = 0.2, r+ = 0.3, m- = 0.6, r- = 0.4, w = 0.5, dR = 0.25
# R+ = -0.5 (0.2 - 0.3) = 0.05, R- = -0.5 (0.6 - 0.4) = -0.1, h = 0.15
ONE = PairErrors(*torch.tensor([[0.2], [0.3], [0.6], [0.4], [0.5], [0.25]], dtype=torch.float64))


def test_hand_worked_margin():
    winner, loser = implicit_rewards(ONE)
    assert winner.item() == pytest.approx(0.05) and loser.item() == pytest.approx(-0.1)
    assert margin(ONE).item() == pytest.approx(0.15)


def test_hand_worked_losses():
    # beta h = 20 * 0.15 = 3: softplus(-3) = log(1 + e^-3), (1 - 3)^2 = 4, (0.25 - 3)^2 = 7.5625
    assert dpo(ONE, beta=20.0).item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert ipo(ONE, beta=20.0).item() == pytest.approx(4.0)
    assert capo(ONE, beta=20.0).item() == pytest.approx(7.5625)
    assert sft(ONE).item() == 0.2
    assert hinge(ONE, beta=20.0).item() == 0.0 and hinge(ONE, beta=2.0).item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (dpo, lambda e: torch.full_like(e.gap, math.log(2))),
        (ipo, lambda e: torch.ones_like(e.gap)),
        (capo, lambda e: e.gap**2),
        (hinge, lambda e: torch.ones_like(e.gap)),
        (smpo, lambda e: torch.full_like(e.gap, math.log(2))),
        # 0.5 (log 0.5 - log 0.99) + 0.5 (log 0.5 - log 0.01)
        (dmpo, lambda e: torch.full_like(e.gap, -math.log(2) - 0.5 * math.log(0.99 * 0.01))),
        (sft, lambda e: e.policy_winner),
    ],
)
def test_loss_at_the_start(objective, expected):
    errors = at_start()
    assert torch.allclose(objective(errors, beta=500.0), expected(errors), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_margin_is_exactly_zero_where_policy_is_the_reference(dtype):
    errors = PairErrors(*(value.to(dtype) for value in tensors_of(at_start())))
    assert torch.equal(margin(errors), torch.zeros_like(margin(errors)))


def test_capo_with_a_gap_of_one_is_ipo_bitwise():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        errors = random_errors(dtype=dtype)
        errors = dataclasses.replace(errors, gap=torch.ones_like(errors.gap))
        assert torch.equal(capo(errors, beta=30.0), ipo(errors, beta=30.0))


@pytest.mark.parametrize("objective", PAIRWISE)
def test_a_constant_weight_is_a_factor_of_beta(objective):
    errors = random_errors()
    weighted = dataclasses.replace(errors, weight=torch.full_like(errors.weight, 0.25))
    plain = dataclasses.replace(errors, weight=torch.ones_like(errors.weight))
    assert torch.allclose(objective(weighted, beta=40.0), objective(plain, beta=10.0), rtol=1e-14)


@pytest.mark.parametrize(
    ("objective", "slope"),
    [
        (dpo, lambda e, beta: torch.full_like(e.gap, -beta / 2)),
        (ipo, lambda e, beta: torch.full_like(e.gap, -2 * beta)),
        (capo, lambda e, beta: -2 * beta * e.gap),
        (hinge, lambda e, beta: torch.full_like(e.gap, -beta)),
        (smpo, lambda e, beta: -beta * e.gap / 2),
        (dmpo, lambda e, beta: torch.full_like(e.gap, -0.25 * math.log(99) * beta)),
    ],
)
def test_gradient_at_the_start(objective, slope):
    # h = -w (m+ - r+) + w (m- - r-), so dh/dm+ = -w and dh/dm- = w
    errors = at_start()
    errors.policy_winner.requires_grad_()
    errors.policy_loser.requires_grad_()
    loss = objective(errors, beta=30.0)
    winner, loser = torch.autograd.grad(loss.sum(), (errors.policy_winner, errors.policy_loser))
    expected = slope(errors, 30.0)
    assert torch.allclose(winner, expected * -errors.weight) and torch.allclose(
        loser, expected * errors.weight
    )
    assert (winner > 0).all() and (loser < 0).all()


@pytest.mark.parametrize("objective", PAIRWISE)
def test_one_small_step_raises_the_margin(objective):
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Linear(6, 6).double()
    inputs, targets = torch.randn(2, 2, 1, 6, generator=generator, dtype=torch.float64)  # winner, loser

    def errors_of(reference: torch.Tensor | None = None) -> PairErrors:
        found = (network(inputs) - targets).square().mean(-1)
        reference = found.detach() if reference is None else reference
        one = torch.ones(1, dtype=torch.float64)
        return PairErrors(found[0], reference[0], found[1], reference[1], weight=0.7 * one, gap=0.2 * one)

    errors = errors_of()
    objective(errors, beta=5.0).mean().backward()
    reference = torch.stack([errors.reference_winner, errors.reference_loser])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 1e-4 * parameter.grad
    assert margin(errors_of(reference)).item() > 0


def at_margin(h: float) -> PairErrors:
    """One pair with w = 1 and this margin, all of it the loser's."""
    return PairErrors(*torch.tensor([[0.2], [0.2], [0.3 + h], [0.3], [1.0], [0.5]], dtype=torch.float64))


def test_dmpo_is_a_divergence_from_a_preference_that_is_wrong_in_one_of_a_hundred():
    assert dmpo(at_margin(0.0), beta=7.0).item() == pytest.approx(1.61446, abs=5e-6)
    assert dmpo(at_margin(math.log(99)), beta=1.0).item() == pytest.approx(0, abs=1e-14)  # the minimum
    assert min(dmpo(at_margin(math.log(99) + apart), beta=1.0).item() for apart in (-0.1, 0.1)) > 1e-5
    far = at_margin(-800.0)
    far.policy_loser.requires_grad_()
    loss = dmpo(far, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(100)) and far.policy_loser.grad.item() == 0
    # at the start 2.2976 times dpo's slope of -beta / 2
    assert 0.25 * math.log(99) / 0.5 == pytest.approx(2.2976, abs=5e-5)
    for flip in (0.0, 0.5, math.nan):
        with pytest.raises(InputError, match=r"flip must be a number above 0 and below 0\.5"):
            dmpo(at_margin(0.0), beta=1.0, flip=flip)


def test_smpo_is_dpo_with_a_beta_that_grows_with_the_gap():
    errors = random_errors()
    for gamma in (1.0, 4.0):
        same = dataclasses.replace(errors, gap=torch.full_like(errors.gap, 1 / gamma))
        assert torch.equal(smpo(same, beta=9.0, gamma=gamma), dpo(errors, beta=9.0))
    # of the pair by hand, beta gamma dR h = 20 * 2 * 0.25 * 0.15 = 1.5
    assert smpo(ONE, beta=20.0, gamma=2.0).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    level = dataclasses.replace(errors, gap=torch.zeros_like(errors.gap))
    winner = level.policy_winner.requires_grad_()
    assert torch.autograd.grad(smpo(level, beta=9.0).sum(), winner)[0].abs().max() == 0
    for gamma in (0.0, None):
        with pytest.raises(InputError, match="gamma must be a positive number"):
            smpo(errors, beta=9.0, gamma=gamma)


def test_swapping_winner_and_loser():
    errors = random_errors()
    swapped = swap(errors)
    assert torch.equal(margin(swapped), -margin(errors))
    # softplus(beta h), written out
    assert torch.allclose(dpo(swapped, beta=9.0), torch.log1p(torch.exp(9.0 * margin(errors))))
    assert torch.allclose(capo(swapped, beta=9.0), capo(errors, beta=9.0), rtol=1e-14)


def test_dpo_is_exact_far_out():
    errors = dataclasses.replace(ONE, weight=torch.tensor([1.0], dtype=torch.float64))  # h = 0.3
    # softplus(x) = max(x, 0) + log1p(e^-|x|) at x = -beta h = -24 and, with beta = 5000, -1500
    assert dpo(errors, beta=80.0).item() == pytest.approx(math.log1p(math.exp(-24)), rel=1e-9)
    assert dpo(errors, beta=5000.0).item() == 0.0
    swapped = swap(errors)
    assert dpo(swapped, beta=80.0).item() - 24 == pytest.approx(math.log1p(math.exp(-24)), rel=1e-3)
    assert dpo(swapped, beta=5000.0).item() == pytest.approx(1500.0)


@pytest.mark.parametrize("objective", [*PAIRWISE, sft])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_losses_are_per_pair(objective, dtype):
    errors = random_errors(dtype=dtype)
    loss = objective(errors, beta=3.0)
    assert loss.dtype == dtype and loss.shape == (50,)
    in_float = PairErrors(*(value.float() for value in tensors_of(errors)))
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(loss, objective(in_float, beta=3.0).to(dtype))
    for pair in range(3):  # a pair does not depend on the others
        alone = PairErrors(*(value[pair : pair + 1] for value in tensors_of(errors)))
        assert torch.allclose(objective(alone, beta=3.0), loss[pair])


def test_a_gap_of_another_dtype_does_not_change_the_loss_dtype():
    errors = random_errors(dtype=torch.float32)
    errors = dataclasses.replace(errors, gap=errors.gap.double())
    assert capo(errors, beta=3.0).dtype == torch.float32


# ---- what an objective reads


@pytest.mark.parametrize("objective", PAIRWISE)
def test_requirements_are_read_through_partials(objective):
    expected = Requirements(reference=True, predictions=False, loser=True)
    assert requirements(objective) == requirements(partial(partial(objective), beta=5)) == expected


@pytest.mark.parametrize("name", ["dpo", "ipo", "capo", "hinge", "dmpo", "smpo", "sft"])
def test_objectives_bind_through_hydra(name):
    objective = instantiate({"_target_": f"capo.objectives.{name}", "_partial_": True, "beta": 20.0})
    assert requirements(objective).reference == (name != "sft")
    direct = {"dpo": dpo, "ipo": ipo, "capo": capo, "hinge": hinge, "dmpo": dmpo, "smpo": smpo, "sft": sft}[
        name
    ]
    assert torch.equal(objective(ONE), direct(ONE, beta=20.0))


def test_sft_needs_neither_reference_nor_loser_nor_beta():
    assert requirements(sft) == Requirements(reference=False, predictions=False, loser=False)
    only = PairErrors(policy_winner=ONE.policy_winner)
    assert torch.equal(sft(only, beta=None), ONE.policy_winner)


def test_undeclared_objectives_are_refused():
    def mine(errors, *, beta):
        return errors.policy_winner

    with pytest.raises(InputError, match=r"mine does not declare what it reads; write @requires\(\)"):
        requirements(partial(mine, beta=1.0))
    assert requirements(requires(lambda errors, *, beta: errors.gap)) == Requirements(True, False, True)
    assert requirements(requires(predictions=True)(mine)) == Requirements(True, True, True)


@pytest.mark.parametrize("objective", PAIRWISE)
def test_missing_fields_are_named(objective):
    with pytest.raises(ValueError, match="no reference_winner, weight"):
        objective(dataclasses.replace(ONE, reference_winner=None, weight=None), beta=1.0)
    with pytest.raises(ValueError, match="no gap"):
        capo(dataclasses.replace(ONE, gap=None), beta=1.0)
    assert dpo(dataclasses.replace(ONE, gap=None), beta=1.0).shape == (1,)


@pytest.mark.parametrize("objective", PAIRWISE)
@pytest.mark.parametrize("beta", [None, 0.0, -1.0, math.nan])
def test_beta_must_be_positive(objective, beta):
    with pytest.raises(InputError, match=r"^beta must be a positive number, got (None|0|-1|nan)"):
        objective(ONE, beta=beta)


def test_a_negative_model_pulls_the_other_way_by_the_same_gap():
    # selection.swap exchanges candidates and mirrors rewards, so that h changes its sign and dR does not
    errors = random_errors()
    swapped = dataclasses.replace(swap(errors), gap=errors.gap)
    scaled = 3.0 * margin(errors)
    torch.testing.assert_close(dpo(swapped, beta=3.0), torch.log1p(scaled.exp()), rtol=1e-12, atol=0)
    torch.testing.assert_close(capo(swapped, beta=3.0), (errors.gap + scaled) ** 2, rtol=1e-12, atol=0)
    # without the mirrored rewards capo would aim at what it aims at unswapped
    torch.testing.assert_close(capo(swap(errors), beta=3.0), capo(errors, beta=3.0), rtol=1e-9, atol=0)
