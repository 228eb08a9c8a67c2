"""Noise schedules of the families.

Diffusers' own, the published and the shipped models', and those that are refused.
"""

import json
import math
import shutil
from importlib import resources
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from capo.backbones import MMDiTBackbone, UNetBackbone
from capo.backbones.sampling import SamplerSettings, candidate_noise, sample
from capo.backbones.saving import save
from capo.cli.build import base_of
from capo.cli.readiness import check_draw
from capo.errors import InputError
from fixtures.configuration import composed


def test_the_flows_sampler_has_the_models_shift(tiny_folders):
    """At shift 3 a time t becomes 3 t / (1 + 2 t)."""
    kinds = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    euler, dpm = (MMDiTBackbone(str(tiny_folders["sd3"]), scheduler=kind).scheduler() for kind in kinds)
    for scheduler in (euler, dpm):
        scheduler.set_timesteps(4)
    # Euler: t evenly from 1 to the last of its own table, 3 / 1002; 1, 0.750749, 0.501498, 0.252246 (0.002994
    # apart from 1/4 steps)
    last = 3 * 0.001 / 1.002
    t = np.linspace(1, last, 4)
    assert euler.sigmas[:-1].tolist() == pytest.approx((3 * t / (1 + 2 * t)).tolist(), abs=1e-6)
    # DPM-Solver: t = 0.999, 0.74925, 0.4995, 0.24975
    t = np.array([0.999, 0.74925, 0.4995, 0.24975])
    assert dpm.sigmas[:-1].tolist() == pytest.approx((3 * t / (1 + 2 * t)).tolist(), abs=1e-6)


def test_the_flow_is_the_schedulers(tiny_backbones):
    """Its noisy latents and log-SNR.

    Its step along the target ends at its own noisy latent of the next time.
    """
    backbone = tiny_backbones["sd3"]
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(7)
    latents, noise = torch.randn(2, 7, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    times, sigmas = scheduler.timesteps, scheduler.sigmas
    torch.testing.assert_close(
        backbone.add_noise(latents, noise, times),
        scheduler.scale_noise(latents, times, noise),
        atol=1e-6,
        rtol=0,
    )
    expected = (((1 - sigmas) / sigmas) ** 2).log()  # of alpha = 1 - sigma; the last sigma is 0
    torch.testing.assert_close(backbone.log_snr(times), expected[:-1], atol=1e-5, rtol=1e-5)
    assert (
        expected[0] == -math.inf and expected[1:-1].isfinite().all()
    )  # a sampler begins at t = 1, which no draw reaches
    x, eps = latents[:1], noise[:1]
    for t, following in pairwise(times):
        here, there = (scheduler.scale_noise(x, time[None], eps) for time in (t, following))
        reached = scheduler.step(backbone.target(x, eps, t[None]), t, here).prev_sample
        torch.testing.assert_close(reached, there, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        scheduler.step(backbone.target(x, eps, following[None]), following, there).prev_sample,
        x,
        atol=1e-6,
        rtol=0,
    )


def test_times_log_snr_and_weight_of_the_flow(tiny_backbones):
    backbone = tiny_backbones["sd3"]
    u = torch.tensor([0.0, 0.25, 0.5, 0.75])
    # logsnr_uniform: lam = 10 - 20 u = 10, 5, 0, -5; t = sigmoid(-lam / 2)
    times = backbone.timesteps(u, "logsnr_uniform")
    assert times.tolist() == pytest.approx(
        [1000 / (1 + math.exp(lam / 2)) for lam in (10, 5, 0, -5)], rel=1e-5
    )
    assert backbone.log_snr(times).tolist() == pytest.approx([10, 5, 0, -5], abs=1e-3)
    assert backbone.timesteps(u[1:], "uniform").tolist() == pytest.approx([250, 500, 750])
    # logit-normal: the normal's quartile is 0.67449, sigmoid(0.67449) = 1 / (1 + 0.50942) = 0.66251
    assert backbone.timesteps(u[1:], "logit_normal").tolist() == pytest.approx(
        [337.49, 500, 662.51], abs=0.01
    )
    # 1 / (e^{(l-b)/2} + e^{-(l-b)/2}) at l = 0, b = -1: 1 / (1.64872 + 0.60653) = 0.44341
    assert backbone.weight(torch.tensor([500.0]), -1.0).item() == pytest.approx(0.44341, abs=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_noise_and_log_snr_are_the_schedulers(tiny_backbones, name):
    backbone = tiny_backbones[name]
    scheduler, t = backbone.scheduler(), torch.tensor([0, 250, 500, 750, 999])
    latents, noise = torch.randn(2, 5, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        backbone.add_noise(latents, noise, t), scheduler.add_noise(latents, noise, t), atol=1e-6, rtol=0
    )
    assert backbone.target(latents, noise, t) is noise
    assert backbone.log_snr(t).tolist() == pytest.approx([7.069, 0.725, -0.963, -2.822, -5.364], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "scheduler", "message"),
    [
        ("sd3", "DDIMScheduler", "DDIMScheduler is not a rectified flow"),
        ("sdxl", "FlowMatchEulerDiscreteScheduler", "has no alphas_cumprod"),
        ("sd15", "FlowMatchEulerDiscreteScheduler", "has no alphas_cumprod"),
    ],
)
def test_schedules_of_the_other_family_are_refused(tiny_folders, tiny_backbones, name, scheduler, message):
    with pytest.raises(InputError, match=message):
        type(tiny_backbones[name])(str(tiny_folders[name]), scheduler=scheduler)


def as_if_trained_with(tiny_folders, folder, name, scheduler):
    """A copy of the tiny pipeline whose own scheduler is another."""
    shutil.copytree(tiny_folders[name], folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]})
    )
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    return str(folder)


SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM = "DPMSolverMultistepScheduler"  # what sd3.yaml names
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("name", "scheduler", "named", "message"),
    [
        (
            "sd3",
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            None,
            "use_dynamic_shifting is not supported",
        ),
        (
            "sd3",
            DPMSolverMultistepScheduler(prediction_type="v_prediction", **FLOW),
            None,
            "prediction_type 'v_prediction' is not supported",
        ),
        (
            "sd3",
            DPMSolverMultistepScheduler(prediction_type="epsilon", **FLOW),
            DPM,
            "prediction_type 'epsilon' is not supported",
        ),
        ("sd3", DDIMScheduler(prediction_type="v_prediction"), DPM, "DDIMScheduler is not a rectified flow"),
        ("sdxl", DDIMScheduler(prediction_type="sample"), None, "prediction_type 'sample' is not supported"),
        (
            "sdxl",
            FlowMatchEulerDiscreteScheduler(),
            None,
            "FlowMatchEulerDiscreteScheduler has no alphas_cumprod",
        ),
        (
            "sdxl",
            FlowMatchEulerDiscreteScheduler(),
            "DDIMScheduler",
            "FlowMatchEulerDiscreteScheduler has no alphas_cumprod",
        ),
        (
            "sdxl",
            DDIMScheduler(rescale_betas_zero_snr=True, **SDXL_BETAS),
            None,
            "DDIMScheduler ends in noise alone",
        ),
    ],
)
def test_a_schedule_that_cannot_be_trained_on_is_refused(
    tiny_folders, tiny_backbones, tmp_path, name, scheduler, named, message
):
    """Also where a sampler is named in its place, as the models' own configurations do.

    That would hide what the weights expect.
    """
    with pytest.raises(InputError, match=f"scheduler_config.json: .*{message}"):
        type(tiny_backbones[name])(
            as_if_trained_with(tiny_folders, tmp_path, name, scheduler), scheduler=named
        )


