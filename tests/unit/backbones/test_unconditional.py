"""The unconditional prediction of the base, or of another policy, in place of the tuned policy's own."""

from dataclasses import replace

import pytest
import torch

from capo.backbones import UNetBackbone
from capo.backbones.export import export_policy, load_policy, policy_fingerprint
from capo.backbones.lora import has_adapter
from capo.backbones.model_card import ModelCard
from capo.backbones.sampling import SamplerSettings, candidate_noise, sample, sample_prompts
from capo.backbones.unconditional import AdapterOff, base_network, unconditional_of
from capo.errors import InputError
from fixtures.policies import PROMPTS, tuned

SETTINGS = SamplerSettings(3, 5.0, 2)
CARD = ModelCard(objective="capo", data="8 prompts of nowhere")


def by_hand(backbone, policy, negative, guidance):
    """Two passes a step, written out: `eps_u` of `negative`, `eps_c` of `policy`."""
    text, empty = backbone.encode_prompts(PROMPTS), backbone.unconditional(2)
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(3)
    latents = candidate_noise([1, 2], backbone.latent_shape)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            without = backbone.predict(negative, latents, t, empty)
            latents = scheduler.step(
                without + guidance * (backbone.predict(policy, latents, t, text) - without), t, latents
            ).prev_sample
    return latents


def drawn(backbone, policy, negative=None, settings=SETTINGS):
    noise = candidate_noise([1, 2], backbone.latent_shape)
    text = backbone.encode_prompts(PROMPTS)
    return sample(backbone, policy, text, noise, settings, unconditional=negative)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_unconditional_prediction_is_the_other_networks(tiny_backbones, name, lora):
    backbone = tiny_backbones[name]
    policy, base = tuned(backbone, lora), backbone.denoiser
    own, found = drawn(backbone, policy), drawn(backbone, policy, base)
    assert torch.equal(found, by_hand(backbone, policy, base, 5.0))
    # two passes of one image differ from one of two by rounding, and the base from the policy by far more
    assert torch.allclose(own, by_hand(backbone, policy, policy, 5.0), atol=1e-4)
    assert (found - own).abs().max() > 1e-2
    if lora:
        assert torch.equal(drawn(backbone, policy, AdapterOff(policy)), found)


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_up_to_guidance_1_it_is_not_read(tiny_backbone, guidance):
    policy, settings = tuned(tiny_backbone), SamplerSettings(3, guidance, 2)

    class Never(torch.nn.Module):
        def forward(self, *args, **options):
            raise AssertionError("no unconditional pass is made")

    assert torch.equal(
        drawn(tiny_backbone, policy, Never(), settings), drawn(tiny_backbone, policy, None, settings)
    )


def test_the_policy_itself_is_the_default(tiny_backbone):
    assert SETTINGS.unconditional == "policy" and unconditional_of(tiny_backbone, SETTINGS) is None


def test_the_base_is_a_network_that_no_adapter_touches(tiny_backbone):
    found = unconditional_of(tiny_backbone, replace(SETTINGS, unconditional="base"))
    assert found.network is tiny_backbone.denoiser
    assert found.fingerprint == tiny_backbone.fingerprints["denoiser"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_base_in_half_precision_predicts_as_a_float32_policy_does(tiny_folder, precision):
    backbone = UNetBackbone(str(tiny_folder), dtype="bfloat16")
    base, settings = base_network(backbone, precision), SamplerSettings(3, 5.0, 2, precision=precision)
    policy = backbone.trainable_copy().eval().requires_grad_(False)
    twice = drawn(backbone, policy, policy, settings)
    assert torch.equal(drawn(backbone, policy, base, settings), twice)
    assert base is not backbone.denoiser


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_folder_names_another_policy(tiny_backbone, tmp_path, lora):
    negative = tuned(tiny_backbone, lora, seed=2)
    folder = export_policy(tiny_backbone, negative, tmp_path / "negative", CARD)
    found = unconditional_of(tiny_backbone, replace(SETTINGS, unconditional=str(folder)))
    assert found.fingerprint == policy_fingerprint(tiny_backbone, folder)
    assert has_adapter(found.network) == lora
    policy = tuned(tiny_backbone)
    expected = by_hand(tiny_backbone, policy, load_policy(tiny_backbone, folder), 5.0)
    assert torch.equal(drawn(tiny_backbone, policy, found.network), expected)
    with pytest.raises(InputError, match=r"neither 'unet/config\.json'"):
        unconditional_of(tiny_backbone, replace(SETTINGS, unconditional=str(tmp_path)))


def test_threads_share_policy_and_base(tiny_backbone):
    """Four lanes at once with a LoRA policy: the same bits as one after another."""
    policy = tuned(tiny_backbone, lora=True)
    base = unconditional_of(tiny_backbone, replace(SETTINGS, unconditional="base")).network
    text, seeds = tiny_backbone.encode_prompts(PROMPTS), [[1, 2, 3, 4], [5, 6, 7, 8]]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample_prompts(tiny_backbone, policy, text, seeds, SamplerSettings(4, 5.0, 1), None, base)
        torch.set_num_threads(4)
        settings = SamplerSettings(4, 5.0, 1, parallel="batches")
        shared = sample_prompts(tiny_backbone, policy, text, seeds, settings, None, base)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, shared)
