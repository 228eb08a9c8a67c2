import os
import signal
import threading
from pathlib import Path

import pytest

from capo.errors import InputError
from capo.runtime.locks import file_lock


def test_waiting_for_a_lock(tmp_path):
    order = []

    def second():
        with file_lock(tmp_path / "lock", wait=True) as mine:
            order.append(("second", mine))

    with file_lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join(timeout=120)
    assert order == ["first", ("second", True)]


def test_a_killed_process_keeps_no_lock(tmp_path):
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        with file_lock(tmp_path / "lock") as mine:
            os.write(sender, b"y" if mine else b"n")
            signal.pause()
    assert os.read(receiver, 1) == b"y"
    with file_lock(tmp_path / "lock") as mine:
        assert not mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with file_lock(tmp_path / "lock") as mine:
        assert mine


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.with_name("mine"))])
def test_what_is_no_lock_is_named_with_its_remedy(tmp_path, make):
    (tmp_path / "mine").write_text("kept")
    make(tmp_path / ".lock")
    with (
        pytest.raises(InputError, match=rf"{tmp_path}/\.lock is no ordinary file, as a lock is: remove it"),
        file_lock(tmp_path / ".lock"),
    ):
        pytest.fail("held")
    assert (tmp_path / "mine").read_text() == "kept"
