"""An objective of one's own is tried before anything is drawn; what is wrong with it is named."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from capo.errors import InputError
from capo.objectives import PairErrors, requires, try_objective
from capo.objectives.base import losses_of
from fixtures import ROOT


def detached(errors):
    return errors.gap + errors.policy_winner.detach()


def leaf(errors):
    return torch.zeros(3, requires_grad=True)


def missing(errors):
    return errors.gap * errors.gap.new_tensor(float("nan")) + errors.policy_winner


def steep(errors):
    return (errors.policy_winner - errors.reference_winner).sqrt()


def number(errors):
    return 0.5


def mean(errors):
    return errors.policy_winner.mean()


def ends(errors):
    raise SystemExit(0)


def undeclared(errors):
    return errors.policy_winner * errors.kl


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (detached, "losses that do not depend on the policy's errors or predictions"),
        (leaf, "losses that do not depend on the policy"),
        (missing, r"not finite where policy = reference.*: \[nan, nan, nan\]"),
        (steep, "gradient by the policy's .* is not finite where policy = reference"),
        (number, "a float: it must return a tensor, a loss per pair"),
        (mean, r"shape \(\) for 3 pairs: it must return \(3,\)"),
        (ends, r"on three made-up pairs failed \(SystemExit: 0\)"),
        (undeclared, r"on three made-up pairs failed \(TypeError: .*HYDRA_FULL_ERROR=1 shows where"),
    ],
)
def test_what_cannot_be_trained_is_named(objective, message):
    with pytest.raises(InputError, match=rf"^the objective \S*{objective.__name__} .*{message}"):
        try_objective(partial(requires()(objective)))


def test_an_object_that_declares_nothing_is_named_by_its_class():
    class Mine:
        def __call__(self, errors):
            return errors.policy_winner

    with pytest.raises(InputError, match=r"Mine does not declare what it reads"):
        try_objective(Mine())


def number(errors):
    return 1.0


def in_place(errors):
    return errors.policy_winner.sub_(errors.reference_winner)


def of_predictions(errors):
    return (errors.predictions.policy - errors.predictions.target).square().mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    "objective",
    [requires()(in_place), requires(reference=False, loser=False, predictions=True)(of_predictions)],
)
def test_one_that_can_be_trained_is_not_refused(objective):
    with torch.no_grad():
        try_objective(objective)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf" / "objective").glob("*.yaml")), ids=lambda file: file.stem
)
@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e6])
def test_none_of_this_package_is_refused(file, beta):
    node = OmegaConf.load(file)
    node = node.get("objective", node)
    node.pop("defaults", None)
    node.beta = beta
    try_objective(instantiate(node))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (mean, r"returned losses of shape \(\) for 2 pairs: it must return \(2,\)"),
        (number, "returned a float: it must return a tensor, a loss per pair"),
        (undeclared, "failed"),
    ],
)
def test_what_an_objective_does_in_a_later_step_is_named_too(objective, message):
    with pytest.raises(InputError, match=rf"^the objective \S*{objective.__name__} {message}"):
        losses_of(objective, PairErrors(policy_winner=torch.ones(2)))
