"""Take a study to Amazon Mechanical Turk (CSV of pairs, images, HTML template), and read its results back."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capo.errors import InputError
from capo.evaluation.reports.templating import page_template
from capo.evaluation.study.server import INSTRUCTION
from capo.evaluation.study.store import IMAGES, SIDES, Study, Vote
from capo.evaluation.study.turns import choice_of, left_side, pair_name
from capo.runtime.files import led_to, whole_file, write_table, write_whole
from capo.runtime.reading import read_bytes

ADDRESS = re.compile(r"https://[^\s\"'<>?#]+")  # names are added to it, and it stands in pages, within quotes
CSV, TEMPLATE = "pairs.csv", "template.html"
ALL = ""  # the rater for whom sides are drawn: on Mechanical Turk they are the same for all
ANSWERS = ("left", "right", "tie")
NEEDED = ("WorkerId", "AssignmentStatus", "Input.pair", "Input.left")
REJECTED = "Rejected"
STATUSES = ("Submitted", "Approved", REJECTED)


@dataclass(frozen=True)
class Imported:
    """Counts of an import: votes recorded, and rows left out because the assignment was rejected."""

    votes: int
    rejected: int


def image_name(study: Study, pair: str, side: str) -> str:
    """File name of an exported image, which does not tell whose it is."""
    return f"{pair_name(study.facts.seed, f'{pair}-{side}', False)}.png"


def export(study: Study, folder: Path, images_at: str) -> list[Path]:
    """Write pairs.csv, template.html and images/ to `folder`; return the three paths.

    The CSV has a row for each pair, checks included: `pair`, `prompt` (escaped, since Mechanical Turk pastes
    it into the page as it is), and the addresses `left` and `right`. Sides are drawn once for each pair.

    Args:
        study: the study.
        folder: where the files go.
        images_at: address under which the content of images/ will stand, `https://...`.

    Raises:
        InputError: `images_at` is no https address, which the workers' browsers require, `folder` is the
            study's own or cannot be written, or an image of the study cannot be read.
    """
    if not ADDRESS.fullmatch(images_at):
        raise InputError(
            f"--images-at {images_at}: workers' browsers load images from https:// alone; give the address "
            "of the folder to which you upload images/, without ? or #"
        )
    if led_to(folder) in (led_to(study.folder), led_to(study.folder / IMAGES)):
        raise InputError(
            f"--to {folder}: there the study's own images lie, whose names tell which side they are; give "
            "another folder"
        )
    rows = []
    for pair in study.pairs.values():
        left = left_side(study.facts.seed, ALL, pair.name)
        names = {
            answer: image_name(study, pair.name, choice_of(answer, left)) for answer in ("left", "right")
        }
        for side in SIDES:
            with whole_file(folder / IMAGES / image_name(study, pair.name, side)) as unfinished:
                unfinished.write_bytes(study.image(pair.name, side))
        address = {answer: f"{images_at.rstrip('/')}/{name}" for answer, name in names.items()}
        rows.append({"pair": pair.name, "prompt": html.escape(pair.prompt), **address})
    rows.sort(key=lambda row: row["pair"])  # by name, which hides the checks among the others
    write_table(folder / CSV, list(rows[0]), rows)
    page = page_template("turk.html.j2")
    write_whole(folder / TEMPLATE, page.render(instruction=INSTRUCTION, ties=study.facts.ties))
    return [folder / CSV, folder / TEMPLATE, folder / IMAGES]


def import_results(study: Study, path: Path) -> Imported:
    """Record the votes of a results file of Mechanical Turk, all of them or none.

    A rater is a `WorkerId`. Rows whose `AssignmentStatus` is Rejected are left out. The answer is read from
    `Answer.choice` (left, right, tie) or from `Answer.choice.left` and so on (true, false). Reading a file
    twice changes nothing.

    Raises:
        InputError: the file cannot be read, has other columns, is of another study, has an answer that is
            none, or two answers of one worker to one pair.
    """
    remedy = "give the CSV of a batch's results"
    try:
        text = read_bytes(path, remedy).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except (FileNotFoundError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from error
    if missing := [name for name in NEEDED if name not in columns]:
        raise InputError(
            f"{path} has no column {', '.join(missing)}; give the CSV that 'Download CSV' of the batch writes"
        )
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"{path}: several columns are called {twice[0]}; remove all but one")
    if not rows:
        raise InputError(f"{path} has columns but no row; download the results when workers have answered")
    votes: dict[tuple[str, str], Vote] = {}
    rejected = 0
    for line, row in enumerate(rows, start=2):
        if None in row:
            raise InputError(f"{path}, row {line}: it has more cells than there are columns; correct it")
        if row["AssignmentStatus"] not in STATUSES:
            raise InputError(
                f"{path}, row {line}: AssignmentStatus is {row['AssignmentStatus']!r}, not one of "
                f"{', '.join(STATUSES)}; correct it"
            )
        if row["AssignmentStatus"] == REJECTED:
            rejected += 1
            continue
        vote = _vote(study, row, f"{path}, row {line}")
        if (vote.rater, vote.pair) in votes:
            raise InputError(
                f"{path}, row {line}: worker {vote.rater} has answered pair {vote.pair} twice; remove one row"
            )
        votes[vote.rater, vote.pair] = vote
    study.vote(*votes.values())
    return Imported(len(votes), rejected)


def _vote(study: Study, row: Mapping[str, str], place: str) -> Vote:
    rater, pair = (row["WorkerId"] or "").strip(), row["Input.pair"]
    left = left_side(study.facts.seed, ALL, pair)
    if pair not in study.pairs or not (row["Input.left"] or "").endswith(f"/{image_name(study, pair, left)}"):
        raise InputError(
            f"{place}: pair {pair!r} with the left image {row['Input.left']!r} is not of {study.folder}; "
            "import the results into the study that exported them"
        )
    answer = _answer(row)
    if not rater or answer not in (ANSWERS if study.facts.ties else ANSWERS[:2]):
        raise InputError(
            f"{place}: worker {rater!r} and answer {answer!r}; an answer is left, right or, with "
            "study.ties=true, tie: remove the row, or reject the assignment"
        )
    seconds = row.get("WorkTimeInSeconds") or ""
    return Vote(
        rater,
        pair,
        choice_of(answer, left),
        left,
        float(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else None,
        "mturk",
    )


def _answer(row: Mapping[str, str]) -> str:
    plain = (row.get("Answer.choice") or "").strip()
    chosen: Sequence[str] = [
        name for name in ANSWERS if (row.get(f"Answer.choice.{name}") or "").strip().lower() == "true"
    ]
    return plain or ",".join(chosen)
