"""Pool of candidates: which files exist and are valid, and reading and writing them shard by shard."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capo.data.pool.files import REMEDY, DamagedShard, TensorFile, write_file, write_tensors
from capo.data.pool.inspection import Inspection
from capo.data.pool.layout import (
    BLOCK,
    SCHEMA,
    Manifest,
    Shard,
    latents_path,
    plan_blocks,
    read_range,
    scores_path,
    text_path,
    write_range,
)
from capo.data.pool.prompt_table import PromptTable
from capo.data.pool.score_files import holds_rows, read_row_scores, read_score_file, write_score_file
from capo.data.prompts import Prompt
from capo.errors import InputError
from capo.runtime.locks import file_lock

ROUNDED = "rounded_to"  # in the header of a text file


class Pool:
    """Candidates of prompts, with scores, in a folder; see `open` and `create`.

    The methods `has_...` tell whether a valid file exists, that is one which is complete and was made with
    the settings in the manifest; the log says why an existing file is not valid. A writer must hold the lock
    of (kind, row).
    """

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder = Path(folder)
        self.manifest = manifest
        self._inspection = Inspection()
        self._table = PromptTable(self.folder / "prompts.parquet", manifest.prompts_per_shard)

    # --- the folder ---

    @classmethod
    def open(cls, folder: str | Path) -> "Pool":
        """Open the pool in `folder`. Raises InputError if there is none, or if it has another schema."""
        path = Path(folder) / "manifest.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("schema") != SCHEMA:
                raise InputError(
                    f"{path}: the pool has schema {values.get('schema')}, but this version reads "
                    f"{SCHEMA}; use another pool.root"
                )
            return cls(folder, Manifest(**values))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not a pool (no manifest.json); generate.py makes one") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); remove the pool or use another pool.root"
            ) from error

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> "Pool":
        """Create a pool in `folder`, or open the one there.

        Raises InputError, which lists the differences, if the existing pool has another manifest.
        """
        path = Path(folder) / "manifest.json"
        if not path.exists():
            with file_lock(path.parent / ".locks" / "manifest", wait=True, remedy=REMEDY):
                if not path.exists():  # another process may have been first
                    write_file(path, json.dumps(asdict(manifest), indent=2).encode() + b"\n")
        pool = cls.open(folder)
        if differences := pool.manifest.differences(manifest):
            raise InputError(
                f"pool {folder} was made with other settings: {'; '.join(differences)}. "
                "Restore these settings, or use another pool.root"
            )
        return pool

    def lock(self, kind: str, row: int | None = None, wait: bool = False) -> AbstractContextManager[bool]:
        """Context manager that yields whether this process holds the lock of a stage (`kind`) and row.

        One lock covers all blocks of a row, because the start of a new block depends on the earlier ones.
        """
        name = kind if row is None else f"{kind}-{row:05d}"
        return file_lock(self.folder / ".locks" / name, wait, REMEDY)

    @property
    def faults(self) -> dict[Path, str]:
        """Files that were found invalid so far, and why."""
        return dict(self._inspection.faults)

    # --- prompts ---

    @property
    def prompts(self) -> list[tuple[Prompt, int]]:
        """Pairs (prompt, position) of all prompts. Categories are not stored."""
        return self._table.prompts

    def append_prompts(self, prompts: Sequence[Prompt], split: str) -> list[int]:
        """Append prompts that the pool lacks, from a new row on; returns the positions of all of `prompts`.

        Nothing is written if the pool has all of them.
        """
        self._table.append(prompts, split, self.lock("prompts", wait=True))
        return self.positions(prompts)

    def positions(self, prompts: Iterable[Prompt]) -> list[int]:
        """Position of each prompt. Raises InputError for a prompt that is not in the pool."""
        return self._table.positions(prompts)

    def text_shards(self, positions: Iterable[int] | None = None) -> list[int]:
        """Numbers of all rows, or of the rows that contain `positions`, ascending."""
        return self._table.rows(positions)

    def text_shard(self, row: int) -> Shard:
        """Shard that stands for the text of a row; it has no candidates."""
        return Shard(row, 0, self._table.row_positions(row), range(0))

    def row_prompts(self, row: int) -> list[Prompt]:
        """Prompts of a row, in the order of their positions."""
        return self._table.row(row)

    # --- shards ---

    def shards(self, candidates: int, positions: Iterable[int] | None = None) -> list[Shard]:
        """Shards, existing or not, for the first `candidates` of all rows, or of the rows of `positions`."""
        return [shard for row in self.text_shards(positions) for shard in self.row_shards(row, candidates)]

    def row_shards(self, row: int, candidates: int) -> list[Shard]:
        """Shards, existing or not, for the first `candidates` of one row."""
        positions = self._table.row_positions(row)
        blocks = plan_blocks(self._blocks(row, candidates), candidates)
        return [Shard(row, block, positions, numbers) for block, numbers in enumerate(blocks)]

    def _blocks(self, row: int, candidates: int) -> dict[int, range]:
        """Blocks of a row on disk that have a readable header: number -> range of candidates."""
        blocks: dict[int, range] = {}
        number = 0
        # a lost block leaves a gap, so the search extends at least as far as blocks of full size would
        path = latents_path(self.folder, row, number)
        while path.exists() or number * BLOCK < candidates:
            if numbers := self._stored_candidates(path):
                blocks[number] = numbers
            number += 1
            path = latents_path(self.folder, row, number)
        return blocks

    def _stored_candidates(self, path: Path) -> range | None:
        header = self._inspection.header(path)
        if header is None:
            return None
        try:
            numbers = read_range(header.metadata["candidates"])
            return numbers if len(numbers) == header.entries["latents"]["shape"][1] else None
        except (AttributeError, KeyError, ValueError):  # no header, or a damaged one that is valid JSON
            return None

    # --- text ---

    def _text_identity(self, row: int) -> dict[str, str]:
        return {"fingerprint": self.manifest.text_encoders, "prompts": self._table.digest(row)}

    def has_text(self, row: int, verify: bool = False, rounded: torch.dtype | None = None) -> bool:
        """Whether the row has valid text embeddings; with `verify`, their checksum is compared once.

        Embeddings that were stored as encoded are always valid, rounded ones only for the dtype `rounded`.
        """
        path = text_path(self.folder, row)
        header = self._inspection.header(path, verify)
        if header is None:
            return False
        stored = _rounding(rounded) if ROUNDED in header.metadata else {}
        expected = self._text_identity(row) | stored
        return self._inspection.matches(path, header.metadata, expected)

    def write_text(
        self,
        row: int,
        text: Mapping[str, Tensor],
        settings: Mapping[str, object],
        rounded: torch.dtype | None = None,
    ) -> None:
        """Store text embeddings of a row; the leading dimension is its prompts, the header has `settings`.

        `rounded` is the dtype that some of them were rounded to.
        """
        count = len(self._table.row_positions(row))
        if wrong := {name: tuple(tensor.shape) for name, tensor in text.items() if len(tensor) != count}:
            raise ValueError(f"row {row} has {count} prompts, but its text has the shapes {wrong}")
        stored = {
            name: tensor[:1] if bool((tensor == tensor[:1]).all()) else tensor
            for name, tensor in text.items()
        }
        metadata = self._text_identity(row) | _described(settings) | (_rounding(rounded) if rounded else {})
        write_tensors(text_path(self.folder, row), stored, metadata)

    def read_text(self, row: int) -> dict[str, Tensor]:
        """Text embeddings of a row by name; the leading dimension is the row's prompts."""
        file = TensorFile(text_path(self.folder, row), verify=True)
        count = len(self._table.row_positions(row))
        return {
            name: file.tensor(name).expand(count, *array.shape[1:]) for name, array in file.arrays.items()
        }

    # --- latents ---

    def _latents_identity(self, shard: Shard) -> dict[str, str]:
        return {
            "fingerprint": self.manifest.generator,
            "prompts": self._table.digest(shard.row),
            "candidates": write_range(shard.candidates),
        }

    def has_latents(self, shard: Shard, verify: bool = False) -> bool:
        """Whether the shard has valid latents; with `verify`, their checksum is compared once."""
        path = latents_path(self.folder, shard.row, shard.block)
        header = self._inspection.header(path, verify)
        expected = self._latents_identity(shard)
        return header is not None and self._inspection.matches(path, header.metadata, expected)

    def write_latents(self, shard: Shard, latents: Tensor, settings: Mapping[str, object]) -> None:
        """Store latents (prompts, candidates, C, H, W) as float16.

        Raises InputError for values that are not finite in float16.
        """
        expected = (len(shard.positions), len(shard.candidates))
        if latents.ndim != 5 or latents.shape[:2] != expected:
            raise ValueError(
                f"latents {tuple(latents.shape)} do not fit shard {shard.name}, {expected} images"
            )
        half = latents.to(torch.float16)
        if not (finite := half.isfinite().flatten(2).all(2)).all():
            place, candidate = (~finite).nonzero()[0].tolist()
            raise InputError(
                f"{self.place(shard, place, candidate)}: the latent is not finite in float16; "
                "sample in another precision (model.backbone.dtype) or with less guidance"
            )
        path = latents_path(self.folder, shard.row, shard.block)
        write_tensors(path, {"latents": half}, self._latents_identity(shard) | _described(settings))

    def read_latents(self, shard: Shard) -> Tensor:
        """Latents (prompts, candidates, C, H, W) float16. Raises DamagedShard or FileNotFoundError."""
        return TensorFile(latents_path(self.folder, shard.row, shard.block), verify=True).tensor("latents")

    def place(self, shard: Shard, prompt: int, candidate: int) -> str:
        """Name of an image for messages; `prompt` and `candidate` are its indices in the shard."""
        text = self._table.row(shard.row)[prompt].text
        return f'prompt {shard.positions[prompt]} ("{text}"), candidate {shard.candidates[candidate]}'

    def check_latent_shape(self, shape: Sequence[int]) -> None:
        """Raise InputError if the stored latents do not have `shape` (C, H, W); one shard is checked."""
        for path in (self.folder / "latents").glob("*.safetensors"):
            if (header := self._inspection.header(path)) is not None:
                stored = header.entries["latents"]["shape"][2:]
                if stored != list(shape):
                    raise InputError(
                        f"pool {self.folder} holds latents of shape {tuple(stored)}, but the model "
                        f"works on {tuple(shape)}: use the model and image size it was made with"
                    )
                return

    # --- scores ---

    def _scores_identity(self, key: str, shard: Shard, latents: str) -> dict[str, str]:
        return {
            "reward": key,
            "prompts": self._table.digest(shard.row),
            "candidates": write_range(shard.candidates),
            "latents": latents,
        }

    def _latents_checksum(self, shard: Shard) -> str | None:
        header = self._inspection.header(latents_path(self.folder, shard.row, shard.block))
        return header.metadata["checksum"] if header else None

    def has_scores(self, key: str, shard: Shard, verify: bool = False) -> bool:
        """Whether the shard has valid scores of reward `key` for its present latents.

        The checksum of the scores is always compared, once until the file changes; with `verify`, prompt ids
        and candidates of the file's rows are compared too.
        """
        path = scores_path(self.folder, key, shard.row, shard.block)
        latents = self._latents_checksum(shard)
        if latents is None:
            return False
        identity = self._scores_identity(key, shard, latents)
        ids = self._table.row_ids(shard.row) if verify else None
        return self._inspection.confirmed(
            path,
            (verify, *identity.values()),
            lambda: self._are_scores(path, identity, shard.candidates, ids),
        )

    def _are_scores(
        self, path: Path, identity: Mapping[str, str], candidates: range, ids: Sequence[str] | None
    ) -> bool:
        try:
            metadata, _ = read_score_file(path)
            if ids is not None and not holds_rows(path, ids, candidates):
                raise DamagedShard(path, "its rows are not those of the shard")
        except FileNotFoundError:
            return False
        except DamagedShard as error:
            self._inspection.report(path, error.reason)
            return False
        return self._inspection.matches(path, metadata, identity)

    def write_scores(self, key: str, shard: Shard, scores: Tensor, settings: Mapping[str, object]) -> None:
        """Store raw scores (prompts, candidates) of the shard's present latents."""
        if scores.shape != (len(shard.positions), len(shard.candidates)):
            raise ValueError(f"scores {tuple(scores.shape)} do not fit shard {shard.name}")
        latents = self._latents_checksum(shard)
        if latents is None:
            raise ValueError(f"scores for shard {shard.name}, which has no latents")
        metadata = self._scores_identity(key, shard, latents) | _described(settings)
        path, numbers = scores_path(self.folder, key, shard.row, shard.block), scores.cpu().float().numpy()
        write_score_file(path, self._table.row_ids(shard.row), shard.candidates, numbers, metadata)

    def scores(self, keys: Sequence[str], candidates: int, positions: Sequence[int] | None = None) -> Tensor:
        """Raw scores (P, N, L) float32 of the first `candidates` by the rewards `keys`.

        P is the number of `positions`, by default of all prompts. Raises InputError, which names file and
        reward, for scores that are missing or damaged.
        """
        if positions is None:
            positions = self._table.positions()
        chosen = np.array(positions, dtype=np.int64)
        rows, places = np.divmod(chosen, self.manifest.prompts_per_shard)
        result = np.empty((len(chosen), candidates, len(keys)), dtype=np.float32)
        order = np.argsort(rows, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(rows[order])) + 1):
            for number, key in enumerate(keys if len(members) else ()):
                row = int(rows[members[0]])
                scores = read_row_scores(self.folder, key, row, self._table.digest(row), candidates)
                result[members, :, number] = scores[places[members]]
        return torch.from_numpy(result)


def _rounding(dtype: torch.dtype | None) -> dict[str, str]:
    """Entry of a text file's header about embeddings that were rounded to `dtype`."""
    return {ROUNDED: str(dtype).removeprefix("torch.")}


def _described(settings: Mapping[str, object]) -> dict[str, str]:
    return {"schema": str(SCHEMA), "settings": json.dumps(dict(settings), sort_keys=True)}
