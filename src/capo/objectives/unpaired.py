"""Objectives of single candidates, each labeled as good or bad."""

from __future__ import annotations

from torch import Tensor

from capo.objectives.base import PairErrors, fields_of, group_of, positive, requires


@requires(group=True, kl=True)
def kto(errors: PairErrors, *, beta: float) -> Tensor:
    """Diffusion-KTO: the mean of `1 - sigmoid(y beta (g - kl))` over the candidates of a prompt, per prompt.

    `g = r - m` is a candidate's gain over the reference, without w; `y = sign(R_ca - 1/2)`, 1 for a candidate
    that wins more than half of its comparisons, -1 for one that wins less, 0 for one between. `kl` is the
    mean of g over the batch, at least 0, which carries no gradient. A pair is two labeled samples: both can
    be good. The loss is 1/2 where policy = reference.

    Args:
        errors: group and kl are read.
        beta: positive.

    Returns:
        (B,) losses in the dtype of the errors; their mean is that over all candidates.

    Raises:
        InputError: if beta is not positive.
        ValueError: if a field is None.
    """
    policy, reference, rewards = group_of(errors)
    (kl,) = fields_of(errors, "kl")
    gain = reference - policy - kl.detach().clamp(min=0)[:, None]
    aim = positive("beta", beta) * (rewards - 0.5).sign() * gain
    return (-aim).sigmoid().mean(1).to(errors.policy_winner.dtype)
