"""Files of a pool that were edited or damaged, or where something else stands, are refused or made again."""

import errno
import json
import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from capo.data.pool import DamagedShard, Manifest, Pool, PoolReader
from capo.data.pool.files import write_tensors
from capo.data.pool.headers import read_header
from capo.data.pool.import_table import check_entries, read_import_table
from capo.data.pool.parquet import ARROW, SEAL
from capo.data.pool.score_files import read_score_file, write_score_file
from capo.data.prompts import make_prompt
from capo.errors import DamagedFile, InputError
from capo.runtime import reading
from fixtures import ROOT

POOLS = ROOT / "tests" / "fixtures" / "pools"  # of an earlier version, without checksums of whole files
PROMPTS = [make_prompt(text) for text in ("a circle", "a square", "a star")]
SETTINGS = {"batch": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pool = Pool.create(
        tmp_path_factory.mktemp("whole") / "pool",
        Manifest(prompts_per_shard=2, seed=0, generator="g", latent_space="l", text_encoders="t"),
    )
    pool.append_prompts(PROMPTS, "train")
    for row in pool.text_shards():
        pool.write_text(row, {"embeds": torch.randn(len(pool.row_prompts(row)), 3)}, SETTINGS)
    for shard in pool.shards(2):
        images = len(shard.positions), 2
        pool.write_latents(shard, torch.randn(*images, 1, 2, 2), SETTINGS)
        pool.write_scores("r-0", shard, torch.randn(*images), SETTINGS)
    return pool.folder


@pytest.fixture
def pool(whole, tmp_path):
    """Three prompts in two rows, two candidates, with text, latents and scores."""
    return Pool.open(shutil.copytree(whole, tmp_path / "pool"))


def refusal(pool) -> str:
    with pytest.raises(DamagedFile) as refused:
        Pool.open(pool.folder)
    return str(refused.value)


# --- prompts.parquet ---


def columns(**changes):
    return {
        "prompt_id": [prompt.id for prompt in PROMPTS],
        "prompt": [prompt.text for prompt in PROMPTS],
        "split": ["train"] * 3,
        "position": [0, 1, 2],
    } | changes


EDITS = [
    ({"prompt": ["a circle", "a cube", "a star"]}, "which is not that of its prompt \"a cube\""),
    ({"prompt": ["a circle", " a square", "a star"]}, "which is not that of its prompt"),
    ({"prompt": ["a circle", None, "a star"]}, "prompt is empty in 1 rows"),
    ({"prompt_id": [PROMPTS[0].id, PROMPTS[0].id, PROMPTS[2].id]}, "prompt_id is"),
    ({"prompt_id": ["x", "y", "z"]}, "prompt_id is x in row 0"),
    ({"position": [0, 1, 1]}, "position is 1 in row 2"),
    ({"position": [2, 1, 0]}, "position is 2 in row 0"),
    ({"position": [-1, 0, 1]}, "position is -1 in row 0"),
    ({"position": [0, 1, 2**62]}, f"position is {2**62} in row 2"),
    ({"position": [1, 2, 3]}, "position is 1 in row 0"),
    ({"position": [0, 1, 4]}, "position is 4 in row 2"),  # the next row begins at 2
    ({"position": [0.0, 1.0, 2.0]}, "column position is double, not int64"),
    ({"split": [["train"]] * 3}, "column split is list"),
    ({"prompt": [{"text": "a circle"}] * 3}, "column prompt is struct"),
    ({"more": [1, 2, 3]}, "its columns are prompt_id, prompt, split, position, more"),
]  # fmt: skip


@pytest.mark.parametrize("sealed", [False, True], ids=["rewritten", "edited"])
@pytest.mark.parametrize(("changes", "message"), EDITS, ids=[message for _, message in EDITS])
def test_an_edited_table_of_prompts_is_refused(pool, changes, message, sealed):
    """An editor keeps the file's metadata, or not."""
    path = pool.folder / "prompts.parquet"
    metadata = pq.read_metadata(path).metadata
    assert SEAL.encode() in metadata
    pq.write_table(pa.table(columns(**changes)).replace_schema_metadata(metadata if sealed else None), path)
    told = refusal(pool)
    assert ("its checksum is not that of its content" if sealed else message) in told
    assert told.startswith(f"{path} cannot be read (") and "restore it, or remove the pool" in told


@pytest.mark.parametrize("name", ["prompt_id", "prompt", "split", "position"])
def test_a_column_that_is_missing_is_named(pool, name):
    table = columns()
    del table[name]
    pq.write_table(pa.table(table), pool.folder / "prompts.parquet")
    assert f"it has no column {name}" in refusal(pool)


def test_the_same_table_without_a_checksum_is_read_and_gets_one_when_prompts_are_added(pool):
    """Pools of earlier versions have none."""
    path = pool.folder / "prompts.parquet"
    pq.write_table(pa.table(columns()), path)
    opened = Pool.open(pool.folder)
    assert opened.prompts == pool.prompts
    opened.append_prompts([make_prompt("a ring")], "train")
    assert SEAL.encode() in pq.read_metadata(path).metadata
    assert [position for _, position in Pool.open(pool.folder).prompts] == [0, 1, 2, 4]


@pytest.mark.parametrize("step", [101, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_the_table_of_prompts_is_found(pool, step):
    path = pool.folder / "prompts.parquet"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), step):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert str(path) in refusal(pool), bit


@pytest.mark.parametrize("step", [211, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_an_earlier_table_changes_no_prompt(tmp_path, step):
    folder = shutil.copytree(POOLS / "tiny-eae45e73-0-train", tmp_path / "pool")
    path, before = folder / "prompts.parquet", Pool.open(folder).prompts
    whole = path.read_bytes()
    assert ARROW.encode() in pq.read_metadata(path).metadata and SEAL.encode() not in whole
    found = 0
    for bit in range(0, 8 * len(whole), step):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert Pool.open(folder).prompts == before, bit
        except DamagedFile:
            found += 1
    assert found > len(whole) * 8 / step / 2


# --- manifest.json ---


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts_per_shard": 0}, "prompts_per_shard is 0, which must be from 1"),
    ({"prompts_per_shard": 10**30}, "prompts_per_shard is 1000000000000000000000000000000"),
    ({"prompts_per_shard": True}, "prompts_per_shard is True, which is no whole number"),
    ({"seed": "0"}, "seed is '0', which is no whole number"),
    ({"generator": None}, "generator is None, which is no text"),
    ({"latent_space": ["l"]}, "latent_space is ['l'], which is no text"),
    ({"schema": "1"}, "schema is '1', which is no whole number"),
    ({"color": "red"}, "color is unknown"),
])  # fmt: skip
def test_a_manifest_with_a_wrong_field_is_refused(pool, changes, message):
    path = pool.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in refusal(pool) and str(path) in refusal(pool)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\x00}\x00", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b""]
)
def test_a_manifest_that_is_no_object_is_refused(pool, content):
    (pool.folder / "manifest.json").write_bytes(content)
    assert "manifest.json cannot be read (it is no" in refusal(pool)


