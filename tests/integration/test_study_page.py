"""The page of a study in a browser: voting by keyboard, a server that is killed, and two raters at a time."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys

import pytest

from capo.evaluation.study.store import Study
from capo.evaluation.study.turns import choice_of, left_side, order
from fixtures import ROOT
from fixtures.browser import CHROMIUM, Browser
from fixtures.studies import HOSTILE, make_fake_study

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="this machine has no Chromium")]
READY = "ready && pair.pair === '{}'"


@contextlib.contextmanager
def served(folder, port=0):
    """Yield the process of `python -m capo.cli.study serve` and the address that it prints."""
    command = [sys.executable, "-m", "capo.cli.study", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process, re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def study(tmp_path):
    with make_fake_study(tmp_path / "study") as study:
        yield study


def turns(study, rater):
    return [pair.name for pair in order(list(study.pairs.values()), study.facts.seed, rater)]


def vote(page, pair, key, after):
    page.wait(READY.format(pair))
    page.press(key)
    page.wait(READY.format(after) if after else "!document.getElementById('end').hidden")


def test_votes_by_key_outlive_a_server_that_is_killed(study, browser):
    pairs = turns(study, "ann")
    with served(study.folder) as (process, address):
        page = browser.page(f"{address}?rater=ann")
        vote(page, pairs[0], "ArrowLeft", pairs[1])
        vote(page, pairs[1], "ArrowRight", pairs[2])
        vote(page, pairs[2], "ArrowDown", pairs[3])
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.press("ArrowLeft")
        page.wait("!document.getElementById('fault').hidden && ready")
        assert "not saved" in page.value("document.getElementById('fault').textContent")
    answers = {pairs[0]: "left", pairs[1]: "right", pairs[2]: "tie"}
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with Study(study.folder) as again:  # what another process finds after the kill
        assert {vote.pair: vote.choice for vote in again.votes()} == {
            name: choice_of(answer, left_side(0, "ann", name)) for name, answer in answers.items()
        }
    with served(study.folder, port):  # the page goes on where it was
        vote(page, pairs[3], "ArrowLeft", pairs[4])
        assert page.value("document.getElementById('fault').hidden")
        page.press("Backspace")
        vote(page, pairs[3], "ArrowRight", pairs[4])
        fresh = browser.page(f"{address}?rater=ann")  # and so does a new one
        for place in range(4, 8):
            vote(fresh, pairs[place], "ArrowLeft", pairs[place + 1] if place < 7 else None)
    answers |= {pairs[3]: "right"} | dict.fromkeys(pairs[4:], "left")
    assert {vote.pair: vote.choice for vote in study.votes()} == {
        name: choice_of(answer, left_side(0, "ann", name)) for name, answer in answers.items()
    }
    assert all(vote.seconds > 0 for vote in study.votes())


def test_two_raters_vote_at_a_time(study, browser):
    with served(study.folder) as (_, address):
        pages = {rater: browser.page(f"{address}?rater={rater}") for rater in ("ann", "ben")}
        for place in range(8):
            for rater, page in pages.items():
                names = turns(study, rater)
                vote(page, names[place], "ArrowRight", names[place + 1] if place < 7 else None)
    assert study.counts() == {"ann": 8, "ben": 8}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_a_prompt_stays_text(study, browser, tmp_path, width):
    with served(study.folder) as (_, address):
        entrance = browser.page(address, width)
        entrance.wait("document.activeElement.id === 'name'")
        pairs = turns(study, "ann")
        page = browser.page(f"{address}?rater=ann", width)
        for name, after in itertools.pairwise(pairs):
            if study.pairs[name].prompt == HOSTILE:
                break
            vote(page, name, "ArrowLeft", after)
        page.wait("ready")
        assert page.value("document.getElementById('prompt').textContent") == HOSTILE
        assert page.value("document.title") == "Which image?"
        assert page.value("document.querySelectorAll('#prompt *').length") == 0
        assert page.value("document.documentElement.scrollWidth") <= width
        left, right = (
            page.value(f"document.getElementById('{side}').getBoundingClientRect().toJSON()")
            for side in ("left", "right")
        )
        assert left["top"] == right["top"] and left["right"] < right["left"]
        assert left["width"] == right["width"] > 0.4 * min(width, 900)
        page.picture(tmp_path / f"vote-{width}.png")
        assert (tmp_path / f"vote-{width}.png").stat().st_size > 5000
