"""Find, download and load a pipeline or VAE from a folder or hub id: safetensors only, which run no code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from torch import nn

from capo.errors import DamagedFile, InputError, first_line
from capo.runtime.hub import cached_snapshot, download_command, hub_refusal, is_hub_id
from capo.runtime.reading import FOLDER_REMEDY, read_any_json, read_json
from capo.runtime.weight_files import weight_files, weight_map

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
VAE_FILES = ["config.json", "*.safetensors"]
AGAIN = "get the folder again, or name the variant that it holds"
Loaded = TypeVar("Loaded")


class MissingWeights(InputError):
    """Weights that are neither in a folder nor in the hub's cache, and that cannot be downloaded either."""


def pipeline_folder(
    weights: str, revision: str | None = None, variant: str | None = None, unused: Mapping[str, None] = {}
) -> Path:
    """Return the folder of a pipeline: `weights` itself, or that hub id's snapshot, downloaded if needed.

    Components in `unused` may be missing. Raises InputError, which lists the places searched, if there is
    none.
    """
    if folder := find_pipeline(weights, revision, variant, unused):
        return folder
    try:
        return Path(
            DiffusionPipeline.download(
                str(weights), revision=revision, variant=variant, use_safetensors=True, **unused
            )
        )
    except Exception as error:  # the hub client's errors share no base class
        raise InputError(
            f"weights '{weights}': the download from {constants.ENDPOINT} failed ({first_line(error)}); what "
            f"was downloaded is kept in {constants.HF_HUB_CACHE}, and running the same command again resumes"
        ) from error


def find_pipeline(
    weights: str, revision: str | None = None, variant: str | None = None, unused: Mapping[str, None] = {}
) -> Path | None:
    """Return a pipeline's folder on this machine, or None if it is not here but can be downloaded.

    Nothing is loaded or downloaded. Raises InputError if there is no such folder, and MissingWeights for a
    hub id that is not available.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(weights), owned=False):
        raise InputError(
            f"weights '{weights}': no such folder (looked at '{folder.absolute()}'); give the folder of a "
            "diffusers pipeline (it holds a model_index.json) or a hub id such as 'owner/name'"
        )
    snapshot, in_cache = _in_cache(str(weights), revision, variant, unused)
    if snapshot is not None:
        return snapshot
    if refusal := hub_refusal(str(weights), revision):
        raise MissingWeights(_not_here(str(weights), revision, variant, in_cache, refusal))
    return None


def _in_cache(
    weights: str, revision: str | None, variant: str | None, unused: Mapping[str, None]
) -> tuple[Path | None, str]:
    """Return the snapshot in the hub's cache if it is complete, else None and the reason."""
    snapshot = cached_snapshot(weights, revision)
    if snapshot is None:
        return None, "not in it"
    lacking = lacking_parts(snapshot, variant, unused)
    return (None, f"there, but without {', '.join(lacking)}") if lacking else (snapshot, "")


def lacking_parts(folder: Path, variant: str | None = None, unused: Mapping[str, None] = {}) -> list[str]:
    """List what a pipeline folder lacks of what its model_index.json names, as after an interrupted download.

    Components in `unused` are not checked.
    """
    try:
        index = read_json(folder / "model_index.json", FOLDER_REMEDY)
    except (FileNotFoundError, DamagedFile):
        return ["model_index.json"]
    names = [
        name
        for name, entry in index.items()
        if _is_component(name, entry) and entry[0] and name not in unused
    ]
    models = [name for name in names if (folder / name / "config.json").is_file()]
    lacking = [name for name in names if not any((folder / name).glob("*"))]
    lacking += [f"the weights of {name}" for name in models if not _has_weights(folder / name, variant)]
    if variant and not any(
        f".{variant}" in path.name for name in models for path in (folder / name).glob("*.safetensors")
    ):
        lacking.append(f"files of variant {variant}")
    return lacking


def _is_component(name: str, entry: object) -> bool:
    return isinstance(entry, list) and not name.startswith("_")


def _has_weights(folder: Path, variant: str | None) -> bool:
    """Whether a model's weights are complete: all shards of an index, or a weight file of any kind."""
    for path in folder.glob(f"*.safetensors.index.{variant}.json" if variant else "*.safetensors.index.json"):
        return all((folder / shard).is_file() for shard in set(weight_map(path).values()))
    return bool(weight_files(folder, variant)) or any(any(folder.glob(pattern)) for pattern in PICKLES)


def _not_here(weights: str, revision: str | None, variant: str | None, in_cache: str, refusal: str) -> str:
    wanted = ["*.json", "*.txt", f"*.{variant}.safetensors"] if variant else []
    command = download_command(weights, revision, wanted)
    return (
        f"weights '{weights}' (revision {revision or 'main'}, variant {variant or 'none'}, safetensors) "
        "are not here\n"
        f"  looked in: folder {Path(weights).absolute()} (not there); "
        f"hub cache {constants.HF_HUB_CACHE} ({in_cache}); {constants.ENDPOINT} ({refusal})\n"
        f"  provide them in one of three ways:\n"
        f"    from the hub: the same command with a network, or {command} "
        "(a gated model: accept its license on its page, then hf auth login)\n"
        f"    as a folder in diffusers' format: model.backbone.weights=FOLDER\n"
        f"    as a hub cache copied from another machine: HF_HOME=FOLDER before the command"
    )


def pipeline_index(folder: Path, known: tuple[str, ...]) -> dict:
    """Read model_index.json of a folder; raise InputError if missing or of a class not in `known`."""
    path = folder / "model_index.json"
    try:
        index = read_json(path, FOLDER_REMEDY)
    except (FileNotFoundError, DamagedFile) as error:
        raise InputError(
            f"weights '{folder}': '{path.name}' is missing or unreadable, so this is not the folder of a "
            "diffusers pipeline; write one with `pipeline.save_pretrained(folder)`"
        ) from error
    if index.get("_class_name") not in known:
        raise InputError(
            f"weights '{folder}' hold a {index.get('_class_name')}; this backbone loads {', '.join(known)}: "
            "choose the model group that fits the weights"
        )
    return index


