"""Pool of candidates: which of its shards are valid, and reading and writing them."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capo.data.pool.files import TensorFile, write_tensors
from capo.data.pool.folder import PoolFolder
from capo.data.pool.headers import DamagedShard, Header, check_latents, check_text
from capo.data.pool.layout import LATENTS, Shard, latents_path, scores_path, text_path, write_range
from capo.data.pool.manifest import SCHEMA
from capo.data.pool.score_files import holds_rows, read_row_scores, read_score_file, write_score_file
from capo.errors import InputError

ROUNDED = "rounded_to"  # in the header of a text file


class Pool(PoolFolder):
    """Candidates of prompts, with scores, in a folder; see `open` and `create`.

    The methods `has_...` tell whether a valid file exists, that is one which is complete and was made with
    the settings in the manifest; the log says why an existing file is not valid. A writer must hold the lock
    of (kind, row).
    """

    # --- text ---

    def _text_identity(self, row: int) -> dict[str, str]:
        return {"fingerprint": self.manifest.text_encoders, "prompts": self._table.digest(row)}

    def has_text(self, row: int, verify: bool = False, rounded: torch.dtype | None = None) -> bool:
        """Whether the row has valid text embeddings; with `verify`, their checksum is compared once.

        Embeddings that were stored as encoded are always valid, rounded ones only for the dtype `rounded`.
        """
        path, count = text_path(self.folder, row), len(self._table.row_ids(row))
        header = self._inspection.header(path, partial(check_text, prompts=count), verify)
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

    def _latents_header(self, shard: Shard, verify: bool = False) -> Header | None:
        """Header of the shard's latents if they are valid, else None; see `has_latents`."""
        path = latents_path(self.folder, shard.row, shard.block)
        header = self._inspection.header(path, partial(check_latents, prompts=len(shard.positions)), verify)
        if header and self._inspection.matches(path, header.metadata, self._latents_identity(shard)):
            return header
        return None

    def has_latents(self, shard: Shard, verify: bool = False) -> bool:
        """Whether the shard has valid latents; with `verify`, their checksum is compared once."""
        return self._latents_header(shard, verify) is not None

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
        for path in (self.folder / LATENTS).glob("*.safetensors"):
            if header := self._inspection.header(path, check_latents):
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
        header = self._latents_header(shard)
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
            path = latents_path(self.folder, shard.row, shard.block)
            raise InputError(
                f"{path} is gone, or was changed, while its images were scored: run the same command "
                "again, which makes what is missing"
            )
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
                prompts = len(self._table.row_ids(row))
                scores = read_row_scores(self.folder, key, row, self._table.digest(row), prompts, candidates)
                result[members, :, number] = scores[places[members]]
        return torch.from_numpy(result)


def _rounding(dtype: torch.dtype | None) -> dict[str, str]:
    """Entry of a text file's header about embeddings that were rounded to `dtype`."""
    return {ROUNDED: str(dtype).removeprefix("torch.")}


def _described(settings: Mapping[str, object]) -> dict[str, str]:
    return {"schema": str(SCHEMA), "settings": json.dumps(dict(settings), sort_keys=True)}
