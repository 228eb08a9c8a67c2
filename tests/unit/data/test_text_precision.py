"""Text embeddings in half the space, where sampling and training round them to half precision anyway."""

import pytest
import torch
from safetensors import safe_open

from capo.backbones import MMDiTBackbone
from capo.backbones.lora import add_lora
from capo.backbones.sampling import SamplerSettings
from capo.cli.build import sampler_settings
from capo.cli.plan import request_of
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool, open_pool, stages_of
from capo.data.pool import PoolReader
from capo.data.prompts import make_prompt
from capo.preflight.plan import disk_space
from fixtures.configuration import composed

PROMPTS = [make_prompt(text) for text in ("a red circle", "a blue square", "the green triangle")]
PRECISION = "bf16-mixed"
WHOLE = SamplerSettings(steps=2, guidance=3.0, batch=3, precision=PRECISION)
HALF = SamplerSettings(steps=2, guidance=3.0, batch=3, precision=PRECISION, text_dtype=torch.bfloat16)


def spec_in(root):
    return PoolSpec(root, "tiny", "train", 5, PROMPTS, candidates=2, prompts_per_shard=2)


def filled(root, backbone, settings):
    return fill_pool(spec_in(root), ImageGenerator.base(backbone, settings), progress=False)


def text_dtypes(pool, row=0):
    with safe_open(pool.folder / "text" / f"{row:05d}.safetensors", "pt") as file:
        names = file.keys()  # it is no mapping
        return {name: file.get_tensor(name).dtype for name in names}, file.metadata()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd3"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("16", torch.float16)])
def test_rounded_text_changes_no_bit_of_a_prediction(tiny_backbones, family, precision, dtype, lora):
    backbone = tiny_backbones[family]
    network = backbone.trainable_copy()
    if lora:
        network = add_lora(network, rank=2, alpha=4, targets=backbone.lora_targets)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.1)
    text = backbone.encode_prompts([prompt.text for prompt in PROMPTS])
    if "time_ids" in text:
        text["time_ids"] = torch.full_like(text["time_ids"], 1023)  # 1024 in bfloat16
    rounded = {
        name: value.to(dtype) if name in backbone.projected_text else value for name, value in text.items()
    }
    assert set(text) - set(backbone.projected_text) <= {"time_ids"}
    assert not torch.equal(rounded["prompt_embeds"].float(), text["prompt_embeds"])
    noisy = torch.randn((3, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    times = backbone.timesteps(torch.tensor([0.2, 0.5, 0.8]), "uniform")
    with torch.no_grad(), torch.autocast("cpu", dtype):
        found, expected = (backbone.predict(network, noisy, times, words) for words in (rounded, text))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_pool_with_half_text_has_the_same_latents(tiny_backbones, family, tmp_path):
    """And the same name: nothing that determines a latent has changed."""
    backbone = tiny_backbones[family]
    whole, half = (
        filled(tmp_path / name, backbone, settings) for name, settings in {"a": WHOLE, "b": HALF}.items()
    )
    assert whole.folder.name == half.folder.name
    for shard in whole.shards(2):
        assert torch.equal(whole.read_latents(shard), half.read_latents(shard))
    (before, plain), (after, header) = text_dtypes(whole), text_dtypes(half)
    assert set(before.values()) == {torch.float32} and "rounded_to" not in plain
    assert header["rounded_to"] == "bfloat16"
    projected = dict.fromkeys(backbone.projected_text, torch.bfloat16)
    assert after == before | projected
    text, read = PoolReader(whole).text(1), PoolReader(half).text(1)
    for name, value in text.items():
        assert torch.equal(read[name], value.to(after[name]))


def test_text_that_was_rounded_is_encoded_again_for_who_needs_all_of_it(tiny_backbone, tmp_path):
    half = filled(tmp_path, tiny_backbone, HALF)
    latents = {path: path.stat().st_mtime_ns for path in half.folder.glob("latents/*")}
    assert [half.has_text(row, rounded=torch.bfloat16) for row in (0, 1)] == [True, True]
    assert not any(half.has_text(0, rounded=other) for other in (None, torch.float16))
    again = filled(tmp_path, tiny_backbone, WHOLE)
    assert set(text_dtypes(again)[0].values()) == {torch.float32}
    assert {path: path.stat().st_mtime_ns for path in again.folder.glob("latents/*")} == latents
    # and stays: what was stored as encoded serves every precision
    stamps = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*") if path.is_file()}
    filled(tmp_path, tiny_backbone, HALF)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_encoders_in_half_precision_are_stored_as_they_are(tiny_folders, tmp_path):
    backbone = MMDiTBackbone(str(tiny_folders["sd3"]), name="sd3", sequence_length=9, dtype="float16")
    pool = open_pool(spec_in(tmp_path), ImageGenerator.base(backbone, HALF))
    stage = stages_of(pool, spec_in(tmp_path), ImageGenerator.base(backbone, HALF), [], False)[0]
    for shard in stage.todo():
        stage.run(shard, lambda count: None)
    dtypes, header = text_dtypes(pool)
    assert set(dtypes.values()) == {torch.float16} and "rounded_to" not in header
    assert pool.has_text(0)


def test_disk_space_counts_the_stored_dtype(tiny_backbones, tmp_path):
    """SD3's text is 333 x 4096 and 2048 numbers: 5464064 bytes in float32 and half of it in bfloat16."""
    backbone, needed = tiny_backbones["sd3"], []
    for settings in (WHOLE, HALF):
        generator = ImageGenerator.base(backbone, settings)
        pool = open_pool(spec_in(tmp_path), generator)
        needed.append(stages_of(pool, spec_in(tmp_path), generator, [], False)[0].bytes_missing())
    assert needed[0] == 2 * needed[1] > 0
    counts = dict.fromkeys(("train", "validation", "test"), 1)
    half, whole, narrow = (
        disk_space(request_of(composed("model=sd3", *changed), counts))["pools"]["train"]
        for changed in ([], ["trainer.precision=32-true"], ["model.backbone.dtype=float16"])
    )
    assert whole - half == (333 * 4096 + 2048) * 2
    assert narrow == half


def test_text_is_rounded_where_sampling_and_training_round_it():
    assert sampler_settings(composed("model=sdxl")).text_dtype == torch.bfloat16
    assert sampler_settings(composed("model=sdxl", "trainer.precision=32-true")).text_dtype is None
    assert sampler_settings(composed("model=sdxl", "sampling.precision=16-mixed")).text_dtype is None
    assert sampler_settings(composed()).text_dtype is None
