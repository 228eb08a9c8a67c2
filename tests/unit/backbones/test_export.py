import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from capo.backbones import UNetBackbone
from capo.backbones.export import export_policy, load_policy, policy_fingerprint
from capo.backbones.lora import add_lora, has_adapter, merged
from capo.backbones.model_card import ModelCard, write_card
from capo.backbones.sampling import SamplerSettings, sample_prompts
from capo.backbones.saving import save
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import candidate_seed, make_prompt
from capo.errors import InputError
from fixtures.policies import PROMPTS, SEEDS, assert_adapters_latents, plain_latents, run_readme

CARD = ModelCard(objective="capo", data="8 prompts of nowhere", settings={"beta": 30})
SETTINGS = SamplerSettings(3, 5.0, 2)


def tuned(denoiser):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def latents_of(backbone, denoiser):
    return sample_prompts(backbone, denoiser, backbone.encode_prompts(PROMPTS), SEEDS, SETTINGS).flatten(0, 1)


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_full_policy_loads_by_the_readmes_line_and_gives_our_latents(tiny_backbone, tmp_path, monkeypatch):
    policy = tuned(tiny_backbone.trainable_copy())
    folder = export_policy(tiny_backbone, policy, tmp_path / "policy", CARD)
    ours = latents_of(tiny_backbone, policy)
    assert torch.equal(plain_latents(run_readme(folder, monkeypatch)), ours)
    assert torch.equal(plain_latents(StableDiffusionXLPipeline.from_pretrained(folder)), ours)
    assert not torch.equal(latents_of(tiny_backbone, tiny_backbone.denoiser), ours)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    loaded = load_policy(tiny_backbone, folder)
    assert torch.equal(latents_of(tiny_backbone, loaded), ours) and not any(
        p.requires_grad for p in loaded.parameters()
    )


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "sd3_bare"])
def test_every_family_loads_by_the_readmes_lines_and_gives_our_latents(
    tiny_backbones, tmp_path, monkeypatch, name, lora
):
    backbone = tiny_backbones[name]
    policy = backbone.trainable_copy()
    policy = tuned(add_lora(policy, targets=backbone.lora_targets, **lora) if lora else policy)
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD)
    ours = latents_of(backbone, policy)
    pipe = run_readme(folder, monkeypatch)
    scheduler = type(pipe.scheduler).__name__
    assert scheduler == type(backbone.pipeline.scheduler).__name__
    base, loaded = latents_of(backbone, backbone.denoiser), load_policy(backbone, folder)
    for found in (plain_latents(pipe, **backbone.call_options), latents_of(backbone, loaded)):
        if lora:
            assert_adapters_latents(found, ours, base)
        else:
            assert torch.equal(found, ours) and not torch.equal(found, base)
    assert_same_weights(policy, loaded)


def test_an_adapter_is_loaded_with_the_sampler_and_autoencoder_that_it_was_tuned_with(
    tiny_folder, tmp_path, monkeypatch
):
    backbone = UNetBackbone(
        str(tiny_folder), scheduler="DPMSolverMultistepScheduler", vae=str(_other_vae(tiny_folder, tmp_path))
    )
    policy = tuned(add_lora(backbone.trainable_copy(), rank=2, alpha=4))
    pipe = run_readme(export_policy(backbone, policy, tmp_path / "policy", CARD), monkeypatch)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert_adapters_latents(
        plain_latents(pipe), latents_of(backbone, policy), latents_of(backbone, backbone.denoiser)
    )
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(backbone.vae.parameters(), pipe.vae.parameters(), strict=True)
    )


