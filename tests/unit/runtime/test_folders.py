import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from capo.errors import InputError
from capo.runtime import files
from capo.runtime.files import fresh_folder, put_back, write_whole


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "result"
    for content in ("first", "second"):
        with fresh_folder(target, "first", "second") as fresh:
            (fresh / content).touch()
            assert not (target / content).exists()
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in target.parent.iterdir()] == ["result"]  # nothing is left beside it


def test_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(RuntimeError), fresh_folder(target, "kept") as fresh:
        (fresh / "half").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_folder_that_this_package_did_not_write_is_refused(tmp_path):
    target = tmp_path / "policy"
    target.mkdir()
    with fresh_folder(target, "mark.json") as fresh:  # an empty one holds nothing that could be lost
        (fresh / "mark.json").touch()
    with fresh_folder(target, "mark.json") as fresh:
        (fresh / "thesis.txt").touch()
    entered = []
    with (
        pytest.raises(InputError, match=r"policy holds none of mark.json.*move it away"),
        fresh_folder(target, "mark.json"),
    ):
        entered.append(True)
    assert not entered and [path.name for path in tmp_path.rglob("*")] == ["policy", "thesis.txt"]


@pytest.mark.parametrize("kind", ["file", "fifo", "link to a file"])
def test_what_is_no_folder_is_not_replaced_by_one(tmp_path, kind):
    target = tmp_path / "policy"
    {
        "file": target.touch,
        "fifo": lambda: os.mkfifo(target),
        "link to a file": lambda: target.symlink_to(__file__),
    }[kind]()
    before = target.lstat()
    with pytest.raises(InputError, match="policy is no folder"), fresh_folder(target, "mark"):
        pass
    assert target.lstat() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged at once", "renamed twice"])
@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_folders_are_exchanged_leaves_one_of_them(tmp_path, monkeypatch, exchange, moment):
    """The process ends at its nth call that moves or removes something; nothing of it runs after that."""
    target = tmp_path / "policy"
    target.mkdir()
    (target / "old").touch()
    child = os.fork()
    if child == 0:
        calls = iter(range(100))

        def dying(call):
            def called(*given, **more):
                if next(calls) == moment:
                    os._exit(9)
                return call(*given, **more)

            return called

        if not exchange:
            files.exchanged = lambda one, other: False
        for name in ("rename", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        files.exchanged = dying(files.exchanged)
        try:
            with fresh_folder(target, "old", "new") as fresh:
                (fresh / "new").touch()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if not exchange:
        monkeypatch.setattr(files, "exchanged", lambda one, other: False)
    put_back(target)
    assert [path.name for path in target.iterdir()] in (["old"], ["new"])
    with fresh_folder(target, "old", "new") as fresh:
        (fresh / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and not files.kept(target).exists()


def test_folders_are_exchanged_in_one_step_here(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files.exchanged(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    assert not files.exchanged(tmp_path / "one", tmp_path / "missing")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_file_takes_the_place_of_an_ordinary_file_alone(tmp_path, kind):
    target = tmp_path / "pairs.parquet"
    {
        "fifo": lambda: os.mkfifo(target),
        "device": lambda: target.symlink_to("/dev/null"),
        "folder": target.mkdir,
    }[kind]()
    before = target.lstat()
    with pytest.raises(InputError, match=r"pairs.parquet is no ordinary file.*another name"):
        write_whole(target, "text")
    after = target.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert stat.S_IMODE(after.st_mode) == stat.S_IMODE(before.st_mode) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with fresh_folder(tmp_path / "policy", "mark") as fresh:
            save_file({"w": torch.zeros(1)}, fresh / "weights.safetensors")
            (fresh / "unet").mkdir()
            (fresh / "unet" / "config.json").touch(0o600)
            (fresh / "link").symlink_to(tmp_path)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "policy").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode} and len(files) == 2
