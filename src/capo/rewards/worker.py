"""Script that runs a reward's scorer in another Python environment; `capo.rewards.isolated` starts it.

It needs only the standard library of Python 3.7 or newer, and what the scorer's own target imports. Messages
are sent over stdin and stdout: "CAPO", the length of a JSON header, the header, then as many bytes as its
"sizes" say. Whatever the target prints goes to stderr, which is the log.

    request  {"scorer": {"_target_": ..., ...}, "device": ...}          reply  {"ready": true, "takes": ...}
    request  {"prompts": [...], "shapes": [[w, h], ...]} + RGB bytes    reply  {"scores": [...]}
    request  {"prompts": [...]} + PNG files, for a target that takes png    reply  {"scores": [...]}
    any request that fails                                              reply  {"error": ..., "kind": ...}
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

MAGIC = b"CAPO"
START = struct.Struct(">4sI")  # magic, size of the header in bytes
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
LONGEST_HEADER = 1 << 26  # bytes
# What is sent of an image: a file's bytes to a target whose attribute `takes` is PNG; to others, which get
# PIL images, the bytes of its RGB pixels, since packing them would take longer than the pipe.
PNG, RGB = "png", "rgb"


def _beside(name):
    """Import the module capo.rewards.`name` from its file, without the package around it."""
    full = "capo.rewards." + name
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec = importlib.util.spec_from_file_location(full, file)
    assert spec and spec.loader, file
    found = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


if __name__ != "__main__" or TYPE_CHECKING:
    from capo.rewards import guard, lookup
else:
    guard, lookup = _beside("guard"), _beside("lookup")


def send(stream, header, blobs=()):
    """Write one message: `header`, a JSON object, and `blobs` of bytes."""
    text = json.dumps(dict(header, sizes=[len(blob) for blob in blobs])).encode()
    for part in (START.pack(MAGIC, len(text)), text, *blobs):
        stream.write(part)
    stream.flush()


def receive(stream, most=None):
    """Read the next message as (header, blobs), with at most `most` bytes of blobs.

    Raises EOFError at the stream's end, and ValueError for bytes that are not a message.
    """
    magic, length = START.unpack(_exactly(stream, START.size))
    if magic != MAGIC:
        raise ValueError(f"expected {MAGIC!r}, got {magic!r}")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes, above {LONGEST_HEADER}")
    header = json.loads(_exactly(stream, length).decode())
    sizes = header.pop("sizes", None) if isinstance(header, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a header without the sizes of what follows it")
    if most is not None and sum(sizes) > most:
        raise ValueError(f"{sum(sizes)} bytes after the header, above {most}")
    return header, [_exactly(stream, size) for size in sizes]


def _exactly(stream, count):
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("the stream has ended")
    return data


def missing(modules):
    """List those of `modules` that this environment cannot import.

    Only the parent packages of a dotted name are imported.
    """

    def found(name):
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # of a parent package, of a name that is none
            return False

    return [name for name in modules if not found(name)]


class Service:
    """Answers requests; the first one says which scorer to build."""

    def __init__(self):
        self.scorer: Any = None
        self.takes = RGB

    def answer(self, header, blobs):
        """Return the reply to a request; an error is reported in the reply, and its traceback in the log."""
        try:
            return self.make(**header) if "scorer" in header else {"scores": self.score(blobs, **header)}
        except BaseException as error:  # a target's sys.exit() too
            traceback.print_exc()
            kind, module = type(error).__name__, getattr(error, "name", None)
            return {"error": guard.told(error), "kind": kind, "module": module}

    def make(self, scorer, device):
        """Build the scorer of this yaml entry on a device. Raises TypeError if it cannot be called."""
        with guard.undisturbed():
            self.scorer = lookup.made(scorer)
            if device is not None and hasattr(self.scorer, "to"):
                self.scorer.to(device)
        target = getattr(self.scorer, "func", self.scorer)  # what a partial binds
        self.takes = PNG if getattr(target, "takes", RGB) == PNG else RGB
        if self.takes == RGB:
            import PIL.Image  # noqa: F401  # where it is missing, before any image
        return {"ready": True, "takes": self.takes}

    def score(self, blobs, prompts, shapes=None):
        """Score images, as PNG files or as RGB bytes with their [width, height]; a number for each prompt."""
        if self.takes == RGB and (not isinstance(shapes, list) or len(shapes) != len(blobs)):
            raise ValueError(f"{len(blobs)} images with the shapes {shapes!r}")
        if len(blobs) != len(prompts):
            raise ValueError(f"{len(blobs)} images for {len(prompts)} prompts")
        images = blobs if self.takes == PNG else list(map(_picture, blobs, shapes or []))
        return guard.scores(self.scorer, images, prompts)


def _picture(pixels, shape):
    """PIL image of RGB bytes, row by row, of `shape` [width, height]."""
    from PIL import Image

    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)
    ):
        raise ValueError(f"an image of shape {shape!r}, which is not [width, height]")
    width, height = shape
    if len(pixels) != 3 * width * height:
        raise ValueError(f"an image of {width} x {height} pixels in {len(pixels)} bytes")
    return Image.frombytes("RGB", (width, height), pixels)


def _die_with(parent):
    """Make this process end with `parent`: on Linux by the kernel, elsewhere by the end of stdin."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before this call
        os._exit(0)


def _listen(stream, requests):
    """Put messages into `requests`; end this process at the end of stdin, even while it scores."""
    try:
        while True:
            requests.put(receive(stream))
    finally:
        os._exit(0)


def serve(parent):
    """Answer requests until the process `parent` ends."""
    _die_with(parent)
    faulthandler.enable()
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # prints of the target, and of whatever it calls, go to the log
    requests, service = queue.Queue(), Service()
    threading.Thread(target=_listen, args=(incoming, requests), daemon=True).start()
    while True:
        send(outgoing, service.answer(*requests.get()))


def main(arguments):
    """Run the command: `missing MODULE...` prints a JSON list, `serve PID` answers requests."""
    here = os.path.dirname(os.path.abspath(__file__))
    # This file's folder must not hide modules with the names of its files; the working directory may hold a
    # user's own.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here] + [os.getcwd()]
    if arguments[0] == "missing":
        print(json.dumps(missing(arguments[1:])))
    else:
        serve(int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
