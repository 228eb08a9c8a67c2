import math
import time
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from capo.backbones import UNetBackbone
from capo.backbones.latents import from_denoiser
from capo.backbones.saving import save
from capo.errors import InputError

PROMPTS = ["a red square", "a green circle left of the blue triangle"]


def noisy_input(backbone, count=2):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, *backbone.latent_shape, generator=generator)
    return latents, noise, torch.tensor([10, 800, 400, 999][:count])


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_backbone, tiny_folder):
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    embeds, negative, pooled, negative_pooled = plain.encode_prompt(PROMPTS)
    text, empty = tiny_backbone.encode_prompts(PROMPTS), tiny_backbone.unconditional(2)
    assert torch.equal(text["prompt_embeds"], embeds) and torch.equal(text["pooled_prompt_embeds"], pooled)
    assert torch.equal(empty["prompt_embeds"], negative) and torch.equal(
        empty["pooled_prompt_embeds"], negative_pooled
    )
    assert {key: value.shape for key, value in text.items()} == {
        "prompt_embeds": (2, 12, 24),
        "pooled_prompt_embeds": (2, 16),
        "time_ids": (2, 6),
    }
    # original size, crop, target size of 8x8 latents behind a VAE of factor 2
    assert text["time_ids"].tolist() == empty["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert not torch.equal(text["prompt_embeds"][0], text["prompt_embeds"][1])


def test_no_prompt_is_refused(tiny_backbone):
    with pytest.raises(InputError, match="no prompt to encode"):
        tiny_backbone.encode_prompts([])


@pytest.mark.parametrize(
    "scheduler", [None, "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_log_snr_and_weight_of_sdxls_schedule(tiny_folder, scheduler):
    backbone = UNetBackbone(str(tiny_folder), scheduler=scheduler)
    t = torch.tensor([0, 250, 500, 750, 999])
    # the product of 1 - beta, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012), in float64
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    expected = [math.log(alpha_bar[i] / (1 - alpha_bar[i])) for i in t]
    assert backbone.log_snr(t).tolist() == pytest.approx(expected, abs=1e-3)
    assert backbone.log_snr(t).tolist() == pytest.approx([7.069, 0.725, -0.963, -2.822, -5.364], abs=1e-3)
    # sigmoid(1.5 - log-SNR), by hand at t = 250: 1 / (1 + e^(0.725 - 1.5)) = 1 / (1 + 0.4607) = 0.685
    assert backbone.weight(t, 1.5).tolist() == pytest.approx([0.0038, 0.685, 0.922, 0.987, 0.9990], abs=1e-3)
    assert backbone.log_snr(t).dtype == backbone.weight(t, 1.5).dtype == torch.float32


def test_schedule_follows_the_models_config(tiny_backbone, tiny_folder, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=10, beta_schedule="linear", beta_start=0.5, beta_end=0.5
    )
    pipeline.save_pretrained(tmp_path)
    backbone = UNetBackbone(str(tmp_path))
    t = backbone.timesteps(torch.tensor([0.0, 0.099, 0.1, 0.99]), "uniform")
    assert t.tolist() == [0, 0, 1, 9] and t.dtype == torch.int64  # floor(u * 10)
    # beta = 1/2: alpha_bar = 1/2, 1/4, ...; log-SNR = log(1) = 0, log((1/4) / (3/4)) = -log 3
    assert backbone.log_snr(t)[1:3].tolist() == pytest.approx([0.0, -math.log(3)], abs=1e-6)
    assert tiny_backbone.timesteps(torch.tensor([0.25, 0.9999]), "uniform").tolist() == [250, 999]


def test_noise_is_added_as_the_scheduler_adds_it_and_is_the_target(tiny_backbone):
    latents, noise, t = noisy_input(tiny_backbone, 4)
    expected = tiny_backbone.scheduler().add_noise(latents, noise, t)
    torch.testing.assert_close(tiny_backbone.add_noise(latents, noise, t), expected, rtol=0, atol=1e-6)
    assert tiny_backbone.target(latents, noise, t) is noise


def test_predict_calls_the_given_denoiser(tiny_backbone):
    latents, _, t = noisy_input(tiny_backbone)
    text, policy = tiny_backbone.encode_prompts(PROMPTS), tiny_backbone.trainable_copy()
    with torch.no_grad():
        policy.conv_out.weight.mul_(2)
        policy.conv_out.bias.mul_(2)
    base, tuned = (
        tiny_backbone.predict(denoiser, latents, t, text) for denoiser in (tiny_backbone.denoiser, policy)
    )
    torch.testing.assert_close(tuned, 2 * base)  # twice the last layer
    added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
    assert torch.equal(
        base, tiny_backbone.denoiser(latents, t, text["prompt_embeds"], added_cond_kwargs=added).sample
    )
    assert tuned.requires_grad and not base.requires_grad
    same_time = tiny_backbone.predict(tiny_backbone.denoiser, latents, t[:1].expand(2), text)
    assert torch.equal(same_time, tiny_backbone.predict(tiny_backbone.denoiser, latents, t[0], text))


def test_prediction_depends_on_text_time_and_size(tiny_backbone):
    latents, _, t = noisy_input(tiny_backbone)
    text = tiny_backbone.encode_prompts(PROMPTS)
    base = tiny_backbone.predict(tiny_backbone.denoiser, latents, t, text)
    for changed in (
        {key: value.flip(0) for key, value in text.items()},
        text | {"time_ids": text["time_ids"] * 2},
    ):
        assert (tiny_backbone.predict(tiny_backbone.denoiser, latents, t, changed) - base).abs().max() > 1e-5
    assert (tiny_backbone.predict(tiny_backbone.denoiser, latents, t + 100, text) - base).abs().max() > 1e-5


def test_half_precision_text_is_cast_to_the_denoisers_dtype(tiny_backbone):
    latents, _, t = noisy_input(tiny_backbone)
    text = tiny_backbone.encode_prompts(PROMPTS)
    half = {key: value.half() for key, value in text.items()}
    full, rounded = (tiny_backbone.predict(tiny_backbone.denoiser, latents, t, kind) for kind in (text, half))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(
        rounded, full, rtol=0, atol=1e-2
    )  # float16 keeps 11 bits of embeddings around 1


def test_reference_stored_in_bf16_is_the_float32_policy_under_autocast(tiny_backbone):
    latents, _, t = noisy_input(tiny_backbone)
    text, policy, reference = (
        tiny_backbone.encode_prompts(PROMPTS),
        tiny_backbone.trainable_copy(),
        tiny_backbone.trainable_copy(),
    )
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
    text["time_ids"] = torch.full_like(text["time_ids"], 819)  # bf16 would make 820 of it
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [tiny_backbone.predict(denoiser, latents, t, text) for denoiser in (policy, reference)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == torch.bfloat16


def test_images_are_the_pipelines(tiny_backbone, tiny_folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    arguments = {"num_inference_steps": 3, "num_images_per_prompt": 2}
    latents = pipeline(
        PROMPTS, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments
    ).images
    expected = pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **arguments).images
    images = tiny_backbone.decode(latents, batch=4)
    assert [(image.mode, image.size) for image in images] == [("RGB", (16, 16))] * 4
    assert all(np.array_equal(image, other) for image, other in zip(images, expected, strict=True))
    assert len({image.tobytes() for image in images}) == 4
    assert [isinstance(image, Image.Image) for image in tiny_backbone.decode(latents.half(), batch=3)] == [
        True
    ] * 4


def test_encoded_images_are_scaled_and_shifted(tiny_folder):
    backbone = UNetBackbone(str(tiny_folder))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = backbone.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(backbone.encode_images(images), raw * 0.7)
    backbone.vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(backbone.encode_images(images), (raw - 0.25) * 0.7)
    torch.testing.assert_close(from_denoiser(backbone.vae, backbone.encode_images(images)), raw)
    backbone.vae.register_to_config(latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 4, 8])
    latents = backbone.encode_images(images)
    torch.testing.assert_close(latents[:, 3], (raw[:, 3] - 4) * 0.7 / 8)
    torch.testing.assert_close(from_denoiser(backbone.vae, latents), raw)


def test_trainable_copy_is_float32_independent_and_without_dropout(tiny_folder):
    backbone = UNetBackbone(str(tiny_folder), dtype="bfloat16")
    for module in backbone.denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy = backbone.trainable_copy().train()
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and all(
        p.requires_grad for p in policy.parameters()
    )
    assert {p.dtype for p in backbone.denoiser.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for part in (backbone.denoiser, backbone.vae) for p in part.parameters())
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    assert all(torch.equal(value, before[name].float()) for name, value in policy.state_dict().items())
    latents, _, t = noisy_input(backbone)
    text = backbone.encode_prompts(PROMPTS)
    assert torch.equal(*(backbone.predict(policy, latents, t, text) for _ in range(2)))
    with torch.no_grad():
        policy.conv_in.weight.zero_()
    assert torch.equal(backbone.denoiser.conv_in.weight, before["conv_in.weight"])


def test_saved_pipeline_is_plain_float32_with_the_given_denoiser(tiny_folder, tmp_path):
    backbone = UNetBackbone(
        str(tiny_folder), dtype="float16", scheduler="EulerDiscreteScheduler", channels_last=["unet"]
    )
    policy = backbone.trainable_copy()
    with torch.no_grad():
        policy.conv_out.bias.add_(1)
    save(backbone, tmp_path / "saved", policy)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler" and pipeline.dtype == torch.float32
    assert {
        p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()
    } == {torch.float32}
    assert all(
        torch.equal(value, policy.state_dict()[name]) for name, value in pipeline.unet.state_dict().items()
    )
    assert backbone.pipeline.unet is backbone.denoiser and backbone.denoiser is not policy
    assert backbone.denoiser.dtype == torch.float16


def test_fingerprints_tell_denoiser_latent_space_and_text_apart(tiny_backbone, tmp_path):
    policy = tiny_backbone.trainable_copy()
    with torch.no_grad():
        policy.conv_out.bias.add_(1)
    save(tiny_backbone, tmp_path / "saved", policy)
    tuned, base = UNetBackbone(str(tmp_path / "saved")).fingerprints, tiny_backbone.fingerprints
    assert set(base) == {"denoiser", "latent_space", "text_encoders"} and all(
        len(value) == 64 for value in base.values()
    )
    assert {key for key in base if base[key] != tuned[key]} == {"denoiser"}


def test_sampler_identity_follows_the_scheduler(tiny_backbone, tiny_folder):
    euler = UNetBackbone(str(tiny_folder), scheduler="EulerDiscreteScheduler").sampler_identity()
    ours = tiny_backbone.sampler_identity()
    assert ours["scheduler"] == "DDIMScheduler" and ours["config"]["beta_end"] == 0.012
    assert {key for key in ours if ours[key] != euler[key]} == {"scheduler", "config"}


def test_channels_last_changes_rounding_only(tiny_backbone, tiny_folder):
    backbone = UNetBackbone(str(tiny_folder), channels_last=["unet", "vae"])
    assert backbone.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents, _, t = noisy_input(backbone)
    outputs = [
        each.predict(each.denoiser, latents, t, each.encode_prompts(PROMPTS))
        for each in (backbone, tiny_backbone)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


def test_unknown_scheduler_and_dtype_are_refused(tiny_folder):
    with pytest.raises(InputError, match=r"model.backbone.scheduler=AutoencoderKL: .*DDIMScheduler"):
        UNetBackbone(str(tiny_folder), scheduler="AutoencoderKL")
    with pytest.raises(InputError, match=r"model dtype 'fp16'.*float16"):
        UNetBackbone(str(tiny_folder), dtype="fp16")


def test_lanes_take_turns_at_the_tokenizer(tiny_folder, monkeypatch):
    backbone = UNetBackbone(str(tiny_folder))
    backbone.pipeline.register_to_config(
        force_zeros_for_empty_prompt=False
    )  # then each count is encoded anew
    encode, busy = backbone.pipeline.encode_prompt, []

    def slow(*args, **kwargs):
        busy.append(len(busy))
        assert len(busy) == 1, "two lanes encode at once"
        time.sleep(0.01)
        found = encode(*args, **kwargs)
        busy.pop()
        return found

    monkeypatch.setattr(backbone.pipeline, "encode_prompt", slow)
    with ThreadPoolExecutor(4) as lanes:
        found = list(lanes.map(backbone.unconditional, [1, 2, 3, 4] * 3))
    assert [len(text["prompt_embeds"]) for text in found] == [1, 2, 3, 4] * 3
