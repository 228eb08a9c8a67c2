"""Configurations of a pipeline's components: what libraries read of them unchecked is checked before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from capo.errors import DamagedFile
from capo.runtime.reading import FOLDER_REMEDY, read_any_json, read_json
from capo.runtime.schema import Said, Section, faults, key
from capo.runtime.stored import Record

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
Side = Annotated[int, Field(ge=1, le=2**16)]


class Network(Record):
    """What pipelines read of the config.json of a network of diffusers, where it is there."""

    sample_size: Annotated[
        Side | Annotated[list[Side], Field(min_length=2, max_length=2)],
        Said("a whole number from 1 on, or two of them"),
    ] = key("sides of its latents or images", 1)
    scaling_factor: Annotated[float, Field(gt=0)] = key("factor of a VAE's latents", 1.0)
    shift_factor: float | None = key("shift of a VAE's latents", None)
    addition_time_embed_dim: Annotated[int, Field(ge=1)] | None = key("width of an embedded size", None)


class Tokenizer(Record):
    """What is read of a tokenizer_config.json, where it is there."""

    model_max_length: Annotated[
        Annotated[int, Field(ge=2)] | Annotated[float, Field(ge=2)], Said("a number of tokens, at least 2")
    ] = key("tokens of a prompt, start and end included", 2)


def check_configs(*components: Path) -> None:
    """Raise DamagedFile for a JSON file of a component that cannot be used: libraries do not name the file.

    A config.json holds an object: what a text there names, diffusers would get from the hub.
    """
    for component in components:
        for path in sorted(component.glob("*.json")):
            values = (read_json if path.name == CONFIG else read_any_json)(path, FOLDER_REMEDY)
            schema = _schema(path.name, values)
            if schema is not None and (found := faults(schema, values)):
                raise DamagedFile(path, "; ".join(found.values()), FOLDER_REMEDY)


def _schema(name: str, values: object) -> type[Section] | None:
    if name == TOKENIZER:
        return Tokenizer
    return Network if name == CONFIG and isinstance(values, dict) and "_class_name" in values else None