# --- something else in a file's place ---


def folder_at(path):
    path.mkdir()


def circle_at(path):
    path.symlink_to(path.name)


def pipe_at(path):
    os.mkfifo(path)


@pytest.mark.parametrize("place", [folder_at, circle_at, pipe_at])
@pytest.mark.parametrize("name", ["manifest.json", "prompts.parquet"])
def test_no_ordinary_file_in_place_of_a_pools_is_refused(pool, name, place):
    (pool.folder / name).unlink()
    place(pool.folder / name)
    assert f"{name} cannot be read (" in refusal(pool)


@pytest.mark.parametrize("place", [folder_at, circle_at, pipe_at])
@pytest.mark.parametrize("kind", ["latents", "text", "scores"])
def test_no_ordinary_file_in_place_of_a_shard_does_not_count(pool, kind, place, caplog):
    path = min((pool.folder / kind).rglob("0000*.*"))
    path.unlink()
    place(path)
    opened, shard = Pool.open(pool.folder), pool.shards(2)[0]
    has = {
        "latents": lambda: opened.has_latents(shard, verify=True),
        "text": lambda: opened.has_text(0, verify=True),
        "scores": lambda: opened.has_scores("r-0", shard, verify=True),
    }
    read = {
        "latents": lambda: PoolReader(opened).latents(0, [0]),
        "text": lambda: PoolReader(opened).text(0),
        "scores": lambda: opened.scores(["r-0"], 2),
    }
    assert not has[kind]() and f"{path} is not valid" in caplog.text
    with pytest.raises(DamagedShard, match=path.name):
        read[kind]()


