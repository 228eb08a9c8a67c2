"""Safetensors files, part by part."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from capo.errors import DamagedFile, InputError
from capo.runtime import tensor_files
from capo.runtime.tensor_files import RowReader, spans, tensor_entries, tensor_homes, write_parts

TENSORS = {
    "matrix": torch.arange(35.0).view(7, 5),
    "half": torch.arange(6, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "count": torch.tensor([3, 4]),
    "flags": torch.tensor([True, False, True]),
}


def test_a_file_is_copied_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PART", 10)  # two rows of the matrix
    source, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(TENSORS, source)
    entries = tensor_entries(source)
    assert spans((7, 5)) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    sizes, read = [], RowReader()

    def parts():
        for name, (_, shape) in entries.items():
            for span in spans(shape):
                part = read(source, name, span)
                sizes.append(part.numel())
                yield part

    write_parts(copy, entries, parts())
    found = load_file(copy)
    assert found.keys() == TENSORS.keys() and max(sizes) == 10
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_file_is_opened_anew_once_a_part_of_it_has_been_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PART", 10)
    file, opened = tmp_path / "a.safetensors", []
    save_file(TENSORS, file)

    def noted(path, framework):
        opened.append(Path(path))
        return safe_open(path, framework)

    monkeypatch.setattr(tensor_files, "safe_open", noted)
    read, counts = RowReader(), []
    for span in ((0, 1), (1, 2), (2, 3), (3, 5), (5, 6)):  # 5 elements a row
        assert torch.equal(read(file, "matrix", span), TENSORS["matrix"][slice(*span)])
        counts.append(len(opened))
    assert counts == [1, 1, 2, 2, 3] and set(opened) == {file}


def test_too_few_parts_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="16 bytes of tensors were given, not 32"):
        write_parts(tmp_path / "a.safetensors", {"a": ("F32", (2, 4))}, iter([torch.zeros(4)]))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a\.safetensors cannot be read \(as safetensors: .*\); restore it"):
        tensor_entries(tmp_path / "a.safetensors")


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(InputError, match=r"a\.safetensors cannot be read \(it is empty\); restore it"):
        tensor_entries(tmp_path / "a.safetensors")


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"pickle")  # which is not read
    with pytest.raises(DamagedFile, match=rf"{tmp_path} .*it holds no weights, which are \*\.safetensors"):
        tensor_homes(tmp_path)
