"""Soups: one model from several that were tuned from the same base (CaPO, B.2, eq. 29), as pure functions.

A soup is `base + sum_i c_i (theta_i - base)`, tensor by tensor, with a number c_i for each model. The task
vectors `theta_i - base` enter those numbers only through their inner products, so a tensor is never needed
whole: inner products add up over its parts, and those of an adapter's products B A follow from the factors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capo.errors import ParameterError

METHODS = ("slerp", "linear")
PARALLEL = 1e-6  # sine of the angle below which two task vectors are interpolated linearly


def slerp(base: Tensor, a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate spherically between the task vectors of `a` and `b`.

    Args:
        base: tensor of the common base, any shape.
        a: the same tensor of the model at weight 0.
        b: that of the model at weight 1.
        weight: from 0 to 1.

    Returns:
        The interpolated tensor, shape and dtype of `a`, computed in float32.
    """
    gram = inner_products(base, [a, b])
    return combined(base, [a, b], _slerp_step(gram, [1.0, 0.0], [0.0, 1.0], weight)).to(a.dtype)


def soup(base: Tensor, models: Sequence[Tensor], method: str, weights: Sequence[float]) -> Tensor:
    """Merge one tensor of several models; shape and dtype of the first, computed in float32.

    Raises ParameterError as `check_weights` does.
    """
    check_weights(method, weights, len(models))
    return combined(base, models, coefficients(inner_products(base, models), method, weights)).to(
        models[0].dtype
    )


def check_weights(method: str, weights: Sequence[float], models: int) -> None:
    """Raise ParameterError for an unknown method, or for weights that do not fit it or the models' number."""
    if method not in METHODS:
        raise ParameterError("method", method, f"must be one of {', '.join(METHODS)}")
    if len(weights) != models or not all(math.isfinite(weight) for weight in weights):
        raise ParameterError("weights", list(weights), f"must be {models} finite numbers, one per policy")
    if not any(weights):
        raise ParameterError("weights", list(weights), "must not all be 0, which would give the base")
    if method == "slerp" and min(weights) <= 0:
        raise ParameterError("weights", list(weights), "must be above 0 for slerp")


def inner_products(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Inner products (M, M), float64, of the task vectors of M models; those of parts of a tensor add up."""
    vectors = torch.stack([(model.float() - base.float()).flatten() for model in models]).double()
    return vectors @ vectors.T


def coefficients(gram: Tensor, method: str, weights: Sequence[float]) -> list[float]:
    """Return the numbers c_i of a soup (see the module) for one tensor.

    `linear`: c_i = w_i. `slerp`: the first two models are interpolated, the result with the third, and so on,
    each model by its share of the weights so far: by 1/2, then 1/3, for three equal weights. The result
    depends on the order.

    Args:
        gram: (M, M) inner products of the task vectors, float64.
        method: one of METHODS.
        weights: one for each model.
    """
    if method == "linear":
        return [float(weight) for weight in weights]
    rows = torch.eye(len(weights), dtype=torch.float64).tolist()
    merged, total = rows[0], weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total += weight
        merged = _slerp_step(gram, merged, row, weight / total)
    return merged


def combined(base: Tensor, models: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    """Return `base + sum_i c_i (theta_i - base)` in float32, theta_i itself where c_i is 1 and all else 0."""
    moving = [(model, number) for model, number in zip(models, numbers, strict=True) if number != 0]
    if len(moving) == 1 and moving[0][1] == 1:
        return moving[0][0].float()
    result = base.to(torch.float32, copy=True)
    for model, number in moving:
        result.add_(model.float() - base.float(), alpha=number)
    return result


def _slerp_step(gram: Tensor, a: Sequence[float], b: Sequence[float], weight: float) -> list[float]:
    """Interpolate between two combinations of the task vectors, each given by its numbers."""
    one, two = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    first, second = 1 - weight, weight
    norms = math.sqrt(max((one @ gram @ one).item(), 0)) * math.sqrt(max((two @ gram @ two).item(), 0))
    if norms > 0:
        angle = math.acos(max(-1.0, min(1.0, (one @ gram @ two).item() / norms)))
        if math.sin(angle) > PARALLEL:
            first, second = (math.sin(share * angle) / math.sin(angle) for share in (first, second))
    return (first * one + second * two).tolist()
