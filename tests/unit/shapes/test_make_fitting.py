import pytest
import torch
from torch import nn

from capo.shapes.make.fitting import fit, generator
from capo.shapes.make.muon import Muon, orthogonal


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_directions():
    for shape in ((3, 20, 50), (3, 50, 20)):
        matrices = torch.randn(*shape, generator=generator(1))
        found = orthogonal(matrices)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        assert torch.linalg.svdvals(found).min() > 0.6 and torch.linalg.svdvals(found).max() < 1.3
        inside = u.mT @ found @ v.mT  # diagonal where the singular vectors are those of the matrix
        assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_a_step_has_the_size_that_its_rate_says():
    weight = nn.Parameter(torch.zeros(16, 64))
    optimizer = Muon([weight], lr=0.01)
    weight.grad = torch.randn(16, 64, generator=generator(2))
    optimizer.step()
    # orthogonal rows: each entry's mean square is 1 / 64, times 0.2 sqrt(64)
    assert 0.8 * 0.002 < weight.detach().square().mean().sqrt() < 1.2 * 0.002


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def _loss(module: nn.Module):
    def loss(step: int):
        x = torch.randn(32, 8, generator=generator(3, step))
        return (module(x) - x[:, :4]).square().mean(), {}

    return loss


def test_two_optimizers_learn_and_go_on_after_a_cut_as_if_there_had_been_none(tmp_path):
    whole = _module()
    start = _loss(whole)(0)[0].item()
    fit("whole", whole, _loss(whole), tmp_path, 60, lr=1e-2, matrices=[whole[0].weight])
    assert _loss(whole)(0)[0].item() < start / 2

    class Cut(Exception):
        pass

    def cut(step: int):
        if step == 30:
            raise Cut
        return _loss(parted)(step)

    parted = _module()
    with pytest.raises(Cut):
        fit("parted", parted, cut, tmp_path, 60, lr=1e-2, matrices=[parted[0].weight], save_every=0)
    again = _module()
    fit("parted", again, _loss(again), tmp_path, 60, lr=1e-2, matrices=[again[0].weight])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_frozen_parameters_stay(tmp_path):
    module = _module()
    module[2].requires_grad_(False)
    before = module[2].weight.clone()
    fit("part", module, _loss(module), tmp_path, 5, lr=1e-2)
    assert torch.equal(module[2].weight, before)