def _other_vae(tiny_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae")
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.1)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_pool_of_a_policy_holds_what_its_folder_draws_without_this_package(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tuned(tiny_backbone.trainable_copy()), tmp_path / "policy", CARD)
    generator = ImageGenerator(
        tiny_backbone,
        load_policy(tiny_backbone, folder),
        policy_fingerprint(tiny_backbone, folder),
        SamplerSettings(3, 5.0, 8),
    )
    prompts = [make_prompt(text) for text in PROMPTS]
    pool = fill_pool(PoolSpec(tmp_path, "tiny", "test", 7, prompts, candidates=4), generator, progress=False)
    [shard] = pool.shards(4)
    arguments = {"num_inference_steps": 3, "guidance_scale": 5.0, "num_images_per_prompt": 4}

    def draw(output_type):
        seeds = [candidate_seed(7, prompt.id, index) for prompt in prompts for index in range(4)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        return pipeline(PROMPTS, generator=generators, output_type=output_type, **arguments).images

    assert torch.equal(pool.read_latents(shard).flatten(0, 1), draw("latent").half())
    ours = tiny_backbone.decode(pool.read_latents(shard).flatten(0, 1), 8)
    # the pool's images are those of latents rounded to float16
    apart = np.abs(np.stack(ours).astype(int) - np.stack(draw("pil")))
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.03
    assert np.abs(np.diff(np.stack(ours).astype(int), axis=0)).max() > 10  # another image would be seen


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3"])
def test_the_bytes_of_a_policy_do_not_depend_on_what_the_process_has_encoded(tiny_backbones, tmp_path, name):
    """A run that is resumed finds its text in the pool, and a run that is not has encoded it."""
    backbone, written = tiny_backbones[name], []
    tokenizers = [part for key, part in backbone.pipeline.components.items() if key.startswith("tokenizer")]
    for calls in ({"padding": "max_length", "max_length": 7, "truncation": True}, {"padding": True}, {}):
        for tokenizer in tokenizers:
            tokenizer(["a red cat"], **calls)
        folder = export_policy(backbone, backbone.denoiser, tmp_path / "policy", CARD)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({str(path): path.read_bytes() for path in files})
    assert written[0] == written[1] == written[2]
    assert len([path for path in written[0] if path.endswith("tokenizer.json")]) == len(tokenizers)
    encoded = backbone.encode_prompts(PROMPTS)
    assert all(torch.equal(value, encoded[key]) for key, value in backbone.encode_prompts(PROMPTS).items())


def test_exported_folder_holds_no_path(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tiny_backbone.denoiser, tmp_path / "policy", CARD)
    origins = [str(tmp_path.parent), str(tiny_backbone.folder), "_name_or_path"]
    assert [path for path in folder.rglob("*.json") for origin in origins if origin in path.read_text()] == []


def test_lora_file_loads_by_the_readmes_lines_and_gives_our_latents(tiny_backbone, tmp_path, monkeypatch):
    policy = tuned(add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=5))  # alpha is not the rank
    folder = export_policy(tiny_backbone, policy, tmp_path / "policy", CARD)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "base.json",
        "comfyui_lora.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    assert json.loads((folder / "base.json").read_text())["weights"] == tiny_backbone.weights
    ours, base, loaded = (
        latents_of(tiny_backbone, policy),
        latents_of(tiny_backbone, tiny_backbone.denoiser),
        load_policy(tiny_backbone, folder),
    )
    for found in (plain_latents(run_readme(folder, monkeypatch)), latents_of(tiny_backbone, loaded)):
        assert_adapters_latents(found, ours, base)
    assert has_adapter(loaded)
    assert_same_weights(policy, loaded)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3", "sd3_bare"])
def test_full_export_of_a_lora_policy_is_merged(tiny_backbones, tmp_path, monkeypatch, name):
    backbone = tiny_backbones[name]
    policy = tuned(add_lora(backbone.trainable_copy(), rank=2, alpha=5, targets=backbone.lora_targets))
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD, full=True)
    plain = run_readme(folder, monkeypatch)
    loaded = getattr(plain, backbone.denoiser_component)
    expected = merged(policy, backbone.trainable_copy()).state_dict()
    assert expected.keys() == loaded.state_dict().keys() == backbone.denoiser.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in expected.items())
    assert not (folder / "pytorch_lora_weights.safetensors").exists() and has_adapter(policy)
    # the adapter's own latents but for rounding, and not the base's
    merged_in, beside, base = (
        plain_latents(plain, **backbone.call_options),
        latents_of(backbone, policy),
        latents_of(backbone, backbone.denoiser),
    )
    moved = (beside - base).abs().max().item()
    assert moved > 1e-3
    torch.testing.assert_close(merged_in, beside, atol=1e-3 * moved, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3"])
def test_a_policy_in_half_precision_is_loaded_as_it_is_stored(
    tiny_backbones, tmp_path, monkeypatch, name, dtype
):
    backbone = tiny_backbones[name]
    policy = tuned(backbone.trainable_copy())
    folder = export_policy(backbone, policy, tmp_path / "policy", CARD, dtype=dtype)
    write_card(backbone, folder, CARD)  # as after an evaluation: the folder tells its dtype
    assert f"dtype=torch.{dtype}, use_safetensors=True)" in (folder / "README.md").read_text()
    pipe, half = run_readme(folder, monkeypatch), getattr(torch, dtype)
    parts = {
        part: module
        for part, module in backbone.pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert len(parts) == {"sdxl": 4, "sd15": 3, "sd3": 5}[name]
    for part, module in (parts | {backbone.denoiser_component: policy}).items():
        [file] = (folder / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {half}
        stored, ours = getattr(pipe, part).state_dict(), module.state_dict()
        assert all(torch.equal(value.to(half), stored[key].to(half)) for key, value in ours.items())
    assert getattr(pipe, backbone.denoiser_component).dtype == half
    loaded = load_policy(backbone, folder)  # evaluated in float32, with the weights that are stored
    assert all(
        torch.equal(value, policy.state_dict()[key].to(half).float())
        for key, value in loaded.state_dict().items()
    )
    assert policy.dtype == torch.float32 and backbone.vae.dtype == torch.float32  # ours are left alone
    ours, base = latents_of(backbone, loaded), latents_of(backbone, backbone.denoiser)
    found = plain_latents(pipe, **backbone.call_options).float()
    assert (found - ours).abs().max() < 0.5 * (ours - base).abs().max()


def test_a_merged_adapter_is_rounded_once(tiny_backbone, tmp_path):
    policy = tuned(add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=5))
    folder = export_policy(tiny_backbone, policy, tmp_path / "policy", CARD, full=True, dtype="float16")
    [file] = (folder / "unet").glob("*.safetensors")
    expected = merged(policy, tiny_backbone.trainable_copy()).state_dict()
    assert all(torch.equal(value.half(), load_file(file)[key]) for key, value in expected.items())


def test_adapter_of_another_base_is_refused(tiny_backbone, tmp_path):
    policy = add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=5)
    folder = export_policy(tiny_backbone, policy, tmp_path / "policy", CARD)
    save(tiny_backbone, tmp_path / "other", tuned(tiny_backbone.trainable_copy()))
    with pytest.raises(InputError, match=r"LoRA adapter of '.*/pipeline'.*not of '.*/other'"):
        load_policy(UNetBackbone(str(tmp_path / "other")), folder)


def test_a_config_that_names_a_repository_is_not_asked_of_the_hub(tiny_backbone, tmp_path, monkeypatch):
    folder = export_policy(tiny_backbone, tiny_backbone.trainable_copy(), tmp_path / "policy", CARD)
    (folder / "unet" / "config.json").write_text('"owner/name"')
    monkeypatch.setattr(type(tiny_backbone.denoiser), "from_pretrained", None)  # is not called
    with pytest.raises(InputError, match=r"unet/config\.json cannot be read \(it holds no names with values"):
        load_policy(tiny_backbone, folder)


def test_a_policy_that_lacks_a_tensor_is_refused(tiny_backbone, tmp_path):
    """The library would draw the tensor at random, with a warning."""
    folder = export_policy(tiny_backbone, tiny_backbone.trainable_copy(), tmp_path / "policy", CARD)
    path = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(path)
    gone = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path)
    with pytest.raises(InputError, match=rf"^policy '{folder}/unet' lacks {gone} of the model's tensors; "):
        load_policy(tiny_backbone, folder)


