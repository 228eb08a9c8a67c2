"""Results of a benchmark: a JSON file, written after every row so that runs can resume, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capo.errors import InputError
from capo.runtime.files import write_whole

Row = dict[str, Any]
OUT_OF_MEMORY = "out of memory"
REMEDY = "make room there, or name another file with --results"


class Records:
    """Rows of results by key, each written to the file when it is measured.

    Args:
        path: the JSON file; the table is written next to it, with the suffix .md.
        facts: facts about the machine and the benchmark. If the file exists, its `device` and `what` must be
            equal to these. None: take the facts of the file.

    Raises:
        InputError: if the file has results of another device or benchmark, or, without `facts`, does not
            exist.
    """

    def __init__(self, path: Path, facts: Mapping[str, object] | None):
        self.path, self.facts, self.rows = path, dict(facts or {}), {}
        if not path.is_file():
            if facts is None:
                raise InputError(f"{path} does not exist: measure first, or name the file with --results")
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if facts is None:
            self.facts = known["facts"]
        for name in ("device", "what"):
            if known["facts"].get(name) != self.facts.get(name):
                raise InputError(
                    f"{path} has results of {known['facts'].get(name)}, this is {self.facts.get(name)}: "
                    "name another file with --results"
                )
        self.rows = known["rows"]

    def add(self, key: str, row: Row) -> None:
        """Add a row, or replace the one with the same key, and write both files."""
        self.rows[key] = row
        write_whole(
            self.path, json.dumps({"facts": self.facts, "rows": self.rows}, indent=1) + "\n", remedy=REMEDY
        )
        write_whole(self.path.with_suffix(".md"), self.markdown(), remedy=REMEDY)

    def markdown(self) -> str:
        """One line of facts and a table of all rows, in Markdown."""
        told = "; ".join(f"{name} {_number(value)}" for name, value in self.facts.items())
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        lines = [["", *names], ["---"] * (len(names) + 1)]
        lines += [[key, *(_cell(name, row.get(name)) for name in names)] for key, row in self.rows.items()]
        return f"{told}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(name: str, value: object) -> str:
    if name.endswith("bytes") and isinstance(value, int | float):
        return f"{value / 1e9:.2f} GB"
    return _number(value).replace("|", "\\|")


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measured(job: Callable[[], Row]) -> Row:
    """Row of `job`, or, if it fails, a row with the reason, so that other settings are still measured."""
    try:
        return {"status": "measured", **job()}
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    except (RuntimeError, ValueError, InputError) as error:
        return {"status": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def print_rows(rows: Mapping[str, Row], names: Sequence[str]) -> None:
    """Print the columns `names` of the rows, one row per line."""
    for key, row in rows.items():
        told = ", ".join(f"{name} {_number(row[name])}" for name in names if row.get(name) is not None)
        print(f"{key}: {row['status']}" + (f"; {told}" if told else ""), flush=True)
