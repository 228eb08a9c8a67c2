"""Soups of task vectors, in float64 where their formulas are checked."""

import math

import pytest
import torch

from capo.errors import ParameterError
from capo.soup import coefficients, combined, inner_products, slerp, soup


def drawn(count, shape=(6, 5), seed=0, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + scale * torch.randn(shape, generator=generator) for _ in range(count)]


def formula(base, a, b, weight):
    """Equation 29 as it is written, of two tensors."""
    u, v = (a - base).double(), (b - base).double()
    angle = torch.arccos((u * v).sum() / (u.norm() * v.norm()))
    return base.double() + (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / angle.sin()


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_slerp_is_the_formula(weight):
    base, (a, b) = drawn(2)
    expected = formula(base, a, b, weight).float()
    torch.testing.assert_close(slerp(base, a, b, weight), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(torch.lerp(a, b, weight), expected, atol=1e-4)  # the chord is shorter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_ends_are_the_models_bit_for_bit(dtype):
    base, (a, b) = drawn(2)
    a, b = a.to(dtype), b.to(dtype)
    assert torch.equal(slerp(base, a, b, 0.0), a) and torch.equal(slerp(base, a, b, 1.0), b)


def test_equal_norms_are_kept():
    base, (a, b) = drawn(2)
    b = base + (b - base) * ((a - base).norm() / (b - base).norm())
    norm = (slerp(base, a, b, 0.3) - base).norm()
    torch.testing.assert_close(norm, (a - base).norm(), rtol=1e-4, atol=0)
    assert (torch.lerp(a, b, 0.3) - base).norm() < 0.95 * norm


@pytest.mark.parametrize("scale", [1.0, 3.0, -2.0])
def test_parallel_vectors_are_interpolated_linearly(scale):
    base, (a, _) = drawn(2)
    b = base + scale * (a - base)
    torch.testing.assert_close(slerp(base, a, b, 0.25), torch.lerp(a, b, 0.25), atol=1e-6, rtol=0)


def test_a_zero_task_vector_means_linear():
    base, (a, _) = drawn(2)
    torch.testing.assert_close(slerp(base, a, base, 0.25), base + 0.75 * (a - base), atol=1e-6, rtol=0)
    assert torch.equal(slerp(base, base, base, 0.5), base)


def test_three_models_are_merged_one_after_the_other_by_a_half_and_a_third():
    base, models = drawn(3)
    first = formula(base, models[0], models[1], 0.5)
    expected = formula(base.double(), first, models[2].double(), 1 / 3).float()
    found = soup(base, models, "slerp", [1.0, 1.0, 1.0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    turned = soup(base, models[::-1], "slerp", [1.0, 1.0, 1.0])
    assert not torch.allclose(found, turned, atol=1e-5)  # the order matters


def test_the_weights_of_slerp_are_shares():
    base, models = drawn(2)
    torch.testing.assert_close(
        soup(base, models, "slerp", [3.0, 1.0]), slerp(base, *models, 0.25), atol=1e-7, rtol=0
    )


def test_linear_adds_weighted_task_vectors():
    base, models = drawn(3)
    expected = base + sum(w * (model - base) for w, model in zip([0.5, 0.7, -0.4], models, strict=True))
    torch.testing.assert_close(soup(base, models, "linear", [0.5, 0.7, -0.4]), expected, atol=1e-6, rtol=0)


def test_inner_products_of_parts_add_up():
    base, models = drawn(3)
    whole = inner_products(base, models)
    parts = sum(inner_products(base[rows], [m[rows] for m in models]) for rows in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(whole, parts)
    assert whole.dtype == torch.float64 and whole.shape == (3, 3)
    numbers = coefficients(whole, "slerp", [1.0, 1.0, 1.0])
    torch.testing.assert_close(combined(base, models, numbers), soup(base, models, "slerp", [1.0] * 3))


@pytest.mark.parametrize(
    ("method", "weights", "said"),
    [
        ("mean", [1, 1], "method must be one of slerp, linear"),
        ("slerp", [1], "weights must be 2 finite numbers"),
        ("linear", [1, math.nan], "weights must be 2 finite numbers"),
        ("linear", [0, 0], "weights must not all be 0, which would give the base"),
        ("slerp", [1, 0], "must be above 0 for slerp"),
    ],
)
def test_what_cannot_be_merged_is_refused(method, weights, said):
    base, models = drawn(2)
    with pytest.raises(ParameterError, match=said):
        soup(base, models, method, weights)
