import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from capo.backbones import UNetBackbone
from capo.backbones.sampling import SamplerSettings
from capo.cli.resolvers import shipped
from capo.errors import InputError
from capo.preflight.model_check import (
    PLACES,
    Check,
    check_denoising,
    check_known,
    check_sample,
    check_vae,
    denoising_at,
    photograph,
    pixels_of,
    possible_targets,
    write_checks,
)
from capo.shapes.prompts import known_scenes

WEIGHTS = shipped("unet")


def looked_at(backbone, known):
    """VAE and denoising check of a backbone."""
    vae, latents = check_vae(backbone, known)
    captions = [caption for _, caption in known]
    return vae, check_denoising([denoising_at(backbone, latents, captions, place, 8) for place in PLACES])


@pytest.fixture
def broken(tmp_path):
    """A copy of the shapes model in which something can be made wrong."""
    shutil.copytree(WEIGHTS, tmp_path / "unet")
    return tmp_path / "unet"


def test_the_shapes_model_passes(tmp_path):
    backbone, known = UNetBackbone(WEIGHTS), known_scenes()
    vae, denoising = looked_at(backbone, known)
    assert vae.passed and denoising.passed and not vae.remedy + denoising.remedy
    picture = check_sample(
        backbone, known[0][1], SamplerSettings(3, 4.0, 1), tmp_path / "check" / "sample.png"
    )
    assert picture.passed and Image.open(tmp_path / "check" / "sample.png").size == (64, 64)


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_wrong_scaling_factor_is_named(broken, factor):
    config = json.loads((broken / "vae/config.json").read_text())
    config["scaling_factor"] *= factor
    (broken / "vae/config.json").write_text(json.dumps(config))
    vae, _ = check_vae(UNetBackbone(str(broken)), known_scenes())
    assert not vae.passed and "scaling_factor or shift_factor" in vae.remedy


def test_exchanged_text_encoders_are_named(broken):
    (broken / "text_encoder").rename(broken / "kept")
    (broken / "text_encoder_2").rename(broken / "text_encoder")
    (broken / "kept").rename(broken / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2': the files do not hold all weights"):
        UNetBackbone(str(broken))


def test_another_text_encoder_is_named():
    backbone = UNetBackbone(WEIGHTS)
    words = backbone.text_encoders[0].get_input_embeddings().weight
    words.data = words.flip(0)
    vae, denoising = looked_at(backbone, known_scenes())
    assert vae.passed and not denoising.passed and "text_encoder" in denoising.remedy


def test_a_wrong_prediction_type_is_named(monkeypatch):
    """The same denoiser, as if trained to predict the noise, eps = alpha v + sigma x_t."""
    backbone = UNetBackbone(WEIGHTS)
    of_velocity, alphas_cumprod = backbone.denoiser.forward, backbone.scheduler().alphas_cumprod

    def of_noise(sample, timestep, **options):
        abar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return (abar.sqrt() * of_velocity(sample, timestep, **options)[0] + (1 - abar).sqrt() * sample,)

    monkeypatch.setattr(backbone.denoiser, "forward", of_noise)
    vae, denoising = looked_at(backbone, known_scenes())
    assert vae.passed and not denoising.passed and "the denoiser predicts the noise, not" in denoising.remedy


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3", "sd3_bare"])
def test_random_weights_fail_by_name(tiny_backbones, name, tmp_path):
    vae, denoising = looked_at(tiny_backbones[name], photograph())
    assert (
        not vae.passed
        and not denoising.passed
        and (vae.name, denoising.name) == ("VAE round trip", "denoising error")
    )
    assert check_sample(
        tiny_backbones[name], "a red circle", SamplerSettings(2, 3.0, 1), tmp_path / "sample.png"
    ).passed


def test_a_latent_that_is_not_finite_is_said(tiny_folder, tmp_path):
    backbone = UNetBackbone(str(tiny_folder))
    with torch.no_grad():
        backbone.denoiser.conv_out.bias.fill_(math.nan)
    found = check_sample(backbone, "red", SamplerSettings(2, 1.0, 1), tmp_path / "sample.png")
    assert not found.passed and "not finite" in found.found and not (tmp_path / "sample.png").exists()


@pytest.mark.parametrize(
    "known",
    [
        None,
        "abc",
        [],
        [Image.new("RGB", (4, 4))],
        [("a circle", Image.new("RGB", (4, 4)))],
        [["circle"]],
        [7],
    ],
    ids=["nothing", "text", "empty", "pictures", "the other way round", "captions", "numbers"],
)
def test_what_is_no_list_of_pictures_with_captions_is_named(known):
    message = r"^model\.known_images: mine returned .*; it must return a list .*\(PIL image, caption"
    with pytest.raises(InputError, match=message):
        check_known("model.known_images: mine", known)
    check_known("", known_scenes(2)), check_known("", photograph())


WHITE = {"L": 255, "RGB": (255, 255, 255)}


def test_pictures_are_cut_to_the_middle():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255  # the middle square is white
    [cut] = pixels_of([(Image.fromarray(wide), "")], (4, 4))
    assert cut.shape == (3, 4, 4) and (cut == 1).all()
    gray, colored = (
        pixels_of([(Image.new(mode, (4, 4), white), "")], (4, 4)) for mode, white in WHITE.items()
    )
    assert torch.equal(gray, colored)


def test_possible_targets_by_hand():
    # log-SNR 0: alpha^2 = sigma^2 = 1/2; x = 1, eps = 3: v = (3 - 1) / sqrt(2), the flow's velocity 3 - 1
    x, noise = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    found = {name: value.item() for name, value in possible_targets(x, noise, torch.zeros(1)).items()}
    assert found == pytest.approx({"the noise": 3, "the image": 1, "v": 2 / 2**0.5, "a flow's velocity": 2})


def test_findings_are_written(tmp_path):
    write_checks([Check("a", True, "b"), Check("c", False, "d", "e")], tmp_path / "check.json")
    assert json.loads((tmp_path / "check.json").read_text())[1] == {
        "name": "c",
        "passed": False,
        "found": "d",
        "remedy": "e",
    }