def refuse_pickles(folder: Path, index: dict, variant: str | None = None) -> None:
    """Raise InputError for a component with pickled weights only: loading a pickle can run any code."""
    for component in sorted(index):
        files = [file for pattern in PICKLES for file in sorted((folder / component).glob(pattern))]
        if files and not weight_files(folder / component, variant):
            raise InputError(
                f"weights '{folder}': component '{component}' has only pickled weights ({files[0].name}), "
                "which can run any code when loaded; convert them once, where you trust their source, "
                "with `pipeline.save_pretrained(folder, safe_serialization=True)`"
            )


def load_pipeline(
    folder: Path,
    known: tuple[str, ...],
    variant: str | None,
    dtype: torch.dtype,
    unused: Mapping[str, None] = {},
    hollow: tuple[str, ...] = (),
) -> DiffusionPipeline:
    """Load the pipeline of a folder, of a class in `known`: weights in `dtype`, frozen, in eval mode.

    Components in `unused`, and those that the folder itself leaves empty, are None. Components whose names
    begin with one of `hollow` are on the meta device: they have configs and shapes, and their weights are not
    read. Raises InputError if the folder does not hold such a pipeline in safetensors.
    """
    index = pipeline_index(folder, known)
    parts = {name: entry for name, entry in index.items() if _is_component(name, entry)}
    empty = {name: None for name, entry in parts.items() if name in unused or not entry[0]}
    given = empty | {
        name: hollow_module(folder / name)
        for name in parts
        if name not in empty and name.startswith(hollow) and (folder / name / "config.json").is_file()
    }
    refuse_pickles(folder, {name: entry for name, entry in index.items() if name not in empty}, variant)
    check_configs(*(folder / name for name in parts if name not in empty))
    with loaded(f"weights '{folder}' (variant {variant or 'none'})"):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, variant=variant, dtype=dtype, use_safetensors=True, **given
        )
    pipeline.watermark = None  # SDXL would watermark images wherever invisible-watermark is installed
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipeline


def load_component(
    folder: Path, component: str, kind: type[Loaded], variant: str | None, dtype: torch.dtype
) -> Loaded:
    """Load one component of a pipeline's folder, of the class `kind`, as `load_pipeline` does: in `dtype`.

    Raises InputError if it does not load any more.
    """
    place = folder / component
    held = any(f".{variant}" in path.name for path in weight_files(place, variant).values())
    loader: Any = kind
    check_configs(place)
    with loaded(f"weights '{place}' (variant {variant or 'none'})"):
        return loader.from_pretrained(
            place, variant=variant if held else None, dtype=dtype, use_safetensors=True
        )


def check_configs(*components: Path) -> None:
    """Raise DamagedFile for a JSON file of a component that is not JSON: libraries do not name the file.

    A config.json holds an object: what a text there names, diffusers would get from the hub.
    """
    for component in components:
        for path in sorted(component.glob("*.json")):
            (read_json if path.name == "config.json" else read_any_json)(path, FOLDER_REMEDY)


@contextmanager
def loaded(
    what: str, remedy: str = "get the folder again, or name the variant that it holds"
) -> Iterator[None]:
    """Turn what goes wrong in a library that loads `what` into an InputError that names it."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of diffusers, transformers, tokenizers and safetensors, by the content
        raise InputError(f"{what} do not load: {error}; {remedy}") from error


def fresh_module(config: Mapping) -> nn.Module:
    """A module of diffusers or transformers as its class initializes it, on the current device."""
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    kind = getattr(transformers, config["architectures"][0])
    return kind(kind.config_class(**{key: value for key, value in config.items() if key != "architectures"}))


def hollow_module(folder: Path) -> nn.Module:
    """The module of a component's folder on the meta device, without weights."""
    config = read_json(folder / "config.json", FOLDER_REMEDY)
    with torch.device("meta"), loaded(f"weights '{folder}'"):
        return fresh_module(config)


def find_vae(weights: str, revision: str | None) -> None:
    """Raise InputError if the VAE `weights` is no folder and is not available from the hub or its cache."""
    folder = Path(weights).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return
    refusal = (
        "that folder holds no config.json"
        if folder.is_dir()
        else "no such folder, and not a hub id 'owner/name'"
    )
    if not folder.is_dir() and is_hub_id(str(weights), owned=False):
        try:
            snapshot_download(weights, revision=revision, allow_patterns=VAE_FILES, local_files_only=True)
            return
        except (OSError, ValueError):
            refusal = hub_refusal(str(weights), revision)
    if refusal:
        raise InputError(_no_vae(weights, revision, refusal))


def _no_vae(weights: str, revision: str | None, reason: str) -> str:
    return (
        f"model.backbone.vae={weights} (revision {revision or 'main'}): no AutoencoderKL in safetensors is "
        f"available there ({reason}); give its folder, or null for the pipeline's own"
    )


def load_vae(weights: str, revision: str | None, dtype: torch.dtype) -> tuple[AutoencoderKL, Path]:
    """Load a VAE from a folder or hub id, frozen and in eval mode; return it and its folder.

    Raises InputError if it is not available in safetensors.
    """
    folder = Path(weights).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(weights, revision=revision, allow_patterns=VAE_FILES))
        vae = AutoencoderKL.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the hub and of diffusers, by what is in the files
        raise InputError(_no_vae(weights, revision, first_line(error))) from error
    return vae.eval().requires_grad_(False), folder
