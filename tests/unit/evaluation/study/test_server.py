"""The page's server: what a request gets, what is refused, and votes that are there when it answers."""

import http.client
import json
import os
import sqlite3
import threading
from contextlib import contextmanager

import pytest

from capo.errors import InputError
from capo.evaluation.study.server import INSTRUCTION, StudyServer
from capo.evaluation.study.store import FIRST, SECOND, Study, image_path
from capo.evaluation.study.turns import choice_of, left_side, order
from fixtures.studies import HOSTILE, make_fake_study


@contextmanager
def served(study: Study, host: str = "127.0.0.1"):
    """Yield a function that sends a request and returns its status, headers and body."""
    with StudyServer(study, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def ask(path: str, body: object = None, headers=(), method: str | None = None):
            connection = http.client.HTTPConnection(host, server.server_address[1], timeout=120)
            text = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method or ("POST" if text else "GET"), path, text, {**kind, **dict(headers)})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, answer.headers, content

        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def study(tmp_path):
    with make_fake_study(tmp_path / "study") as study:
        yield study


def test_two_raters_vote_on_all_pairs_in_their_own_orders(study):
    with served(study) as ask:
        for rater, answer in (("ann", "left"), ("ben lee", "right")):
            expected = [pair.name for pair in order(list(study.pairs.values()), 0, rater)]
            next_pair = json.loads(ask(f"/next?rater={rater.replace(' ', '%20')}")[2])
            seen = []
            while next_pair["pair"]:
                seen.append(next_pair["pair"])
                assert (next_pair["done"], next_pair["total"]) == (len(seen) - 1, 8)
                body = {"rater": rater, "pair": seen[-1], "answer": answer, "seconds": 0.5}
                status, _, content = ask("/vote", body)
                next_pair = json.loads(content)
                with sqlite3.connect(study.path) as other:  # as another process sees it
                    count = other.execute("SELECT COUNT(*) FROM votes WHERE rater = ?", [rater]).fetchone()
                other.close()
                assert status == 200 and count == (len(seen),)
            assert seen == expected and next_pair == {"pair": None, "done": 8, "total": 8}
    for vote in study.votes():
        left = left_side(0, vote.rater, vote.pair)
        assert vote.left == left and vote.choice == choice_of(
            "left" if vote.rater == "ann" else "right", left
        )
        assert vote.seconds == 0.5 and vote.source == "page"


def test_sides_show_the_images_that_votes_are_counted_for(study):
    with served(study) as ask:
        for name in study.pairs:
            left = left_side(0, "ann", name)
            other = SECOND if left == FIRST else FIRST
            for side, shown in (("left", left), ("right", other)):
                status, headers, content = ask(f"/image?pair={name}&side={side}&rater=ann")
                assert status == 200 and headers["Content-Type"] == "image/png"
                assert content == study.image(name, shown)


def test_the_page_has_the_papers_instruction_and_nothing_from_elsewhere(study):
    with served(study) as ask:
        status, headers, content = ask("/")
        page = content.decode()
        assert status == 200 and all(line in page for line in INSTRUCTION)
        assert INSTRUCTION[0] == "Given the text below, pick the left or the right image with better looking."
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert "http://" not in page and "https://" not in page
        for name, kind in (
            ("page.css", "text/css"),
            ("vote.css", "text/css"),
            ("vote.js", "text/javascript"),
        ):
            status, headers, content = ask(f"/{name}")
            assert status == 200 and headers["Content-Type"].startswith(kind) and content
        assert json.loads(ask(f"/next?rater={'x' * 64}")[2])["total"] == 8
        prompts = {json.loads(ask(f"/next?rater=r{n}")[2])["prompt"] for n in range(40)}
        assert HOSTILE in prompts  # as text of JSON


@pytest.mark.parametrize(
    "path, body, headers, status, said",
    [
        ("/next?rater=", None, {}, 400, "1 to 64 printable"),
        (f"/next?rater={'x' * 65}", None, {}, 400, "1 to 64 printable"),
        ("/next?rater=a%00b", None, {}, 400, "1 to 64 printable"),
        ("/image?pair=../../study.sqlite&side=left&rater=ann", None, {}, 404, "no such image"),
        ("/image?pair={pair}&side=up&rater=ann", None, {}, 404, "no such image"),
        ("/study.sqlite", None, {}, 404, "no such page"),
        ("/next?rater=ann", None, {"Host": "evil.example"}, 403, "this machine alone"),
        ("/next?rater=ann", None, {"Host": "[::"}, 400, "no such request"),
        ("/vote", {"rater": "ann", "pair": "none", "answer": "left"}, {}, 400, "no such pair"),
        ("/vote", {"rater": "ann", "pair": "{pair}", "answer": "up"}, {}, 400, "left, right or tie"),
        ("/vote", {"rater": "\ud800", "pair": "{pair}", "answer": "left"}, {}, 400, "printable"),
        ("/vote", ["ann"], {}, 400, "JSON object"),
        ("/vote", "no json", {}, 400, "is JSON"),
        ("/vote", "x" * 5000, {}, 413, "at most 4096 bytes"),
        ("/vote", "rater=ann", {"Content-Type": "application/x-www-form-urlencoded"}, 404, "as JSON"),
        ("/other", {"rater": "ann"}, {}, 404, "as JSON"),
    ],
)
def test_requests_that_cannot_be_are_refused_and_change_nothing(study, path, body, headers, status, said):
    name = next(iter(study.pairs))
    if isinstance(body, dict):
        body = {key: value.replace("{pair}", name) for key, value in body.items()}
    with served(study) as ask:
        found, _, content = ask(path.replace("{pair}", name), body, headers)
        assert found == status and said in json.loads(content)["error"]
        assert ask("/next?rater=ann")[0] == 200
    assert study.votes() == []


def test_a_forced_choice_knows_no_ties(tmp_path):
    with make_fake_study(tmp_path / "study", ties=False) as study, served(study) as ask:
        body = {"rater": "ann", "pair": next(iter(study.pairs)), "answer": "tie"}
        status, _, content = ask("/vote", body)
        assert status == 400 and b"no ties" in content and b"tie" not in ask("/")[2].split(b"<main")[1]
        assert ask("/vote", {**body, "answer": "left", "seconds": float("nan")})[0] == 200
        assert [vote.seconds for vote in study.votes()] == [None]


def test_a_port_in_use_is_said(study):
    with (
        StudyServer(study, "127.0.0.1", 0) as server,
        pytest.raises(
            InputError, match=r"port \d+: the page cannot be served .*another port, or 0 for any free one"
        ),
    ):
        StudyServer(study, "127.0.0.1", server.server_address[1])
    for host in ("no.such.host.invalid", "a..b", "256.1.1.1", ""):
        with pytest.raises(InputError, match=rf"host {host}, port 0: .*give another host, 127.0.0.1 for"):
            StudyServer(study, host, 0)


def test_a_pipe_in_place_of_an_image_is_an_answer_and_not_waited_for(study, capsys):
    pair = next(iter(study.pairs))
    for side in (FIRST, SECOND):
        path = image_path(study.folder, pair, side)
        path.unlink()
        os.mkfifo(path)
    with served(study) as ask:
        status, _, content = ask(f"/image?rater=ann&pair={pair}&side=left")
    assert status == 500 and b"it is no ordinary file" in content
    assert "could not be answered" in capsys.readouterr().out
