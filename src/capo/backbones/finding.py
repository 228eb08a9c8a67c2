"""Find a pipeline or VAE: in a folder, in the hub's cache, or on the hub. Nothing of it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from capo.backbones.lora import LORA_FILE
from capo.errors import DamagedFile, InputError, first_line
from capo.runtime.hub import cached_snapshot, download_command, hub_refusal, is_hub_id
from capo.runtime.reading import FOLDER_REMEDY, read_json
from capo.runtime.weight_files import weight_files, weight_map

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
VAE_FILES = ["config.json", "*.safetensors"]


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
    from diffusers import DiffusionPipeline

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
    names = [name for name in named_parts(index) if name not in unused]
    models = [name for name in names if (folder / name / "config.json").is_file()]
    lacking = [name for name in names if not any((folder / name).glob("*"))]
    lacking += [f"the weights of {name}" for name in models if not _has_weights(folder / name, variant)]
    if variant and not any(
        f".{variant}" in path.name for name in models for path in (folder / name).glob("*.safetensors")
    ):
        lacking.append(f"files of variant {variant}")
    return lacking


def is_component(name: str, entry: object) -> bool:
    """Whether an entry of model_index.json names a component."""
    return isinstance(entry, list) and not name.startswith("_")


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """Components for which a model_index.json names a class; null stands for those that there are not."""
    return [name for name, entry in index.items() if is_component(name, entry) and entry[0]]


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
        if (folder / LORA_FILE).is_file():
            raise InputError(
                f"weights '{folder}': it holds a LoRA adapter, '{LORA_FILE}', and no whole pipeline; give a "
                "policy in which it is merged into its base (of a run, evaluate.py run=DIR export=full "
                "validation.strengths=[1] exports one)"
            ) from error
        raise InputError(
            f"weights '{folder}': '{path.name}' is missing or unreadable, so this is not the folder of a "
            "diffusers pipeline; write one with `pipeline.save_pretrained(folder)`"
        ) from error
    if index.get("_class_name") not in known:
        raise InputError(
            f"weights '{folder}' hold a {index.get('_class_name')}; this backbone loads {', '.join(known)}: "
            "choose the model group that fits the weights"
        )
    for name, entry in index.items():
        fine = not is_component(name, entry) or (
            len(entry) == 2 and (entry == [None, None] or all(isinstance(part, str) for part in entry))
        )
        if not fine:
            told = f"{name}={entry}: must be [library, class], or [null, null]"
            raise DamagedFile(path, told, FOLDER_REMEDY)
    return index


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
        raise InputError(no_vae(weights, revision, refusal))


def no_vae(weights: str, revision: str | None, reason: str) -> str:
    """Message for a VAE that is not there, with the reason."""
    return (
        f"model.backbone.vae={weights} (revision {revision or 'main'}): no AutoencoderKL in safetensors is "
        f"available there ({reason}); give its folder, or null for the pipeline's own"
    )
