"""The base as it draws: how it is stored, laid out and compiled, and what training still gets of it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from capo import objectives
from capo.backbones import MMDiTBackbone, UNetBackbone
from capo.backbones.drawing import Drawing
from capo.backbones.sampling import SamplerSettings, candidate_noise, sample
from capo.backbones.unconditional import unconditional_of
from capo.data.generation import ImageGenerator
from capo.module import Execution, PreferenceModule, Weighting

PROMPTS = ["a red circle", "a blue square"]
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
KINDS = {"sdxl": UNetBackbone, "sd15": UNetBackbone, "sd3": partial(MMDiTBackbone, sequence_length=9)}


@pytest.fixture
def fresh(tiny_folders):
    """Makes a backbone of its own, since `prepare` changes it."""

    def make(family="sdxl", **options):
        return KINDS[family](str(tiny_folders[family]), **options)

    return make


class Casts(TorchDispatchMode):
    """Counts the casts of a network's weights."""

    def __init__(self, network):
        super().__init__()
        self.weights, self.count = {p.data_ptr() for p in network.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        casts = torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default  # inside inference mode, and outside
        if function in casts and args[0].data_ptr() in self.weights and found.dtype != args[0].dtype:
            self.count += 1
        return found


def latents(backbone, settings, network=None, unconditional=None):
    noise = candidate_noise([1, 2], backbone.latent_shape)
    text = backbone.encode_prompts(PROMPTS)
    return sample(backbone, network or backbone.denoiser, text, noise, settings, unconditional=unconditional)


def casts(backbone, settings):
    with Casts(backbone.denoiser) as seen:
        latents(backbone, settings)
    return seen.count


@pytest.mark.parametrize("family", list(KINDS))
@pytest.mark.parametrize("precision", list(HALF))
def test_a_prepared_base_draws_the_same_bits_and_casts_no_weight(fresh, tiny_backbones, family, precision):
    settings = SamplerSettings(3, 5.0, 2, precision=precision)
    plain, stored = tiny_backbones[family], fresh(family).prepare(settings.drawing)
    assert torch.equal(latents(plain, settings), latents(stored, settings))
    products = sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in plain.denoiser.modules())
    assert casts(plain, settings) >= 3 * products  # every weight, in every pass
    assert casts(stored, settings) == 0
    for module in stored.denoiser.modules():
        kept = HALF[precision] if isinstance(module, (nn.Linear, nn.Conv2d)) else torch.float32
        assert all(p.dtype == kept for p in module.parameters(recurse=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_loaded_in_half_precision_draws_the_same_bits_too(fresh, dtype):
    settings = SamplerSettings(3, 5.0, 2, precision="bf16-mixed")
    plain, stored = fresh("sd3", dtype=dtype), fresh("sd3", dtype=dtype).prepare(settings.drawing)
    assert torch.equal(latents(plain, settings), latents(stored, settings))


@pytest.mark.parametrize(
    "drawing",
    [Drawing("bf16-mixed"), Drawing("16-mixed"), Drawing(channels_last=True), Drawing(compile=True)],
)
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_policy_starts_from_the_weights_that_were_loaded(fresh, tiny_backbones, family, drawing):
    plain = tiny_backbones[family].denoiser.state_dict()
    policy = fresh(family).prepare(drawing).trainable_copy()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.parameters())
    assert all(torch.equal(value, plain[name]) for name, value in policy.state_dict().items())
    assert not any(getattr(part, "_compiled_call_impl", None) for part in policy.modules())


def test_a_policy_starts_from_the_variant_that_was_loaded(fresh, tmp_path):
    fresh().pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    backbone = UNetBackbone(str(tmp_path), variant="fp16")
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    policy = backbone.prepare(Drawing("bf16-mixed")).trainable_copy()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("drawn", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("trained", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_has_no_second_copy_of_a_base_that_is_stored_as_its_reference(
    fresh, tiny_backbone, drawn, trained
):
    backbone = fresh().prepare(Drawing(drawn))
    module = PreferenceModule(
        backbone,
        partial(objectives.capo, beta=1.0),
        lr=1e-3,
        warm_up=1,
        weighting=Weighting(),
        execution=Execution(trained),
    )
    with module.reference() as reference:
        assert (reference is backbone.denoiser) == (drawn == trained)
        expected = tiny_backbone.reference(trained).state_dict()
        assert all(
            torch.equal(value, expected[name]) and value.dtype == expected[name].dtype
            for name, value in reference.state_dict().items()
        )


def test_a_compiled_base_is_not_the_reference(fresh):
    backbone = fresh().prepare(Drawing("bf16-mixed", compile=True))
    reference = backbone.reference("bf16-mixed")
    assert reference is not backbone.denoiser
    assert not any(getattr(part, "_compiled_call_impl", None) for part in reference.modules())


def test_a_base_is_prepared_for_one_way_of_drawing(fresh):
    backbone = fresh().prepare(Drawing("bf16-mixed"))
    assert backbone.prepare(Drawing("bf16-mixed")) is backbone
    with pytest.raises(ValueError, match="prepared for"):
        backbone.prepare(Drawing("16-mixed"))


@pytest.mark.parametrize("precision", list(HALF))
def test_the_base_beside_a_policy_is_the_one_that_is_stored(fresh, tiny_backbone, precision):
    settings = SamplerSettings(3, 5.0, 2, precision=precision, unconditional="base")
    plain, stored = tiny_backbone, fresh().prepare(settings.drawing)
    found = unconditional_of(stored, settings).network
    assert found is stored.denoiser
    policy = plain.trainable_copy().eval().requires_grad_(False)
    with torch.no_grad():
        policy.conv_out.weight.mul_(1.5)
    expected = latents(plain, settings, policy, plain.denoiser)
    assert torch.equal(latents(stored, settings, policy, found), expected)


def test_options_of_drawing_act_on_the_network_and_are_in_the_fingerprint_where_they_are_on(
    fresh, tiny_backbone
):
    settings = SamplerSettings(2, 5.0, 2)
    known = {ImageGenerator.base(tiny_backbone, settings).fingerprint}
    for option in ("channels_last", "compile"):
        changed = replace(settings, **{option: True})
        backbone = fresh().prepare(changed.drawing)
        weight = backbone.denoiser.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (option == "channels_last")
        compiled = [
            part for part in backbone.denoiser.modules() if getattr(part, "_compiled_call_impl", None)
        ]
        assert bool(compiled) == (option == "compile")
        known.add(ImageGenerator.base(backbone, changed).fingerprint)
        if option == "channels_last":  # the same images but for rounding
            torch.testing.assert_close(latents(backbone, changed), latents(tiny_backbone, settings))
    assert len(known) == 3
