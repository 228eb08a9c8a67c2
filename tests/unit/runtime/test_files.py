import os
from pathlib import Path

import pytest

from capo.errors import InputError
from capo.runtime.files import (
    appending,
    check_inside,
    check_links,
    plain_cell,
    write_json,
    write_table,
    write_whole,
)


def test_writes_text_and_bytes_and_leaves_nothing_beside_them(tmp_path):
    path = tmp_path / "new" / "folder" / "result.txt"
    write_whole(path, "naïve\n")
    assert path.read_bytes() == b"na\xc3\xafve\n"
    write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [entry.name for entry in path.parent.iterdir()] == ["result.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.txt"
    write_whole(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"result.txt cannot be written \(No space left.*hydra.run.dir"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.txt"]


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "result.txt"
    write_whole(path, "old")
    with path.open() as reader:  # whoever reads while it is written sees the old content whole
        write_whole(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_what_a_process_that_died_has_left_is_overwritten(tmp_path):
    (tmp_path / ".result.txt.tmp").write_text("half of a longer te")
    write_whole(tmp_path / "result.txt", "new ", b"and ", memoryview(b"whole"))
    assert (tmp_path / "result.txt").read_text() == "new and whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.txt"]


def test_json_is_indented_and_refuses_a_number_that_is_none(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"rate": 0.5})
    assert path.read_bytes() == b'{\n  "rate": 0.5\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"rate": float("nan")}, allow_nan=False)
    assert path.read_bytes() == b'{\n  "rate": 0.5\n}\n'
    write_json(path, float("nan"))
    assert path.read_text() == "NaN\n"


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"taken/result.txt cannot be written"):
        write_whole(tmp_path / "taken" / "result.txt", "new")


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".results.json.tmp").symlink_to(tmp_path / "thesis.txt")
    write_whole(tmp_path / "results.json", "{}")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "results.json").read_text() == "{}" and not (tmp_path / "results.json").is_symlink()


def test_text_that_a_spreadsheet_would_compute_is_text(tmp_path):
    values = {
        "=1+1": "'=1+1", "+a": "'+a", " -b": "' -b", "@sum": "'@sum", "\t=x": "'\t=x", "-": "'-",
        "\x1b[31mred\r": r"\x1b[31mred\r", "two\nlines\tü": "two\nlines\tü",
        "-0.5": "-0.5", "+1e-3": "+1e-3", "-inf": "-inf", "a=b": "a=b", "": "",
    }  # fmt: skip
    assert {value: plain_cell(value) for value in values} == values
    assert plain_cell(-0.5) == -0.5 and plain_cell(None) is None
    write_table(tmp_path / "table.csv", ["prompt", "rate"], [{"prompt": "=cmd()", "rate": -1.5}])
    assert (tmp_path / "table.csv").read_text() == "prompt,rate\n'=cmd(),-1.5\n"


@pytest.mark.parametrize("place", ["pool", "pool/x", "pool/x/file"])
def test_a_folder_that_leads_elsewhere_is_not_written_to(tmp_path, place):
    run, link = tmp_path / "run", tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    check_inside(run, ["pool", "none"])
    link.symlink_to(tmp_path)
    with pytest.raises(InputError, match=rf"{place} is a link to {tmp_path}, outside of .*/run, where"):
        check_inside(run, ["pool"])
    with pytest.raises(InputError, match=rf"if the link is your own, add 'trust=\[{tmp_path}\]'"):
        check_inside(run, ["pool"], [str(run)])
    check_inside(run, ["pool"], [str(tmp_path)])
    link.unlink()
    (run / "there").mkdir()
    link.symlink_to(run / "there")
    check_inside(run, ["pool"])
    (tmp_path / "linked").symlink_to(run)  # a run directory that lies on another disk
    check_inside(tmp_path / "linked", ["pool"])


def test_a_folder_that_a_link_leads_to_is_not_walked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pool").symlink_to(tmp_path)
    monkeypatch.setattr(Path, "rglob", lambda *given: pytest.fail("it may be any folder, and a large one"))
    with pytest.raises(InputError, match="pool is a link to"):
        check_inside(tmp_path / "run", ["pool"])


def test_links_within_a_folder_and_into_the_hubs_cache_are_its_own(tmp_path):
    snapshot, blobs = tmp_path / "model" / "snapshots" / "abc", tmp_path / "model" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "hash")
    (snapshot / "same.json").symlink_to("config.json")
    check_links(snapshot)
    os.mkfifo(snapshot / "pipe")
    with pytest.raises(InputError, match="pipe is no ordinary file, and is not copied along: remove it"):
        check_links(snapshot)
    (snapshot / "pipe").unlink()
    for name, target in (("out", tmp_path), ("circle", snapshot / "circle"), ("file", "/etc/hostname")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name} is a link to .*put the file itself there"):
            check_links(snapshot)
        (snapshot / name).unlink()


def test_a_pipe_is_not_appended_to_and_not_waited_for(tmp_path):
    with appending(tmp_path / "log") as file:
        file.write(b"a")
    with appending(tmp_path / "log") as file:
        file.write(b"b")
    assert (tmp_path / "log").read_bytes() == b"ab"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError), appending(path):
            pytest.fail("opened")