def test_a_schedule_that_all_but_ends_in_noise_is_finite(tiny_folders, tmp_path):
    """Euler's abar of 2^-24 at the last time: log-SNR -log(2^24 - 1), weight 1."""
    folder = as_if_trained_with(
        tiny_folders, tmp_path, "sdxl", EulerDiscreteScheduler(rescale_betas_zero_snr=True, **SDXL_BETAS)
    )
    backbone, last = UNetBackbone(folder), torch.tensor([999])
    assert backbone.log_snr(last).item() == pytest.approx(-math.log(2**24 - 1), rel=1e-6)
    assert (
        backbone.weight(last, 1.5).item() == pytest.approx(1.0)
        and backbone.log_snr(torch.arange(1000)).isfinite().all()
    )
    noise = candidate_noise([1], backbone.latent_shape)
    assert (
        sample(
            backbone, backbone.denoiser, backbone.encode_prompts(["red"]), noise, SamplerSettings(3, 3.0, 1)
        )
        .isfinite()
        .all()
    )
    with pytest.raises(InputError, match="DDIMScheduler ends in noise alone"):
        UNetBackbone(folder, scheduler="DDIMScheduler")


def test_a_network_that_predicts_v_is_trained_as_one_that_predicts_the_noise(tiny_folders, tmp_path):
    """The squared error of v = alpha eps - sigma x: the noise's over alpha^2; the weight undoes that."""
    folder = as_if_trained_with(
        tiny_folders, tmp_path, "sdxl", DDIMScheduler(prediction_type="v_prediction", **SDXL_BETAS)
    )
    backbone, noise_backbone = UNetBackbone(folder), UNetBackbone(tiny_folders["sdxl"])
    latents, noise = torch.randn(2, 4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 250, 500, 999])
    noisy, v = backbone.add_noise(latents, noise, t), backbone.target(latents, noise, t)
    assert torch.allclose(v, backbone.scheduler().get_velocity(latents, noise, t), atol=1e-6)
    abar = backbone.scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    told = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))  # of the noise
    told_v = (told - (1 - abar).sqrt() * noisy) / abar.sqrt()
    errors = [
        ((prediction - target).square().mean((1, 2, 3)) * kind.weight(t, 1.5)).tolist()
        for prediction, target, kind in ((told, noise, noise_backbone), (told_v, v, backbone))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_a_schedule_that_ends_in_noise_alone_serves_a_network_that_predicts_v(tiny_folders, tmp_path):
    """The last time carries no image: its weight is 0, and sampling from it equals the plain pipeline's."""
    folder = as_if_trained_with(
        tiny_folders,
        tmp_path,
        "sdxl",
        DDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            **SDXL_BETAS,
        ),
    )
    backbone = UNetBackbone(folder)
    assert backbone.weight(torch.tensor([999]), 1.5).item() == 0
    assert backbone.weight(torch.arange(1000), 1.5).isfinite().all()
    noise = candidate_noise([1], backbone.latent_shape)
    ours = sample(
        backbone, backbone.denoiser, backbone.encode_prompts(["red"]), noise, SamplerSettings(3, 3.0, 1)
    )
    theirs = backbone.pipeline(
        "red", latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="latent"
    ).images
    assert ours.isfinite().all() and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3"])
def test_log_snr_of_the_published_schedules(tiny_folders, tmp_path, name):
    """With the sampler and the bias that the models' own configurations name."""
    config = json.loads((resources.files("capo.preflight.published") / f"{name}.json").read_text())[
        "scheduler"
    ]
    published = getattr(diffusers, config["_class_name"]).from_config(config)
    model = composed(f"model={name}").model
    kind = MMDiTBackbone if name == "sd3" else UNetBackbone
    backbone = kind(
        as_if_trained_with(tiny_folders, tmp_path, name, published), scheduler=model.backbone.scheduler
    )
    if name == "sd3":
        check_flow(backbone)
    else:
        check_discrete(backbone)
    assert model.bias == {"sd3": -1.0}.get(name, 1.5)


def test_log_snr_of_the_shipped_schedules():
    """That of the UNet is SDXL's with larger betas, and the network predicts v."""
    check_flow(base_of(composed("model=shapes_mmdit")))
    backbone = base_of(composed("model=shapes_unet"))
    t = torch.tensor([0, 250, 500, 750, 999])
    # the product of 1 - beta, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.02), in float64
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2)[t.numpy()]
    expected = np.log(alpha_bar / (1 - alpha_bar))
    assert backbone.log_snr(t).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert backbone.log_snr(t[-1]).item() == pytest.approx(-8.377, abs=1e-3)
    weights = alpha_bar / (1 + np.exp(expected + 1))  # of v: abar sigmoid(-1 - log-SNR)
    assert backbone.weight(t, -1.0).tolist() == pytest.approx(weights.tolist(), abs=1e-5)


