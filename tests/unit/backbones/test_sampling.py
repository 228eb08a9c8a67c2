import functools

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UniPCMultistepScheduler

from capo.backbones import UNetBackbone
from capo.backbones.sampling import (
    SamplerSettings,
    candidate_generators,
    candidate_noise,
    sample,
    sample_prompts,
)
from capo.data.stages import sampling_record
from capo.errors import InputError

PROMPTS = ["a red square", "a green circle left of the blue triangle"]
SEEDS = [[11, 12, 13], [2**62 + 1, 5, 6]]


@functools.cache
def plain_pipeline(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def scheduled(tiny_folder):
    """Makes the backbone with a scheduler, each once. Read only."""
    return functools.cache(lambda scheduler: UNetBackbone(str(tiny_folder), scheduler=scheduler))


def plain_latents(folder, backbone, steps, guidance, **arguments):
    """What the pipeline itself makes: one batch of all six candidates."""
    pipeline = plain_pipeline(folder)
    pipeline.scheduler = type(backbone.pipeline.scheduler).from_config(backbone.pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for row in SEEDS for seed in row]
    return pipeline(
        PROMPTS,
        num_images_per_prompt=3,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("guidance", [7.5, 1.0, 0.5])  # at most 1: no unconditional pass
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_latents_are_the_pipelines_bitwise(tiny_folder, scheduled, scheduler, guidance):
    backbone = scheduled(scheduler)
    text = backbone.encode_prompts(PROMPTS)
    latents = sample_prompts(backbone, backbone.denoiser, text, SEEDS, SamplerSettings(4, guidance, 6))
    assert latents.shape == (2, 3, 4, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(latents.flatten(0, 1), plain_latents(tiny_folder, backbone, 4, guidance))


def test_guidance_below_0_leads_away_from_the_prompt(tiny_backbone):
    backbone, unconditional = tiny_backbone, tiny_backbone.unconditional(2)
    text = backbone.encode_prompts(PROMPTS)

    def drawn(conditions, guidance):
        settings = SamplerSettings(3, guidance, 6)
        return sample_prompts(backbone, backbone.denoiser, conditions, SEEDS, settings)

    # towards 0 it is sampling without the prompt, and at 0 itself sampling with it, as pipelines do
    without, prompted = drawn(unconditional, 1.0), drawn(text, 1.0)
    torch.testing.assert_close(drawn(text, -1e-6), without, rtol=0, atol=1e-4)
    assert torch.equal(drawn(text, 0.0), prompted)
    assert (without - prompted).abs().max() > 1e-2
    # to first order, images leave the prompt by as much as guidance above 1 approaches it
    away, towards = drawn(text, -0.001) - without, drawn(text, 1.001) - prompted
    assert torch.nn.functional.cosine_similarity(away.flatten(), -towards.flatten(), dim=0) > 0.9


def test_encoded_empty_prompt_is_the_negative_branch_where_zeros_are_not_forced(build_tiny, tmp_path):
    build_tiny(force_zeros_for_empty_prompt=False).save_pretrained(tmp_path)
    backbone = UNetBackbone(str(tmp_path))
    text = backbone.encode_prompts([prompt for prompt in PROMPTS for _ in range(3)])
    seeds = [[seed] for row in SEEDS for seed in row]
    latents = sample_prompts(backbone, backbone.denoiser, text, seeds, SamplerSettings(4, 5.0, 6))
    # the pipeline encodes the negative prompt once a prompt: six prompts here, as in our batch of six
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    generators = [torch.Generator().manual_seed(seed) for row in seeds for seed in row]
    plain = pipeline(
        [prompt for prompt in PROMPTS for _ in range(3)],
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=generators,
        output_type="latent",
    ).images
    assert torch.equal(latents.flatten(0, 1), plain)
    assert not torch.equal(backbone.unconditional(1)["prompt_embeds"], torch.zeros(1, 12, 24))


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_batches_differ_by_rounding_only(tiny_backbone, batch):
    text = tiny_backbone.encode_prompts(PROMPTS)
    whole, parts = (
        sample_prompts(tiny_backbone, tiny_backbone.denoiser, text, SEEDS, SamplerSettings(4, 5.0, size))
        for size in (6, batch)
    )
    assert (whole - parts).abs().max() <= 1e-4
    assert (whole - whole.roll(1, dims=1)).abs().max() > 0.1  # a candidate in another's place would be seen


def test_noise_of_a_candidate_depends_on_its_seed_alone():
    noise = candidate_noise([3, 4, 2**63 - 1], (4, 8, 8))
    assert noise.shape == (3, 4, 8, 8) and noise.dtype == torch.float32
    for row, seed in zip(noise, [3, 4, 2**63 - 1], strict=True):
        assert torch.equal(row, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))[0])
    assert torch.equal(candidate_noise([4], (4, 8, 8))[0], noise[1])


def test_any_denoiser_of_the_family_is_sampled(tiny_backbone):
    policy = tiny_backbone.trainable_copy()
    text, settings = tiny_backbone.encode_prompts(PROMPTS[:1]), SamplerSettings(3, 5.0, 1)
    base = sample_prompts(tiny_backbone, tiny_backbone.denoiser, text, [[1]], settings)
    assert torch.equal(sample_prompts(tiny_backbone, policy, text, [[1]], settings), base)
    with torch.no_grad():
        policy.conv_out.bias.add_(0.1)
    assert not torch.equal(sample_prompts(tiny_backbone, policy, text, [[1]], settings), base)


def test_two_calls_share_no_scheduler_state(tiny_folder):
    # DPM-Solver++ carries its last predictions: used twice it would begin with those of the first call
    backbone = UNetBackbone(str(tiny_folder), scheduler="DPMSolverMultistepScheduler")
    text, noise = backbone.encode_prompts(PROMPTS[:1]), candidate_noise([1], backbone.latent_shape)
    first, second = (
        sample(backbone, backbone.denoiser, text, noise, SamplerSettings(4, 5.0, 1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert backbone.pipeline.scheduler.num_inference_steps is None  # the pipeline's own is never used


def test_latents_are_fit_for_autograd_and_progress_counts_images(tiny_backbone):
    text, noise = tiny_backbone.encode_prompts(PROMPTS), candidate_noise([1, 2], tiny_backbone.latent_shape)
    steps = []
    latents = sample(
        tiny_backbone, tiny_backbone.denoiser, text, noise, SamplerSettings(3, 5.0, 2), steps.append
    )
    assert steps == [2, 2, 2]  # three steps of two images
    weight = torch.ones((), requires_grad=True)
    (latents * weight).sum().backward()  # a tensor of inference mode would raise here
    assert weight.grad == pytest.approx(latents.sum().item(), rel=1e-5)


def test_scheduler_that_draws_noise_needs_generators(tiny_folder):
    backbone = UNetBackbone(str(tiny_folder), scheduler="DDPMScheduler")
    text, settings = backbone.encode_prompts(PROMPTS[:1]), SamplerSettings(3, 5.0, 1)
    with pytest.raises(InputError, match=r"DDPMScheduler draws noise.*generators"):
        sample(backbone, backbone.denoiser, text, candidate_noise([1], backbone.latent_shape), settings)
    generators = candidate_generators([1])
    sample(
        backbone,
        backbone.denoiser,
        text,
        candidate_noise(generators, backbone.latent_shape),
        settings,
        generators=generators,
    )


@pytest.mark.parametrize("settings", [(0, 5.0, 1), (3, 5.0, 0), (3, float("nan"), 1), (3, 5.0, 1, "both")])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="sampling"):
        SamplerSettings(*settings)


def test_autocast_is_for_the_prediction_and_not_for_the_schedulers_step(tiny_folder, monkeypatch):
    """UniPC of order 3 multiplies matrices in its step, which autocast would round to bf16."""
    backbone = UNetBackbone(str(tiny_folder), scheduler="UniPCMultistepScheduler")
    config = {**backbone.pipeline.scheduler.config, "solver_order": 3}
    backbone.pipeline.scheduler = UniPCMultistepScheduler.from_config(config)
    step, predict, seen = UniPCMultistepScheduler.step, UNetBackbone.predict, []

    def watched(name, function):
        def call(*args, **options):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return function(*args, **options)

        return functools.wraps(function)(call)

    monkeypatch.setattr(UniPCMultistepScheduler, "step", watched("step", step))
    monkeypatch.setattr(UNetBackbone, "predict", watched("prediction", predict))
    text, noise = backbone.encode_prompts(PROMPTS[:1]), candidate_noise([1], backbone.latent_shape)
    sample(backbone, backbone.denoiser, text, noise, SamplerSettings(5, 1.0, 1, precision="bf16-mixed"))
    assert seen == [("prediction", True), ("step", False)] * 5


def test_more_steps_than_the_schedule_has_are_refused(tiny_backbone):
    text, noise = tiny_backbone.encode_prompts(PROMPTS[:1]), candidate_noise([1], tiny_backbone.latent_shape)
    with pytest.raises(InputError, match=r"sampling.steps 1001: DDIMScheduler"):
        sample(tiny_backbone, tiny_backbone.denoiser, text, noise, SamplerSettings(1001, 5.0, 1))


def test_noise_of_another_shape_is_refused(tiny_backbone):
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\) does not fit latents \(4, 8, 8\)"):
        sample(
            tiny_backbone,
            tiny_backbone.denoiser,
            tiny_backbone.encode_prompts(PROMPTS[:1]),
            candidate_noise([1], (4, 4, 4)),
            SamplerSettings(2, 5.0, 1),
        )
    with pytest.raises(ValueError, match=r"same number of seeds, not \[1, 2\]"):
        sample_prompts(
            tiny_backbone,
            tiny_backbone.denoiser,
            tiny_backbone.encode_prompts(PROMPTS),
            [[1, 2], [3]],
            SamplerSettings(2, 5.0, 1),
        )


def test_threads_that_share_batches_give_the_latents_of_one_thread(tiny_backbone):
    text, seeds, steps = tiny_backbone.encode_prompts(PROMPTS), [[1, 2, 3], [4, 5, 6]], []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample_prompts(tiny_backbone, tiny_backbone.denoiser, text, seeds, SamplerSettings(3, 5.0, 2))
        torch.set_num_threads(2)
        settings = SamplerSettings(3, 5.0, 2, parallel="batches")
        shared = sample_prompts(tiny_backbone, tiny_backbone.denoiser, text, seeds, settings, steps.append)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, shared)
    assert sum(steps) == 6 * 3


def test_a_batch_that_does_not_fit_is_halved_and_recorded(tiny_folder, monkeypatch, caplog):
    """A device with room for two guided images: the latents are those of batches of two."""
    backbone = UNetBackbone(str(tiny_folder))
    predict, sizes = UNetBackbone.predict, []

    def cramped(self, denoiser, noisy, t, text):
        sizes.append(len(noisy) // 2)
        if len(noisy) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, denoiser, noisy, t, text)

    text, seeds = backbone.encode_prompts(["red", "blue"]), [[1, 2, 3], [4, 5, 6]]
    expected = sample_prompts(backbone, backbone.denoiser, text, seeds, SamplerSettings(2, 3.0, 2))
    monkeypatch.setattr(UNetBackbone, "predict", cramped)
    settings = SamplerSettings(2, 3.0, 5)
    found = sample_prompts(backbone, backbone.denoiser, text, seeds, settings)
    assert sizes == [5, 2, 2, 2, 2, 1, 1, 1, 1] and torch.allclose(found, expected, atol=1e-5)
    assert "5 images at once do not fit" in caplog.text
    assert sampling_record(backbone, settings)["batch"] == 2
    assert sampling_record(UNetBackbone(str(tiny_folder)), settings)["batch"] == 5


def test_an_image_that_does_not_fit_is_a_message(tiny_folder, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = UNetBackbone(str(tiny_folder))
    monkeypatch.setattr(UNetBackbone, "predict", full)
    with pytest.raises(InputError, match=r"sampling: a single image does not fit.*sampling.precision=bf16"):
        sample_prompts(
            backbone, backbone.denoiser, backbone.encode_prompts(["red"]), [[1]], SamplerSettings(2, 3.0, 2)
        )
