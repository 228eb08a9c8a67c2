import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from capo.errors import DamagedFile, InputError
from capo.runtime.fingerprints import (
    component_fingerprint,
    file_digest,
    safetensors_fingerprint,
    weight_files,
)

PARTS = ["unet", "tokenizer"]


@pytest.fixture
def copied(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_digest_is_the_sha256_of_the_content(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"abc")
    # sha256("abc"), the first example of FIPS 180-2
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abcd")  # remembered by size and time: a changed file is read again
    assert file_digest(path) == hashlib.sha256(b"abcd").hexdigest()


def test_digest_is_read_once_while_size_and_time_stay(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"abc")
    digest = file_digest(path)
    monkeypatch.setattr(hashlib, "file_digest", None)  # reading again would fail
    assert file_digest(path) == digest


def test_hub_cache_and_folder_have_the_same_fingerprint_and_blobs_are_not_read(
    copied, tiny_folder, monkeypatch
):
    folder_fingerprint = component_fingerprint(tiny_folder, PARTS)
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    blob = copied / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.parent.mkdir()
    weights.rename(blob)
    blob.write_bytes(b"")  # the name says what the hub stores under it
    weights.symlink_to(blob)
    assert component_fingerprint(copied, PARTS) == folder_fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_fingerprint_follows_content(copied, tiny_folder, name):
    path = copied / name
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"changed": 1}))
    else:
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert component_fingerprint(copied, PARTS) != component_fingerprint(tiny_folder, PARTS)
    assert component_fingerprint(copied, ["vae"]) == component_fingerprint(tiny_folder, ["vae"])


def test_fingerprint_ignores_what_is_not_the_model(copied, tiny_folder):
    config = copied / "unet" / "config.json"
    changed = json.loads(config.read_text()) | {
        "_diffusers_version": "9.9",
        "_name_or_path": "/somewhere/else",
    }
    config.write_text(json.dumps(changed, indent=7))
    (copied / "unet" / "model.onnx").write_bytes(b"other format")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant that is not loaded")
    assert component_fingerprint(copied, PARTS) == component_fingerprint(tiny_folder, PARTS)


def test_settings_are_part_of_the_fingerprint(tiny_folder):
    fingerprints = {
        component_fingerprint(tiny_folder, ["vae"], settings=settings)
        for settings in (None, {"scaling": 1}, {"scaling": 2})
    }
    assert len(fingerprints) == 3


def test_safetensors_fingerprint_follows_tensors_and_metadata_only(tmp_path):
    def fingerprint(values, metadata, dtype=torch.float32):
        save_file({"a": torch.tensor(values, dtype=dtype), "b": torch.zeros(())}, tmp_path / "x", metadata)
        return safetensors_fingerprint(tmp_path / "x")

    # the order of metadata in the file is drawn anew by each save: 8 entries would agree once in 40 320 times
    many = {str(i): "" for i in range(8)}
    assert fingerprint([1, 2], many) == fingerprint([1, 2], many)
    kinds = [
        ([1, 2], {}),
        ([2, 1], {}),
        ([1, 2], {"alpha": "5"}),
        ([[1, 2]], {}),
        ([1, 2], {}, torch.float16),
    ]
    assert len({fingerprint(*kind) for kind in kinds}) == 5


def test_variant_and_shard_names(tmp_path):
    names = [
        "model.safetensors",
        "model.fp16.safetensors",  # plain names beside those of a variant
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
    ]  # the older form
    for name in names:
        (tmp_path / name).touch()
    shards = ["diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002"]
    plain, half = weight_files(tmp_path), weight_files(tmp_path, "fp16")
    assert {key: path.name for key, path in plain.items()} == {
        "model": names[0],
        shards[0]: names[2],
        shards[1]: names[3],
    }
    assert {key: path.name for key, path in half.items()} == {
        "model": names[1],
        shards[0]: names[4],
        shards[1]: names[5],
    }
    assert (
        weight_files(tmp_path, "bf16") == plain
    )  # as diffusers: a component without the variant loads its plain files


def test_missing_component_is_named(tiny_folder):
    with pytest.raises(InputError, match=r"text_encoder_9.*complete diffusers pipeline"):
        component_fingerprint(tiny_folder, ["unet", "text_encoder_9"])


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    for name in ("folder", "circle", "pipe"):
        with pytest.raises(DamagedFile, match=f"{name} cannot be read .*; put the file itself there"):
            file_digest(tmp_path / name)
