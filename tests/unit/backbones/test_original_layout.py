"""A whole model in one file: the names that other programs load, and what diffusers reads back from it."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file
from torch import nn

from capo.backbones.export import export_policy, load_policy
from capo.backbones.lora import COMFYUI_FILE, merged
from capo.backbones.model_card import ModelCard, write_card
from capo.backbones.original_layout import marks, original_vae
from capo.backbones.saving import CHECKPOINT_FILE, original_weights
from capo.preflight.architecture import published
from fixtures import ROOT
from fixtures.foreign_names import RECORDED
from fixtures.policies import tuned

CARD = ModelCard(objective="capo", data="8 prompts of nowhere")
PUBLISHED = json.loads((ROOT / "tests/fixtures/original_layout.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_diffusers_reads_every_weight_back_from_the_file(tiny_backbones, tmp_path, name, lora):
    backbone = tiny_backbones[name]
    policy = tuned(backbone, lora)
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD, checkpoint=True)
    pipe = type(backbone.pipeline).from_single_file(
        str(folder / CHECKPOINT_FILE), config=str(backbone.folder), dtype=torch.float16, local_files_only=True
    )
    parts = {part: one for part, one in backbone.pipeline.components.items() if isinstance(one, nn.Module)}
    parts["unet"] = merged(policy, backbone.trainable_copy()) if lora else policy
    assert len(parts) == {"sdxl": 4, "sd15": 3}[name]
    for part, module in parts.items():
        found = getattr(pipe, part).state_dict()
        assert found.keys() == module.state_dict().keys()
        assert all(torch.equal(value.half(), found[key]) for key, value in module.state_dict().items()), part
    weights = load_file(folder / CHECKPOINT_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    # the policy beside it is what it would be without the file
    assert (folder / COMFYUI_FILE).is_file() == lora and load_policy(backbone, folder).dtype == torch.float32


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_names_and_shapes_are_those_of_the_published_model(model):
    plan, recorded = published(model), PUBLISHED[model]
    second = plan.module("text_encoder_2") if "text_encoder_2" in plan.configs else None
    weights = original_weights(plan.denoiser(), plan.vae(), plan.module("text_encoder"), second)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    assert {name: shapes.get(name) for name in recorded["shapes"]} == recorded["shapes"]
    counts = {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in recorded["counts"]}
    assert counts == recorded["counts"] and len(shapes) == sum(counts.values())
    for _, place, blocks, width in RECORDED["unets"][model]["attentions"]:
        query = f"model.diffusion_model.{place}.transformer_blocks.{blocks - 1}.attn1.to_q.weight"
        assert shapes[query] == [width, width]


def test_the_attention_of_a_vae_becomes_convolutions_and_back():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
    )
    weights = vae.state_dict()
    written = original_vae(weights)
    assert written["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (8, 8, 1, 1)
    found = convert_ldm_vae_checkpoint(written, vae.config)
    assert found.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in found.items())


def test_what_a_network_predicts_is_marked():
    assert marks({"prediction_type": "epsilon"}) == {}
    found = marks({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    assert {name: tensor.numel() for name, tensor in found.items()} == {"v_pred": 0, "ztsnr": 0}


def test_equal_policies_give_equal_bytes(tiny_backbone, tmp_path):
    one, other = (
        export_policy(tiny_backbone, tuned(tiny_backbone, lora=True), tmp_path / name, CARD, checkpoint=True)
        for name in ("a", "b")
    )
    assert (one / CHECKPOINT_FILE).read_bytes() == (other / CHECKPOINT_FILE).read_bytes()


def test_card_says_where_the_file_goes(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tuned(tiny_backbone), tmp_path / "policy", CARD, checkpoint=True)
    write_card(tiny_backbone, folder, CARD)  # as after an evaluation
    text = (folder / "README.md").read_text()
    assert f"`{CHECKPOINT_FILE}` is the whole tuned model" in text and COMFYUI_FILE not in text