def check_discrete(backbone):
    """SDXL's schedule of 1000 times.

    Five log-SNRs, their weights at b = 1.5 and the mean weight of all times.
    """
    t = torch.tensor([0, 250, 500, 750, 999])
    assert backbone.log_snr(t).tolist() == pytest.approx([7.069, 0.725, -0.963, -2.822, -5.364], abs=5e-4)
    assert backbone.weight(t, 1.5).tolist() == pytest.approx([0.0038, 0.685, 0.922, 0.987, 0.9990], abs=6e-4)
    everywhere = backbone.timesteps((torch.arange(1000) + 0.5) / 1000, "uniform")
    assert everywhere.tolist() == list(range(1000))
    assert backbone.weight(everywhere, 1.5).mean().item() == pytest.approx(0.793, abs=5e-4)


def check_flow(backbone):
    """Log-SNR 2 log((1 - t) / t) of unshifted times, mean weights at b = -1 of two draws.

    The shift of 3 is the sampler's alone.
    """
    t = torch.tensor([0.1, 0.25, 0.5, 0.9])
    assert backbone.timesteps(t, "uniform").tolist() == pytest.approx([100, 250, 500, 900])
    # 2 log 9 = 4.39445, 2 log 3 = 2.19722
    assert backbone.log_snr(1000 * t).tolist() == pytest.approx([4.39445, 2.19722, 0, -4.39445], abs=1e-4)
    u = (torch.arange(10_000) + 0.5) / 10_000
    means = {
        draw: backbone.weight(backbone.timesteps(u, draw), -1.0).mean().item()
        for draw in ("logsnr_uniform", "uniform")
    }
    assert means == pytest.approx({"logsnr_uniform": 0.156, "uniform": 0.277}, abs=5e-4)
    sampler = backbone.scheduler()
    sampler.set_timesteps(2)
    middle = sampler.sigmas[1].item()  # of t = 0.4995: 3 t / (1 + 2 t)
    assert middle == pytest.approx(3 * 0.4995 / (1 + 2 * 0.4995), abs=1e-3)


@pytest.mark.parametrize(("model", "draw"), [("shapes_unet", "logsnr_uniform"), ("sdxl", "logit_normal")])
def test_a_draw_of_the_other_family_is_refused(model, draw):
    cfg = composed(f"model={model}", f"noise.draw={draw}")
    with pytest.raises(
        InputError,
        match=f"{draw}: model={model} draws times by uniform or logsnr_normal or logsnr_normal_late only",
    ):
        check_draw(cfg)
    cfg.noise.draw = "uniform"
    check_draw(cfg)


def test_a_draw_of_discrete_schedules_is_refused_for_flows():
    cfg = composed("model=sd3", "noise.draw=logsnr_normal")
    with pytest.raises(
        InputError, match=r"noise\.draw=logsnr_normal: model=sd3 draws times by logsnr_uniform or"
    ):
        check_draw(cfg)
    check_draw(composed("model=sdxl", "noise.draw=logsnr_normal"))


@pytest.mark.parametrize(
    "kinds",
    [
        ("DPMSolverMultistepScheduler",) * 2,
        ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_the_shift_survives_being_saved_and_loaded_again(tiny_folders, tmp_path, kinds):
    """An exported policy has the scheduler that it was tuned with: as the next base it must mean the same."""
    first = MMDiTBackbone(str(tiny_folders["sd3"]), scheduler=kinds[0], sequence_length=9)
    save(first, tmp_path / "policy", first.denoiser)
    again = MMDiTBackbone(str(tmp_path / "policy"), scheduler=kinds[1], sequence_length=9).scheduler()
    assert again.config.get("flow_shift" if kinds[1].startswith("DPM") else "shift") == 3.0
