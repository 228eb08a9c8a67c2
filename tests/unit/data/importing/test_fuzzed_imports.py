"""Tables of imports and of prompts, damaged or with odd cells: a message, or entries that can be used."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capo.data.importing import folder, pickapic, rankings
from capo.data.importing.images import BrokenImage, check, picture
from capo.data.importing.survey import survey
from capo.data.prompts import make_prompt, split_sets
from capo.errors import InputError
from fixtures.damage import damaged, examples, put

FAST, SLOW = 20, 200
BUDGETS = [FAST, pytest.param(SLOW, marks=pytest.mark.slow)]


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, form)
    return buffer.getvalue()


IMAGES = {form: encoded(form) for form in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")}


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("form", IMAGES)
def test_damaged_images(tmp_path, form, number):
    @examples(number)
    @given(damaged(IMAGES[form]))
    def holds(content):
        for read in (check, lambda cell, folder: picture(cell, folder, (8, 8))):
            try:
                read(content, tmp_path)
            except BrokenImage as error:
                assert str(error)

    holds()


def test_an_image_that_is_no_ordinary_file_is_broken(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(BrokenImage, match="no ordinary file"):
            check(name, tmp_path)


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text('aé ,"\n\x00\u2028', max_size=6),
    st.sampled_from(["a red cat", "a dog", "0.png", "1.png", "gone.png", "\ud800", 1, 0, 0.5]),
    st.lists(st.sampled_from(["0.png", 1, None, 0.5]), max_size=3),
    st.dictionaries(st.sampled_from(["a", "bytes", "path"]), st.integers(), max_size=2),
)
SOURCES = {
    "pickapic": (pickapic, ("caption", "jpg_0", "jpg_1", "label_0")),
    "rankings": (rankings, ("prompt", "image_path", "rank")),
    "folder": (folder, ("caption", "file_name")),
}


def entries(source: str, path) -> None:
    """Import a table, whose entries then are what they should be, or raise InputError."""
    read, _ = SOURCES[source]
    found = survey(read(str(path.parent if source == "folder" else path)), progress=False)
    assert all(isinstance(text, str) and make_prompt(text).text == text for text in found.texts)
    assert len(set(found.ids)) == len(found.ids)
    assert found.candidates >= 2 and (found.places >= 0).all()


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_tables_of_imports_with_odd_cells(tmp_path, source, number):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(IMAGES["PNG"])
    columns = SOURCES[source][1]

    @examples(number)
    @given(st.lists(st.fixed_dictionaries({name: CELL for name in columns}), max_size=4))
    def holds(rows):
        path = tmp_path / "metadata.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        try:
            entries(source, path)
        except InputError as error:
            assert str(error)

    holds()


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The bytes of a table of comparisons in each format."""
    rows = [{"caption": "a red cat", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": "1"}] * 3
    place = tmp_path_factory.mktemp("tables") / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), place)
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return {
        ".parquet": place.read_bytes(),
        ".csv": "\n".join(lines).encode(),
        ".tsv": "\n".join(lines).replace(",", "\t").encode(),
        ".jsonl": "\n".join(map(json.dumps, rows)).encode(),
        ".json": json.dumps(rows).encode(),
    }


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("kind", [".parquet", ".csv", ".tsv", ".jsonl", ".json"])
def test_damaged_tables_of_imports(tmp_path, tables, kind, number):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(IMAGES["PNG"])
    path = tmp_path / f"table{kind}"

    @examples(number)
    @given(damaged(tables[kind]))
    def holds(content):
        path.write_bytes(content)
        try:
            entries("pickapic", path)
        except InputError as error:
            assert str(error)

    holds()


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_damaged_files_of_prompts(tmp_path, kind, number):
    texts = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("cat", "dog", "bird")]
    path = tmp_path / f"prompts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"prompt": texts}), path)
    else:
        head = {"txt": [], "jsonl": []}.get(kind, ["prompt"])
        lines = [json.dumps({"prompt": text}) if kind == "jsonl" else text for text in texts]
        path.write_text("\n".join([*head, *lines]))
    whole, others = path.read_bytes(), [tmp_path / "validation.txt", tmp_path / "test.txt"]
    for other in others:
        other.write_text(f"a {other.stem} star")

    @examples(number)
    @given(damaged(whole))
    def holds(content):
        put(path, content)
        try:
            prompts = split_sets(str(path), *map(str, others))["train"]
            assert all(prompt == make_prompt(prompt.text) and prompt.text for prompt in prompts)
        except InputError as error:
            assert str(error)

    holds()
