"""From what a reward's yaml calls `weights` to tensors: a file, a folder or a hub id; nothing that can run code.

`setting` in every function is the key of the configuration that gave the source, for messages.
"""

import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from capo.errors import InputError, first_line
from capo.runtime.hub import hub_refusal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = ("*.json", "*.txt")  # configs and vocabularies, which come with everything
SHOWN = 3  # names of tensors in a message
# read from old files only: transformers makes them itself
REMADE = "position_ids"


def fetch(source: str, revision: str | None, setting: str, *patterns: str) -> Path:
    """The file or folder `source`, or the hub's snapshot of that id, downloaded if need be.

    A folder holds files that match one of `patterns`; of a repository, only the first pattern that matches is downloaded, with the
    configs beside it. Raises InputError that says what was looked for and how to provide it where there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if any(any(path.glob(pattern)) for pattern in patterns):
            return path
        raise InputError(
            f"{setting}={source}: that folder holds no {' and no '.join(patterns)}; give the folder that does"
        )
    _require_hub_id(source, setting)
    return _from_hub(source, revision, setting, patterns)


def fetch_file(source: str, revision: str | None, setting: str, name: str) -> Path:
    """The file `source`, or the file `name` of that folder or hub repository; raises InputError as `fetch`."""
    found = fetch(source, revision, setting, name)
    return found / name if found.is_dir() else found


def look_for(source: str, revision: str | None, setting: str) -> None:
    """InputError, as `fetch`'s, where `source` is neither here nor in the hub's cache nor to be had from the hub; downloads nothing.

    What a file or folder holds is not looked at.
    """
    if Path(source).expanduser().exists():
        return
    _require_hub_id(source, setting)
    try:
        snapshot_download(source, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        if refusal := hub_refusal(source, revision):
            raise InputError(_not_here(source, revision, setting, (), refusal)) from None


def _require_hub_id(source: str, setting: str) -> None:
    if not HUB_ID.fullmatch(str(source)):
        raise InputError(
            f"{setting}={source}: no such file or folder (looked at '{Path(source).expanduser().absolute()}'); give one that is there, or "
            "a hub id such as 'owner/name'"
        )


def _from_hub(source: str, revision: str | None, setting: str, patterns: Collection[str]) -> Path:
    lacking = f"no {' and no '.join(patterns)} in it"
    for pattern in patterns:
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*SMALL, pattern]))
        except Exception as error:  # the errors of the hub's client have no class in common
            raise InputError(_not_here(source, revision, setting, patterns, first_line(error))) from error
        if any(folder.glob(pattern)):
            return folder
    raise InputError(_not_here(source, revision, setting, patterns, lacking))


def _not_here(source: str, revision: str | None, setting: str, patterns: Collection[str], reason: str) -> str:
    includes = [f"--include '{pattern}'" for pattern in [*SMALL, *patterns]]
    command = " ".join(
        [f"hf download {source}", *([f"--revision {revision}"] if revision else []), *includes]
    )
    by_hand = f", or {command}" if patterns else ""  # without them it would be all that the repository holds
    return (
        f"{setting}={source} (revision {revision or 'main'}) is not here\n"
        f"  looked in: folder {Path(source).absolute()} (not there); hub cache {constants.HF_HUB_CACHE} and {constants.ENDPOINT} "
        f"({reason})\n"
        f"  provide it in one of three ways:\n"
        f"    from the hub: the same command with a network{by_hand}\n"
        f"    as a folder: {setting}=FOLDER, and evaluation.{setting}=FOLDER where it evaluates too\n"
        f"    as a hub cache copied from another machine: HF_HOME=FOLDER before the command"
    )


def read_state(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that torch.save wrote, alone or as `state_dict`, by name, on the CPU.

    Raises InputError for a file that is neither, such as a pickled module: loading one runs whatever code it holds.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise InputError(
            f"{setting}={path}: no safetensors file and no state dict ({first_line(error)}); a pickled module can run any code when "
            "loaded: convert it once, where you trust its source, with safetensors.torch.save_file(module.state_dict(), FILE)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # beside what training kept
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{setting}={path}: no state dict (tensors by name); save module.state_dict() alone")
    return state


def read_config(folder: Path, setting: str) -> dict[str, Any]:
    """What a folder's config.json says; InputError where it is missing or no json, or `folder` is a file."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        alone = "it is a file; give the folder that holds it and its config.json"
        fault = (
            alone if folder.is_file() else "its config.json is missing or unreadable; get the folder again"
        )
        raise InputError(f"{setting}={folder}: {fault}") from error


def require_type(folder: Path, setting: str, wanted: str, told: str) -> None:
    """InputError, as `read_config`'s, or where the config's `model_type` is not `wanted`; `told` says what the reward reads."""
    found = read_config(folder, setting).get("model_type")
    if found != wanted:
        raise InputError(
            f"{setting}={folder}: it holds a model of type {found}, this reward reads {told} (type {wanted})"
        )


def refuse_other_names(
    missing: Collection[str], unexpected: Collection[str], source: str, setting: str, published: str
) -> None:
    """InputError where a checkpoint has not exactly the tensors of the model; `published` is one that has."""
    unexpected = [name for name in unexpected if not name.endswith(REMADE)]
    faults = [
        f"{word} {_named(names)}"
        for word, names in (("lacks", missing), ("has unknown", unexpected))
        if names
    ]
    if faults:
        raise InputError(
            f"{setting}={source}: another model's weights: it {' and '.join(faults)}; this reward reads those of {published}"
        )


def _named(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:SHOWN])
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN} more"
