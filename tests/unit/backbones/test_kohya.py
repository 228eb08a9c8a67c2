"""An adapter in the names of other programs: what they look for, and the strength that they give it."""

import re

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from capo.backbones.export import export_policy
from capo.backbones.kohya import kohya_names
from capo.backbones.lora import ADAPTER, COMFYUI_FILE, add_lora, merged
from capo.backbones.model_card import ModelCard, write_card
from capo.backbones.sampling import SamplerSettings, sample_prompts
from capo.preflight.architecture import published
from fixtures.foreign_names import RECORDED, comfyui_layers
from fixtures.policies import PROMPTS, SEEDS, assert_adapters_latents, plain_latents

CARD = ModelCard(objective="capo", data="8 prompts of nowhere")
RANK, ALPHA = 2, 5  # alpha is not the rank


def policy_of(backbone):
    policy = add_lora(backbone.trainable_copy(), rank=RANK, alpha=ALPHA, targets=backbone.lora_targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def patched_as_by_comfyui(weights, file, prefix):
    """Weights W + alpha / rank * up down of each layer that a name in the file is known for.

    Raises KeyError for a name that no layer has.
    """
    layers = {
        f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}": name
        for name in weights
        if name.endswith(".weight")
    }
    patched = {name: weight.clone() for name, weight in weights.items()}
    for name in {name.split(".")[0] for name in file}:
        up, down, alpha = (file[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        patched[layers[name]] += alpha.item() / down.shape[0] * up @ down
    return patched


@pytest.mark.parametrize(
    "model, tensors",
    # SDXL: 70 transformer blocks of 8 layers; SD1.5: 16. SD3: 24 blocks of 8 less one layer of the last one;
    # SD3.5: 4 more in 13 blocks.
    [("sdxl", 3 * 560), ("sd15", 3 * 128), ("sd3", 3 * 191), ("sd35_medium", 3 * 243)],
)
def test_names_and_shapes_are_those_that_comfyui_looks_for(model, tensors):
    plan = published(model)
    with torch.device("meta"):
        policy = add_lora(plan.denoiser(), rank=4, alpha=8, targets=plan.family.lora_targets)
    adapter = get_peft_model_state_dict(policy, adapter_name=ADAPTER)
    found = {
        name: tuple(tensor.shape)
        for name, tensor in kohya_names(adapter, plan.family.kohya_prefix, 8).items()
    }
    expected = {}
    for name, (out, takes) in comfyui_layers(model).items():
        expected |= {
            f"{name}.lora_down.weight": (4, takes),
            f"{name}.lora_up.weight": (out, 4),
            f"{name}.alpha": (),
        }
    assert found == expected and len(found) == tensors


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_the_web_ui_finds_the_same_layers(model):
    # its rule (convert_diffusers_name_to_compvis): three rows of the layout for each block of a resolution
    for name, place, *_ in RECORDED["unets"][model]["attentions"]:
        side, block, row = re.fullmatch(
            r"lora_unet_(down|mid|up)_(?:blocks_(\d+)|block)_attentions_(\d+)", name
        ).groups()
        rows = 3 * int(block or 0) + int(row)
        expected = {
            "down": f"input_blocks.{1 + rows}.1",
            "mid": "middle_block.1",
            "up": f"output_blocks.{rows}.1",
        }
        assert place == expected[side]


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3", "sd3_bare"])
def test_comfyui_gives_the_adapter_our_strength(tiny_backbones, tmp_path, name):
    backbone = tiny_backbones[name]
    policy = policy_of(backbone)
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD)
    patched = patched_as_by_comfyui(
        backbone.denoiser.state_dict(), load_file(folder / COMFYUI_FILE), backbone.kohya_prefix
    )
    ours = merged(policy, backbone.trainable_copy()).state_dict()
    assert patched.keys() == ours.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(patched[key], weight, rtol=1e-6, atol=1e-7)
    moved = sum(not torch.equal(ours[key], weight) for key, weight in backbone.denoiser.state_dict().items())
    assert 3 * moved == len(load_file(folder / COMFYUI_FILE))


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_diffusers_loads_kohyas_names_with_our_latents(tiny_backbones, tmp_path, name):
    backbone = tiny_backbones[name]
    policy = policy_of(backbone)
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD)
    pipe = type(backbone.pipeline).from_pretrained(backbone.folder)
    pipe.load_lora_weights(folder, weight_name=COMFYUI_FILE)

    def latents_of(denoiser):
        text = backbone.encode_prompts(PROMPTS)
        return sample_prompts(backbone, denoiser, text, SEEDS, SamplerSettings(3, 5.0, 2)).flatten(0, 1)

    assert_adapters_latents(plain_latents(pipe), latents_of(policy), latents_of(backbone.denoiser))


def test_layers_of_a_convolution_keep_their_kernel():
    layers = {
        "conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3),
        "conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
    }
    found = kohya_names(layers, "lora_unet", 0.5)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (8, 2, 1, 1),
        "lora_unet_conv_in.alpha": (),
    }
    assert found["lora_unet_conv_in.alpha"].item() == 0.5


def test_equal_policies_give_equal_bytes(tiny_backbone, tmp_path):
    one, other = (
        export_policy(tiny_backbone, policy_of(tiny_backbone), tmp_path / name, CARD) for name in ("a", "b")
    )
    assert (one / COMFYUI_FILE).read_bytes() == (other / COMFYUI_FILE).read_bytes()


@pytest.mark.parametrize("name, web_ui", [("sdxl", True), ("sd3", False)])
def test_card_says_where_the_file_goes(tiny_backbones, tmp_path, name, web_ui):
    backbone = tiny_backbones[name]
    folder = export_policy(backbone, policy_of(backbone), tmp_path / "policy", CARD)
    write_card(backbone, folder, CARD)  # as after an evaluation
    text = (folder / "README.md").read_text()
    assert f"Put `{COMFYUI_FILE}`" in text and "ComfyUI's `models/loras`" in text
    assert ("AUTOMATIC1111" in text) == web_ui
    full = export_policy(backbone, policy_of(backbone), tmp_path / "full", CARD, full=True)
    assert "ComfyUI" not in (full / "README.md").read_text() and not (full / COMFYUI_FILE).exists()
