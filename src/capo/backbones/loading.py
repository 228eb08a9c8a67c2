"""Load a pipeline or VAE from a folder or hub id: safetensors only, which run no code."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from capo.backbones.component_configs import check_configs
from capo.backbones.finding import PICKLES, VAE_FILES, is_component, lacking_parts, no_vae, pipeline_index
from capo.backbones.finite import check_finite
from capo.errors import DamagedFile, InputError, first_line
from capo.runtime.reading import FOLDER_REMEDY, read_json
from capo.runtime.tensor_files import tensor_homes
from capo.runtime.weight_files import weight_files

AGAIN = "get the folder again, or give its variant (model.backbone.variant, null for files without one)"
Loaded = TypeVar("Loaded")


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


def refuse_code(folder: Path, index: Mapping[str, list]) -> None:
    """Raise InputError for a component whose class stands in code of the folder itself.

    `index` has the entry of each component in model_index.json: its library and its class.
    """
    for component, entry in index.items():
        library = str(entry[0])
        # a pipeline's own module has its safety checker and the like
        if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
            raise InputError(
                f"weights '{folder}': model_index.json names {'.'.join(map(str, entry))} for '{component}', "
                "which is no class of diffusers or transformers, and code of a model's folder is not run; "
                "use a folder with classes of theirs"
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
    parts = {name: entry for name, entry in index.items() if is_component(name, entry)}
    empty = {name: None for name, entry in parts.items() if name in unused or not entry[0]}
    given = empty | {
        name: hollow_module(folder / name)
        for name in parts
        if name not in empty and name.startswith(hollow) and (folder / name / "config.json").is_file()
    }
    filled = {name: entry for name, entry in parts.items() if name not in empty}
    refuse_code(folder, filled)
    refuse_pickles(folder, {name: entry for name, entry in index.items() if name not in empty}, variant)
    if lacking := lacking_parts(folder, variant, empty):
        raise InputError(f"weights '{folder}' lack {', '.join(lacking)}; {AGAIN}")
    check_configs(*(folder / name for name in filled))
    for name, entry in filled.items():
        config = folder / name / "config.json"
        kind = read_json(config, FOLDER_REMEDY).get("_class_name") if config.is_file() else None
        if kind not in (None, entry[1]):
            told = f"_class_name={kind}, and model_index.json has {entry[1]} for '{name}'"
            raise DamagedFile(config, told, FOLDER_REMEDY)
    with loaded(f"weights '{folder}' (variant {variant or 'none'})"):
        pipeline = DiffusionPipeline.from_pretrained(
            folder, variant=variant, dtype=dtype, use_safetensors=True, **given
        )
    for name in [name for name in filled if name not in given]:
        check_complete(folder / name, pipeline.components[name], variant)
    check_tokens(folder, pipeline.components)
    check_finite(str(folder / "vae"), pipeline.components.get("vae"))  # its images would be black, unnoticed
    pipeline.watermark = None  # SDXL would watermark images wherever invisible-watermark is installed
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipeline


def check_complete(folder: Path, module: object, variant: str | None) -> None:
    """InputError if a network of `folder` has more weights than its files: libraries make up the rest."""
    if not isinstance(module, nn.Module):
        return
    held = sum(math.prod(shape) for _, _, shape in tensor_homes(folder, variant).values())
    asked = sum(weight.numel() for weight in module.parameters())
    if asked > held or any(weight.is_meta for weight in module.parameters()):
        raise InputError(
            f"weights '{folder}': the files do not hold all weights of its config.json ({asked:,} numbers of "
            f"a {type(module).__name__}; there are {held:,}, some maybe of another network); {FOLDER_REMEDY}"
        )


def check_tokens(folder: Path, components: Mapping[str, Any]) -> None:
    """Raise InputError for a tokenizer with more tokens, or longer prompts, than its text encoder takes."""
    for name, encoder in components.items():
        tokenizer = components.get(name.replace("text_encoder", "tokenizer"))
        if not name.startswith("text_encoder") or encoder is None or tokenizer is None:
            continue
        ends, known = encoder.config.eos_token_id, encoder.config.vocab_size
        if isinstance(ends, int) and ends >= known:  # the pooled text would be that of the first token
            raise InputError(
                f"weights '{folder}': eos_token_id={ends} in {name}/config.json: must be below "
                f"vocab_size={known}; {FOLDER_REMEDY}"
            )
        longest = getattr(encoder.config, "max_position_embeddings", None)  # a T5 takes any number
        found = {
            "vocab_size": (len(tokenizer), encoder.config.vocab_size),
            "max_position_embeddings": (tokenizer.model_max_length, longest),
        }
        for key, (wanted, there) in found.items():
            if there is not None and wanted > there:
                raise InputError(
                    f"weights '{folder}': the tokenizer of '{name}' makes up to {wanted} tokens, and {key}="
                    f"{there} in {name}/config.json; {FOLDER_REMEDY}"
                )


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


@contextmanager
def loaded(what: str, remedy: str = AGAIN) -> Iterator[None]:
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


def load_vae(weights: str, revision: str | None, dtype: torch.dtype) -> tuple[AutoencoderKL, Path]:
    """Load a VAE from a folder or hub id, frozen and in eval mode; return it and its folder.

    Raises InputError if it is not available in safetensors.
    """
    folder = Path(weights).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(weights, revision=revision, allow_patterns=VAE_FILES))
        check_configs(folder)
        vae = AutoencoderKL.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the hub and of diffusers, by what is in the files
        raise InputError(no_vae(weights, revision, first_line(error))) from error
    check_complete(folder, vae, None)
    check_finite(str(folder), vae)
    return vae.eval().requires_grad_(False), folder
