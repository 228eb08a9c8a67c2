"""Pairwise objectives, which read the margin h against the reference: DPO, IPO, CaPO and others."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from capo.errors import ParameterError
from capo.objectives.base import PairErrors, fields_of, positive, requires, scaled_margin


@requires()
def dpo(errors: PairErrors, *, beta: float) -> Tensor:
    """Diffusion-DPO: `softplus(-beta h)` per pair (eq. 22); log 2 where policy = reference.

    Args:
        errors: all fields but gap are read.
        beta: positive. To match the Diffusion-DPO code, give half its beta (that code has a factor -0.5),
            with w = 1 and shared noise.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    # not torch's softplus, which becomes linear at 20, with an error of 2e-9
    return -functional.logsigmoid(scaled_margin(errors, beta)).to(errors.policy_winner.dtype)


@requires()
def ipo(errors: PairErrors, *, beta: float) -> Tensor:
    """IPO: `(1 - beta h)^2` per pair (eq. 22); 1 where policy = reference.

    Args:
        errors: all fields but gap are read.
        beta: positive.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    return (1 - scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)


@requires()
def capo(errors: PairErrors, *, beta: float) -> Tensor:
    """CaPO: `(dR - beta h)^2` per pair (eq. 8), which is IPO with the calibrated gap as target.

    The loss is dR^2 where policy = reference.

    Args:
        errors: all fields are read.
        beta: positive.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    (gap,) = fields_of(errors, "gap")
    return (gap - scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)


@requires()
def hinge(errors: PairErrors, *, beta: float) -> Tensor:
    """Hinge loss: `relu(1 - beta h)` per pair; 1 where policy = reference, 0 from beta h = 1 on.

    It is the `hinge` of diffusers' example of Diffusion-DPO (there of a sum of squares, with -0.5 beta).

    Args:
        errors: all fields but gap are read.
        beta: positive.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    return (1 - scaled_margin(errors, beta)).relu().to(errors.policy_winner.dtype)


@requires()
def dmpo(errors: PairErrors, *, beta: float, flip: float = 0.01) -> Tensor:
    """DMPO: `p (log p - log(1 - a)) + (1 - p) (log(1 - p) - log a)` with `p = sigmoid(beta h)`, per pair.

    This is the divergence of p from a preference that is wrong with probability a: the reverse of the
    divergence that DPO lowers. It is 0 where beta h = log((1 - a) / a), 1.61446 where policy = reference at
    a = 0.01, and tends to -log a, with a vanishing gradient, as h falls. The formula is that of the code of
    Diffusion-SDPO; the authors of DMPO have published none.

    Args:
        errors: all fields but gap are read.
        beta: positive.
        flip: a, above 0 and below 1/2.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive, or the flip is out of its range.
        ValueError: if a field is None.
    """
    if not 0 < flip < 0.5:
        raise ParameterError("flip", flip, "must be a number above 0 and below 0.5")
    x = scaled_margin(errors, beta)
    right = x.sigmoid() * (functional.logsigmoid(x) - math.log1p(-flip))
    wrong = (-x).sigmoid() * (functional.logsigmoid(-x) - math.log(flip))
    return (right + wrong).to(errors.policy_winner.dtype)


@requires()
def smpo(errors: PairErrors, *, beta: float, gamma: float = 1.0) -> Tensor:
    """SmPO: `softplus(-beta gamma dR h)` per pair, DPO with a beta that grows with the gap; log 2 at first.

    The authors' `2p - 1`, of p the softmax of two PickScores, is dR of one reward at N = 2 (eq. 6). A pair
    with dR = 0 gives no gradient, one with dR = 1 / gamma that of `dpo`. Their latents are inverted, which is
    an option of the noise here (`noise.source`).

    Args:
        errors: all fields are read.
        beta: positive.
        gamma: positive; the published 10 belongs to scores that were scaled to [0, 1] over a whole data set.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta or gamma is not positive.
        ValueError: if a field is None.
    """
    (gap,) = fields_of(errors, "gap")
    scaled = positive("gamma", gamma) * gap * scaled_margin(errors, beta)
    return -functional.logsigmoid(scaled).to(errors.policy_winner.dtype)


@requires()
def linear_dpo(errors: PairErrors, *, beta: float, eta: float = 1e-3) -> Tensor:
    """Linear-DPO: `c w (m+ - m-)` per pair, `c = clamp(0.5 - 0.2 beta h, eta, 1 - eta)` without gradients.

    The factor takes the place of DPO's `sigmoid(-beta h)` (Linear-DPO, arXiv 2605.21123). Within its bounds
    the gradient is that of `ipo` at 0.4 beta, divided by 1.6 beta. Where policy = reference the loss is
    0.5 w (m+ - m-), with the gradient of `dpo` divided by beta. The authors' reference is a moving average of
    the policy (`capo.backbones.averaging.MovingReference`).

    Args:
        errors: all fields but gap are read.
        beta: positive.
        eta: least factor, from 0 to less than 1/2; a pair at the bound 0 gives no gradient.

    Returns:
        (B,) losses in the dtype of the errors; negative where the policy's error on the loser is larger.

    Raises:
        InputError: if beta is not positive, or eta is out of its range.
        ValueError: if a field is None.
    """
    if not 0 <= eta < 0.5:
        raise ParameterError("eta", eta, "must be a number from 0 to less than 0.5")
    factor = (0.5 - 0.2 * scaled_margin(errors, beta).detach()).clamp(eta, 1 - eta)
    winner, loser, weight = fields_of(errors, "policy_winner", "policy_loser", "weight")
    return (factor * weight * (winner - loser)).to(errors.policy_winner.dtype)
