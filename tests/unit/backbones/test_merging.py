"""Soups of exported policies: whole ones and adapters, against soups of the weights in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from capo.backbones.export import export_policy, load_policy
from capo.backbones.lora import merged
from capo.backbones.merging import Base, merge_policies
from capo.backbones.merging_adapters import merged_factors
from capo.backbones.model_card import ModelCard
from capo.errors import InputError, ParameterError
from capo.runtime import tensor_files
from capo.soup import soup
from fixtures.policies import assert_adapters_latents, plain_latents, run_readme, tuned

CARD = ModelCard(objective="capo", data="nothing")
EQUAL = [1.0, 1.0, 1.0]


def base_of(backbone):
    return Base(backbone.folder, type(backbone), backbone.weights, backbone.revision, backbone.variant)


def exported(backbone, folder, count=3, lora=False, **options):
    policies = [tuned(backbone, lora=lora, seed=seed) for seed in range(1, count + 1)]
    folders = [folder / f"policy{index}" for index in range(count)]
    for policy, place in zip(policies, folders, strict=True):
        export_policy(backbone, policy, place, CARD, **options)
    return policies, folders


@pytest.mark.parametrize("method", ["slerp", "linear"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_whole_policies_become_the_soup_of_their_weights(tiny_backbones, tmp_path, monkeypatch, name, method):
    monkeypatch.setattr(tensor_files, "PART", 1000)  # the larger tensors have several parts
    backbone = tiny_backbones[name]
    policies, folders = exported(backbone, tmp_path)
    folder = merge_policies(base_of(backbone), folders, tmp_path / "soup", method, EQUAL, progress=False)
    found, base = load_policy(backbone, folder).state_dict(), backbone.denoiser.state_dict()
    states = [policy.state_dict() for policy in policies]
    for key, value in found.items():
        expected = soup(base[key], [state[key] for state in states], method, EQUAL)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    assert not all(torch.equal(value, states[0][key]) for key, value in found.items())
    pipeline = run_readme(folder, monkeypatch)
    part = getattr(pipeline, backbone.denoiser_component).state_dict()
    assert all(torch.equal(part[key], value) for key, value in found.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f.name for f in folders), "soup"]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_adapters_become_the_soup_of_their_products(tiny_backbones, tmp_path, monkeypatch, name):
    backbone = tiny_backbones[name]
    policies, folders = exported(backbone, tmp_path, lora=True)
    folder = merge_policies(base_of(backbone), folders, tmp_path / "soup", "slerp", EQUAL)
    base = backbone.denoiser.state_dict()
    whole = [merged(policy, backbone.trainable_copy()).state_dict() for policy in policies]
    loaded = load_policy(backbone, folder)
    found = merged(loaded, backbone.trainable_copy()).state_dict()
    for key, value in found.items():
        expected = soup(base[key], [state[key] for state in whole], "slerp", EQUAL)
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=0)
    moved = [key for key in found if not torch.equal(found[key], base[key])]
    assert moved
    soup_model = backbone.trainable_copy()
    soup_model.load_state_dict(found)
    pipeline = run_readme(folder, monkeypatch)
    plain = getattr(pipeline, backbone.denoiser_component)
    latents = plain_latents(pipeline, **backbone.call_options)
    plain.disable_adapters()
    base_latents = plain_latents(pipeline, **backbone.call_options)
    plain.enable_adapters()
    setattr(pipeline, backbone.denoiser_component, soup_model)
    assert_adapters_latents(latents, plain_latents(pipeline, **backbone.call_options), base_latents)


def test_other_programs_get_the_merged_adapter(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2, lora=True)
    folder = merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])
    ours, theirs = (
        load_file(folder / name) for name in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors")
    )
    down = [value for key, value in theirs.items() if key.endswith("lora_down.weight")]
    assert down and {len(value) for value in down} == {4}  # the sum of the ranks
    assert {value.item() for key, value in theirs.items() if key.endswith(".alpha")} == {4.0}
    assert len(ours) == 2 * len(down)


def test_ranks_alphas_and_layers_may_differ():
    generator = torch.Generator().manual_seed(0)

    def factors(rank):
        return torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)

    one, two = {"x": factors(2), "y": factors(2)}, {"x": factors(3)}
    found = merged_factors([one, two], "slerp", [1.0, 1.0])
    zero = torch.zeros(5, 6)
    for layer in ("x", "y"):
        products = [a[layer][1] @ a[layer][0] if layer in a else zero for a in (one, two)]
        product = found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(product, soup(zero, products, "slerp", [1.0, 1.0]), atol=1e-5, rtol=0)
        assert len(found[f"{layer}.lora_A.weight"]) == 5


def test_the_dtype_and_the_card_are_those_of_a_policy(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2, dtype="float16", checkpoint=True)
    folder = merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "linear", [0.7, 0.3])
    [file] = (folder / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert not (folder / "checkpoint.safetensors").exists()  # it holds the first policy's weights
    text = (folder / "README.md").read_text()
    assert f"`{folders[1]}`" in text and "weight 0.3" in text and "| merged by | linear |" in text
    assert "a soup of tuned policies" in text and "Not evaluated." in text
    assert '"soup", dtype=torch.float16' in text and "policy0" not in text.split("```")[1]
    assert (
        json.loads((folder / "base.json").read_text())["denoiser"] == (tiny_backbone.fingerprints["denoiser"])
    )


def test_what_does_not_belong_together_is_refused(tiny_backbones, tmp_path):
    sdxl = tiny_backbones["sdxl"]
    base = base_of(sdxl)
    _, whole = exported(sdxl, tmp_path / "whole", count=2)
    _, adapters = exported(sdxl, tmp_path / "lora", count=1, lora=True)
    _, [other] = exported(tiny_backbones["sd15"], tmp_path / "other", count=1)

    def refused(policies, said, weights=(1.0, 1.0)):
        with pytest.raises(InputError, match=said):
            merge_policies(base, policies, tmp_path / "soup", "slerp", weights)
        assert not (tmp_path / "soup").exists()

    refused([whole[0], adapters[0]], "policy0' is a LoRA adapter and .* a whole pipeline")
    refused([whole[0], other], "was tuned from 'sd15' .*choose its base as model")
    refused([whole[0], tmp_path / "nothing"], r"nothing/base\.json.* cannot be read .* finished runs?")
    (tmp_path / "run").mkdir()
    shutil.copytree(whole[1], tmp_path / "run" / "policy")
    refused([whole[0], tmp_path / "run"], r"run/base\.json.* cannot be read .*; give .*/run/policy")
    refused([whole[0], whole[1] / "unet"], r"unet/base\.json.* cannot be read .*; give .*policy1")
    (whole[1] / "base.json").write_text('{"weights": 3, "denoiser": "x"}')
    refused(whole, r"weights is 3, which is no text")
    with pytest.raises(ParameterError, match="must be above 0"):
        merge_policies(base, adapters * 2, tmp_path / "soup", "slerp", [1.0, -1.0])


def test_a_soup_that_its_dtype_cannot_hold_is_refused(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2, dtype="float16")
    with pytest.raises(InputError, match=r"weights=\[1e\+06, 1e\+06\]|weights=.* beyond what F16"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "linear", [1e6, 1e6])
    assert not (tmp_path / "soup").exists()


def test_other_shapes_are_refused_and_leave_nothing(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2)
    [file] = (folders[1] / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    with pytest.raises(InputError, match=f"'{name}' has shapes"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])
    assert not (tmp_path / "soup").exists()
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(InputError, match=f"for instance '{name}'"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])


def test_numbers_that_cannot_be_merged_are_refused_where_they_differ(tiny_backbone, tmp_path):
    """Float8 is no dtype of sums here; tensors that are alike in all models, such as counts, are copied."""
    _, folders = exported(tiny_backbone, tmp_path, count=2)
    copied = tmp_path / "base"
    shutil.copytree(tiny_backbone.folder, copied)
    files = [next((folder / "unet").glob("*.safetensors")) for folder in (copied, *folders)]
    name = next(name for name, tensor in load_file(files[0]).items() if tensor.ndim == 2)

    def store(*tensors):
        for file, tensor in zip(files, tensors, strict=True):
            save_file(load_file(file) | {name: tensor}, file)
        base = Base(copied, type(tiny_backbone), "tiny")
        for folder in folders:
            facts = json.loads((folder / "base.json").read_text()) | {"denoiser": base.fingerprint}
            (folder / "base.json").write_text(json.dumps(facts))
        return base

    def merged(base):
        return merge_policies(base, folders, tmp_path / "soup", "slerp", [1.0, 1.0], progress=False)

    eighth = torch.tensor([[0.5, 1.0]]).to(torch.float8_e4m3fn)
    with pytest.raises(
        InputError, match=f"'{name}' differs, and is stored as F8_E4M3 .*export_dtype=float32"
    ):
        merged(store(eighth, eighth, (-eighth.float()).to(eighth.dtype)))
    with pytest.raises(InputError, match=f"'{name}' differs, and is stored as F32, F8_E4M3"):
        merged(store(eighth.float(), eighth, eighth))
    with pytest.raises(InputError, match=f"'{name}' differs, and is stored as I64"):
        merged(store(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), torch.tensor([[1, 3]])))
    counts = torch.tensor([[1, 2]])
    found = load_file(next((merged(store(counts, counts, counts)) / "unet").glob("*.safetensors")))
    assert torch.equal(found[name], counts)


def test_a_link_that_leads_out_of_a_policy_is_not_copied(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2)
    (tmp_path / "secret").write_text("key")
    (folders[0] / "vae" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"vae/notes.txt is a link to .*secret, which is not copied along"):
        merge_policies(
            base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0], progress=False
        )
    assert not (tmp_path / "soup").exists()


def test_adapters_of_other_kinds_are_refused(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2, lora=True)
    file = folders[1] / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # without its settings: rank and alpha are not known
    with pytest.raises(InputError, match="is no plain LoRA adapter of linear layers"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])


def test_a_damaged_adapter_is_named(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2, lora=True)
    file = folders[1] / "pytorch_lora_weights.safetensors"
    whole = file.read_bytes()
    with safe_open(file, framework="pt") as found:
        metadata = found.metadata()
    tensors = load(whole)  # not mapped from the file, which is damaged below
    name = next(name for name in tensors if ".lora_B." in name)
    key = "lora_adapter_metadata"

    def refused(said):
        with pytest.raises(InputError, match=said):
            merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])
        assert not (tmp_path / "soup").exists()

    for content in (b"", whole[:100], whole[:-8], b"\xff" * 64):
        file.write_bytes(content)
        refused("pytorch_lora_weights.safetensors cannot be read")
    for settings in ("{", "[]"):
        save_file(tensors, file, metadata | {key: settings})
        refused("cannot be read")
    other = name.replace(".lora_B.", ".lora_A.")
    for spoiled in (name, other):
        save_file(tensors | {spoiled: tensors[spoiled] * float("nan")}, file, metadata)
        refused(f"{file}': its tensor {spoiled} holds values that are not finite; restore it, or export it")
        save_file({key: value for key, value in tensors.items() if key != spoiled}, file, metadata)
        refused(f"{file}': its tensor {spoiled} is missing; restore it")
    save_file(tensors | {name: tensors[name][:, :1].clone()}, file, metadata)
    refused(rf"its tensors {other} of shape \(.*\) and {name} of shape \(.*, 1\) have different ranks")
    save_file(tensors | {name: tensors[name][..., None].clone()}, file, metadata)
    refused(rf"is no plain LoRA adapter of linear layers \({name}\); only")
    settings = json.loads(metadata[key]) | {"unet.lora_alpha": "4"}
    save_file(tensors, file, metadata | {key: json.dumps(settings)})
    refused("is no plain LoRA adapter")


def test_weights_that_are_not_finite_and_a_readme_that_is_no_text_are_named(tiny_backbone, tmp_path):
    _, folders = exported(tiny_backbone, tmp_path, count=2)
    (folders[0] / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"README\.md does not say how the policy is loaded"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])
    [file] = (folders[1] / "unet").glob("*.safetensors")
    tensors = load(file.read_bytes())
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("inf")}, file)
    with pytest.raises(InputError, match=f"'{name}' has values that are not finite in .*{file}'?"):
        merge_policies(base_of(tiny_backbone), folders, tmp_path / "soup", "slerp", [1.0, 1.0])
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": "w"}', '{"weights": "w", "denoiser": 3}'])
def test_an_adapter_whose_base_cannot_be_read_is_not_loaded(tiny_backbone, tmp_path, text):
    _, [folder] = exported(tiny_backbone, tmp_path, count=1, lora=True)
    (folder / "base.json").write_text(text)
    with pytest.raises(InputError, match=r"policy: .*base\.json, which names the base, cannot be read"):
        load_policy(tiny_backbone, folder)


MEASURED = """
import sys
from pathlib import Path
from capo.backbones.merging import Base, merge_policies
from capo.backbones.unet import UNetBackbone

