"""The page on which raters vote, served by the standard library.

Gradio 6 needs a pillow older than this package does, so the two cannot be installed together.
A vote is answered only after it is on disk. Prompts reach the page as JSON and become text there, never
markup; scripts and styles come from this server alone, which the page's policy enforces.
"""

from __future__ import annotations

import errno
import importlib.resources
import ipaddress
import json
import sqlite3
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from capo.errors import DamagedFile, InputError
from capo.evaluation.reports.templating import page_template
from capo.evaluation.study.store import Study, Vote
from capo.evaluation.study.turns import choice_of, left_side, order
from capo.runtime.reading import parse_json

INSTRUCTION = (  # CaPO, appendix C, word for word
    "Given the text below, pick the left or the right image with better looking.",
    "Good example: Images are beautiful and following text description.",
    "Bad example: Images are not looking good or not following text description.",
)
LONGEST = 64  # characters of a rater's name
LARGEST = 4096  # bytes of a request's body
FILES = {"page.css": "text/css", "vote.css": "text/css", "vote.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that cannot be answered: `status` and the text for the page."""

    def __init__(self, status: HTTPStatus, text: str):
        super().__init__(text)
        self.status = status


class StudyServer(ThreadingHTTPServer):
    """Server of one study's page; any number of raters may vote at a time.

    On a loopback address only requests that name one are answered, so that no page of the web can reach the
    study through a name of its own.
    """

    daemon_threads = True

    def __init__(self, study: Study, host: str, port: int):
        """Bind to host and port (0: any free one). Raises InputError if that fails."""
        self.study = study
        self.loopback = _is_loopback(host)
        self.page = page_template("vote.html.j2").render(
            instruction=INSTRUCTION, ties=study.facts.ties, longest=LONGEST
        )
        try:
            if not host:  # to Python it is every address of this machine
                raise OSError("it has no name")
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError, TypeError) as error:  # TypeError: of a name with an empty part
            reason = getattr(error, "strerror", None) or error
            taken = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
            remedy = "port, or 0 for any free one" if taken else "host, 127.0.0.1 for this machine alone"
            raise InputError(
                f"host {host}, port {port}: the page cannot be served ({reason}); give another {remedy} "
                "(study.host, study.port; of `serve` --host, --port)"
            ) from error

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}/"

    def next_pair(self, rater: str) -> dict[str, Any]:
        """Return the rater's next pair for the page, with the counts; `pair` is None after the last one."""
        study = self.study
        pairs, voted = order(list(study.pairs.values()), study.facts.seed, rater), study.voted(rater)
        found = next((pair for pair in pairs if pair.name not in voted), None)
        shown = {"pair": found.name, "prompt": found.prompt} if found else {"pair": None}
        return {**shown, "done": len(voted), "total": len(pairs)}

    def image(self, rater: str, pair: str, side: str) -> bytes:
        """Return the PNG that stands on the rater's `side` of a pair."""
        if pair not in self.study.pairs or side not in ("left", "right"):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such image")
        shown = choice_of(side, left_side(self.study.facts.seed, rater, pair))
        return self.study.image(pair, shown)

    def take_vote(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Record a vote of the page, and return the next pair."""
        rater, pair, answer = rater_name(body.get("rater")), body.get("pair"), body.get("answer")
        if not isinstance(pair, str) or pair not in self.study.pairs:
            raise Refused(HTTPStatus.BAD_REQUEST, "the study has no such pair; reload the page")
        if answer == "tie" and not self.study.facts.ties:
            raise Refused(HTTPStatus.BAD_REQUEST, "this study has no ties")
        left, given = left_side(self.study.facts.seed, rater, pair), body.get("seconds")
        seconds = float(given) if isinstance(given, int | float) and 0 <= given < 1e6 else None
        try:
            vote = Vote(rater, pair, choice_of(str(answer), left), left, seconds)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        self.study.vote(vote)
        return self.next_pair(rater)


def rater_name(given: object) -> str:
    """Return a rater's name without outer spaces; Refused if it is empty or too long."""
    name = given.strip() if isinstance(given, str) else ""
    if not name or len(name) > LONGEST or not name.isprintable():
        raise Refused(HTTPStatus.BAD_REQUEST, f"a rater's name has 1 to {LONGEST} printable characters")
    return name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    timeout = 60  # seconds; a connection that says nothing is closed

    def log_message(self, *args: object) -> None:
        """Print nothing: a line for each image would bury what the command says."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        try:
            self._check_host()
            kind, content = respond()
            self._send(HTTPStatus.OK, kind, content)
        except Refused as error:
            self._send(error.status, "application/json", _json({"error": str(error)}))
        except (sqlite3.Error, OSError, DamagedFile) as error:
            if isinstance(error, ConnectionError):
                return  # the page was left
            print(f"error: a request could not be answered: {error}")
            text = _json({"error": f"the server cannot read or write its files: {error}"})
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", text)
        except ValueError:  # of an address or header that is none
            self._send(HTTPStatus.BAD_REQUEST, "application/json", _json({"error": "no such request"}))

    def _check_host(self) -> None:
        named = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if self.server.loopback and not _is_loopback(named):
            raise Refused(HTTPStatus.FORBIDDEN, "this study is served to this machine alone")

    def _get(self) -> tuple[str, bytes]:
        place = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(place.query).items()}
        name = place.path.lstrip("/")
        if name == "":
            return "text/html; charset=utf-8", self.server.page.encode()
        if name in FILES:
            folder = importlib.resources.files("capo.evaluation.reports") / "templates"
            return f"{FILES[name]}; charset=utf-8", (folder / name).read_bytes()
        if name == "next":
            return "application/json", _json(self.server.next_pair(rater_name(asked.get("rater"))))
        if name == "image":
            rater = rater_name(asked.get("rater"))
            return "image/png", self.server.image(rater, asked.get("pair", ""), asked.get("side", ""))
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[str, bytes]:
        # a form of another page cannot send this type without being asked first
        if self.path != "/vote" or self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.NOT_FOUND, "votes are sent to /vote as JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a vote has at most {LARGEST} bytes")
        try:
            body = parse_json(self.rfile.read(int(length)).decode())
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "a vote is JSON") from error
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "a vote is a JSON object")
        return "application/json", _json(self.server.take_vote(body))

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
