"""Filters by counts worked out by hand, the seeded draw, and sets that cannot overlap."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo.data.prompts import Prompt, check_splits, prompt_id, report_table, split_sets, splits
from capo.data.prompts.report import left_out, shortages
from capo.data.prompts.rows import DUPLICATE, ELSEWHERE, EMPTY, FINE, KEPT, NSFW, OVER_LIMIT, TOO_LONG
from capo.data.prompts.splits import choose
from capo.data.prompts.text import decoded_lines
from capo.errors import InputError

COUNTS = ("empty", "nsfw", "unwanted", "too_long", "duplicates", "elsewhere", "over_limit", "kept")


@pytest.fixture(autouse=True)
def nothing_remembered():
    splits._remembered.clear()


def texts(path, *lines):
    path.write_text("\n".join(lines))
    return str(path)


def counts(report):
    return {key: value for key in COUNTS if (value := getattr(report, key))}


def words(prompts):
    return [prompt.text for prompt in prompts]


def sets(tmp_path, train, **more):
    """Sets whose validation and test are one prompt each."""
    given = {
        "validation": texts(tmp_path / "v.txt", "validation prompt"),
        "test": texts(tmp_path / "t.txt", "test prompt"),
    } | more
    return split_sets(train=train, **given)


def test_every_filter_counts_its_rows(tmp_path):
    rows = [  # prompt, image_nsfw, prompt_nsfw
        ("a circle", 0.1, 0.0),
        ("", 0.9, 0.9),
        (None, 0.0, 0.0),
        (" \n", 0.0, 0.0),  # three empty
        ("a square", 0.5, 0.0),
        ("blurred", 2.0, 0.0),
        ("rude", 0.0, 0.7),
        ("unknown", None, 0.0),
        ("nan", 0.0, float("nan")),  # five NSFW
        ("x" * 21, 0.0, 0.0),
        ("x" * 20, 0.0, 0.0),  # one too long
        ("y" * 100_001, 0.0, 0.0),  # and one for any limit
        ("a  circle", 0.2, 0.0),
        ("a\tcircle ", 0.0, 0.0),
        ("A circle", 0.0, 0.0),  # two duplicates
        ("mixed", 0.1, 0.0),
        ("mixed", 0.9, 0.0),
        ("mixed ", 0.0, 0.0),  # three NSFW, as one of them is
        ("test  prompt", 0.0, 0.0),
        ("validation prompt", 0.0, 0.0),
        ("test prompt", 0.0, 0.0),  # two elsewhere, one a duplicate
    ]
    table = {
        name: list(column)
        for name, column in zip(("prompt", "image_nsfw", "prompt_nsfw"), zip(*rows, strict=True), strict=True)
    }
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    found = sets(tmp_path, {"path": str(tmp_path / "m.parquet"), "max_length": 20}, seed=None)
    assert words(found["train"]) == ["a circle", "x" * 20, "A circle"]
    report = found.report[0]
    assert counts(report) == {
        "empty": 3,
        "nsfw": 8,
        "too_long": 2,
        "duplicates": 3,
        "elsewhere": 2,
        "kept": 3,
    }
    assert report.read == len(rows) == sum(counts(report).values())
    assert left_out(report) == "3 empty, 8 NSFW, 2 too long, 3 duplicates, 2 also in another split"
    check_splits(found)

    loose = sets(tmp_path, {"path": str(tmp_path / "m.parquet"), "nsfw": None, "max_length": None}, seed=None)
    assert counts(loose.report[0]) == {
        "empty": 3, "too_long": 1, "duplicates": 5, "elsewhere": 2, "kept": 10,
    }  # fmt: skip
    strict = sets(
        tmp_path,
        {"path": str(tmp_path / "m.parquet"), "nsfw": 0.05, "nsfw_columns": ["prompt_nsfw"]},
        seed=None,
    )
    assert counts(strict.report[0]) == {
        "empty": 3, "nsfw": 2, "too_long": 1, "duplicates": 5, "elsewhere": 2, "kept": 8,
    }  # fmt: skip


def test_pick_a_pics_columns(tmp_path):
    rows = {
        "caption": ["a cat", "a cat", "a dog", "a cow", "a hen"],
        "has_label": [False, True, True, True, None],  # the first row and the last are not judged
        "are_different": [True, True, False, True, True],  # nor can the third be
        "jpg_0": [b"", b"", b"", b"", b""],
    }
    pq.write_table(pa.table(rows), tmp_path / "train-0.parquet")
    source = {
        "path": str(tmp_path / "train-*.parquet"),
        "column": "caption",
        "where": {"has_label": True, "are_different": True},
    }
    found = sets(tmp_path, source, seed=None)
    assert words(found["train"]) == ["a cat", "a cow"]
    assert counts(found.report[0]) == {"unwanted": 3, "kept": 2}


def test_switches_and_scores_in_files_of_text(tmp_path):
    lines = ["prompt,nsfw,ok", "a,False,1", "b,True,1", "c,0.49,1", "d,0.5,1", "e,,1", "f,no,0"]
    found = sets(tmp_path, {"path": texts(tmp_path / "a.csv", *lines), "where": {"ok": 1}}, seed=None)
    assert words(found["train"]) == ["a", "c"] and counts(found.report[0]) == {
        "nsfw": 3,
        "unwanted": 1,
        "kept": 2,
    }
    with pytest.raises(
        InputError,
        match=r"column 'nsfw' holds 'rather', which is neither an NSFW score.*prompts.train.nsfw=null",
    ):
        sets(tmp_path, texts(tmp_path / "b.csv", "prompt,nsfw", "a,rather"))


def test_a_threshold_of_another_scale_is_refused(tmp_path):
    shares = texts(tmp_path / "a.csv", "prompt,nsfw", "a,0.9", "b,0.1")
    with pytest.raises(InputError, match=r"prompts.train.nsfw=50: no score of .*'nsfw', is above 2; give"):
        sets(tmp_path, {"path": shares, "nsfw": 50})
    percents = texts(tmp_path / "b.csv", "prompt,nsfw", "a,3", "b,70")
    assert words(sets(tmp_path, {"path": percents, "nsfw": 50})["train"]) == ["a"]
    (tmp_path / "both").mkdir()  # one file of a set may be clean
    texts(tmp_path / "both" / "a.csv", "prompt,nsfw", "a,3", "b,70")
    texts(tmp_path / "both" / "b.csv", "prompt,nsfw", "c,0", "d,1")
    both = {"path": str(tmp_path / "both"), "nsfw": 50}
    assert sorted(words(sets(tmp_path, both)["train"])) == ["a", "c", "d"]


def test_categories_come_along(tmp_path):
    lines = [json.dumps({"tag": tag, "prompt": f"a {tag}"}) for tag in ("bench", "cow")] + [
        '{"prompt": "no tag"}'
    ]
    found = sets(tmp_path, {"path": texts(tmp_path / "g.jsonl", *lines), "category": "tag"}, seed=None)
    assert found["train"] == [
        Prompt(prompt_id(text), text, tag)
        for text, tag in (("a bench", "bench"), ("a cow", "cow"), ("no tag", ""))
    ]


def by_hash(names, seed):
    """The order by the hash of seed and prompt id, worked out anew."""
    return sorted(
        names,
        key=lambda text: hashlib.blake2b(f"{seed}/{prompt_id(text)}".encode(), digest_size=8).hexdigest(),
    )


def test_the_draw_is_a_function_of_seed_and_prompts(tmp_path):
    names = [f"prompt {number}" for number in range(40)]
    one, other = texts(tmp_path / "one.txt", *names), texts(tmp_path / "other.txt", *reversed(names))

    def drawn(path, limit, seed):
        return words(sets(tmp_path, {"path": path, "limit": limit}, seed=seed)["train"])

    assert drawn(one, 10, 0) == drawn(other, 10, 0) == by_hash(names, 0)[:10]
    assert drawn(one, 25, 0)[:10] == drawn(one, 10, 0)
    assert drawn(one, None, 3) == by_hash(names, 3) != by_hash(names, 0)
    assert drawn(one, 10, None) == names[:10] and drawn(other, 10, None) == names[:-11:-1]


def test_prompts_are_fetched_across_batches_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("capo.data.prompts.files.BATCH", 3)
    names = [f"prompt {number}" for number in range(20)]
    for part in (0, 1):
        pq.write_table(
            pa.table({"tag": [name[-1] for name in names[part::2]], "prompt": names[part::2]}),
            tmp_path / f"{part}.parquet",
        )
    found = sets(
        tmp_path, {"path": str(tmp_path), "format": "parquet", "limit": 12, "category": "tag"}, seed=5
    )
    assert [(prompt.text, prompt.category) for prompt in found["train"]] == [
        (name, name[-1]) for name in by_hash(names, 5)[:12]
    ]
    assert counts(found.report[0]) == {"over_limit": 8, "kept": 12} and len(found.report[0].places) == 2


def test_selection_and_report_prompts_of_one_file(tmp_path):
    """The paper's setting.

    Validation a part of a set, test the rest of it, and training has none of either.
    """
    lines = ["Prompt\tCategory", *(f"prompt {number}\tArts" for number in range(10))]
    parti = {"path": texts(tmp_path / "p.tsv", *lines), "category": "Category"}
    train = texts(tmp_path / "d.txt", "prompt  3", "other", "prompt 8 ")
    found = split_sets(train, parti | {"limit": 4}, parti, priority=["validation", "test", "train"])
    assert words(found["train"]) == ["other"]
    assert words(found["validation"]) + words(found["test"]) != [] and len(found["test"]) == 6
    assert sorted(words(found["validation"]) + words(found["test"])) == [
        f"prompt {number}" for number in range(10)
    ]
    assert [counts(report) for report in found.report] == [
        {"elsewhere": 2, "kept": 1},
        {"over_limit": 6, "kept": 4},
        {"elsewhere": 4, "kept": 6},
    ]


def test_priority_says_who_keeps_a_prompt(tmp_path):
    one, two, both = (
        texts(tmp_path / name, *lines)
        for name, lines in (("1.txt", "ab"), ("2.txt", "bc"), ("3.txt", "abcd"))
    )
    found = split_sets(both, one, two)  # test b c, validation a, train d
    assert [sorted(words(found[split])) for split in ("test", "validation", "train")] == [
        ["b", "c"],
        ["a"],
        ["d"],
    ]
    with pytest.raises(
        InputError,
        match=r"prompts.train: no prompt is left of 1.txt .*2 rows read, 2 also in another split; leave "
        r"some to it: set a limit for validation or test \(prompts.validation.limit=N\)",
    ):
        split_sets(one, both, texts(tmp_path / "4.txt", "e"), priority=["validation", "test", "train"])
    with pytest.raises(
        InputError, match=r"prompts.priority=\['train'\]: must name train, validation, test once each"
    ):
        split_sets(one, two, both, priority=["train"])


def test_choose_by_hand():
    #       row 0     1     2      3      4     5         6     7
    ids = np.array([10, 20, 10, 0, 30, 40, 50, 20], np.uint64)
    fates = np.array([FINE, FINE, FINE, EMPTY, NSFW, TOO_LONG, FINE, NSFW], np.uint8)
    rows, found = choose(ids, fates, np.array([99], np.uint64), None, 1)
    assert rows.tolist() == [0]
    assert found.tolist() == [KEPT, NSFW, DUPLICATE, EMPTY, NSFW, TOO_LONG, OVER_LIMIT, NSFW]
    rows, found = choose(ids, fates, np.array([10], np.uint64), 0, None)
    assert rows.tolist() == [6] and found[0] == ELSEWHERE and fates[1] == FINE


@pytest.mark.parametrize(("name", "lines", "message"), [
    ("a.txt", [" ", ""],
     r"prompts.train: no prompt is left of a.txt \(.*a.txt\): 1 rows read, 1 empty; give another file"),
    ("a.jsonl", ['{"prompt": "a"}', '{"prompt": 3}'],
     "a.jsonl: row 2: the prompt is 3, not text; name another column"),
    ("a.jsonl", [r'{"prompt": "a \ud83d"}'],
     r"a.jsonl: row 1: 'a \\ud83d' contains an unpaired surrogate, half a character"),
    ("a.jsonl", [""], "prompts.train: no prompt is left of a.jsonl .*: 0 rows read"),
    ("a.csv", ["text,tag", "a,b"],
     "a.csv: no column is called prompt; name one: prompts.train.column= one of text, tag"),
])  # fmt: skip
def test_prompts_that_cannot_be_used(tmp_path, name, lines, message):
    with pytest.raises(InputError, match=message):
        sets(tmp_path, texts(tmp_path / name, *lines))


def test_a_pipe_and_a_device_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for file in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(InputError, match=rf"prompts.test={file}: cannot be read \(it is no ordinary"):
            list(decoded_lines(file, f"prompts.test={file}"))


def test_a_file_that_is_missing_is_found_before_another_is_read(tmp_path):
    broken = texts(tmp_path / "t.jsonl", "not JSON")
    with pytest.raises(InputError, match=r"prompts.train.path=.*gone.txt: no such file"):
        split_sets(str(tmp_path / "gone.txt"), broken, broken)


def test_the_report_is_printed_once_until_a_file_changes(tmp_path, capsys):
    train, one, other = (
        texts(tmp_path / f"{name}.txt", *lines) for name, lines in (("a", "aab"), ("v", "x"), ("t", "y"))
    )
    given = {"path": train, "limit": 5, "name": "mine"}
    first = split_sets(given, one, other)
    shown = capsys.readouterr().out
    assert (
        "duplicates" in shown
        and "prompts.train.limit=5: mine gives only 2" in shown
        and f"train: {train}" in shown
    )
    assert split_sets(given, one, other) is first and capsys.readouterr().out == ""
    texts(tmp_path / "a.txt", "a", "a", "b", "c")
    assert sorted(words(split_sets(given, one, other)["train"])) == ["a", "b", "c"]
    assert "rows read" in capsys.readouterr().out
    assert len(split_sets(given | {"limit": 2}, one, other)["train"]) == 2


def test_the_table_leaves_out_what_never_happened(tmp_path):
    found = sets(tmp_path, texts(tmp_path / "a.txt", "a", "a", "b", ""))
    table = report_table(found.report)
    assert list(table.columns[0].cells) == ["set", "rows read", "duplicates", "kept"]
    assert list(table.columns[1].cells) == ["a.txt", "3", "1", "2"]
    assert shortages(found.report, {"train": 2, "test": None}) == []


def test_a_hub_file_is_reported_with_its_commit(tmp_path, monkeypatch):
    file = tmp_path / "datasets--o--n" / "snapshots" / "abc123" / "data" / "m.csv"
    file.parent.mkdir(parents=True)
    texts(file, "prompt", "a circle")
    monkeypatch.setattr("capo.data.prompts.sources.hub_file", lambda *_: file)
    found = sets(tmp_path, {"hub": "o/n", "file": "data/m.csv"})
    assert found.report[0].places == ("o/n/data/m.csv, revision abc123",)
