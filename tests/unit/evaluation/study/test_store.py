"""Pairs, turns and votes: what is stored, in which order raters see it, and what is refused."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.study.drawing import damaged, study_pairs
from capo.evaluation.study.store import FIRST, SECOND, TIE, Study, Vote, image_path
from capo.evaluation.study.turns import choice_of, chosen_prompts, left_side, order
from fixtures.studies import HOSTILE, make_fake_study


def test_votes_and_pairs_come_back_as_they_were_given(tmp_path):
    with make_fake_study(tmp_path / "study") as study:
        name = next(iter(study.pairs))
        study.vote(Vote("ann", name, FIRST, SECOND, 2.5), Vote("ben", name, TIE, FIRST))
        study.vote(Vote("ann", name, SECOND, SECOND, 0.5))  # changed her mind
        facts, pairs = study.facts, study.pairs
    with Study(tmp_path / "study") as again:
        assert again.facts == facts and again.pairs == pairs and again.pairs[name].prompt == HOSTILE
        assert again.votes() == [Vote("ann", name, SECOND, SECOND, 0.5), Vote("ben", name, TIE, FIRST)]
        assert again.voted("ann") == {name} and again.voted("cat") == set()
        assert again.counts() == {"ann": 1, "ben": 1}


def test_votes_that_cannot_be_are_recorded_by_none(tmp_path):
    with make_fake_study(tmp_path / "study") as study:
        good = Vote("ann", next(iter(study.pairs)), FIRST, FIRST)
        for bad in (Vote("ann", "no such pair", FIRST, FIRST), Vote("ben", good.pair, "left", FIRST)):
            with pytest.raises(sqlite3.IntegrityError):
                study.vote(good, bad)
        assert study.votes() == []


def test_files_outside_of_a_study_are_neither_shown_nor_written(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    with make_fake_study(tmp_path / "study") as study:
        name = next(iter(study.pairs))
        path = image_path(study.folder, name, FIRST)
        path.rename(tmp_path / "kept")
        path.symlink_to(secret)
        with pytest.raises(InputError, match=rf"{name}-first.png .*is a link to {secret}, outside of the st"):
            study.image(name, FIRST)
        path.unlink()
        path.write_text("no picture")
        with pytest.raises(InputError, match=r"-first.png cannot be read \(it is no PNG\); restore it"):
            study.image(name, FIRST)
        shown = study.image(name, SECOND)
    (tmp_path / "own").symlink_to(tmp_path / "study")  # a link to the whole study is one's own
    with Study(tmp_path / "own") as linked:
        assert linked.image(name, SECOND) == shown
    database = tmp_path / "study" / "study.sqlite"
    database.rename(tmp_path / "other.sqlite")
    database.symlink_to(tmp_path / "other.sqlite")
    with pytest.raises(InputError, match=r"study.sqlite is a link to .*other.sqlite, outside of"):
        Study(tmp_path / "study")


def test_folders_without_a_readable_study_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no study \(no study.sqlite\)"):
        Study(tmp_path)
    (tmp_path / "study.sqlite").write_text("no database, but long enough that SQLite reads its header" * 9)
    with pytest.raises(InputError, match=r"cannot be read .*; restore it"):
        Study(tmp_path)
    make_fake_study(tmp_path / "study").close()
    (tmp_path / "study.sqlite").unlink()
    with pytest.raises(InputError, match=rf"holds no study .*: give {tmp_path / 'study'}$"):
        Study(tmp_path)
    with sqlite3.connect(tmp_path / "study" / "study.sqlite") as connection:
        connection.execute("UPDATE facts SET value = '9' WHERE name = 'schema'")
    connection.close()
    with pytest.raises(InputError, match="has schema 9"):
        Study(tmp_path / "study")


@pytest.mark.parametrize(("change", "reason"), [
    ("DELETE FROM pairs", "none of a study"),
    ("DROP TABLE votes", "its tables are not those of a study"),
    ("CREATE TRIGGER t AFTER INSERT ON votes BEGIN DELETE FROM votes; END", "its tables are not"),
    ("ALTER TABLE pairs RENAME TO p; CREATE VIEW pairs AS SELECT * FROM p", "its tables are not"),
    ("UPDATE facts SET value = '[\"../../x\"]' WHERE name = 'pairs'; "
     "INSERT INTO pairs VALUES ('../../x', 'a', 'b', 'c', 0)", "pair '../../x' is none of a study"),
    ("UPDATE facts SET value = '\"x\"' WHERE name = 'seed'", "seed is 'x'"),
    ("UPDATE facts SET value = '[3, 4]' WHERE name = 'names'", "not two names"),
    ("INSERT INTO facts VALUES ('evil', '1')", "unexpected keyword"),
    ("INSERT INTO votes (rater, pair, choice, left_side, source) VALUES ('a', 'none', 'tie', 'first', '')",
     "a vote is of a pair that it does not have"),
    ("INSERT INTO votes (rater, pair, choice, left_side, source) "
     "SELECT x'ff', name, 'tie', 'first', '' FROM pairs", "a vote's rater is no text"),
    ("INSERT INTO votes (rater, pair, choice, left_side, source, seconds) "
     "SELECT 'a', name, 'tie', 'first', '', 9e999 FROM pairs", "its seconds are no number of seconds"),
    ("UPDATE pairs SET prompt = x'ff00'", "prompt or category is no text"),
    ("UPDATE facts SET value = '-5' WHERE name = 'seed'", r"seed is -5, not from 0"),
    ("UPDATE facts SET value = '[]' WHERE name = 'pairs'", "is not among the pairs that its facts name"),
])  # fmt: skip
def test_a_study_from_elsewhere_is_what_this_package_writes_or_refused(tmp_path, change, reason):
    make_fake_study(tmp_path / "study").close()
    with closing(sqlite3.connect(tmp_path / "study" / "study.sqlite")) as connection:
        connection.executescript(change)
    with pytest.raises(InputError, match=rf"study.sqlite cannot be read \(.*{reason}.*\); restore it"):
        Study(tmp_path / "study")


def test_each_rater_sees_every_pair_once_with_checks_among_them(tmp_path):
    with make_fake_study(tmp_path / "study", prompts=40, checks=4) as study:
        pairs = list(study.pairs.values())
    orders = {rater: order(pairs, 0, rater) for rater in ("ann", "ben")}
    for found in orders.values():
        assert sorted(pair.name for pair in found) == sorted(pair.name for pair in pairs)
        checks = [place for place, pair in enumerate(found) if pair.check]
        # one within each quarter of the 40 pairs, behind the checks before it
        assert all(
            10 * number + number <= place <= 10 * number + 10 + number for number, place in enumerate(checks)
        )
        assert len(checks) == 4
    assert orders["ann"] != orders["ben"] != order(pairs, 1, "ben")
    assert order(pairs[::-1], 0, "ann") == orders["ann"]


def test_sides_are_even_and_follow_from_seed_rater_and_pair():
    sides = [left_side(0, rater, f"{pair}") for rater in ("ann", "ben") for pair in range(1000)]
    assert 880 < sides.count(FIRST) < 1120  # 1000 +- 5 standard deviations of 22
    assert sides[:1000] != sides[1000:]
    assert sides[:9] == [left_side(0, "ann", f"{pair}") for pair in range(9)]
    assert sides[:64] != [left_side(1, "ann", f"{pair}") for pair in range(64)]


@pytest.mark.parametrize("left, other", [(FIRST, SECOND), (SECOND, FIRST)])
def test_an_answer_means_the_image_on_that_side(left, other):
    assert [choice_of(answer, left) for answer in ("left", "right", "tie")] == [left, other, TIE]
    with pytest.raises(ValueError, match="'up'"):
        choice_of("up", left)


def test_prompts_are_drawn_by_the_seed_and_keep_their_order():
    prompts = [make_prompt(f"prompt {number}") for number in range(50)]
    drawn = chosen_prompts(prompts, 20, 0)
    assert [prompt for prompt in prompts if prompt in drawn] == drawn and len(drawn) == 20
    assert {p.id for p in chosen_prompts(prompts[::-1], 20, 0)} == {p.id for p in drawn}
    assert chosen_prompts(prompts, 20, 1) != drawn and chosen_prompts(prompts, 50, 3) == prompts
    with pytest.raises(InputError, match=r"study\.prompts=51: there are 50 test prompts"):
        chosen_prompts(prompts, 51, 0)


def test_checks_are_made_of_pairs_and_named_like_them():
    prompts = [make_prompt(f"prompt {number}") for number in range(5)]
    pairs = study_pairs(prompts, 2, 0)
    assert [pair.check for pair in pairs] == 5 * [False] + 2 * [True]
    assert len({pair.name for pair in pairs}) == 7 and {len(pair.name) for pair in pairs} == {12}
    with pytest.raises(InputError, match=r"study\.checks=6: .*study.checks=5 or fewer"):
        study_pairs(prompts, 6, 0)


def test_a_damaged_image_is_a_quarter_of_the_image_under_noise():
    image = Image.new("RGB", (64, 64), (200, 100, 0))
    pixels = np.asarray(damaged(image, 0), float)
    expected = [0.25 * value + 0.75 * 127.5 for value in (200, 100, 0)]
    assert np.abs(pixels.mean((0, 1)) - expected).max() < 5  # of 4096 pixels: 0.75 * 73.6 / 64 = 0.9
    assert pixels.std((0, 1)).min() > 45  # 0.75 * 255 / sqrt(12) = 55