@pytest.mark.parametrize("change", ["whole numbers", "further"])
def test_a_policy_whose_tensors_are_not_the_models_is_refused(tiny_backbone, tmp_path, change):
    folder = export_policy(tiny_backbone, tiny_backbone.trainable_copy(), tmp_path / "policy", CARD)
    path = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(path)
    first = sorted(weights)[0]
    weights |= {first: weights[first].int()} if change == "whole numbers" else {"x": torch.ones(1)}
    save_file(weights, path)
    told = (
        f"{first} is stored as I32, not as floating"
        if change == "whole numbers"
        else "x is none of the model's"
    )
    with pytest.raises(InputError, match=f"does not fit the model: its tensor {told}"):
        load_policy(tiny_backbone, folder)


def test_policy_of_another_architecture_is_refused(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tiny_backbone.denoiser, tmp_path / "policy", CARD)
    config = dict(tiny_backbone.denoiser.config) | {"layers_per_block": 2}
    type(tiny_backbone.denoiser).from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(InputError, match="does not fit the model"):
        load_policy(tiny_backbone, folder)


def test_folder_without_policy_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(
        InputError, match=r"neither 'unet/config.json' nor 'pytorch_lora_weights.safetensors'"
    ):
        load_policy(tiny_backbone, tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_fingerprint_follows_the_policy(tiny_backbone, tmp_path, lora):
    def exported(name, change):
        policy = tiny_backbone.trainable_copy()
        policy = add_lora(policy, rank=2, alpha=5) if lora else policy
        return export_policy(tiny_backbone, tuned(policy) if change else policy, tmp_path / name, CARD)

    base, same, other = (
        policy_fingerprint(tiny_backbone, exported(*kind)) for kind in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert base == same != other and len(base) == 64


def test_card_names_base_objective_data_and_win_rates(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tiny_backbone.trainable_copy(), tmp_path / "policy", CARD)
    text = (folder / "README.md").read_text()
    assert (
        "Not evaluated." in text and "| beta | 30 |" in text and "base_model" not in text
    )  # a folder is no hub id
    for fact in (tiny_backbone.weights, "capo", "8 prompts of nowhere", "DDIMScheduler"):
        assert fact in text
    rates = {"looks": {"mean": 0.6127, "low": 0.59, "high": 0.6349}}
    write_card(tiny_backbone, folder, ModelCard("capo", "8 prompts of nowhere", rates))
    text = (folder / "README.md").read_text()
    assert "| looks | 61.3 | 59.0 - 63.5 |" in text and "Not evaluated." not in text


def test_export_replaces_an_older_policy(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tiny_backbone.denoiser, tmp_path / "policy", CARD)
    policy = tuned(add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=5))
    export_policy(tiny_backbone, policy, folder, CARD)
    assert not (folder / "unet").exists()
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and value.dtype == torch.float32 for key, value in weights.items())
