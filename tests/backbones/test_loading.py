import hashlib
import json
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from capo.backbones import UNetBackbone
from capo.errors import InputError


@pytest.fixture
def copied(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def hub_cache(folder, cache):
    """`folder` as the hub's cache would hold it under the id tiny/shapes: snapshot of links into blobs."""
    repository = cache / "models--tiny--shapes"
    snapshot = repository / "snapshots" / ("c" * 40)
    for path in sorted(folder.rglob("*.*")):
        content, link = path.read_bytes(), snapshot / path.relative_to(folder)
        sha256 = path.suffix == ".safetensors"  # large files; small ones go by git's own hash
        blob = repository / "blobs" / (hashlib.sha256 if sha256 else hashlib.sha1)(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)


def test_hub_id_is_loaded_from_the_cache_without_network(tiny_folder, tiny_backbone, tmp_path, monkeypatch):
    hub_cache(tiny_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = UNetBackbone("tiny/shapes")
    assert backbone.fingerprints == tiny_backbone.fingerprints
    assert torch.equal(backbone.denoiser.conv_in.weight, tiny_backbone.denoiser.conv_in.weight)


def test_hub_id_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match="hub repository 'nobody/nothing'.*revision abc.*hf download nobody/nothing"
    ):
        UNetBackbone("nobody/nothing", revision="abc")


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=f"no such folder.*{tmp_path}/nothing.*model_index.json"):
        UNetBackbone(str(tmp_path / "nothing"))


def test_folder_without_pipeline(tmp_path):
    with pytest.raises(InputError, match="'model_index.json' is missing.*save_pretrained"):
        UNetBackbone(str(tmp_path))


def test_pipeline_of_another_family(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(
        InputError, match="hold a StableDiffusion3Pipeline; this backbone loads StableDiffusionXLPipeline"
    ):
        UNetBackbone(str(copied))


def test_pipeline_with_code_of_its_own(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["pipeline", "Mine"]}))
    (copied / "pipeline.py").write_text("raise RuntimeError('this code must not run')")
    with pytest.raises(InputError, match="hold a .*Mine"):
        UNetBackbone(str(copied))


def test_component_with_code_of_its_own(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["mine", "UNet"]}))
    (copied / "unet" / "mine.py").write_text("raise RuntimeError('this code must not run')")
    with pytest.raises(InputError, match="do not load"):
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
