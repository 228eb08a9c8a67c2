"""Who is at work in a run directory."""

import pytest

from capo.errors import InputError
from capo.runtime import run_folder
from capo.runtime.launch import Launch
from capo.runtime.run_folder import alone


def test_a_run_is_the_work_of_one_command_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    with alone(tmp_path):
        with pytest.raises(InputError, match="another command is at work on this run: wait"), alone(tmp_path):
            pass
        monkeypatch.setattr(run_folder, "launch", lambda: Launch(1, 2, 1, 2))
        with alone(tmp_path):  # another process of the same command
            pass
        monkeypatch.setattr(run_folder, "launch", Launch)
    (tmp_path / ".policy.a1b2c3_d" / "new").mkdir(parents=True)  # of a command that was killed
    (tmp_path / ".policy.old").mkdir()  # which is put back
    with alone(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".policy.old"]
