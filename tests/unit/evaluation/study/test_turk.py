"""A study on Mechanical Turk: what is uploaded, and results that come back as votes."""

import csv
import html
import os
import re

import pytest

from capo.cli import study_files
from capo.errors import InputError
from capo.evaluation.study.store import FIRST, SECOND, TIE, image_path
from capo.evaluation.study.turk import export, import_results
from fixtures.studies import HOSTILE, make_fake_study

AT = "https://images.example/study"


def exported(study, tmp_path):
    export(study, tmp_path / "mturk", f"{AT}/")
    with (tmp_path / "mturk" / "pairs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_batch(path, rows, answers, **columns):
    """Results in the columns of the requester's site: the input's, the answer's, and what a batch adds."""
    lines = [
        {
            "HITId": f"H{number}",
            "WorkerId": f"A{number % 2}",
            "AssignmentStatus": "Submitted",
            "WorkTimeInSeconds": "12",
            **{f"Input.{name}": value for name, value in row.items()},
            **answer,
            **columns,
        }
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        table.writeheader()
        table.writerows(lines)
    return path


@pytest.fixture
def study(tmp_path):
    with make_fake_study(tmp_path / "study") as study:
        yield study


def test_an_export_follows_no_link_out_of_the_study(study, tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "study" / "mturk").symlink_to(tmp_path / "else")
    options = study_files.arguments(["export", str(tmp_path / "study"), "--images-at", AT])
    with pytest.raises(InputError, match=rf"study/mturk is a link to {tmp_path}/else, outside of"):
        study_files._export(options)


def test_an_export_that_cannot_be_made_is_named(study, tmp_path):
    for address in ("http://x", 'https://x/"><script>', "https://x y", "https://x/?y=1", "https://x#y"):
        with pytest.raises(InputError, match="workers' browsers load images from https:// alone"):
            export(study, tmp_path / "mturk", address)
    with pytest.raises(InputError, match=r"--to .*study: there the study's own images lie.* another folder"):
        export(study, study.folder / ".." / study.folder.name, AT)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file/images/.* cannot be written"):
        export(study, tmp_path / "file", AT)
    image_path(study.folder, next(iter(study.pairs)), FIRST).unlink()
    with pytest.raises(InputError, match=r"-first.png cannot be read \(it is not there\); restore it"):
        export(study, tmp_path / "mturk", AT)


def test_the_export_names_every_image_and_escapes_every_prompt(study, tmp_path):
    rows = exported(study, tmp_path)
    assert {row["pair"] for row in rows} == set(study.pairs) and len(rows) == 8
    assert [row["pair"] for row in rows] == sorted(study.pairs)
    for row in rows:
        pair = study.pairs[row["pair"]]
        assert html.unescape(row["prompt"]) == pair.prompt and not set('<>"') & set(row["prompt"])
        images = []
        for side in ("left", "right"):
            address, name = row[side].rsplit("/", 1)
            assert address == AT and re.fullmatch(r"[0-9a-f]{12}\.png", name)
            images.append((tmp_path / "mturk" / "images" / name).read_bytes())
        assert sorted(images) == sorted(study.image(pair.name, side) for side in (FIRST, SECOND))
    assert any(html.unescape(row["prompt"]) == HOSTILE for row in rows)
    assert len(list((tmp_path / "mturk" / "images").iterdir())) == 16


def test_the_template_asks_for_columns_of_the_csv_alone(study, tmp_path):
    rows = exported(study, tmp_path)
    text = (tmp_path / "mturk" / "template.html").read_text()
    asked = set(re.findall(r"\$\{([^}]*)\}", text))
    assert asked == {"prompt", "left", "right"} <= set(rows[0])
    assert "Given the text below, pick the left or the right image with better looking." in text
    assert re.findall(r'name="choice" value="(\w+)"', text) == ["left", "tie", "right"]


@pytest.mark.parametrize("form", ["one column", "a column for each answer"])
def test_results_become_votes_for_the_images_that_stood_there(study, tmp_path, form):
    rows = exported(study, tmp_path)
    given = [("left", "right", "tie")[number % 3] for number in range(len(rows))]
    if form == "one column":
        answers = [{"Answer.choice": answer} for answer in given]
    else:
        answers = [
            {f"Answer.choice.{name}": str(name == answer).lower() for name in ("left", "tie", "right")}
            for answer in given
        ]
    path = write_batch(tmp_path / "batch.csv", rows, answers)
    for _ in range(2):  # a second time changes nothing
        found = import_results(study, path)
        assert (found.votes, found.rejected) == (8, 0)
    votes = {vote.pair: vote for vote in study.votes()}
    assert len(votes) == len(study.votes()) == 8
    for row, answer in zip(rows, given, strict=True):
        vote = votes[row["pair"]]
        assert vote.source == "mturk" and vote.seconds == 12.0 and vote.rater in ("A0", "A1")
        if answer == "tie":
            assert vote.choice == TIE
        else:
            name = row[answer].rsplit("/", 1)[1]
            shown = (tmp_path / "mturk" / "images" / name).read_bytes()
            assert study.image(vote.pair, vote.choice) == shown


def test_rejected_assignments_are_left_out(study, tmp_path):
    rows = exported(study, tmp_path)
    answers = [{"Answer.choice": "left"} for _ in rows]
    path = write_batch(tmp_path / "batch.csv", rows, answers, AssignmentStatus="Rejected")
    found = import_results(study, path)
    assert (found.votes, found.rejected) == (0, 8) and study.votes() == []


def test_results_that_cannot_be_are_refused_whole(study, tmp_path):
    rows = exported(study, tmp_path)
    good = [{"Answer.choice": "left"} for _ in rows]
    path = tmp_path / "batch.csv"

    def refused(said):
        with pytest.raises(InputError, match=said):
            import_results(study, path)
        assert study.votes() == []

    write_batch(path, rows, [*good[:-1], {"Answer.choice": "both"}])
    refused("row 9: worker 'A1' and answer 'both'")
    write_batch(path, rows, [*good[:-1], {}])
    refused("row 9: worker 'A1' and answer ''")
    write_batch(path, [*rows[:-1], {**rows[-1], "pair": "none"}], good)
    refused("row 9: pair 'none' .* is not of")
    write_batch(path, [*rows[:-1], {**rows[-1], "left": rows[-1]["right"]}], good)
    refused("row 9: .*import the results into the study that exported them")
    write_batch(path, [*rows, rows[1]], [*good, *good[:1]], WorkerId="A1")
    refused("row 10: worker A1 has answered pair .* twice")
    write_batch(path, rows, good, AssignmentStatus="rejected")
    refused("row 2: AssignmentStatus is 'rejected', not one of Submitted, Approved, Rejected")
    header, *lines = write_batch(path, rows, good).read_text().splitlines()
    path.write_text("\n".join([header, lines[0], f"{lines[1]},x"]))
    refused("row 3: it has more cells than there are columns")
    path.write_text("\n".join([header.replace("HITId", "WorkerId"), *lines]))
    refused("several columns are called WorkerId")
    path.write_text(header)
    refused("has columns but no row")
    path.write_text("a,b\n1,2\n")
    refused("has no column WorkerId, AssignmentStatus, Input.pair, Input.left")
    path.write_bytes(b"\xff\xfe")
    refused("cannot be read")
    path.unlink()
    refused("cannot be read")
    os.mkfifo(path)
    refused(r"cannot be read \(it is no ordinary file\)")
