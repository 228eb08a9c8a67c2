"""Every family does what diffusers' own pipeline does, on tiny pipelines of the real classes."""

import inspect
import logging
import math
from functools import partial
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from capo.backbones import MMDiTBackbone, UNetBackbone
from capo.backbones.sampling import SamplerSettings, candidate_generators, candidate_noise, sample
from capo.data import PreferenceBatch
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.importing.images import pixels
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.module import PreferenceModule, Weighting
from capo.objectives import dpo

PROMPTS = ["a red square", "the blue circle left of a green triangle"]
FAMILIES = ("sdxl", "sd15", "sd3", "sd3_bare")
OPTIONS = {"sd3": {"max_sequence_length": 9}, "sd3_bare": {"max_sequence_length": 3}}


def plain_pipeline(folder, name):
    """The pipeline as a user loads it, without this package."""
    parts = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_bare" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_backbones, tiny_folders, name):
    plain, backbone = plain_pipeline(tiny_folders[name], name), tiny_backbones[name]
    others = {
        key: None
        for key in ("prompt_2", "prompt_3")
        if key in inspect.signature(plain.encode_prompt).parameters
    }
    with torch.no_grad():
        found = plain.encode_prompt(
            PROMPTS,
            **others,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            **OPTIONS.get(name, {}),
        )
    text, empty = backbone.encode_prompts(PROMPTS), backbone.unconditional(2)
    assert torch.equal(text["prompt_embeds"], found[0]) and torch.equal(empty["prompt_embeds"], found[1])
    assert not torch.equal(found[0][0], found[0][1])
    if len(found) == 4:
        assert torch.equal(text["pooled_prompt_embeds"], found[2]) and torch.equal(
            empty["pooled_prompt_embeds"], found[3]
        )


def test_the_t5s_tokens_come_after_clips(tiny_backbones):
    with_t5, bare = (
        tiny_backbones[name].encode_prompts(PROMPTS)["prompt_embeds"] for name in ("sd3", "sd3_bare")
    )
    assert with_t5.shape == (2, 12 + 9, 32) and bare.shape == (
        2,
        12 + 3,
        32,
    )  # CLIP's 12 tokens, padded from 8 + 16 to the T5's 32
    assert (with_t5[:, :12, 24:] == 0).all() and (bare[:, 12:] == 0).all() and with_t5[:, 12:].abs().sum() > 0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sdxl", "DDIMScheduler"),
        ("sd15", "DDIMScheduler"),
        ("sd3", "FlowMatchEulerDiscreteScheduler"),
        ("sd3", "DPMSolverMultistepScheduler"),
        ("sd3_bare", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_latents_are_the_pipelines_bitwise(tiny_backbones, tiny_folders, name, scheduler, guidance):
    kind = type(tiny_backbones[name])
    options = {"sd3": {"sequence_length": 9}, "sd3_bare": {"t5": False, "sequence_length": 3}}.get(name, {})
    backbone, plain = (
        kind(str(tiny_folders[name]), scheduler=scheduler, **options),
        plain_pipeline(tiny_folders[name], name),
    )
    plain.scheduler = backbone.scheduler()
    seeds, text = [3, 4], backbone.encode_prompts(PROMPTS)
    expected = plain(
        PROMPTS,
        generator=candidate_generators(seeds),
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="latent",
        **OPTIONS.get(name, {}),
    ).images
    noise = candidate_noise(seeds, backbone.latent_shape)
    latents = sample(backbone, backbone.denoiser, text, noise, SamplerSettings(4, guidance, 2))
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_decoded_as_the_pipeline_decodes_them(tiny_backbones, tiny_folders, name):
    """Of one pass with the same noise, the images that the pipeline itself gives."""
    backbone, plain = tiny_backbones[name], plain_pipeline(tiny_folders[name], name)
    latents, expected = (
        plain(
            PROMPTS,
            generator=candidate_generators([3, 4]),
            num_inference_steps=2,
            output_type=kind,
            **OPTIONS.get(name, {}),
        ).images
        for kind in ("latent", "pil")
    )
    for mine, theirs in zip(backbone.decode(latents), expected, strict=True):
        assert isinstance(mine, Image.Image) and np.array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_encoded_as_the_pipeline_encodes_them(tiny_backbones, tiny_folders, monkeypatch, name):
    """The image-to-image pipeline's own latents of a picture: the posterior's mode, before noise."""
    backbone = tiny_backbones[name]
    plain = diffusers.AutoPipelineForImage2Image.from_pipe(plain_pipeline(tiny_folders[name], name))
    theirs = inspect.getmodule(type(plain))
    monkeypatch.setattr(theirs, "retrieve_latents", partial(theirs.retrieve_latents, sample_mode="argmax"))
    without_noise = Mock(
        scale_noise=lambda latents, t, noise: latents, add_noise=lambda latents, noise, t: latents
    )
    monkeypatch.setattr(plain, "scheduler", without_noise)
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)]
    with torch.no_grad():
        expected = plain.prepare_latents(
            plain.image_processor.preprocess(pictures), torch.tensor([500.0]), 2, 1, torch.float32, "cpu"
        )
    assert torch.equal(backbone.encode_images(pixels(pictures)), expected)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_dpo_is_the_published_loss(tiny_backbones, name):
    """Diffusion-DPO.

    -log sigmoid(-0.5 beta (model_diff - ref_diff)) on mean squared errors, one noise and time for both of a
    pair.
    """
    backbone, beta = tiny_backbones[name], 20.0
    module = PreferenceModule(
        backbone,
        partial(dpo, beta=beta / 2),
        lr=1e-3,
        warm_up=0,
        weighting=Weighting("constant"),
        draw=backbone.draws[0],
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    latents, noise = torch.randn(2, 3, 2, *backbone.latent_shape, generator=generator)
    noise = noise[:, :1].expand(-1, 2, -1, -1, -1)
    text = backbone.encode_prompts([*PROMPTS, "a circle"])
    u = torch.tensor([0.2, 0.5, 0.8])
    batch = PreferenceBatch(latents, noise, u, torch.tensor([[0.9, 0.1]] * 3), text, ["a", "b", "c"])
    t = backbone.timesteps(u, backbone.draws[0])

    def errors(network, which):
        noisy = backbone.add_noise(latents[:, which], noise[:, which], t)
        return F.mse_loss(
            backbone.predict(network, noisy, t, text),
            backbone.target(latents[:, which], noise[:, which], t),
            reduction="none",
        ).mean((1, 2, 3))

    with torch.no_grad():
        model_diff, ref_diff = (errors(net, 0) - errors(net, 1) for net in (module.policy, backbone.denoiser))
        expected = -F.logsigmoid(-0.5 * beta * (model_diff - ref_diff))
        found = module.objective(module.pair_errors(batch))
    assert (expected - math.log(2)).abs().max() > 1e-3  # the policy has moved
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_t5_that_is_not_there_is_named(tiny_folders):
    with pytest.raises(InputError, match=r"no text_encoder_3.*model.backbone.t5=false"):
        MMDiTBackbone(str(tiny_folders["sd3_bare"]))


def test_the_t5_is_not_loaded_where_it_is_not_wanted(tiny_folders, tiny_backbones):
    backbone = MMDiTBackbone(str(tiny_folders["sd3"]), t5=False, sequence_length=3)
    assert backbone.pipeline.text_encoder_3 is None
    assert (backbone.encode_prompts(PROMPTS)["prompt_embeds"][:, 12:] == 0).all()
    prints = [tiny_backbones["sd3"].fingerprints, backbone.fingerprints]
    assert (
        prints[0]["text_encoders"] != prints[1]["text_encoders"]
        and prints[0]["denoiser"] == prints[1]["denoiser"]
    )


def test_the_sequence_length_is_part_of_the_texts_fingerprint(tiny_folders):
    prints = [
        MMDiTBackbone(str(tiny_folders["sd3"]), sequence_length=n).fingerprints["text_encoders"]
        for n in (4, 5)
    ]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("sdxl", {"tokenizer": 1, "tokenizer_2": 1}),
        ("sd15", {"tokenizer": 1}),
        ("sd3", {"tokenizer": 1, "tokenizer_2": 1, "tokenizer_3": 2}),
    ],
)
def test_prompts_over_the_token_limit_are_counted(tiny_backbones, name, cut):
    # 11 words and two ends are 13 tokens of CLIP's 12; 9 words and an end are 10 of the T5's 9
    long, medium = " ".join(["red"] * 11), " ".join(["red"] * 9)
    assert tiny_backbones[name].truncated([long, medium, "red"]) == cut


