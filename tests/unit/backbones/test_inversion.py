"""Inversion of latents by a policy: exactly at the drawn time, and for each sample of a batch by itself."""

import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from capo.backbones.inversion import Inversion, invert
from capo.errors import InputError

PROMPTS = ["a red cat", "a blue dog", "a red dog", "a cat", "a dog", "a blue cat"]


@contextmanager
def predicting(backbone, monkeypatch, function):
    """The network of `backbone` replaced by a function of latents and times."""
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "predict", lambda network, noisy, t, text: function(noisy, t))
        yield


def mixed(backbone):
    """Latents, times and text of six samples, from the first timestep to the last."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(6, *backbone.latent_shape, generator=draw)
    t = torch.tensor([0, 3, 17, 250, 731, len(backbone.scheduler().alphas_cumprod) - 1])
    return latents, t, backbone.encode_prompts(PROMPTS)


def abar(backbone, t):
    return backbone.scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)


@pytest.mark.parametrize("options", [{}, {"renoise": 2}, {"eta": 0.1}, {"renoise": 1, "eta": 0.5}])
@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_the_noisy_latent_is_made_of_image_and_target_at_every_time(tiny_backbones, name, options):
    backbone = tiny_backbones[name]
    latents, t, text = mixed(backbone)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy, target = invert(backbone, backbone.denoiser, latents, t, text, steps=4, noise=noise, **options)
    # the target of these networks is the noise itself
    remade = abar(backbone, t).sqrt() * latents + (1 - abar(backbone, t)).sqrt() * target
    assert torch.allclose(remade, noisy, atol=2e-6) and target.isfinite().all()
    assert torch.allclose(backbone.add_noise(latents, target, t), noisy, atol=2e-6)
    assert not (noisy.requires_grad or target.requires_grad)


@pytest.mark.parametrize("options", [{}, {"renoise": 1}, {"renoise": 1, "eta": 0.1}])
def test_a_batch_is_its_samples_one_by_one(tiny_backbone, options):
    latents, t, text = mixed(tiny_backbone)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def inverted(rows):
        words = {key: value[rows] for key, value in text.items()}
        arguments = tiny_backbone.denoiser, latents[rows], t[rows], words
        return invert(tiny_backbone, *arguments, steps=3, noise=noise[rows], **options)

    whole = inverted(slice(None))
    singles = [inverted(slice(row, row + 1)) for row in range(len(t))]
    for part, alone in zip(whole, zip(*singles, strict=True), strict=True):
        assert torch.allclose(part, torch.cat(alone), atol=1e-5)


def test_without_predicted_noise_the_image_fades_alone(tiny_backbone, monkeypatch):
    latents, t, text = mixed(tiny_backbone)
    with predicting(tiny_backbone, monkeypatch, lambda noisy, t: torch.zeros_like(noisy)):
        noisy, target = invert(tiny_backbone, None, latents, t, text, steps=5, renoise=1)
    assert torch.allclose(noisy, abar(tiny_backbone, t).sqrt() * latents, atol=1e-6)
    assert target.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["sdxl", "velocity"])
def test_one_noise_at_all_times_is_what_inversion_finds(tiny_backbones, monkeypatch, name):
    backbone = tiny_backbones["sdxl"]
    latents, t, text = mixed(backbone)
    true = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(vars(backbone), "_predicts_velocity", name == "velocity")

    def told(noisy, now):
        if name != "velocity":
            return true
        # before the first timestep there is no noise: the network is told the first one for it
        shares = abar(backbone, now)
        shares = torch.where(clean(noisy), torch.ones_like(shares), shares)
        return shares.sqrt() * true - (1 - shares).sqrt() * latents

    def clean(noisy):
        return (noisy - latents).abs().amax((1, 2, 3), keepdim=True) == 0

    with predicting(backbone, monkeypatch, told):
        noisy, target = invert(backbone, None, latents, t, text, steps=7)
        expected = backbone.target(latents, true, t)
    assert torch.allclose(noisy, backbone.add_noise(latents, true, t), atol=1e-5)
    assert torch.allclose(target, expected, atol=2e-4)


def test_each_sample_has_a_grid_of_its_own_that_ends_at_its_time(tiny_backbone, monkeypatch):
    latents, t, text = mixed(tiny_backbone)
    seen = []
    told = lambda noisy, t: seen.append(t.tolist()) or torch.zeros_like(noisy)  # noqa: E731
    with predicting(tiny_backbone, monkeypatch, told):
        invert(tiny_backbone, None, latents, t, text, steps=4, renoise=2)
    assert len(seen) == 4 * 3 and seen[0] == seen[2] == [0] * 6  # corrections are made for the same time
    grid = tiny_backbone.rising_times(t, 4)
    assert grid[0].tolist() == [-1] * 6 and torch.equal(grid[-1], t)
    assert all((later >= now).all() for now, later in pairwise(grid))
    assert grid[:, 4].tolist() == [-1, 182, 365, 548, 731]  # quarters of 732, from -1


def test_a_step_by_hand_with_a_correction_and_fresh_noise(tiny_backbone, monkeypatch):
    latents, text = torch.full((1, *tiny_backbone.latent_shape), 2.0), tiny_backbone.encode_prompts(["a cat"])
    t = torch.tensor([99])
    alphas = tiny_backbone.scheduler().alphas_cumprod
    # one step from the clean latent 2, with a network that halves what it sees: it predicts 1, the step leads
    # to 2 sqrt(a) + sqrt(1 - a), of which it predicts the half, and the step is made again with their mean
    a = alphas[99].item()
    mean = (1 + (2 * math.sqrt(a) + math.sqrt(1 - a)) / 2) / 2
    with predicting(tiny_backbone, monkeypatch, lambda noisy, t: noisy / 2):
        noisy, target = invert(tiny_backbone, None, latents, t, text, steps=1, renoise=1)
    assert torch.allclose(noisy, torch.full_like(noisy, 2 * math.sqrt(a) + mean * math.sqrt(1 - a)))
    assert torch.allclose(target, torch.full_like(target, mean), atol=1e-5)
    # two steps, by way of timestep 49; fresh noise only where the earlier time has noise of its own
    b = alphas[49].item()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    with predicting(tiny_backbone, monkeypatch, lambda noisy, t: torch.zeros_like(noisy)):
        noisy, _ = invert(tiny_backbone, None, latents, t, text, steps=2, eta=0.1, noise=noise)
    deviation = math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    added = (noisy - 2 * math.sqrt(a)) / (0.1 * deviation)
    assert abs(added.std() - 1) < 0.2 and abs(added.mean()) < 0.3  # of 4 x 8 x 8 numbers or so


def test_samples_that_share_their_numbers_share_fresh_noise(tiny_backbone, monkeypatch):
    latents, t, text = mixed(tiny_backbone)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noise[1], t[1] = noise[5], t[5]
    with predicting(tiny_backbone, monkeypatch, lambda noisy, t: torch.zeros_like(noisy)):
        noisy, _ = invert(tiny_backbone, None, latents, t, text, steps=3, eta=0.3, noise=noise)
        again, _ = invert(tiny_backbone, None, latents, t, text, steps=3, eta=0.3, noise=noise)
    fresh = noisy - abar(tiny_backbone, t).sqrt() * latents
    assert torch.equal(noisy, again) and torch.allclose(fresh[1], fresh[5], atol=1e-6)
    assert not torch.allclose(fresh[1], fresh[4], atol=1e-2)
    with pytest.raises(ValueError, match="needs the random numbers"):
        invert(tiny_backbone, None, latents, t, text, steps=3, eta=0.3)


@pytest.mark.parametrize("name", ["sd3", "sd3_bare"])
def test_a_flow_is_not_inverted(tiny_backbones, name):
    backbone = tiny_backbones[name]
    latents = torch.zeros(1, *backbone.latent_shape)
    text = backbone.encode_prompts(["a cat"])
    with pytest.raises(InputError, match=r"MMDiTBackbone: .* noise\.source=prior"):
        invert(backbone, backbone.denoiser, latents, torch.tensor([500.0]), text, steps=2)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"renoise": -1}, {"eta": -0.1}, {"eta": math.nan}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least"):
        Inversion(**wrong)
    assert Inversion(steps=5, renoise=1).passes == 10
