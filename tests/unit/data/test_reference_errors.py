"""Errors of the reference in a file of a pool: what is found there, and what a kill or an edit leaves."""

import logging
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from capo.data import PreferenceBatch, reference_errors
from capo.data.dataset import sample_digest
from capo.data.reference_errors import ReferenceErrors, check_reuse
from capo.errors import InputError, ParameterError
from capo.objectives import Requirements

SETTINGS = {"reference": "abc", "precision": "32-true"}
PAIRS = Requirements(reference=True, predictions=False, loser=True)


def batch_of(*names: str) -> PreferenceBatch:
    """A batch whose samples have these digests; nothing else of it is read."""
    pairs = len(names)
    nothing = torch.zeros(pairs, 2, 1, 1, 1)
    ids, digests = list(names), list(names)
    return PreferenceBatch(
        nothing, nothing, torch.zeros(pairs), torch.zeros(pairs, 2), {}, ids, digests=digests
    )


def errors_of(seed: int, pairs: int = 2) -> torch.Tensor:
    return torch.randn(pairs, 2, generator=torch.Generator().manual_seed(seed))


def filled(folder, *passes: str, settings=SETTINGS, **options) -> ReferenceErrors:
    """A file with a pass for each letter, whose errors follow from it."""
    kept = ReferenceErrors(folder, settings, **options)
    for letter in passes:
        kept.keep(batch_of(letter, letter.upper()), errors_of(ord(letter)))
    kept.close()
    return kept


def found(kept: ReferenceErrors, letter: str) -> bool:
    """Whether a pass is known; if so, its errors are those that were kept, bit for bit."""
    recalled = kept.recall(batch_of(letter, letter.upper()), 2)
    assert recalled is None or torch.equal(recalled, errors_of(ord(letter)))
    return recalled is not None


def test_errors_come_back_bit_for_bit_by_batch(tmp_path):
    filled(tmp_path, "a", "b")
    later = ReferenceErrors(tmp_path, SETTINGS)
    assert found(later, "a") and found(later, "b") and not found(later, "c")
    assert (later.recalled, later.computed) == (2, 0)
    # the same samples in another order or company, or read in another number
    assert later.recall(batch_of("A", "a"), 2) is None
    assert later.recall(batch_of("a"), 2) is None and later.recall(batch_of("a", "A", "b"), 2) is None
    assert later.recall(batch_of("a", "A"), 1) is None


def test_other_settings_have_a_file_of_their_own(tmp_path):
    first = filled(tmp_path, "a")
    other = filled(tmp_path, settings={**SETTINGS, "precision": "bf16-mixed"})
    assert not found(other, "a") and other.path != first.path and other.path.parent == first.path.parent
    # even under its name, a file of other settings is not read
    other.path.write_bytes(first.path.read_bytes())
    assert not found(ReferenceErrors(tmp_path, {**SETTINGS, "precision": "bf16-mixed"}), "a")


def test_a_pair_takes_little_disk_and_the_line_says_how_much(tmp_path):
    kept = filled(tmp_path, *"abcd")
    # 4 passes of 2 pairs: 24 bytes of key, length and checksum, and 2 * 2 * 4 of errors
    assert kept.path.stat().st_size == len(kept.path.read_bytes().split(b"\n")[0]) + 1 + 4 * (24 + 16)
    assert "4 passes" in kept.described and "(20.0 bytes a pair)" in kept.described


@pytest.mark.parametrize("cut", [1, 17, 30, 39])
def test_a_record_that_a_kill_left_unfinished_is_dropped(tmp_path, caplog, cut):
    path = filled(tmp_path, *"abc").path
    os.truncate(path, path.stat().st_size - cut)
    with caplog.at_level(logging.WARNING):
        later = filled(tmp_path, "c", "d")
    assert "is damaged from byte" in caplog.text and "made again" in caplog.text
    caplog.clear()
    whole = ReferenceErrors(tmp_path, SETTINGS)
    assert [found(whole, letter) for letter in "abcd"] == [True] * 4 and not caplog.text
    assert later.computed == 2 and not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("place", [-1, -39, -35, -25])  # of the second record: errors, key, length, checksum
def test_damage_is_said_and_never_read(tmp_path, caplog, place):
    path = filled(tmp_path, *"ab").path
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        later = ReferenceErrors(tmp_path, SETTINGS)
    assert found(later, "a") and not found(later, "b") and str(path) in caplog.text


def test_a_file_of_something_else_is_made_again(tmp_path, caplog):
    path = filled(tmp_path, "a").path
    path.write_text("notes\n")
    assert not found(filled(tmp_path, "b"), "a") and "first line is another" in caplog.text
    assert found(ReferenceErrors(tmp_path, SETTINGS), "b")


def test_a_pipe_in_its_place_is_named_and_not_waited_for(tmp_path):
    path = filled(tmp_path, "a").path
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=rf"{path} cannot be used \(it is no ordinary file\): move it"):
        ReferenceErrors(tmp_path, SETTINGS)


