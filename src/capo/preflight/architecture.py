"""A pipeline's architecture from its configs: meta-device modules and input shapes, without weights.

`published/<name>.json` holds the configs of a published model: those keys of the hub's config.json files that
determine sizes and FLOPs. A folder in diffusers' format brings its own configs.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from capo.backbones import FAMILIES, Family
from capo.backbones.component_configs import check_configs
from capo.backbones.loading import fresh_module, loaded
from capo.backbones.models import Autoencoder, Denoiser
from capo.errors import DamagedFile, InputError
from capo.runtime.reading import FOLDER_REMEDY, read_json


@dataclass(frozen=True)
class Blueprint:
    """Configs of a pipeline's modules; hashable, so that results computed from it can be cached.

    Attributes:
        text: JSON text of {component: config}.
        family: model family, which derives shapes from the configs.
        options: JSON text of the keyword arguments of the family's backbone.
    """

    text: str
    family: type[Family]
    options: str = "{}"

    @cached_property
    def configs(self) -> dict[str, dict]:
        """Configs by component."""
        return json.loads(self.text)

    @property
    def denoiser_name(self) -> str:
        """Name of the component that is tuned."""
        return self.family.denoiser_component

    @property
    def encoder_names(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return sorted(name for name in self.configs if name.startswith("text_encoder"))

    def module(self, component: str) -> Any:
        """Build the component on the meta device: float32, all parameters trainable.

        Raises InputError for a config that no network can have.
        """
        what = f"the sizes and classes in {component}/config.json"
        with torch.device("meta"), loaded(what, FOLDER_REMEDY):
            return fresh_module(self.configs[component])

    def denoiser(self) -> Denoiser:
        """Build the component that is tuned, on the meta device."""
        return self.module(self.denoiser_name)

    def vae(self) -> Autoencoder:
        """Build the VAE, on the meta device."""
        return self.module("vae")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.family.shape_of_latent(self.configs, **json.loads(self.options))

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's conditioning by their names in a pool, without the batch dimension."""
        return self.family.shapes_of_text(self.configs, **json.loads(self.options))

    def inputs(self, images: int) -> dict[str, object]:
        """Build uninitialized arguments for the denoiser, for `images` at once, on the current device."""
        text = {name: torch.empty(images, *shape) for name, shape in self.text_shapes.items()}
        return self.family.denoiser_inputs(torch.empty(images, *self.latent_shape), torch.zeros(images), text)


def _blueprint(configs: dict[str, dict], family: type[Family], options: Mapping[str, object]) -> Blueprint:
    left_out = family.unused_parts(**options)
    kept = {name: config for name, config in configs.items() if name not in left_out}
    return Blueprint(json.dumps(kept, sort_keys=True), family, json.dumps(options, sort_keys=True))


def _family_of(configs: Mapping[str, Mapping]) -> type[Family] | None:
    """The one of FAMILIES whose denoiser is among the configs."""
    return next(
        (FAMILIES[name] for config in configs.values() if (name := config.get("_class_name")) in FAMILIES),
        None,
    )


def published_names() -> list[str]:
    """List the published models whose configs are in this package."""
    return sorted(
        path.name.removesuffix(".json")
        for path in importlib.resources.files("capo.preflight.published").iterdir()
        if path.name.endswith(".json")
    )


def published(name: str, /, family: type[Family] | None = None, **options: object) -> Blueprint:
    """Return the blueprint of a published model, for a backbone of `family` with the arguments `options`.

    Without `family`, the denoiser's class decides. Raises InputError for a name without configs here.
    """
    if name not in published_names():
        raise InputError(
            f"model.published={name}: no configs of that name are in this package; choose one of "
            f"{', '.join(published_names())}, or give model.backbone.weights=FOLDER to use its own configs"
        )
    text = (
        importlib.resources.files("capo.preflight.published")
        .joinpath(f"{name}.json")
        .read_text(encoding="utf-8")
    )
    configs = json.loads(text)["components"]
    family = family or _family_of(configs)
    assert family is not None  # every published model has a denoiser of FAMILIES
    return _blueprint(configs, family, options)


def from_folder(folder: Path, /, family: type[Family] | None = None, **options: object) -> Blueprint:
    """Return the blueprint of a pipeline folder, for a backbone of `family` with the arguments `options`.

    Raises InputError if the folder lacks a denoiser, a VAE or a text encoder of a known class, and for a
    config that no network can have (`check_configs`).
    """
    configs = {}
    for path in sorted(folder.glob("*/config.json")):
        config = read_json(path, FOLDER_REMEDY)
        kind = config.get("_class_name") or (config.get("architectures") or [""])[0]
        if not isinstance(kind, str):
            raise DamagedFile(path, f"its class is {kind!r}, not a name", FOLDER_REMEDY)
        if hasattr(diffusers, kind) or hasattr(transformers, kind):
            # The folder's origin and its dtype are not part of the architecture.
            configs[path.parent.name] = {
                key: value
                for key, value in config.items()
                if key not in ("_name_or_path", "dtype", "torch_dtype")
            }
    family = family or _family_of(configs)
    denoisers = [known.denoiser_component for known in FAMILIES.values()]
    denoiser = family.denoiser_component if family else " or ".join(dict.fromkeys(denoisers))
    lacking = [part for part in (denoiser, "vae", "text_encoder") if part not in configs]
    if family is None or lacking:  # without a family, the denoiser is lacking
        raise InputError(
            f"weights '{folder}': no config.json of a known class for {', '.join(lacking)}; "
            "give the folder of a diffusers pipeline"
        )
    left_out = family.unused_parts(**options)
    check_configs(*(folder / name for name in configs if name not in left_out))
    return _blueprint(configs, family, options)
