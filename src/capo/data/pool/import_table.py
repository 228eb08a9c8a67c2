"""Table of an imported pool, imported.parquet: the origin of its images, and the choices of people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capo.data.pool.parquet import read_table, write_sealed
from capo.data.prompts import Prompt
from capo.errors import DamagedFile, InputError
from capo.runtime.reading import parse_object

NAME = "imported.parquet"
REMEDY = "remove it and run the same generate.py stage=import again"
PLACE = ("table", "row", "item")  # columns that tell where an image is
SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "candidate": pa.int32(),
        **dict.fromkeys(PLACE, pa.int64()),
        "rank": pa.float32(),
    }
)
HUMAN_LABELS, REWARD_LABELS = "human", "rewards"  # possible label sources of an imported pool


@dataclass(frozen=True)
class ImportTable:
    """Entries of an imported pool, in the order of the pool's positions.

    Attributes:
        ids: E prompt ids.
        texts: E captions.
        places: (E, N, 3) int64; table, row, and number in the row, of each candidate's image.
        ranks: (E, N) float32 ranks, 0 the worst; None if the source has no choices.
        report: JSON values that say what was left out and why.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    places: np.ndarray
    ranks: np.ndarray | None
    report: Mapping[str, Any]

    @property
    def candidates(self) -> int:
        """Images of each entry, N."""
        return self.places.shape[1]


def is_imported(folder: Path) -> bool:
    """Whether the pool in `folder` was imported (not sampled)."""
    return (Path(folder) / NAME).is_file()


def write_import_table(folder: Path, table: ImportTable) -> None:
    """Write imported.parquet, with one row per candidate and the report in the file's metadata."""
    entries, candidates = table.places.shape[:2]
    file, row, item = table.places.reshape(-1, 3).T
    columns = {
        "prompt_id": np.repeat(np.array(table.ids, dtype=object), candidates),
        "prompt": np.repeat(np.array(table.texts, dtype=object), candidates),
        "candidate": np.tile(np.arange(candidates, dtype=np.int32), entries),
        "table": file,
        "row": row,
        "item": item,
        "rank": pa.nulls(entries * candidates, pa.float32()) if table.ranks is None else table.ranks.ravel(),
    }
    metadata = {"candidates": str(candidates), "report": json.dumps(dict(table.report))}
    write_sealed(Path(folder) / NAME, pa.table(columns, schema=SCHEMA), metadata)


def read_import_table(folder: Path) -> ImportTable:
    """Read the table of an imported pool. Raises InputError for a sampled pool and for a damaged file."""
    path = Path(folder) / NAME
    try:
        table, metadata, _ = read_table(path, SCHEMA, REMEDY)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is not an imported pool (no {NAME}): generate.py stage=import makes one and prints "
            "its folder"
        ) from error
    try:
        return _entries(table, metadata)
    except (KeyError, ValueError) as error:
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise DamagedFile(path, reason, REMEDY) from error


def _entries(table: pa.Table, metadata: Mapping[str, str]) -> ImportTable:
    """Entries of a table with one row per candidate. Raises ValueError, and KeyError without its metadata."""
    candidates, report = int(metadata["candidates"]), parse_object(metadata["report"])
    if candidates < 1 or len(table) % candidates:
        raise ValueError(f"candidates is {candidates}, but there are {len(table)} rows")
    if not isinstance(report.get("dropped"), dict) or not isinstance(report.get("broken"), list):
        raise ValueError("report lacks dropped or broken")
    if not isinstance(report.get("first", {}), dict):
        raise ValueError("first in the report is no mapping")
    for name in SCHEMA.names:
        empty = table[name].null_count
        if empty and (name != "rank" or empty != len(table)):
            raise ValueError(f"{name} is empty in {empty} of {len(table)} rows")
    ids, texts, numbers = (
        np.array(table[name].to_pylist()).reshape(-1, candidates)
        for name in ("prompt_id", "prompt", "candidate")
    )
    for name, values in {"prompt_id": ids, "prompt": texts}.items():
        if (values != values[:, :1]).any():
            raise ValueError(f"{name} differs among the candidates of an entry")
    if (numbers != np.arange(candidates)).any():
        raise ValueError(f"candidate must count from 0 to {candidates - 1} in each entry")
    places = np.stack([table[name].to_numpy() for name in PLACE], axis=-1).reshape(-1, candidates, 3)
    if (places < 0).any():
        raise ValueError(f"{', '.join(PLACE)} must not be negative")
    ranks = None if table["rank"].null_count else table["rank"].to_numpy().reshape(-1, candidates)
    if ranks is not None and not np.isfinite(ranks).all():
        raise ValueError("rank must be finite")
    return ImportTable(ids[:, 0].tolist(), texts[:, 0].tolist(), places, ranks, report)


def check_entries(folder: Path, table: ImportTable, prompts: Sequence[Prompt]) -> None:
    """Raise DamagedFile unless a pool's first prompts, in their order, are the entries of its table."""
    if [(prompt.id, prompt.text) for prompt in prompts] != [*zip(table.ids, table.texts, strict=True)][
        : len(prompts)
    ]:
        raise DamagedFile(
            Path(folder) / NAME, "its entries are not the prompts of prompts.parquet", "restore both"
        )
