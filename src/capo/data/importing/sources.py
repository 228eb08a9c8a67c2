"""Sources of imported preferences: tables whose columns hold captions, images and their order.

Each file of the Hydra group `import` names a function that makes a `Source` and checks that its tables exist;
`capo.data.importing.survey` checks the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from capo.data.importing.ordering import (
    TOO_FEW,
    UNEQUAL,
    Dropped,
    Entry,
    caption_of,
    choice_of,
    dense_ranks,
    number_of,
    numbers_of,
    same_size,
    unusable,
)
from capo.data.importing.source import Source
from capo.data.importing.tables import Table
from capo.errors import InputError
from capo.runtime.files import named_twice

FOLDER_TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")


class _Pairs(Source):
    """Source in which a row is a comparison of two images."""

    def __init__(self, tables, caption: str, image_0: str, image_1: str, label: str, limit: int | None):
        for table in tables:
            table.require({"caption": caption, "image_0": image_0, "image_1": image_1, "label": label})
        options = {
            "kind": "pairs",
            "caption": caption,
            "images": [image_0, image_1],
            "label": label,
            "limit": limit,
        }
        super().__init__(tables, tables[0].path.parent, [image_0, image_1], options)
        self.caption, self.label, self.limit = caption, label, limit

    def read(self, dropped: Dropped) -> Iterator[Entry]:
        """One entry for each usable row, as many as `limit`."""
        found = 0
        for number, table in enumerate(self.tables):
            for row, values in table.rows([self.caption, self.label]):
                if found == self.limit:
                    return
                caption = caption_of(values.get(self.caption), table.named(row, self.caption))
                ranks = choice_of(values.get(self.label), table.named(row, self.label))
                if reason := unusable(caption, ranks):
                    dropped.drop(reason, (number, row, 0))
                    continue
                found += 1
                yield Entry(caption, ((number, row, 0), (number, row, 1)), ranks)

    def pick(self, row: dict, item: int) -> object:
        return row.get(self.columns[item])


class _Lists(Source):
    """Source in which a row is a caption with a list of images and a list of their ranks or scores."""

    def __init__(
        self, tables, images: Path, caption: str, column: str, order: str, better: str, candidates: int | None
    ):
        for table in tables:
            table.require({"caption": caption, "image": column, "order": order})
        options = {
            "kind": "lists",
            "caption": caption,
            "images": column,
            "order": order,
            "better": better,
            "candidates": candidates,
        }
        super().__init__(tables, images, [column], options)
        self.caption, self.order, self.better, self.candidates = caption, order, better, candidates

    def read(self, dropped: Dropped) -> Iterator[Entry]:
        yield from same_size(list(self._rows(dropped)), self.candidates, dropped)

    def _rows(self, dropped: Dropped) -> Iterator[Entry]:
        for number, table in enumerate(self.tables):
            columns = [
                self.caption,
                self.order,
                *([self.columns[0]] if table.holds_paths(self.columns[0]) else []),
            ]
            for row, values in table.rows(columns):
                where = table.named(row, self.order)
                caption = caption_of(values.get(self.caption), table.named(row, self.caption))
                numbers = numbers_of(values.get(self.order), where)
                ranks = dense_ranks(numbers, self.better) if numbers else None
                count = len(_images(values.get(self.columns[0]))) if len(columns) == 3 else len(numbers or ())
                unequal = ranks is not None and count != len(ranks)
                if reason := UNEQUAL if unequal else unusable(caption, ranks):
                    dropped.drop(reason, (number, row, 0))
                    continue
                yield Entry(caption, tuple((number, row, item) for item in range(count)), ranks)

    def pick(self, row: dict, item: int) -> object:
        cells = _images(row.get(self.columns[0]))
        return cells[item] if item < len(cells) else None


def _images(cell: object) -> list:
    """Images in the cell of a list; none if there is something else."""
    return cell if isinstance(cell, list) else []


class _Files(Source):
    """Source in which a row is an image with its caption and perhaps a score.

    The rows with the same caption are its candidates.
    """

    def __init__(
        self,
        table: Table,
        images: Path,
        caption: str,
        column: str,
        score: str | None,
        better: str,
        candidates: int | None,
    ):
        table.require({"caption": caption, "image": column} | ({"score": score} if score else {}))
        options = {
            "kind": "files",
            "caption": caption,
            "images": column,
            "score": score,
            "better": better,
            "candidates": candidates,
        }
        super().__init__([table], images, [column], options)
        self.caption, self.score, self.better, self.candidates = caption, score, better, candidates

    def read(self, dropped: Dropped) -> Iterator[Entry]:
        yield from same_size(list(self._captions(dropped)), self.candidates, dropped)

    def _captions(self, dropped: Dropped) -> Iterator[Entry]:
        groups: dict[str, list[tuple[int, float | None]]] = {}
        for row, values in self.tables[0].rows([self.caption, *([self.score] if self.score else [])]):
            score = (
                number_of(values.get(self.score), self.tables[0].named(row, self.score))
                if self.score
                else None
            )
            caption = caption_of(values.get(self.caption), self.tables[0].named(row, self.caption))
            groups.setdefault(caption, []).append((row, score))
        for caption, members in groups.items():
            scores = [score for _, score in members if score is not None]
            ranks = dense_ranks(scores, self.better) if self.score and len(scores) == len(members) else None
            if reason := TOO_FEW if len(members) < 2 else unusable(caption, ranks if self.score else (0, 1)):
                dropped.drop(reason, (0, members[0][0], 0))
                continue
            yield Entry(caption, tuple((0, row, 0) for row, _ in members), ranks)

    def pick(self, row: dict, item: int) -> object:
        return row.get(self.columns[0])


def pickapic(
    files: str | list[str],
    caption: str = "caption",
    image_0: str = "jpg_0",
    image_1: str = "jpg_1",
    label: str = "label_0",
    limit: int | None = None,
    outside: bool = False,
) -> Source:
    """Source of comparisons of two images, in the columns of Pick-a-Pic.

    Args:
        files: a table, a folder of parquet files, or a list of these.
        caption: column of the captions.
        image_0: column of the first images.
        image_1: column of the second images.
        label: column of the choices: 1 if the first image was chosen, 0 for the second, 0.5 for a tie.
        limit: number of usable comparisons to read; None: all.
        outside: whether paths of images may lead out of the folder of the first table.

    Raises:
        InputError: if a file or column is missing.
    """
    return _reaching(_Pairs(_tables(files), caption, image_0, image_1, label, limit), outside)


def rankings(
    files: str | list[str],
    images: str | None = None,
    caption: str = "prompt",
    image: str = "image_path",
    order: str = "rank",
    better: str = "lower",
    candidates: int | None = None,
    outside: bool = False,
) -> Source:
    """Source of rankings of several images, as in HPD: lists of images and of their ranks or scores.

    Args:
        files: a table, a folder of parquet files, or a list of these.
        images: folder that image paths are relative to; None: the folder of the first table.
        caption: column of the captions.
        image: column of the lists of images.
        order: column of the lists of ranks or scores.
        better: `lower` for ranks (1 is the best), `higher` for scores.
        candidates: images per entry; see `same_size`.
        outside: whether paths of images may lead out of that folder.

    Raises:
        InputError: if a file or column is missing, or `better` is invalid.
    """
    tables = _tables(files)
    root = Path(images or tables[0].path.parent).expanduser()
    return _reaching(_Lists(tables, root, caption, image, order, _direction(better), candidates), outside)


def folder(
    files: str,
    table: str | None = None,
    caption: str = "caption",
    image: str = "file_name",
    score: str | None = None,
    better: str = "higher",
    candidates: int | None = None,
    outside: bool = False,
) -> Source:
    """Source of images in a folder, with a table of one row per image: file, caption and perhaps a score.

    Args:
        files: the folder.
        table: file name of the table in the folder; None: the first that exists of metadata.csv,
            metadata.tsv, metadata.jsonl and metadata.parquet.
        caption: column of the captions.
        image: column of the image paths, relative to the folder.
        score: column of the scores; None: the images have no order.
        better: `lower` or `higher`, whichever scores are better.
        candidates: images per entry; see `same_size`.
        outside: whether paths of images may lead out of the folder.

    Raises:
        InputError: if the table or a column is missing, or `better` is invalid.
    """
    root = Path(files).expanduser()
    if not root.is_dir():
        raise InputError(
            f"import.files={files} is no folder: give the one that holds the images and their table (unpack "
            "an archive first)"
        )
    names = [table] if table else FOLDER_TABLES
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise InputError(
            f"import.files={files}: no {' or '.join(names)} in it; name the table with import.table=FILE"
        )
    source = _Files(Table(found), root, caption, image, score, _direction(better), candidates)
    return _reaching(source, outside)


def _reaching(source: Source, outside: bool) -> Source:
    source.outside = outside
    return source


def _tables(files: str | Sequence[str]) -> list[Table]:
    paths: list[Path] = []
    for name in [files] if isinstance(files, str) else files:
        path = Path(name).expanduser()
        inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            what = "no parquet file in it" if path.is_dir() else "no such file"
            raise InputError(
                f"import.files={name}: {what}; give a table, a folder of parquet files, or a list of them"
            )
        paths += inside
    if twice := named_twice(paths):
        raise InputError(
            f"import.files: {twice[0]} is named twice, so its rows would count twice; name it once"
        )
    if not paths:
        raise InputError("import.files is empty; give a table, a folder of parquet files, or a list of them")
    return [Table(path) for path in paths]


def _direction(better: str) -> str:
    if better not in ("lower", "higher"):
        raise InputError(f"import.better={better}: must be lower (ranks, 1 the best) or higher (scores)")
    return better
