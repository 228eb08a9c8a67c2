"""Score files: the scores of a shard in parquet, with a checksum and that of the latents they belong to."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.pool.files import write_file
from capo.data.pool.headers import DamagedShard, opened
from capo.data.pool.layout import read_range, scores_path, write_range
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
    with _parquet(path) as file:
        kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
        if kinds.get("score") != pa.float32():
            raise DamagedShard(path, f"its column score is {kinds.get('score', 'not there')}, not float")
        column = file.read(columns=["score"], use_threads=False).column(0)
        if column.null_count:
            raise DamagedShard(path, f"score is empty in {column.null_count} rows")
        scores = column.to_numpy()
        metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, scores):
        raise DamagedShard(path, "its checksum is not that of its scores")
    return metadata, scores


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Yield an opened Parquet file. Raises DamagedShard for what goes wrong with it, or FileNotFoundError."""
    with opened(path) as file:
        # read into memory first: the files are small, and opening them by path takes a quarter longer
        data = file.read()
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as table:
            yield table
    except DamagedShard:
        raise
    except Exception as error:  # what pyarrow raises for damaged bytes has no base class of its own
        raise DamagedShard(path, "it cannot be read as parquet") from error


def holds_rows(path: Path, ids: Sequence[str], candidates: range) -> bool:
    """Whether the file's rows are `candidates` of the prompts `ids`, in this order. Raises DamagedShard."""
    with _parquet(path) as file:
        columns = file.read(columns=["prompt_id", "candidate"], use_threads=False).to_pydict()
    return columns == {
        "prompt_id": [name for name in ids for _ in candidates],
        "candidate": [*candidates] * len(ids),
    }


def read_row_scores(
    folder: Path, key: str, row: int, digest: str, prompts: int, candidates: int
) -> np.ndarray:
    """Scores (prompts, candidates) float32 of reward `key`, concatenated over the row's blocks.

    `digest` and `prompts` are the digest and the number of the row's prompts. Raises InputError for
    scores that are missing, damaged or of other prompts.
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
        if metadata.get("prompts") != digest:
            raise DamagedShard(path, "it belongs to other prompts")
        numbers = _candidates(path, metadata)
        if numbers.start != covered or len(flat) != prompts * len(numbers):
            raise DamagedShard(path, f"it holds {len(flat)} scores of candidates {write_range(numbers)}")
        blocks.append(flat.reshape(prompts, len(numbers)))
        covered = numbers.stop
    return np.concatenate(blocks, axis=1)[:, :candidates]


def _candidates(path: Path, metadata: Mapping[str, str]) -> range:
    try:
        return read_range(metadata["candidates"])
    except (KeyError, ValueError) as error:
        raise DamagedShard(path, f"its candidates are {metadata.get('candidates', 'not there')}") from error


def _checksum(metadata: Mapping[str, str], scores: np.ndarray) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    digest.update(np.ascontiguousarray(scores, dtype=np.float32).data)
    return digest.hexdigest()
