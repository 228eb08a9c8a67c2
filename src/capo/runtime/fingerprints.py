"""Fingerprints of models: hashes of the content of config and weight files, independent of their location."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capo.errors import DamagedFile, InputError
from capo.runtime.files import led_to
from capo.runtime.reading import FOLDER_REMEDY, open_ordinary, read_any_json
from capo.runtime.tensor_files import readable_tensors
from capo.runtime.weight_files import weight_files

# Keys in which libraries record themselves and a file's origin; they say nothing about the model.
VOLATILE_KEYS = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_diffusers_version",
        "transformers_version",
        "is_local",
        "local_files_only",
    }
)
# tokenizer.json also records how the tokenizer was last called before it was saved.
CALL_STATE = frozenset({"truncation", "padding"})
BLOB_NAME = re.compile(r"[0-9a-f]{64}")

# (path, size, mtime in ns) -> sha256: hashing gigabytes takes long
_digests: dict[tuple[str, int, int], str] = {}


def file_digest(path: str | Path) -> str:
    """Return the sha256 of a file's content, 64 hex digits.

    In the hub's cache a large file is a link to a blob named by its sha256, and that name is used without
    reading the file. Any other digest is cached for the life of the process, by path, size and modification
    time. Raises DamagedFile for anything but an ordinary file, and FileNotFoundError.
    """
    target = led_to(Path(path))
    if target.parent.name == "blobs" and BLOB_NAME.fullmatch(target.name):
        return target.name
    with open_ordinary(target, partial(DamagedFile, remedy="put the file itself there")) as file:
        status = os.fstat(file.fileno())
        key = (str(target), status.st_size, status.st_mtime_ns)
        if key not in _digests:
            try:
                _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:  # of the disk, which does not say the name
                raise DamagedFile(target, error.strerror or str(error), "get the file again") from error
    return _digests[key]


def safetensors_fingerprint(path: str | Path) -> str:
    """Hash the tensors and metadata of a small safetensors file, 64 hex digits.

    The raw bytes are not hashed, because the order of the metadata entries differs from save to save. Raises
    InputError for a file that cannot be read.
    """
    with readable_tensors(Path(path)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        entries = {
            name: [str(value.dtype), list(value.shape), _tensor_digest(value)]
            for name, value in tensors.items()
        }
        return content_fingerprint({"metadata": file.metadata(), "tensors": entries})


def _tensor_digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def content_fingerprint(entries: Mapping[str, object]) -> str:
    """Return the sha256, 64 hex digits, of a mapping of JSON values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def component_fingerprint(
    folder: str | Path,
    components: Sequence[str],
    variant: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """Fingerprint some components of a diffusers pipeline folder, 64 hex digits.

    It covers each component's config (without `VOLATILE_KEYS`) and safetensors, or a tokenizer's files, and
    `settings`: JSON values of the pipeline that belong to these components. A snapshot in the hub's cache and
    a plain folder with the same content have the same fingerprint. Raises InputError if a component's folder
    is missing or holds nothing to hash.
    """
    entries = {component: _component_entries(Path(folder) / component, variant) for component in components}
    return content_fingerprint({"components": entries, "settings": dict(settings or {})})


def _component_entries(folder: Path, variant: str | None) -> dict[str, object]:
    weights = weight_files(folder, variant)
    entries: dict[str, object] = {name: file_digest(path) for name, path in weights.items()}
    # A download of a model holds only config.json beside the weights; a tokenizer consists of small files.
    patterns = ("config.json",) if weights else ("*.json", "*.txt", "*.model")
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        entries[path.name] = _stable_config(path) if path.suffix == ".json" else file_digest(path)
    if not entries:
        raise InputError(
            f"no fingerprint for '{folder}': it holds no config and no safetensors; "
            "is this a complete diffusers pipeline folder?"
        )
    return entries


def _stable_config(path: Path) -> object:
    config = read_any_json(path, FOLDER_REMEDY)
    if not isinstance(config, dict):
        return config
    volatile = VOLATILE_KEYS | (CALL_STATE if path.name == "tokenizer.json" else frozenset())
    return {key: value for key, value in config.items() if key not in volatile}


def digested(value: Any) -> Any:
    """Replace every path in `value` by digests of the files there, so that no machine's paths count."""
    if isinstance(value, Mapping):
        return {str(key): digested(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [digested(inner) for inner in value]
    # A string without a slash is not a path: a folder with the name of an option must not change the hash.
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        path = Path(value).expanduser()
        if _lies_there(path) and path.is_file():
            return file_digest(path)
        if _lies_there(path) and path.is_dir():
            return {
                str(file.relative_to(path)): file_digest(file)
                for file in sorted(path.rglob("*"))
                if file.is_file() and not file.name.startswith(".")
            }
    return value


def _lies_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long: a sentence with a slash in it
        return False
