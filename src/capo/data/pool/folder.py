"""Folder of a pool: its manifest, its locks, and which prompts and blocks of candidates it has."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from capo.data.pool.files import REMEDY
from capo.data.pool.headers import check_latents
from capo.data.pool.inspection import Inspection
from capo.data.pool.layout import BLOCK, LOCKS, Shard, latents_path, plan_blocks
from capo.data.pool.manifest import NAME, Manifest, check_folder, check_links
from capo.data.pool.prompt_table import PromptTable
from capo.data.prompts import Prompt
from capo.errors import InputError
from capo.runtime.files import check_ordinary
from capo.runtime.locks import file_lock


class PoolFolder:
    """Folder of a pool, without the content of its shards, which `Pool` reads and writes."""

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder = Path(folder)
        self.manifest = manifest
        self._inspection = Inspection()
        self._table = PromptTable(self.folder / "prompts.parquet", manifest.prompts_per_shard)

    # --- the folder ---

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the pool in `folder`.

        Raises InputError if there is none, or one of another schema, or one that would be written elsewhere
        (`check_links`), and DamagedFile if its manifest or its table of prompts is damaged.
        """
        check_links(Path(folder))
        return cls(folder, Manifest.read(Path(folder)))

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> Self:
        """Create a pool in `folder`, or open the one there.

        Raises InputError, which lists the differences, if the existing pool has another manifest, and if
        something other than a folder stands there.
        """
        path = Path(folder) / NAME
        check_folder(path.parent)
        check_links(path.parent)
        if not os.path.lexists(path):
            with file_lock(path.parent / LOCKS / "manifest", wait=True, remedy=REMEDY):
                if not os.path.lexists(path):  # another process may have been first
                    manifest.write(path.parent)
        pool = cls.open(folder)
        pool.require(manifest)
        return pool

    def require(self, manifest: Manifest) -> None:
        """Raise InputError, which lists the differences, unless the pool has this manifest."""
        if differences := self.manifest.differences(manifest):
            raise InputError(
                f"pool {self.folder} was made with other settings: {'; '.join(differences)}. "
                "Restore these settings, or use another pool.root"
            )

    def lock(self, kind: str, row: int | None = None, wait: bool = False) -> AbstractContextManager[bool]:
        """Context manager that yields whether this process holds the lock of a stage (`kind`) and row.

        One lock covers all blocks of a row, because the start of a new block depends on the earlier ones.
        """
        name = kind if row is None else f"{kind}-{row:05d}"
        return file_lock(self.folder / LOCKS / name, wait, REMEDY)

    @property
    def faults(self) -> dict[Path, str]:
        """Files that were found invalid so far, and why."""
        return dict(self._inspection.faults)

    def check_replaceable(self) -> None:
        """Raise InputError if a file that was found invalid is no ordinary file: it is not replaced."""
        for path in self._inspection.faults:
            check_ordinary(path, other="")

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

    def require_split(self, split: str) -> None:
        """Raise DamagedFile if the table of prompts is that of a pool of another split."""
        self._table.require_split(split)

    def positions(self, prompts: Iterable[Prompt]) -> list[int]:
        """Position of each prompt. Raises InputError for a prompt that is not in the pool."""
        return self._table.positions(prompts)

    def present(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Those of the prompts that are in the pool."""
        return [prompt for prompt in prompts if self._table.holds(prompt)]

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
            if header := self._inspection.header(path, check_latents):
                blocks[number] = check_latents(path, header)
            number += 1
            path = latents_path(self.folder, row, number)
        return blocks