def test_an_empty_shard_is_called_empty_by_each_way_to_read_it(pool):
    path = pool.folder / "latents" / "00000-00.safetensors"
    path.write_bytes(b"")
    for read in (lambda: PoolReader(pool).latents(0, [0]), lambda: read_header(path)):
        with pytest.raises(DamagedShard, match=r"00000-00\.safetensors is damaged: it is empty; run gener"):
            read()


@pytest.mark.parametrize("kind", ["latents", "text", "scores"])
def test_a_shard_that_the_system_does_not_let_be_read_is_told_and_not_made_again(pool, kind, monkeypatch):
    path = min((pool.folder / kind).rglob("0000*.*"))
    opener = reading._without_waiting

    def refuse(place, flags):
        if place == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", place)
        return opener(place, flags)

    shard = pool.shards(2)[0]
    monkeypatch.setattr(reading, "_without_waiting", refuse)
    has = {
        "latents": lambda: pool.has_latents(shard),
        "text": lambda: pool.has_text(0),
        "scores": lambda: pool.has_scores("r-0", shard),
    }
    with pytest.raises(
        InputError, match=rf"{path} cannot be read \(Permission denied\): let this user read it"
    ):
        has[kind]()
    assert not pool.faults


@pytest.mark.parametrize("read", [read_header, read_score_file])
def test_a_shard_that_a_disk_does_not_give_back_is_told_and_not_made_again(tmp_path, read):
    path = tmp_path / "00000-00"
    path.symlink_to("/proc/self/mem")  # an ordinary file whose first byte cannot be read
    with pytest.raises(InputError, match=rf"{path} cannot be read \(Input/output error\): let .* was left"):
        read(path)


def test_a_folder_in_place_of_a_shard_is_not_replaced(pool):
    path = pool.folder / "latents" / "00000-00.safetensors"
    path.unlink()
    path.mkdir()
    shard = pool.shards(2)[0]
    with pytest.raises(InputError, match=r"00000-00\.safetensors is no ordinary file.*move it away"):
        pool.write_latents(shard, torch.zeros(2, 2, 1, 2, 2), SETTINGS)


# --- headers and scores that say other things ---


def rewritten(path, tensors, **changes):
    """Write tensors under the metadata of the file at `path`, with a checksum that is theirs."""
    _, _, metadata = header_of(path)
    write_tensors(path, tensors, {key: v for key, v in (metadata | changes).items() if v is not None})


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return data[8 + length :], header, {k: v for k, v in header["__metadata__"].items() if k != "checksum"}


HALF = {"dtype": torch.float16}


