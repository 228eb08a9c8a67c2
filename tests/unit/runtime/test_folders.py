import pytest

from capo.runtime.files import fresh_folder


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "result"
    for content in ("first", "second"):
        with fresh_folder(target) as fresh:
            (fresh / content).touch()
            assert not (target / content).exists()
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in target.parent.iterdir()] == ["result"]  # nothing is left beside it


def test_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(RuntimeError), fresh_folder(target) as fresh:
        (fresh / "half").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