def test_an_autoencoder_of_its_own(tiny_folders, tmp_path):
    other = UNetBackbone(str(tiny_folders["sd15"])).vae
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.1)
    other.save_pretrained(tmp_path / "vae")
    plain, own = (
        UNetBackbone(str(tiny_folders["sdxl"])),
        UNetBackbone(str(tiny_folders["sdxl"]), vae=str(tmp_path / "vae")),
    )
    assert torch.equal(own.vae.decoder.conv_out.bias, other.decoder.conv_out.bias)
    assert own.fingerprints["latent_space"] != plain.fingerprints["latent_space"]
    assert own.fingerprints["denoiser"] == plain.fingerprints["denoiser"]
    with pytest.raises(InputError, match=r"model.backbone.vae=.*no AutoencoderKL"):
        UNetBackbone(str(tiny_folders["sdxl"]), vae=str(tmp_path))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_sampling_under_autocast_is_another_generator_with_much_the_same_images(tiny_backbones, name):
    backbone = tiny_backbones[name]
    text, noise = backbone.encode_prompts(PROMPTS), candidate_noise([1, 2], backbone.latent_shape)
    full, mixed = (
        sample(backbone, backbone.denoiser, text, noise, SamplerSettings(3, 3.0, 2, precision=precision))
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed.dtype == torch.float32 and not torch.equal(full, mixed)
    torch.testing.assert_close(full, mixed, atol=0.15, rtol=0)


def test_truncation_is_warned_of_once(tiny_backbone, tmp_path, caplog):
    texts = [f"{' '.join(['red'] * 11)} {word}" for word in ("circle", "square", "triangle")] + [
        "a red circle"
    ]
    plan = PoolSpec(
        tmp_path, "tiny", "train", 0, [make_prompt(text) for text in texts], 2, prompts_per_shard=1
    )
    with caplog.at_level(logging.WARNING):
        fill_pool(
            plan,
            ImageGenerator.base(tiny_backbone, SamplerSettings(1, 1.0, 2)),
            stages=("text",),
            progress=False,
        )
    told = [
        record.getMessage() for record in caplog.records if "longer than" in record.getMessage()
    ]  # of whoever
    assert [line.split(":")[0] for line in told] == [
        f"3 of 4 prompts are longer than the 12 tokens that {name} reads"
        for name in ("tokenizer", "tokenizer_2")
    ]
    assert not [record for record in caplog.records if "truncated" in record.getMessage()]
