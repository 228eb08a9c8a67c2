"""Where the reference of training stands, and when it is prepared."""

import pytest
import torch
from torch import nn

from capo.backbones import networks
from capo.backbones.execution import Execution
from capo.backbones.networks import Reference

CPU = torch.device("cpu")


def test_a_base_that_its_preparation_would_change_is_copied(tiny_backbone):
    reference = Reference(tiny_backbone, "32-true", separate=True)
    reference.place(Execution(), CPU, None, wait=False)
    assert reference.network is tiny_backbone.denoiser
    reference.place(Execution(channels_last=True), CPU, None, wait=False)
    assert reference.network is not tiny_backbone.denoiser
    weight = tiny_backbone.denoiser.conv_in.weight
    assert torch.equal(reference.network.conv_in.weight, weight) and weight.is_contiguous()


@pytest.mark.parametrize(("wait", "before"), [(True, 0), (False, 1)])
def test_a_reference_that_waits_is_placed_once_before_its_first_pass(
    tiny_backbone, monkeypatch, wait, before
):
    placed = []
    monkeypatch.setattr(networks, "place", lambda network, *where: placed.append(network))
    reference = Reference(tiny_backbone, "32-true", separate=True)
    reference.place(Execution(), CPU, None, wait=wait)
    assert len(placed) == before
    for _ in range(2):
        with reference.beside(nn.Module()) as network:
            assert placed == [network] and network is tiny_backbone.denoiser
            assert not torch.is_grad_enabled()
