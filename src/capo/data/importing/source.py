"""The interface of a source of imported preferences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from capo.data.importing.ordering import Dropped, Entry, Place
from capo.data.importing.tables import SHARED, RowCursor, Table
from capo.errors import InputError
from capo.runtime.files import led_to, lies_in, own_places
from capo.runtime.fingerprints import content_fingerprint, file_digest


class Source(ABC):
    """Source of entries: tables of captions, images and choices.

    Attributes:
        tables: the tables; their order determines that of the entries.
        images: folder that paths of images are relative to.
        columns: names of the columns with images.
        options: JSON values that determine the entries, part of the fingerprint.
        outside: whether paths may lead out of `images`, which a table from elsewhere has no business to.
    """

    outside = False

    def __init__(
        self, tables: Sequence[Table], images: Path, columns: Sequence[str], options: dict[str, object]
    ):
        self.tables, self.images, self.columns, self.options = list(tables), images, list(columns), options
        self._cursors: dict[int, RowCursor] = {}

    def __getstate__(self) -> dict[str, object]:
        """What another process needs: places of the files, not what was read of them."""
        own = {name: value for name, value in self.__dict__.items() if name != "_read"}
        return own | {"images": self.images.absolute(), "_cursors": {}}

    def check_here(self, places: Iterable[Place]) -> None:
        """Raise InputError if this machine does not see a table, or the file of an image at `places`."""
        for table in self.tables:
            table.check_here()
        for place in places:
            cell = self.cell(place)
            if isinstance(cell, str) and not (self.images / cell).is_file():
                raise InputError(
                    f"this machine does not see {self.images / cell} ({self.where(place)}): {SHARED}"
                )

    @abstractmethod
    def read(self, dropped: Dropped) -> Iterator[Entry]:
        """Entries in the order of the tables; counts in `dropped` those that cannot be used, by reason."""

    @abstractmethod
    def pick(self, row: dict, item: int) -> object:
        """Cell of image number `item` of a row."""

    def cell(self, place: Place) -> object:
        """Cell of an image: bytes, `{bytes, path}` or a path. Requests in ascending order are fast.

        Raises InputError for a path that leads out of `images`, by `..`, from the root or by links.
        """
        table, row, item = place
        if table not in self._cursors:
            self._cursors = {
                table: RowCursor(self.tables[table], self.columns)
            }  # releases the rows of the previous table
        found = self.pick(self._cursors[table].row(row), item)
        if isinstance(found, str) and not self.outside and not self._is_inside(found):
            raise InputError(
                f"{self.where(place)}: {found} leads out of {self.images}: put the image there, or, if you "
                "trust the table, give import.outside=true"
            )
        return found

    def _is_inside(self, path: str) -> bool:
        try:
            return lies_in(led_to(self.images / path), self._places)
        except ValueError:  # a null byte: no path at all, which opening it tells
            return True

    @cached_property
    def _places(self) -> list[Path]:
        return own_places(self.images)

    def where(self, place: Place) -> str:
        """Name of an image in messages: file, row (the first one is 1), and column or number of the image."""
        item = place[2]
        return f"{self.row_of(place)}, {self.columns[item] if len(self.columns) > 1 else f'image {item + 1}'}"

    def row_of(self, place: Place) -> str:
        """Name of an image's row in messages."""
        table, row, _ = place
        return f"{self.tables[table].path.name} row {row + 1}"

    @cached_property
    def _read(self) -> tuple[list[Entry], Dropped]:
        dropped = Dropped()
        return list(self.read(dropped)), dropped

    @property
    def entries(self) -> list[Entry]:
        """Entries that can be used; images are not checked yet."""
        return self._read[0]

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> number of entries left out; images are not checked yet."""
        return dict(self._read[1])

    @property
    def first_dropped(self) -> dict[str, str]:
        """Reason -> table and row of the first entry left out."""
        places = self._read[1].first.items()
        return {reason: self.row_of(place) for reason, place in places}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint, 64 hex digits, of the content: options, tables, and image files outside the tables."""
        return content_fingerprint(
            {
                "import": 1,
                "options": self.options,
                "tables": [file_digest(table.path) for table in self.tables],
                "images": self._files(),
            }
        )

    def _files(self) -> list[str | None]:
        outside = [any(table.holds_paths(column) for column in self.columns) for table in self.tables]
        places = [place for entry in self.entries for place in entry.places if outside[place[0]]]
        return [_digest(self.images, self.cell(place)) for place in places]


def _digest(folder: Path, cell: object) -> str | None:
    path = folder / cell if isinstance(cell, str) and cell else None
    try:
        return file_digest(path) if path and path.is_file() else None
    except OSError:  # of a name that is too long, say: no image, which the survey tells
        return None
