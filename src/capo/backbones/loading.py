"""From what a config calls `weights` to a pipeline: a folder or a hub id, safetensors only, no code."""

import json
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from capo.errors import InputError
from capo.fingerprints import weight_files

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def named_dtype(dtype: str) -> torch.dtype:
    """torch's dtype of that name; InputError for another name."""
    if dtype not in DTYPES:
        raise InputError(f"model dtype '{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def pipeline_folder(weights: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a pipeline: `weights` itself, or the hub's snapshot of that id (downloaded).

    Raises InputError that says what was looked for where neither is to be had.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(weights)):
        raise InputError(
            f"weights '{weights}': no such folder (looked at '{folder.absolute()}'); give the folder of a "
            "diffusers pipeline (it holds a model_index.json) or a hub id such as 'owner/name'"
        )
    try:
        return Path(
            DiffusionPipeline.download(str(weights), revision=revision, variant=variant, use_safetensors=True)
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        raise InputError(
            f"weights '{weights}': no folder '{folder.absolute()}', and hub repository '{weights}' "
            f"(revision {revision or 'main'}, variant {variant or 'none'}, safetensors) could not be had. "
            f"Check the name; with a network, `hf download {weights}` (after `hf auth login` where the model "
            f"is gated); without one, copy the pipeline's folder here and give its path. Cause: {error}"
        ) from error


def pipeline_index(folder: Path, known: tuple[str, ...]) -> dict:
    """model_index.json of a pipeline folder; InputError where it is missing or of a class not in `known`."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"weights '{folder}': '{path.name}' is missing or unreadable, so this is no diffusers pipeline "
            "folder; write one with `pipeline.save_pretrained(folder)`"
        ) from error
    if index.get("_class_name") not in known:
        raise InputError(
            f"weights '{folder}' hold a {index.get('_class_name')}; this backbone loads {', '.join(known)}: "
            "choose the model group that fits the weights"
        )
    return index


def refuse_pickles(folder: Path, index: dict, variant: str | None = None) -> None:
    """InputError naming a component that has pickled weights and no safetensors: pickles run code."""
    for component in sorted(index):
        files = [file for pattern in PICKLES for file in sorted((folder / component).glob(pattern))]
        if files and not weight_files(folder / component, variant):
            raise InputError(
                f"weights '{folder}': component '{component}' has only pickled weights ({files[0].name}), "
                "which can run any code when loaded; convert them once, where you trust their source, "
                "with `pipeline.save_pretrained(folder, safe_serialization=True)`"
            )


def load_pipeline(
    folder: Path, known: tuple[str, ...], variant: str | None, dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline of a folder, of one of the classes `known`: weights in `dtype`, frozen, in eval mode.

    Raises InputError for a folder that does not hold such a pipeline in safetensors.
    """
    refuse_pickles(folder, pipeline_index(folder, known), variant)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, variant=variant, dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"weights '{folder}' (variant {variant or 'none'}) do not load: {error}. Get the folder again, "
            "or name the variant that it holds"
        ) from error
    pipeline.watermark = None  # SDXL's, put into images where a certain package happens to be installed
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipeline
