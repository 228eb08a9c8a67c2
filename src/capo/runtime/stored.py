"""Read JSON files that a command wrote earlier, compared with a schema of what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from capo.errors import DamagedFile
from capo.runtime.reading import read_json
from capo.runtime.schema import Section, faults


class Record(Section):
    """What is read of a file; it may hold further keys, which nothing reads."""

    model_config = ConfigDict(extra="allow")


def read_record(path: Path, schema: type[Section], remedy: str) -> dict[str, Any]:
    """Read a JSON file as plain values.

    Raises FileNotFoundError if there is none, and DamagedFile, which names file, key and `remedy`, if it
    cannot be read or has other values than the schema allows.
    """
    values = read_json(path, remedy)
    if found := faults(schema, values):
        raise DamagedFile(path, "; ".join(found.values()), remedy)
    return values
