"""Parquet files of a pool that carry a checksum of all their bytes."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.pool.files import write_file
from capo.errors import DamagedFile
from capo.runtime.reading import read_bytes

SEAL = "sha256"  # key of the file's metadata
BLANK = b"0" * 64  # stands for the checksum in the bytes that it is of
ARROW = "ARROW:schema"  # key in files without a checksum, which earlier versions wrote


def write_sealed(path: Path, table: pa.Table, metadata: Mapping[str, str] = {}) -> None:
    """Write a table atomically, with `metadata` and a checksum of the whole file; the caller locks it."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**metadata, SEAL: BLANK.decode()})
    data = buffer.getvalue().to_pybytes()
    place = data.rindex(BLANK)  # the metadata stands behind all rows and their statistics
    seal = hashlib.sha256(data).hexdigest().encode()
    write_file(path, data[:place], seal, data[place + len(seal) :])


def read_table(path: Path, schema: pa.Schema, remedy: str) -> tuple[pa.Table, dict[str, str], bool]:
    """Read a table whose columns are those of `schema`.

    Returns:
        The table, the file's metadata, and whether a checksum has shown that no byte was changed; files of
        earlier versions have none.

    Raises:
        DamagedFile: it is not Parquet, was changed, or has other columns or types; `remedy` ends the message.
        FileNotFoundError: there is no file.
    """
    fault, data = partial(DamagedFile, path, remedy=remedy), read_bytes(path, remedy)
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            if SEAL in metadata and not _is_whole(data, metadata[SEAL].encode()):
                raise fault("its checksum is not that of its content")
            if wrong := _other_columns(file.schema_arrow, schema):
                raise fault(wrong)
            if SEAL not in metadata and ARROW not in metadata:
                raise fault("its checksum is not there")
            table = file.read(use_threads=False).replace_schema_metadata(None)
            table.validate(full=True)
            if _row_counts(file.metadata) != {len(table)}:
                raise fault("its parts have different numbers of rows")
    except DamagedFile:
        raise
    except Exception as error:  # what pyarrow raises for damaged bytes has no base class of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise fault(f"it is no complete Parquet file: {reason}") from error
    return table, metadata, SEAL in metadata


def _is_whole(data: bytes, seal: bytes) -> bool:
    place = data.rfind(seal) if len(seal) == len(BLANK) else -1
    blank = hashlib.sha256(data[:place] + BLANK + data[place + len(seal) :]) if place >= 0 else None
    return blank is not None and blank.hexdigest().encode() == seal


def _row_counts(file: pq.FileMetaData) -> set[int]:
    """What a file says in different places about how many rows it has."""
    groups = [file.row_group(number) for number in range(file.num_row_groups)]
    columns = [sum(group.column(place).num_values for group in groups) for place in range(file.num_columns)]
    return {file.num_rows, sum(group.num_rows for group in groups), *columns}


def _other_columns(found: pa.Schema, wanted: pa.Schema) -> str | None:
    """What distinguishes two schemas in names and types, or None."""
    if lacking := [name for name in wanted.names if name not in found.names]:
        return f"it has no column {lacking[0]}"
    if found.names != wanted.names:
        return f"its columns are {', '.join(found.names)}, not {', '.join(wanted.names)}"
    for name, own, kind in zip(wanted.names, found.types, wanted.types, strict=True):
        if own != kind:
            return f"column {name} is {own}, not {kind}"
    return None
