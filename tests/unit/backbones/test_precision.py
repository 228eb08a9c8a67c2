"""The frozen side under autocast: the bits of the float32 policy, in half the memory."""

import pytest
import torch
from torch import nn

from capo.backbones import UNetBackbone
from capo.backbones.lora import add_lora, merged
from capo.backbones.precision import half_stored, marked_as_trained

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def prediction(backbone, network, dtype, autocast=True):
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn((2, *backbone.latent_shape), generator=draw)
    times = backbone.timesteps(torch.tensor([0.2, 0.8]), "uniform")
    text = backbone.encode_prompts(["a red circle", "a blue square"])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        return backbone.predict(network, noisy, times, text)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sd15"])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_a_half_reference_is_bit_equal_to_the_policy(tiny_backbones, family, precision):
    backbone = tiny_backbones[family]
    reference = backbone.reference(precision)
    policy = backbone.trainable_copy()
    dtype = DTYPES[precision]
    assert torch.equal(prediction(backbone, reference, dtype), prediction(backbone, policy, dtype))
    assert not torch.equal(
        prediction(backbone, policy, dtype).float(), prediction(backbone, policy, dtype, autocast=False)
    )
    for module in reference.modules():
        kept = dtype if isinstance(module, (nn.Linear, nn.Conv2d)) else torch.float32
        assert all(p.dtype == kept and not p.requires_grad for p in module.parameters(recurse=False))


def test_without_autocast_a_float32_base_is_its_own_reference(tiny_backbone, tiny_folder):
    assert tiny_backbone.reference("32-true") is tiny_backbone.denoiser
    half = UNetBackbone(str(tiny_folder), dtype="float16")
    assert {p.dtype for p in half.reference("32-true").parameters()} == {torch.float32}
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.float16}


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_half_stored_lora_policy_computes_what_a_float32_one_does(tiny_backbones, family):
    """Under autocast, bit for bit.

    Its adapter stays float32, and merging goes into the base as it was loaded.
    """
    backbone, lora = (
        tiny_backbones[family],
        {"rank": 2, "alpha": 4, "targets": tiny_backbones[family].lora_targets},
    )
    whole = add_lora(backbone.trainable_copy(), **lora)
    half = add_lora(half_stored(backbone.trainable_copy(), "bf16-mixed"), **lora)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one, other in zip(whole.parameters(), half.parameters(), strict=True):
            if one.requires_grad:
                one.copy_(torch.randn(one.shape, generator=draw) * 0.3)
                other.copy_(one)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(
        prediction(backbone, whole, torch.bfloat16), prediction(backbone, half, torch.bfloat16)
    )
    assert sum(p.nbytes for p in half.parameters()) < 0.75 * sum(p.nbytes for p in whole.parameters())
    for one, other in zip(
        *(merged(policy, backbone.trainable_copy()).parameters() for policy in (whole, half)), strict=True
    ):
        assert torch.equal(one, other)


def test_marked_weights_round_as_trained_ones():
    """A linear layer after a permutation, as in SDXL's attention blocks.

    On AVX-512 a frozen copy differs in the last bits.
    """
    draw = torch.Generator().manual_seed(0)
    trained = nn.Linear(16, 16)
    frozen = nn.Linear(16, 16).requires_grad_(False)
    frozen.load_state_dict(trained.state_dict())
    inputs = [
        torch.randn((8, 16, 2, 2), generator=draw).permute(0, 2, 3, 1).reshape(8, 4, 16) for _ in range(8)
    ]
    with torch.no_grad(), marked_as_trained(frozen):
        assert all(torch.equal(trained(x), frozen(x)) for x in inputs)
        assert all(p.requires_grad for p in frozen.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
