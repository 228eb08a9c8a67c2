import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from capo.backbones import UNetBackbone
from capo.backbones.finding import pipeline_index
from capo.errors import InputError


@pytest.fixture
def copied(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_folder_without_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"'model_index.json' is missing.*save_pretrained"):
        UNetBackbone(str(tmp_path))


def test_pipeline_of_another_family(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(
        InputError, match="hold a StableDiffusion3Pipeline; this backbone loads StableDiffusionXLPipeline"
    ):
        UNetBackbone(str(copied))


def test_denoiser_of_another_class_than_the_familys_is_named_before_weights_load(copied):
    class Misspelt(UNetBackbone):
        denoiser_class = "UNet2DConditionModl"

    index = pipeline_index(copied, UNetBackbone.pipeline_classes)
    UNetBackbone.check_index(index, str(copied))
    told = r"the class of 'unet' is UNet2DConditionModel there, and UNet2DConditionModl for Misspelt"
    with pytest.raises(InputError, match=told):
        Misspelt.check_index(index, str(copied))
    Misspelt.denoiser_component = "unett"
    with pytest.raises(InputError, match=r"the class of 'unett' is None there"):
        Misspelt.check_index(index, str(copied))


def test_pipeline_with_code_of_its_own(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["pipeline", "Mine"]}))
    (copied / "pipeline.py").write_text("raise RuntimeError('this code must not run')")
    with pytest.raises(InputError, match=r"hold a .*Mine"):
        UNetBackbone(str(copied))


def test_component_with_code_of_its_own(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["mine", "UNet"]}))
    (copied / "unet" / "mine.py").write_text("raise RuntimeError('this code must not run')")
    with pytest.raises(
        InputError, match=r"model_index.json names mine.UNet for 'unet', which is no class of"
    ):
        UNetBackbone(str(copied))


def test_pickled_weights(copied):
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(
        InputError,
        match=r"'vae' has only pickled weights \(diffusion_pytorch_model.bin\).*safe_serialization",
    ):
        UNetBackbone(str(copied))


def test_truncated_weights(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="do not load"):
        UNetBackbone(str(copied))


def test_variant_is_loaded_in_float32(tiny_folder, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    backbone = UNetBackbone(str(tmp_path), variant="fp16")
    expected = pipeline.unet.conv_in.weight.float()
    assert torch.equal(backbone.denoiser.conv_in.weight, expected) and expected.dtype == torch.float32
    with pytest.raises(InputError, match=r"\(variant bf16\) do not load"):
        UNetBackbone(str(tmp_path), variant="bf16")
