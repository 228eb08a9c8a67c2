"""Score files: the scores of a shard in parquet, with a checksum and that of the latents they belong to."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.pool.files import DamagedShard, write_file
from capo.data.pool.layout import read_range, scores_path
from capo.errors import InputError


def write_score_file(
    path: Path, ids: Sequence[str], candidates: range, scores: np.ndarray, metadata: Mapping[str, str]
) -> None:
    """Write scores (prompts, candidates) float32 to a parquet file with one row per candidate."""
    table = pa.table(
        {
            "prompt_id": pa.array(np.repeat(np.array(ids, dtype=object), len(candidates)), pa.string()),
            "candidate": pa.array(np.tile(np.array(candidates, dtype=np.int32), len(ids))),
            "score": pa.array(scores.astype(np.float32).ravel()),
        }
    )
    complete = dict(metadata) | {"checksum": _checksum(metadata, scores)}
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(complete), buffer)
    write_file(path, memoryview(buffer.getvalue()))


def read_score_file(path: Path) -> tuple[dict[str, str], np.ndarray]:
    """Read (metadata, flat float32 scores) with the prompts outermost.

    Only the column of scores is read: the order of the rows is known, and strings would take most of the
    time. Raises DamagedShard or FileNotFoundError.
    """
    try:
        # read into memory first: the files are small, and opening them by path takes a quarter longer
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
        scores = file.read(columns=["score"], use_threads=False).column(0).to_numpy()
        metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:
        raise DamagedShard(path, "it cannot be read as parquet") from error
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, scores):
        raise DamagedShard(path, "its checksum is not that of its scores")
    return metadata, scores


def holds_rows(path: Path, ids: Sequence[str], candidates: range) -> bool:
    """Whether the file's rows are `candidates` of the prompts `ids`, in this order. Raises DamagedShard."""
    try:
        columns = pq.ParquetFile(path).read(columns=["prompt_id", "candidate"], use_threads=False).to_pydict()
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:
        raise DamagedShard(path, "it cannot be read as parquet") from error
    return columns == {
        "prompt_id": [name for name in ids for _ in candidates],
        "candidate": [*candidates] * len(ids),
    }


def read_row_scores(folder: Path, key: str, row: int, digest: str, candidates: int) -> np.ndarray:
    """Scores (prompts of the row, candidates) float32 of reward `key`, concatenated over the row's blocks.

    `digest` is the digest of the row's prompts. Raises InputError for scores that are missing, damaged or of
    other prompts.
    """
    blocks: list[np.ndarray] = []
    covered = 0
    while covered < candidates:
        path = scores_path(folder, key, row, len(blocks))
        try:
            metadata, flat = read_score_file(path)
        except FileNotFoundError as error:
            raise InputError(
                f"{path}: reward '{key}' has not scored candidates {covered}-{candidates - 1} "
                "of this row's prompts; run generate.py with the same configuration"
            ) from error
        if metadata["prompts"] != digest:
            raise DamagedShard(path, "it belongs to other prompts")
        numbers = read_range(metadata["candidates"])
        blocks.append(flat.reshape(-1, len(numbers)))
        covered = numbers.stop
    return np.concatenate(blocks, axis=1)[:, :candidates]


def _checksum(metadata: Mapping[str, str], scores: np.ndarray) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    digest.update(np.ascontiguousarray(scores, dtype=np.float32).data)
    return digest.hexdigest()
