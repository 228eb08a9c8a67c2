"""The README of a policy that is sampled with the unconditional prediction of its base, or another policy."""

import itertools

import pytest
import torch

from capo.backbones import UNetBackbone
from capo.backbones.export import export_policy, load_policy
from capo.backbones.model_card import ModelCard, write_card
from capo.backbones.sampling import SamplerSettings, sample_prompts
from capo.backbones.unconditional import unconditional_of
from fixtures.policies import PROMPTS, SEEDS, assert_adapters_latents, plain_latents, run_readme, tuned


def card(source):
    return ModelCard("capo", "8 prompts of nowhere", unconditional=source)


def our_latents(backbone, policy, source, guidance=5.0):
    settings = SamplerSettings(3, guidance, 2, unconditional=source)
    text, network = backbone.encode_prompts(PROMPTS), unconditional_of(backbone, settings)
    found = sample_prompts(backbone, policy, text, SEEDS, settings, unconditional=network and network.network)
    return found.flatten(0, 1)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(("sdxl", "sd3"), ("full", "lora", "merged")),
        *((name, "full") for name in ("sd15", "sd3_bare")),
        *(slow(name, kind) for name in ("sd15", "sd3_bare") for kind in ("lora", "merged")),
    ],
)
def test_the_readmes_lines_sample_with_the_base_as_we_do(tiny_backbones, tmp_path, monkeypatch, name, kind):
    backbone = tiny_backbones[name]
    policy = tuned(backbone, kind != "full")
    folder = export_policy(backbone, policy, tmp_path / "policy", card("base"), full=kind == "merged")
    ours, own = our_latents(backbone, policy, "base"), our_latents(backbone, policy, "policy")
    pipe = run_readme(folder, monkeypatch)
    found = plain_latents(pipe, **backbone.call_options)
    assert (ours - own).abs().max() > 1e-2
    if kind == "full":
        assert torch.equal(found, ours)
    else:
        assert_adapters_latents(found, ours, own)
    # a second picture, and one without guidance, which reads no unconditional prediction
    assert torch.equal(plain_latents(pipe, **backbone.call_options), found)
    generators = [torch.Generator().manual_seed(seed) for [seed] in SEEDS]
    plain = pipe(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="latent",
        generator=generators,
        **backbone.call_options,
    ).images
    without = our_latents(backbone, policy, "policy", 1.0)
    torch.testing.assert_close(plain, without, atol=0 if kind == "full" else 1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind", "negative"),
    [
        ("sdxl", "full", "lora"),
        ("sdxl", "lora", "full"),
        ("sd3", "full", "full"),
        ("sd3", "lora", "lora"),
        slow("sdxl", "full", "full"),
        slow("sdxl", "lora", "lora"),
        slow("sd3", "full", "lora"),
        slow("sd3", "lora", "full"),
    ],
)
def test_the_readmes_lines_sample_with_another_policy_as_we_do(
    tiny_backbones, tmp_path, monkeypatch, name, kind, negative
):
    backbone = tiny_backbones[name]
    other = tuned(backbone, negative == "lora", seed=2)
    source = str(export_policy(backbone, other, tmp_path / "other", card("policy")))
    policy = tuned(backbone, kind == "lora")
    folder = export_policy(backbone, policy, tmp_path / "policy", card(source))
    ours, base = our_latents(backbone, policy, source), our_latents(backbone, policy, "base")
    found = plain_latents(run_readme(folder, monkeypatch), **backbone.call_options)
    assert_adapters_latents(found, ours, base)
    assert f"that of `{source}`" in (folder / "README.md").read_text()


def test_the_readme_says_whose_prediction_it_is_and_nothing_at_the_default(tiny_backbone, tmp_path):
    folder = export_policy(tiny_backbone, tuned(tiny_backbone), tmp_path / "policy", card("base"))
    text = (folder / "README.md").read_text()
    assert "| unconditional prediction under guidance | the base's |" in text
    write_card(tiny_backbone, folder, card("policy"))
    text = (folder / "README.md").read_text()
    assert "unconditional" not in text and "negative" not in text
    assert text.split("```python\n")[1].split("```")[0].count("\n") == 4  # two imports, a blank, the pipeline


def test_revision_and_variant_of_the_base_are_given(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_backbone, "revision", "abc")
    monkeypatch.setattr(tiny_backbone, "variant", "fp16")
    folder = export_policy(tiny_backbone, tuned(tiny_backbone), tmp_path / "policy", card("base"))
    [line] = [
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("negative = ")
    ]
    assert line.endswith('use_safetensors=True, revision="abc", variant="fp16")')
    assert 'subfolder="unet"' in line and str(tiny_backbone.folder) in line


def test_a_loaded_policy_is_sampled_like_the_one_in_memory(tiny_folder, tmp_path):
    backbone = UNetBackbone(str(tiny_folder))
    policy = tuned(backbone)
    loaded = load_policy(backbone, export_policy(backbone, policy, tmp_path / "policy", card("base")))
    assert torch.equal(our_latents(backbone, loaded, "base"), our_latents(backbone, policy, "base"))


def test_the_base_is_loaded_in_the_dtype_of_the_policy(tiny_backbone, tmp_path, monkeypatch):
    folder = export_policy(
        tiny_backbone, tuned(tiny_backbone), tmp_path / "policy", card("base"), dtype="bfloat16"
    )
    pipe = run_readme(folder, monkeypatch)
    assert plain_latents(pipe).dtype == torch.bfloat16  # networks of two dtypes could not share a batch
    assert "torch.float32" not in (folder / "README.md").read_text()
