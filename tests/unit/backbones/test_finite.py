"""Weights that are not finite are named, in the place of what they spoil."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from capo.backbones import UNetBackbone
from capo.backbones.loading import load_vae
from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.errors import InputError


@pytest.fixture
def spoiled(tiny_folder, tmp_path):
    """Copy the tiny model, with one value of the first tensor of a component that is not finite."""

    def spoil(component, value=float("nan")):
        folder = shutil.copytree(tiny_folder, tmp_path / component)
        [file] = (folder / component).glob("*.safetensors")
        tensors = load_file(file)
        tensors[min(tensors)].view(-1)[-1] = value
        save_file(tensors, file, metadata={"format": "pt"})
        return folder, min(tensors)

    return spoil


def test_a_vae_is_refused_where_it_is_loaded(spoiled):
    folder, name = spoiled("vae", float("inf"))
    with pytest.raises(InputError, match=rf"/vae: its tensor {name} holds values that are not finite; get"):
        UNetBackbone(str(folder))
    with pytest.raises(InputError, match=f"/vae: its tensor {name} holds"):
        load_vae(str(folder / "vae"), None, torch.float32)


def test_another_vae_is_whole_and_its_configuration_is_read(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latents_std": [0.0]}))
    with pytest.raises(InputError, match=r"vae/config\.json cannot be read \(latents_std=\[0\.0\]: must be"):
        load_vae(str(folder), None, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"/vae': the files do not hold all weights of its config\.json"):
        load_vae(str(folder), None, torch.float32)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_spoil_latents_are_named_when_they_are_drawn(spoiled, component, tmp_path):
    folder, name = spoiled(component)
    generator = ImageGenerator.base(
        UNetBackbone(str(folder)), SamplerSettings(steps=1, guidance=1.0, batch=1)
    )
    spec = PoolSpec(tmp_path / "pools", "tiny", "train", 0, [make_prompt("a circle")], 2)
    with pytest.raises(
        InputError, match=f"/{component}: its tensor .*{name} holds values that are not finite"
    ):
        fill_pool(spec, generator, [], progress=False)


def test_weights_that_are_finite_pass_and_a_policy_is_told_from_the_base(tiny_backbone):
    tiny_backbone.check_weights(tiny_backbone.denoiser)
    policy = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(policy.weight, float("nan"))
    with pytest.raises(InputError, match="the policy's unet: its tensor weight holds"):
        tiny_backbone.check_weights(policy)
