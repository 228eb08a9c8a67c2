"""Find, download and read a reward's weights from a file, folder or hub id, without running code from them.

In every function `setting` is the configuration key that gave the source, for messages.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from capo.errors import DamagedFile, InputError, first_line, load_reason
from capo.runtime.hub import cached_snapshot, download_command, hub_refusal, is_hub_id
from capo.runtime.reading import FOLDER_REMEDY, read_json

# configs, vocabularies and chat templates, which are always downloaded
SMALL = ("*.json", "*.txt", "*.jinja")
SHOWN = 3  # tensor names listed in a message
# Present in old files only; transformers computes it.
REMADE = "position_ids"


def fetch(source: str, revision: str | None, setting: str, *patterns: str) -> Path:
    """Return the file or folder `source`, or the snapshot of that hub id, downloaded if needed.

    A folder must hold files that match one of `patterns`. From a repository only the first pattern with a
    match is downloaded, together with the configs. Raises InputError, which lists the places searched and how
    to provide the source, if there is none.
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
    """Return the file `source`, or the file `name` in that folder or repository; raise as `fetch` does."""
    found = fetch(source, revision, setting, name)
    return found / name if found.is_dir() else found


def look_for(source: str, revision: str | None, setting: str) -> None:
    """Raise InputError, as `fetch` does, if `source` is neither here, nor in the hub's cache, nor on the hub.

    Nothing is downloaded, and the content of a file or folder is not checked.
    """
    if Path(source).expanduser().exists():
        return
    _require_hub_id(source, setting)
    if cached_snapshot(source, revision) is None and (refusal := hub_refusal(source, revision)):
        raise InputError(_not_here(source, revision, setting, (), refusal))


def _require_hub_id(source: str, setting: str) -> None:
    if not is_hub_id(str(source)):
        raise InputError(
            f"{setting}={source}: no such file or folder (looked at "
            f"'{Path(source).expanduser().absolute()}'); give one that is there, or a hub id such as "
            "'owner/name'"
        )


def _from_hub(source: str, revision: str | None, setting: str, patterns: Collection[str]) -> Path:
    lacking = f"no {' and no '.join(patterns)} in it"
    for pattern in patterns:
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*SMALL, pattern]))
        except Exception as error:  # the hub client's errors share no base class
            raise InputError(_not_here(source, revision, setting, patterns, first_line(error))) from error
        if any(folder.glob(pattern)):
            return folder
    raise InputError(_not_here(source, revision, setting, patterns, lacking))


def _not_here(source: str, revision: str | None, setting: str, patterns: Collection[str], reason: str) -> str:
    command = download_command(source, revision, [*SMALL, *patterns])
    by_hand = f", or {command}" if patterns else ""  # without patterns it would download the whole repository
    return (
        f"{setting}={source} (revision {revision or 'main'}) is not here\n"
        f"  looked in: folder {Path(source).absolute()} (not there); hub cache {constants.HF_HUB_CACHE} and "
        f"{constants.ENDPOINT} ({reason})\n"
        f"  provide it in one of three ways:\n"
        f"    from the hub: the same command with a network{by_hand}\n"
        f"    as a folder: {setting}=FOLDER, and evaluation.{setting}=FOLDER if it is used in evaluation "
        "too\n"
        f"    as a hub cache copied from another machine: HF_HOME=FOLDER before the command"
    )


def read_state(path: Path, setting: str) -> dict[str, Tensor]:
    """Read {name: tensor}, on the CPU, from a safetensors file or a state dict written by torch.save.

    The state dict may be the file's content or its entry `state_dict`. Raises InputError for any other file,
    such as a pickled module, because loading one runs any code in it.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except MemoryError:
        raise
    except Exception as error:  # of safetensors, pickle and torch, by the bytes
        raise InputError(
            f"{setting}={path}: no safetensors file and no state dict ({load_reason(error)}); a pickled "
            "module can run any code when loaded: convert it once, where you trust its source, with "
            "safetensors.torch.save_file(module.state_dict(), FILE)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # beside the state of training
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{setting}={path}: no state dict (tensors by name); save module.state_dict() alone")
    return state


def read_config(folder: Path, setting: str) -> dict[str, Any]:
    """Read a folder's config.json; raise InputError if missing or not JSON, or if `folder` is a file."""
    try:
        return read_json(folder / "config.json", FOLDER_REMEDY)
    except (FileNotFoundError, DamagedFile) as error:
        alone = "it is a file; give the folder that holds it and its config.json"
        fault = (
            alone if folder.is_file() else "its config.json is missing or unreadable; get the folder again"
        )
        raise InputError(f"{setting}={folder}: {fault}") from error


def require_type(folder: Path, setting: str, wanted: str, told: str) -> None:
    """Raise InputError as `read_config` does, or if the config's `model_type` is not `wanted`.

    `told` names, for the message, the model that the reward reads.
    """
    found = read_config(folder, setting).get("model_type")
    if found != wanted:
        raise InputError(
            f"{setting}={folder}: it holds a model of type {found}, this reward reads {told} (type {wanted})"
        )


def load_inputs(folder: Path, setting: str) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor of a Qwen-VL; raise InputError if the folder lacks them."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    try:
        return AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # the tokenizers library's errors share no base class
        raise InputError(
            f"{setting}={folder}: no tokenizer and image processor ({error}); get the folder again"
        ) from error


@contextmanager
def taking_weights(source: str | Path, setting: str, published: str) -> Iterator[None]:
    """Turn what goes wrong where a model takes its weights, such as shapes that differ, into an InputError.

    It names the checkpoint `source`, and `published`, one that fits.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{setting}={source}: its weights do not load ({error}); this reward reads those of {published}"
        ) from error


def load_network(
    kind: Any, folder: Path, config: Any, setting: str, published: str, state: dict[str, Tensor] | None = None
) -> Any:
    """Load a network of transformers from a folder in float32; with `state`, load these weights instead.

    Args:
        kind: class of the network.
        folder: holds the weights.
        config: its architecture.
        setting: configuration key that gave the folder.
        published: a checkpoint that fits, for messages.
        state: name -> tensor.

    Raises:
        InputError: the weights do not load, or are another model's.
    """
    place: dict[str, Any] = (
        {"pretrained_model_name_or_path": folder}
        if state is None
        else {"pretrained_model_name_or_path": None, "state_dict": state}
    )
    with taking_weights(folder, setting, published):
        model, found = kind.from_pretrained(
            **place, config=config, dtype=torch.float32, output_loading_info=True
        )
    refuse_other_names(found["missing_keys"], found["unexpected_keys"], str(folder), setting, published)
    return model


def refuse_other_names(
    missing: Collection[str], unexpected: Collection[str], source: str, setting: str, published: str
) -> None:
    """Raise InputError if a checkpoint lacks tensors of the model or has others.

    Args:
        missing: names of the model's tensors that the checkpoint lacks.
        unexpected: names of the checkpoint's tensors that the model does not have.
        source: the checkpoint.
        setting: configuration key that gave the checkpoint.
        published: a checkpoint that fits.
    """
    unexpected = [name for name in unexpected if not name.endswith(REMADE)]
    faults = [
        f"{word} {_named(names)}"
        for word, names in (("lacks", missing), ("has unknown", unexpected))
        if names
    ]
    if faults:
        raise InputError(
            f"{setting}={source}: another model's weights: it {' and '.join(faults)}; this reward reads "
            f"those of {published}"
        )


def _named(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:SHOWN])
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN} more"
