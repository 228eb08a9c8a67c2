import hashlib
import json
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from capo.backbones import UNetBackbone, finding
from capo.backbones.finding import MissingWeights, find_pipeline, lacking_parts, pipeline_index
from capo.errors import InputError


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


def test_a_snapshot_that_lacks_files_of_its_repository_is_still_used(tiny_folder, tmp_path, monkeypatch):
    """As after a download by patterns, which leaves a list of all files beside the few that it took."""
    trees = pytest.importorskip("huggingface_hub._tree_cache")
    hub_cache(tiny_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    listed = {"never_downloaded.ckpt": trees.TreeCacheEntry(size=1, blob_id="a" * 40)}
    trees.write_tree_cache(str(tmp_path / "models--tiny--shapes"), "c" * 40, listed)
    with pytest.raises(FileNotFoundError, match="never_downloaded"):
        huggingface_hub.snapshot_download("tiny/shapes", cache_dir=tmp_path, local_files_only=True)
    assert find_pipeline("tiny/shapes") == tmp_path / "models--tiny--shapes" / "snapshots" / ("c" * 40)


def test_hub_id_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights) as missing:
        UNetBackbone("nobody/nothing", revision="abc")
    lines = str(missing.value).splitlines()
    assert lines[0] == "weights 'nobody/nothing' (revision abc, variant none, safetensors) are not here"
    assert f"hub cache {tmp_path} (not in it)" in lines[1] and "https://huggingface.co (not asked" in lines[1]
    assert "hf download nobody/nothing --revision abc (a gated model: accept" in lines[3]
    assert "model.backbone.weights=FOLDER" in lines[4] and "HF_HOME=FOLDER" in lines[5]


@pytest.mark.parametrize(("gone", "lacking"), [
    ("unet/diffusion_pytorch_model.safetensors", "the weights of unet"),
    ("tokenizer", "tokenizer"),
    ("model_index.json", "model_index.json"),
])  # fmt: skip
def test_a_download_that_was_cut_off_is_no_pipeline(tiny_folder, tmp_path, monkeypatch, gone, lacking):
    hub_cache(tiny_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_pipeline("tiny/shapes") == tmp_path / "models--tiny--shapes" / "snapshots" / ("c" * 40)
    path = find_pipeline("tiny/shapes") / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingWeights, match=rf"\(there, but without {lacking}\)"):
        find_pipeline("tiny/shapes")


def test_a_cache_without_the_variant_does_not_count(tiny_folder, tmp_path, monkeypatch):
    hub_cache(tiny_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"without files of variant fp16\).*") as missing:
        find_pipeline("tiny/shapes", variant="fp16")
    assert "--include '*.fp16.safetensors'" in str(missing.value)


def test_shards_that_an_index_names_must_all_be_there(tiny_folder, tmp_path):
    copied = shutil.copytree(tiny_folder, tmp_path / "copy")
    unet = copied / "unet"
    names = {
        "conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "conv_out.weight": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / names["conv_in.weight"])
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert lacking_parts(copied) == ["the weights of unet"]
    (unet / names["conv_out.weight"]).write_bytes(b"")
    assert lacking_parts(copied) == []


class Hub:
    """Stands for the hub's client."""

    def __init__(self, gated=False, error=None):
        self.gated, self.error, self.asked = gated, error, []

    def __call__(self):
        return self

    def model_info(self, weights, revision, timeout):
        self.asked.append((weights, revision))
        if self.error and not self.gated:
            raise self.error
        return self

    def auth_check(self, weights):
        raise self.error


@pytest.mark.parametrize(("hub", "reason"), [
    (Hub(error=ConnectionError("no route\nand more")), r"\(cannot be reached: no route\)"),
    (Hub(error=HfHubHTTPError("404: no such repository", response=Mock(headers={}))),
     r"\(answers: 404: no such repository\)"),
    (Hub(gated="auto", error=HfHubHTTPError("401: log in", response=Mock(headers={}))),
     r"\(answers: 401: log in\)"),
    (Hub(gated="manual", error=GatedRepoError("403", response=Mock(headers={}))),
     r"\(gated, and you have no access: accept the license on https://huggingface.co/some/model, "
     r"then hf auth login\)"),
    (Hub(), None),
])  # fmt: skip
def test_the_hub_is_asked_before_anything_is_downloaded(tmp_path, monkeypatch, hub, reason):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("capo.runtime.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("capo.runtime.hub.HfApi", hub)
    if reason is None:
        assert find_pipeline("some/model", "abc") is None
    else:
        with pytest.raises(MissingWeights, match=reason):
            find_pipeline("some/model", "abc")
    assert hub.asked == [("some/model", "abc")]


def test_a_download_that_ends_early_says_that_it_goes_on(monkeypatch):
    def cut_off(*args, **kwargs):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(finding, "find_pipeline", lambda *args: None)
    monkeypatch.setattr(DiffusionPipeline, "download", cut_off)
    with pytest.raises(
        InputError,
        match=r"download from https://huggingface.co failed \(the line is dead\); "
        r"what was downloaded is kept",
    ):
        UNetBackbone("some/model")


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=f"no such folder.*{tmp_path}/nothing.*model_index.json"):
        UNetBackbone(str(tmp_path / "nothing"))


def test_an_adapter_is_told_from_a_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"'model_index\.json' is missing or unreadable"):
        pipeline_index(tmp_path, ("StableDiffusionPipeline",))
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(
        InputError, match=r"it holds a LoRA adapter, .* export=full validation\.strengths=\[1\]"
    ):
        pipeline_index(tmp_path, ("StableDiffusionPipeline",))
