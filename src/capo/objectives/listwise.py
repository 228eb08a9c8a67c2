"""Objectives of k candidates of a prompt at once."""

from __future__ import annotations

from torch import Tensor

from capo.objectives.base import PairErrors, fields_of, group_of, positive, requires


@requires(group=True)
def capo_group(errors: PairErrors, *, beta: float) -> Tensor:
    """CaPO on k candidates of a prompt: the mean of `(Rc_i - beta tc_i)^2` over them, per prompt.

    R is the calibrated reward R_ca of a candidate, `t = -w (m - r)` its implicit reward, and Rc and tc are
    these less their means over the group. This is half the mean of `capo` over all k^2 ordered pairs of the
    group, so a quarter of `capo` at k = 2; it uses what k - 1 independent gaps tell, for k passes in place of
    2 (k - 1). Where policy = reference it is the variance of R.

    Args:
        errors: group and weight are read.
        beta: positive; it compares with that of `capo`.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    policy, reference, rewards = group_of(errors)
    (weight,) = fields_of(errors, "weight")
    implicit = -weight[:, None] * (policy - reference)
    apart = rewards - positive("beta", beta) * implicit
    return (apart - apart.mean(1, keepdim=True)).square().mean(1).to(errors.policy_winner.dtype)
