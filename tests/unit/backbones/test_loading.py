import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from capo.backbones import MMDiTBackbone, UNetBackbone
from capo.backbones.finding import pipeline_index
from capo.backbones.sampling import SamplerSettings, sample
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
    with pytest.raises(InputError, match=r"files of variant bf16; get the folder again, or give its"):
        UNetBackbone(str(tmp_path), variant="bf16")


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("file", "values", "told"), [
    ("model_index.json", {"vae": []}, r"index.json cannot be read \(vae=\[\]: must be \[library"),
    ("model_index.json", {"vae": ["diffusers"]}, r"\(vae=\['diffusers'\]: must be \[library, class\]"),
    ("model_index.json", {"vae": ["diffusers", "UNet2DConditionModel"]},
     r"vae/config.json cannot be read \(_class_name=AutoencoderKL, and model_index.json has UNet2D"),
    ("text_encoder/config.json", {"num_hidden_layers": 5},
     r"text_encoder': the files do not hold all weights of its config.json \(.* of a CLIPTextModel"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 99},
     r"tokenizer of 'text_encoder' makes up to 99 tokens, and max_position_embeddings=12 in text"),
    ("tokenizer_2/tokenizer_config.json", {"eos_token": "new"}, r"of 'text_encoder_2'.*vocab_size="),
    ("text_encoder/config.json", {"eos_token_id": 99999}, r"eos_token_id=99999 in text_encoder/config.json"),
    ("vae/config.json", {"latents_mean": [0.0, 0.0]}, r"vae/config.json .*latents_mean has 2 numbers"),
])  # fmt: skip
def test_files_that_contradict_each_other(copied, file, values, told):
    changed(copied / file, **values)
    with pytest.raises(InputError, match=told):
        UNetBackbone(str(copied))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "scheduler", "unet"])
def test_a_part_that_is_not_there_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(InputError, match=rf"weights '.*copy' lack {part}; get the folder again"):
        UNetBackbone(str(copied))


def test_weights_of_another_network(copied):
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(copied / "vae" / name, copied / "unet" / name)
    with pytest.raises(InputError, match=r"copy/unet': the files do not hold all weights of its config.json"):
        UNetBackbone(str(copied))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_what_encodes_prompts_is_not_left_out(tiny_folder, part):
    index = pipeline_index(tiny_folder, UNetBackbone.pipeline_classes) | {part: [None, None]}
    with pytest.raises(
        InputError, match=rf"model_index.json has no class for '{part}', which encodes prompts"
    ):
        UNetBackbone.check_index(index, str(tiny_folder))


@pytest.mark.parametrize("sides", [9, [8, 7], 32])
def test_a_size_that_an_mmdit_cannot_draw_is_named(tiny_folders, sides):
    config = json.loads((tiny_folders["sd3"] / "transformer" / "config.json").read_text())
    with pytest.raises(InputError, match=r"sample_size=.* in transformer/config.json: must be a multiple of"):
        MMDiTBackbone.shape_of_latent({"transformer": config | {"sample_size": sides}})


@pytest.mark.parametrize("values", [{"steps_offset": 900}, {"trained_betas": [0.1, 0.2]}])
def test_times_of_sampling_that_the_schedule_lacks(copied, values):
    changed(copied / "scheduler" / "scheduler_config.json", **values)
    backbone = UNetBackbone(str(copied))
    noise, text = torch.zeros(1, *backbone.latent_shape), backbone.encode_prompts(["a"])
    with pytest.raises(InputError, match=r"sampling.steps 2: DDIMScheduler .*correct steps_offset, trained"):
        sample(backbone, backbone.denoiser, text, noise, SamplerSettings(2, 1.0, 1))
