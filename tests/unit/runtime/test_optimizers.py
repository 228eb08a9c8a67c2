"""What moves the weights."""

import importlib.util

import pytest
import torch
from torch import nn

from capo.errors import InputError
from capo.runtime.optimizers import clip_gradients, make_optimizer


def test_the_norm_is_that_of_all_gradients_and_is_clipped():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_gradients(parameters, 3.5).item() == 7.0  # sqrt(4 + 9 + 36); half of it is allowed
    assert torch.allclose(parameters[0].grad, torch.tensor([1.0, 1.5]), atol=1e-5)
    assert torch.allclose(parameters[1].grad, torch.tensor([3.0]), atol=1e-5)
    parameters[1].grad = torch.tensor([float("nan")])
    assert clip_gradients(parameters, 1.0).isnan()


def test_a_first_fused_step_moves_by_the_learning_rate():
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = make_optimizer("adamw", [weight], lr=0.1)
    weight.grad = torch.tensor([5.0, -0.01])
    optimizer.step()
    # Adam's first step is lr g / (|g| + eps); no weight decay
    assert optimizer.defaults["fused"] and torch.allclose(
        weight.detach(), torch.tensor([0.9, -0.9]), atol=1e-5
    )


def test_scaled_gradients_are_not_fused():
    assert not make_optimizer("adamw", [nn.Parameter(torch.zeros(1))], lr=0.1, scaled=True).defaults["fused"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_eight_bits_need_their_package():
    with pytest.raises(InputError, match=r"capo\[bitsandbytes\]"):
        make_optimizer("adamw_8bit", [nn.Parameter(torch.zeros(1))], lr=0.1)