def merge(root):
    root = Path(root)
    policies = [root / "a", root / "b"]
    merge_policies(Base(root / "base", UNetBackbone, "base"), policies, root / "soup", "slerp", [1, 1], False)

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

merge(sys.argv[1])  # what is imported at first
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
merge(sys.argv[2])
print(memory("VmHWM") - before)
"""


def large(root, rows):
    """A base and two policies of four tensors, each of `rows` x 1 MiB."""
    from capo.runtime.fingerprints import component_fingerprint

    for seed, name in enumerate(("base", "a", "b")):
        (root / name / "unet").mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"t{i}": torch.randn(rows, 2**18, generator=generator) for i in range(4)}
        save_file(tensors, root / name / "unet" / "diffusion_pytorch_model.safetensors")
        (root / name / "unet" / "config.json").write_text("{}")
        (root / name / "model_index.json").write_text("{}")
    known = {"weights": "base", "denoiser": component_fingerprint(root / "base", ["unet"])}
    for name in ("a", "b"):
        (root / name / "base.json").write_text(json.dumps(known))
        (root / name / "README.md").write_text('x.from_pretrained("a")\n## How it was made\nso\n')
    return root


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_a_merge_holds_little_of_the_models_in_memory(tmp_path):
    """Two policies of 1 GiB, whose four tensors have 256 MiB each."""
    try:
        small, big = large(tmp_path / "small", 1), large(tmp_path / "large", 256)
        told = subprocess.run(
            [sys.executable, "-c", MEASURED, str(small), str(big)],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(tmp_path)  # 4 GiB, which pytest would keep
    assert told.returncode == 0, told.stderr
    print(f"peak above the start: {int(told.stdout) / 2**10:.0f} MiB, of 256 MiB in the largest tensor")
    assert 0 < int(told.stdout) < 4 * 256 * 2**10  # KiB
