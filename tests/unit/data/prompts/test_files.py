"""Every format of prompt files, written by the test: which columns come, and what is refused."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capo.data.prompts import files
from capo.data.prompts.files import READERS, row_count
from capo.errors import InputError

ROWS = {
    "Prompt": ['a "red" circle', "a star, blue", ""],
    "Category": ["Arts", "", "Animals"],
    "Note": ["x", "y", "z"],
}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, *names):
    """Columns of a file of any format, its batches joined."""
    form = {"txt": "text"}.get(path.suffix[1:], path.suffix[1:]) or "folder"
    offered = []
    batches = list(
        READERS[form](path, f"here={path.name}", lambda there: offered.append(list(there)) or names)
    )
    return {name: [value for batch in batches for value in batch[name]] for name in names}, offered[0]


def test_a_line_a_prompt(tmp_path):
    # U+2028 and form feed end no line; a byte order mark is no text
    path = written(tmp_path, "a.txt", "\ufeffa circle\r\n\na\u2028star\f!\nlast")
    assert read(path, "prompt") == ({"prompt": ["a circle", "", "a\u2028star\f!", "last"]}, ["prompt"])


def test_a_file_a_prompt(tmp_path):
    for name, text in (("b.txt", "a long\nprompt\n"), ("a.txt", "first"), ("c.json", "{}")):
        written(tmp_path, name, text)
    folder = tmp_path.rename(tmp_path.parent / "texts")
    assert read(folder, "prompt", "name") == (
        {"prompt": ["first", "a long\nprompt\n"], "name": ["a", "b"]},
        ["prompt", "name"],
    )


def test_csv_quotes_and_tsv_does_not(tmp_path):
    csv = written(
        tmp_path,
        "a.csv",
        'Prompt,Category,Note\n"a ""red"" circle",Arts,x\n"a star, blue",,y\n\n"two\nlines",Animals,z\n',
    )
    assert read(csv, "Category", "Prompt") == (
        {"Category": ["Arts", "", "Animals"], "Prompt": ['a "red" circle', "a star, blue", "two\nlines"]},
        ["Prompt", "Category", "Note"],
    )
    tsv = written(tmp_path, "a.tsv", 'Prompt\tCategory\r\n"a star" in red\tArts\r\nthe word "PEACE\tArts\r\n')
    assert read(tsv, "Prompt")[0] == {"Prompt": ['"a star" in red', 'the word "PEACE']}


def test_jsonl_keys_may_differ_from_line_to_line(tmp_path):
    lines = [
        '{"tag": "colors", "prompt": "a", "color": "red"}',
        "",
        '{"prompt": "b", "include": [{"count": 1}]}',
    ]
    found, offered = read(written(tmp_path, "a.jsonl", "\n".join(lines)), "prompt", "tag")
    assert found == {"prompt": ["a", "b"], "tag": ["colors", None]} and offered == [
        "tag",
        "prompt",
        "color",
        "include",
    ]


def test_parquet_gives_the_chosen_columns_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BATCH", 2)
    pq.write_table(pa.table(ROWS), tmp_path / "a.parquet")
    batches = list(READERS["parquet"](tmp_path / "a.parquet", "here", lambda names: ["Note", "Prompt"]))
    assert [sorted(batch) for batch in batches] == [["Note", "Prompt"]] * 2
    assert [batch["Prompt"] for batch in batches] == [ROWS["Prompt"][:2], ROWS["Prompt"][2:]]
    assert (
        row_count(tmp_path / "a.parquet", "parquet") == 3 and row_count(tmp_path / "a.parquet", "csv") is None
    )


@pytest.mark.parametrize("form", ["text", "csv", "tsv", "jsonl"])
def test_batches_of_lines_hold_every_row(tmp_path, monkeypatch, form):
    monkeypatch.setattr(files, "BATCH", 2)
    header = "prompt\n" if form in ("csv", "tsv") else ""
    lines = [json.dumps({"prompt": str(number)}) if form == "jsonl" else str(number) for number in range(5)]
    path = written(tmp_path, "a", header + "\n".join(lines))
    sizes = [
        [value.strip() for value in batch["prompt"]]
        for batch in READERS[form](path, "here", lambda names: ["prompt"])
    ]
    assert sizes == [["0", "1"], ["2", "3"], ["4"]]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"a circle\n\xff\xfe", r"^here=a.txt: not UTF-8 text \(byte 9\) in line 2; save"),
    ("a.csv", b"prompt\na circle\n\xe9", r"^here=a.csv: not UTF-8 text \(byte 16\) in line 3"),
    ("a.csv", "", "here=a.csv: the first line is empty"),
    ("a.csv", 'prompt\n"a\nb\nc\n', r"here=a.csv: line 4 cannot be read \(unexpected end of data\)"),
    ("a.csv", "prompt,prompt\na,b\n", "here=a.csv: several columns are called 'prompt'; rename all but one"),
    ("a.tsv", "prompt\tprompt\na\tb\n", "here=a.tsv: several columns are called 'prompt'"),
    ("a.csv", "prompt,tag\nred, blue,x\n",
     r"here=a.csv: line 2 has 3 cells, but there are 2 columns \(prompt, tag\)"),
    ("a.tsv", "prompt\ttag\na\tx\nb\n", "here=a.tsv: line 3 has 1 cells"),
    ("a.csv", f"prompt\n{'x' * 140_000}\n", "here=a.csv: line 2 cannot be read"),
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "here=a.jsonl: line 3 is not JSON"),
    ("a.jsonl", '"a circle"\n', "here=a.jsonl: line 1 is not a JSON object"),
    ("a.parquet", b"PAR1 and no more", "here=a.parquet: not a complete Parquet file"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, name, content), "prompt")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(InputError, match=rf"here={name}: cannot be read \(.*No such file"):
        read(tmp_path / name, "prompt")


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"here=a.parquet: several columns are called 'prompt'"):
        read(tmp_path / "a.parquet", "prompt")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert row_count(tmp_path / name, "parquet") is None
    with pytest.raises(InputError, match=rf"here={name}: cannot be read \(it is no ordinary file\)"):
        read(tmp_path / name, "prompt")


def test_old_line_ends_end_a_prompt(tmp_path):
    assert read(written(tmp_path, "a.txt", "a cat\ra dog\r"), "prompt")[0] == {"prompt": ["a cat", "a dog"]}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", "a cat\n".encode("utf-16-le"), "a null byte in line 1, which no text has; save it as UTF-8"),
    ("a.csv", "prompt;tag\na cat;x\n", "its first line has ';' between columns, where ',' should stand"),
    ("a.tsv", "prompt,tag\na cat,x\n", "its first line has ',' between columns"),
])  # fmt: skip
def test_what_would_be_read_otherwise_than_meant_is_refused(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, name, content), "prompt")


@pytest.mark.parametrize(("first", "form"), [
    ("prompt,category", "csv"), ('"Prompt"', "csv"), ("id\tcaption", "tsv"), ('{"prompt": "a cat"}', "jsonl"),
])  # fmt: skip
def test_a_table_is_not_read_as_lines(tmp_path, first, form):
    path = written(tmp_path, "a.txt", f"{first}\na dog\n")
    with pytest.raises(InputError, match=rf"prompts=files and prompts.train.format={form}$"):
        list(READERS["text"](path, f"prompts.train.path={path}", lambda names: names))


@pytest.mark.parametrize(
    "first", ["a cat, a prompt", "{a cat}", "prompt, a red circle", "a caption", '{"cat": "red"}']
)
def test_a_prompt_is_no_header(tmp_path, first):
    assert read(written(tmp_path, "a.txt", f"{first}\n"), "prompt")[0] == {"prompt": [first]}


def test_endings_count_in_capitals_too(tmp_path):
    written(tmp_path, "1.txt", "a cat")
    written(tmp_path, "2.TXT", "a dog")
    found = [batch["prompt"] for batch in READERS["folder"](tmp_path, "here", lambda names: names)]
    assert found == [["a cat", "a dog"]]
