"""Table of an imported pool, imported.parquet: the origin of its images, and the choices of people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.pool.files import write_file
from capo.errors import InputError

NAME = "imported.parquet"
HUMAN_LABELS, REWARD_LABELS = LABELS = ("human", "rewards")  # possible label sources of an imported pool


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
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, write_page_checksum=True)
    write_file(Path(folder) / NAME, memoryview(buffer.getvalue()))


def read_import_table(folder: Path) -> ImportTable:
    """Read the table of an imported pool. Raises InputError for a sampled pool and for a damaged file."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise InputError(
            f"{folder} is not an imported pool (no {NAME}): generate.py stage=import makes one and prints "
            "its folder"
        )
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        candidates, report = int(metadata["candidates"]), json.loads(metadata["report"])
        places = np.stack([table[name].to_numpy() for name in ("table", "row", "item")], axis=-1).reshape(
            -1, candidates, 3
        )
        ranks = None if table["rank"].null_count else table["rank"].to_numpy().reshape(-1, candidates)
        ids, texts = (
            table[name].take(np.arange(0, len(table), candidates)).to_pylist()
            for name in ("prompt_id", "prompt")
        )
    except (OSError, pa.ArrowException, AttributeError, LookupError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}); remove it and run the same generate.py stage=import again"
        ) from error
    return ImportTable(ids, texts, places, ranks, report)