@pytest.mark.parametrize(("tensors", "changes", "message"), [
    ({"other": torch.zeros(2, 2, 1, 2, 2, **HALF)}, {}, "it holds other, not latents alone"),
    ({}, {}, "it holds nothing, not latents alone"),
    ({"latents": torch.zeros(2, 2, 1, 2, 2)}, {}, "latents are F32"),
    ({"latents": torch.zeros(2, 2, 4, **HALF)}, {}, "not F16 with five dimensions"),
    ({"latents": torch.zeros(3, 2, 1, 2, 2, **HALF)}, {}, "its latents are of 3 prompts, not of 2"),
    ({"latents": torch.zeros(2, 3, 1, 2, 2, **HALF)}, {}, "its latents are of 3 candidates, not of 0-2"),
    ({"latents": torch.zeros(2, 2, 1, 2, 2, **HALF)}, {"candidates": "2-0"}, "its candidates are '2-0'"),
    ({"latents": torch.zeros(2, 2, 1, 2, 2, **HALF)}, {"candidates": "x"}, "its candidates are 'x'"),
    ({"latents": torch.zeros(2, 2, 1, 2, 2, **HALF)}, {"candidates": None}, "its header has no candidates"),
])  # fmt: skip
def test_latents_of_another_form_do_not_count(pool, caplog, tensors, changes, message):
    path, shard = pool.folder / "latents" / "00000-00.safetensors", pool.shards(2)[0]
    rewritten(path, tensors, **changes)
    opened = Pool.open(pool.folder)
    assert not opened.has_latents(shard, verify=True) and message in caplog.text
    assert not opened.has_scores("r-0", shard)
    opened.check_latent_shape((1, 2, 2))  # the other shard tells


def test_text_of_another_form_does_not_count(pool, caplog):
    path = pool.folder / "text" / "00000.safetensors"
    for tensors in ({"embeds": torch.zeros(3, 3)}, {"embeds": torch.tensor(1.0)}):
        rewritten(path, tensors)
        assert not Pool.open(pool.folder).has_text(0, verify=True)
        assert "tensor 'embeds' has the shape" in caplog.text


def test_a_file_that_another_program_has_written_does_not_count(pool, caplog):
    """Its checksum is not there, or not that of its content."""
    path, shard = pool.folder / "latents" / "00000-00.safetensors", pool.shards(2)[0]
    _, _, metadata = header_of(path)
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata)
    assert not Pool.open(pool.folder).has_latents(shard)
    assert "its header has no checksum" in caplog.text


@pytest.mark.parametrize(("change", "message"), [
    (lambda header: header["latents"].update(dtype="F8"), "dtype of tensor 'latents' is 'F8'"),
    (lambda header: header["latents"].update(dtype=["F16"]), "dtype of tensor 'latents' is ['F16']"),
    (lambda header: header["latents"].update(shape=[2, 2, 1, 2, 3]), "do not fit its dtype and shape"),
    (lambda header: header["latents"].update(shape=[2, 2, -1, 2, 2]), "shape of tensor 'latents' must be"),
    (lambda header: header["latents"].update(shape=[16, *[1] * 90]), "tensor 'latents' has 91 dimensions"),
    (lambda header: header["latents"].update(shape=None), "shape of tensor 'latents' must be"),
    (lambda header: header["latents"].update(data_offsets=[0]), "must be two numbers"),
    (lambda header: header["latents"].update(data_offsets=[8, 40]), "do not fit its dtype and shape"),
    (lambda header: header["latents"].update(more=1), "needs dtype, shape and data_offsets alone"),
    (lambda header: header.update(latents=[]), "needs dtype, shape and data_offsets alone"),
    (lambda header: header.update(__metadata__=[]), "__metadata__ must map names to text"),
    (lambda header: header["__metadata__"].update(checksum=5), "__metadata__ must map names to text"),
])  # fmt: skip
def test_odd_headers_are_named(pool, change, message):
    path = pool.folder / "latents" / "00000-00.safetensors"
    data, header, _ = header_of(path)
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with pytest.raises(DamagedShard) as refused:
        PoolReader(pool).latents(0, [0])
    assert message in str(refused.value) and "00000-00.safetensors is damaged: its header" in str(
        refused.value
    )
    assert not Pool.open(pool.folder).has_latents(pool.shards(2)[0])