def test_runs_at_the_same_time_share_the_file(tmp_path, monkeypatch):
    one, other = ReferenceErrors(tmp_path, SETTINGS), ReferenceErrors(tmp_path, SETTINGS)
    monkeypatch.setattr(reference_errors, "EVERY", -1.0)  # each pass is written at once
    one.keep(batch_of("a", "A"), errors_of(ord("a")))
    other.keep(batch_of("b", "B"), errors_of(ord("b")))  # and reads what the other has added
    assert found(other, "a") and not found(one, "b")
    # a third process mends the file, which is another one then, while both have it in use
    with one.path.open("ab") as file:
        file.write(b"half a rec")
    assert found(ReferenceErrors(tmp_path, SETTINGS), "b")
    one.keep(batch_of("c", "C"), errors_of(ord("c")))
    other.keep(batch_of("c", "C"), errors_of(ord("c")))  # known by now: not written twice
    last = ReferenceErrors(tmp_path, SETTINGS)
    assert [found(last, letter) for letter in "abc"] == [True] * 3
    assert last.path.read_bytes() == one.path.read_bytes() and "3 passes" in last.described
    assert last.path.stat().st_size == len(last._line) + 3 * 40


def test_a_file_that_another_process_has_cut_is_read_anew(tmp_path, monkeypatch, caplog):
    filled(tmp_path, *"abc")
    one = ReferenceErrors(tmp_path, SETTINGS)
    content = bytearray(one.path.read_bytes())
    content[len(one._line)] ^= 1  # of the first record, so that all three are lost to the next process
    one.path.write_bytes(content)
    third = filled(tmp_path, "d")
    assert not found(third, "a") and third.path.stat().st_size == len(one._line) + 40
    caplog.clear()
    monkeypatch.setattr(reference_errors, "EVERY", -1.0)
    one.keep(batch_of("e", "E"), errors_of(ord("e")))
    assert all(found(one, letter) for letter in "abcde") and not caplog.text
    assert [found(ReferenceErrors(tmp_path, SETTINGS), letter) for letter in "ade"] == [False, True, True]


def test_the_limit_holds_for_all_files_of_the_pool(tmp_path, caplog):
    first = filled(tmp_path, "a", "b")
    taken = first.path.stat().st_size
    second = filled(tmp_path, "a", settings={"reference": "other"}, limit=taken + 60)
    assert "the most that is allowed" in caplog.text and "Remove that folder" in caplog.text
    assert second.path.stat().st_size == len(second._line)  # nothing but the settings
    second.keep(batch_of("b", "B"), errors_of(ord("b")))  # training goes on
    second.close()
    assert second.computed == 2 and second.path.stat().st_size == len(second._line)


def test_a_pool_that_cannot_be_written_is_refused_at_the_start_and_said_later(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*trainer\.reuse_reference=false"):
        ReferenceErrors(tmp_path / "file", SETTINGS)
    kept = ReferenceErrors(tmp_path / "pool", SETTINGS)
    kept.path.unlink()
    kept.path.mkdir()  # in its place, so that no file can be opened or written
    kept.keep(batch_of("a", "A"), errors_of(0))
    kept.close()
    assert "no longer kept" in caplog.text


@pytest.mark.parametrize("changed", ["latents", "noise", "u", "text", "dtype", "name"])
def test_a_digest_is_of_every_tensor_of_a_sample(changed):
    sample = {
        "latents": torch.ones(2, 3),
        "noise": torch.ones(2, 3),
        "u": torch.ones(1),
        "text": torch.ones(4),
    }
    other = {name: value.clone() for name, value in sample.items()}
    if changed == "dtype":
        other["text"] = other["text"].half()
    elif changed == "name":
        other["words"] = other.pop("text")
    else:
        other[changed].view(-1)[-1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert sample_digest(sample) == sample_digest({name: value.clone() for name, value in sample.items()})
    assert sample_digest(sample) != sample_digest(other)


def test_a_batch_without_digests_is_no_key(tmp_path):
    batch = replace(batch_of("a", "A"), digests=[])
    with pytest.raises(ValueError, match="digests=True"):
        ReferenceErrors(tmp_path, SETTINGS).recall(batch, 2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"source": "inverted"}, "follow from the policy"),
        ({"pinned": 0.1}, "pinned pairs read"),
        ({"sharded": True}, "every pass together"),
        ({"needs": replace(PAIRS, predictions=True)}, "this objective reads"),
    ],
)
def test_what_cannot_be_reused_is_refused(given, reason):
    usual = {"needs": PAIRS, "source": "drawn", "pinned": 0.0, "sharded": False}
    check_reuse(**usual)
    check_reuse(**{**usual, "source": "prior"})
    with pytest.raises(ParameterError, match=f"reuse_reference must be false, since .*{reason}"):
        check_reuse(**{**usual, **given})


def test_a_kill_while_it_writes_leaves_whole_records(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_errors, "EVERY", -1.0)
    path = ReferenceErrors(tmp_path, SETTINGS).path
    begun = path.stat().st_size
    child = os.fork()
    if not child:  # writes without end
        try:
            kept = ReferenceErrors(tmp_path, SETTINGS)
            for number in range(10**9):
                kept.keep(batch_of(f"{number}", "b"), torch.full((2, 2), float(number)))
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + 120
        while path.stat().st_size < begun + 20 * 40 and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    later = ReferenceErrors(tmp_path, SETTINGS)
    passes = (path.stat().st_size - begun) // 40
    assert passes >= 20 and (path.stat().st_size - begun) % 40 == 0
    for number in range(passes):
        recalled = later.recall(batch_of(f"{number}", "b"), 2)
        assert recalled is not None and torch.equal(recalled, torch.full((2, 2), float(number)))
