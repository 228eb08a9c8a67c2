"""The manifest of a pool: the settings that its files were made with."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capo.data.pool.files import write_file
from capo.data.pool.layout import LATENTS, LOCKS, REFERENCE, SCORES, TEXT, VERIFIED
from capo.errors import DamagedFile, InputError
from capo.runtime.files import refuse_links
from capo.runtime.limits import SHARD
from capo.runtime.reading import read_json
from capo.runtime.terminal import typed

SCHEMA = 1
NAME = "manifest.json"
REMEDY = "restore it, or remove the pool, or use another pool.root"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Settings of a pool; the three fingerprints are hashes of content, so any machine can compare them."""

    schema: int = SCHEMA
    prompts_per_shard: int = 8
    seed: int
    generator: str  # fingerprint of denoiser and sampler
    latent_space: str  # fingerprint of VAE and scaling
    text_encoders: str  # fingerprint of the text encoders

    def differences(self, other: "Manifest") -> list[str]:
        """One clause for each field that differs, such as `seed is 0, this configuration has 1`."""
        mine, its = asdict(self), asdict(other)
        return [
            f"{name} is {mine[name]}, this configuration has {its[name]}"
            for name in mine
            if mine[name] != its[name]
        ]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the pool in `folder`.

        Raises InputError if there is none, or one of another schema, and DamagedFile for a field that is not
        what it should be.
        """
        path = folder / NAME
        try:
            values = read_json(path, REMEDY)
        except FileNotFoundError as error:
            raise InputError(f"{folder} is not a pool (no {NAME}); generate.py makes one") from error
        if isinstance(schema := values.get("schema"), int) and schema != SCHEMA:
            raise InputError(
                f"{path}: the pool has schema {schema}, but this version reads {SCHEMA}; use another "
                "pool.root"
            )
        if fault := _fault(values):
            raise DamagedFile(path, fault, REMEDY)
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write the manifest; the caller holds its lock."""
        write_file(folder / NAME, json.dumps(asdict(self), indent=2).encode() + b"\n")


def holds_pool(folder: Path) -> bool:
    """Whether a pool was begun in this folder: its manifest is the first file that is written."""
    return (folder / NAME).is_file()


def is_begun(folder: Path) -> bool:
    """Whether there is anything of a pool in `folder`, with a manifest or without; locks alone are nothing.

    Raises InputError for what is no folder.
    """
    check_folder(folder)
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def check_folder(folder: Path) -> None:
    """Raise InputError for a pool's place where no pool can stand.

    That is one where something other than a folder is, there or at its root, and one in another pool.
    """
    check_root(folder.parent)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(
            f"{folder} is no folder, but a pool should stand there: move it away, or use another pool.root"
        )


def check_root(root: Path) -> None:
    """Raise InputError for a root of pools that is no folder, or a pool itself."""
    if os.path.lexists(root) and not root.is_dir():
        raise InputError(
            f"{root} is no folder, but pools should stand there: move it away, or use another pool.root"
        )
    if holds_pool(root):
        raise InputError(
            f"pool.root={root} is a pool itself: give the folder that it stands in, "
            f"{typed('pool.root', root.absolute().parent)}"
        )


def check_links(folder: Path) -> None:
    """Raise InputError if a folder of the pool in `folder` is a link that leads out of it, or no folder.

    Folders of shards are not listed, since they may hold millions: a shard that is a link is replaced, as
    every file that is written whole. Those of scores and of errors are few, and errors are appended.
    """
    places = [folder / name for name in (TEXT, LATENTS, SCORES, REFERENCE, VERIFIED, LOCKS)]
    for name in (SCORES, REFERENCE):
        places += sorted((folder / name).glob("*")) if not (folder / name).is_symlink() else []
    refuse_links(folder, places, own="; pool.root, or the whole folder of a pool, may be a link")
    for name in (TEXT, LATENTS, SCORES):
        if os.path.lexists(place := folder / name) and not place.is_dir():
            raise InputError(
                f"{place} is no folder, but files of a pool should stand there: move it away, or use another "
                "pool.root"
            )


def _fault(values: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a manifest, or None."""
    kinds = Manifest.__annotations__
    if others := sorted(values.keys() ^ kinds.keys()):
        return f"{others[0]} is {'unknown' if others[0] in values else 'not there'}"
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            return f"{name} is {values[name]!r}, which is no {'text' if kind is str else 'whole number'}"
    if not 1 <= values["prompts_per_shard"] <= SHARD:
        return f"prompts_per_shard is {values['prompts_per_shard']}, which must be from 1 to {SHARD}"
    return None