def test_scores_of_another_form_are_named(pool):
    path = pool.folder / "scores" / "r-0" / "00000-00.parquet"
    table = pq.read_table(path)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    cases = {
        "its column score is not there": table.drop_columns("score"),
        "its column score is string": table.set_column(2, "score", pa.array(["x"] * 4)),
        "its column score is list": table.set_column(2, "score", pa.array([[1.0]] * 4)),
        "score is empty in 4 rows": table.set_column(2, "score", pa.nulls(4, pa.float32())),
        "its checksum is not that": table.slice(1),
    }
    for message, changed in cases.items():
        pq.write_table(changed, path)
        with pytest.raises(DamagedShard, match=f"00000-00.parquet is damaged: {message}"):
            pool.scores(["r-0"], 2)
        assert not Pool.open(pool.folder).has_scores("r-0", pool.shards(2)[0])
    del metadata["checksum"]
    for key, value in (("candidates", "1-3"), ("candidates", "0"), ("prompts", "others")):
        write_score_file(path, ["a", "b"], range(2), torch.zeros(2, 2).numpy(), metadata | {key: value})
        with pytest.raises(DamagedShard, match=r"00000-00\.parquet is damaged: it(s candidates are| )"):
            pool.scores(["r-0"], 2)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(DamagedShard("there", "it is empty")))
    assert str(error).startswith(
        "there is damaged: it is empty; run generate.py with the same configuration "
    )
    assert str(error).endswith(", for an imported pool with the stage=import of it")
    error = pickle.loads(pickle.dumps(DamagedFile("there", "it is empty", "restore it")))
    assert (str(error), error.reason) == ("there cannot be read (it is empty); restore it", "it is empty")


# --- imported.parquet ---


@pytest.fixture
def imported(tmp_path):
    return shutil.copytree(POOLS / "tiny-f9b9b8c3-0-imported", tmp_path / "imported")


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt_id": ["x"] * 6}, "its entries are not the prompts"),
    ({"prompt": ["a red cat", "a dog"] * 3}, "prompt differs among the candidates of an entry"),
    ({"candidate": pa.array([1, 0] * 3, pa.int32())}, "candidate must count from 0 to 1"),
    ({"row": [0, 0, 1, 1, 2, -2]}, "table, row, item must not be negative"),
    ({"rank": pa.array([1, 0, None, 0, 1, 0], pa.float32())}, "rank is empty in 1 of 6 rows"),
    ({"rank": pa.array([1, 0, float("nan"), 0, 1, 0], pa.float32())}, "rank must be finite"),
    ({"prompt": pa.nulls(6, pa.string())}, "prompt is empty in 6 of 6 rows"),
    ({"row": ["0"] * 6}, "column row is string, not int64"),
])  # fmt: skip
def test_an_edited_table_of_imports_is_refused(imported, change, message):
    path = imported / "imported.parquet"
    table = pq.read_table(path)
    for name, values in change.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, path)
    with pytest.raises(DamagedFile) as refused:
        check_entries(imported, read_import_table(imported), [p for p, _ in Pool.open(imported).prompts])
    assert message in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(("metadata", "message"), [
    ({"report": "{}"}, "it has no candidates"),
    ({"candidates": "4", "report": "{}"}, "candidates is 4, but there are 6 rows"),
    ({"candidates": "two", "report": "{}"}, "invalid literal"),
    ({"candidates": "2", "report": "[]"}, "it holds no names"),
    ({"candidates": "2", "report": "{}"}, "report lacks dropped or broken"),
])  # fmt: skip
def test_a_table_of_imports_with_other_metadata_is_refused(imported, metadata, message):
    path = imported / "imported.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(
        DamagedFile, match=rf"imported\.parquet cannot be read \(.*{message}.*remove it and run"
    ):
        read_import_table(imported)


def test_entries_in_another_order_are_refused(imported):
    path = imported / "imported.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([2, 3, 0, 1, 4, 5]), path)
    with pytest.raises(DamagedFile, match="its entries are not the prompts"):
        check_entries(imported, read_import_table(imported), [p for p, _ in Pool.open(imported).prompts])
