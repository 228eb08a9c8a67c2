"""Script that runs a reward's scorer in another Python environment; `capo.rewards.isolated` starts it.

It needs only the standard library of Python 3.7 or newer, and what the scorer's own target imports. Messages
are sent over stdin and stdout: "CAPO", the length of a JSON header, the header, then as many bytes as its
"sizes" say. Whatever the target prints goes to stderr, which is the log.

    request  {"scorer": {"_target_": ..., ...}, "device": ...}   reply  {"ready": true}
    request  {"prompts": [...]} + one PNG per prompt             reply  {"scores": [...]}
    any request that fails                                       reply  {"error": ..., "kind": ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import importlib.util
import io
import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import Any

MAGIC = b"CAPO"
START = struct.Struct(">4sI")  # magic, size of the header in bytes
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
# These import nothing of this package, which would load torch beside their tensorflow.
STANDALONE = ("capo.rewards.vila",)
PNG = "png"  # a target whose attribute `takes` is this gets the files' bytes; others get PIL images


def send(stream, header, blobs=()):
    """Write one message: `header`, a JSON object, and `blobs` of bytes."""
    text = json.dumps(dict(header, sizes=[len(blob) for blob in blobs])).encode()
    for part in (START.pack(MAGIC, len(text)), text, *blobs):
        stream.write(part)
    stream.flush()


def receive(stream):
    """Read the next message as (header, blobs).

    Raises EOFError at the stream's end, and ValueError for bytes that are not a message.
    """
    magic, length = START.unpack(_exactly(stream, START.size))
    if magic != MAGIC:
        raise ValueError(f"expected {MAGIC!r}, got {magic!r}")
    header = json.loads(_exactly(stream, length).decode())
    return header, [_exactly(stream, size) for size in header.pop("sizes")]


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
        except ImportError:
            return False

    return [name for name in modules if not found(name)]


def build(node) -> Any:
    """Return `node` with each `{_target_: module.name, ...}` in it replaced by its call, innermost first.

    `_args_` are positional arguments; `_partial_: true` binds the arguments without calling.
    """
    if isinstance(node, list):
        return [build(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    given = {
        key: build(value)
        for key, value in node.items()
        if key not in ("_target_", "_partial_", "_convert_", "_recursive_")
    }
    if "_target_" not in node:
        return given
    target, positional = locate(node["_target_"]), given.pop("_args_", [])
    return (
        functools.partial(target, *positional, **given)
        if node.get("_partial_")
        else target(*positional, **given)
    )


def locate(path) -> Any:
    """Return the object at the dotted path `module.name`, importing the longest part that is a module."""
    module, names = path, []
    while True:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
        if not module:
            raise ImportError(f"{path} is not a dotted path module.name")
        try:
            found = load(module)
        except ModuleNotFoundError as error:
            if "." in module and error.name == module:  # it may be a class with a method
                continue
            raise
        return functools.reduce(getattr, names, found)


def load(module):
    """Import `module`.

    A module in STANDALONE, and any module of capo where capo is not installed, is loaded from its file,
    without the package around it.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    file = os.path.join(root, *module.split(".")) + ".py"
    if module not in STANDALONE:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "capo" or not os.path.isfile(file):
                raise
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module", name=module)
    found = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Service:
    """Answers requests; the first one says which scorer to build."""

    def __init__(self):
        self.scorer: Any = None
        self.opened: Any = None

    def answer(self, header, blobs):
        """Return the reply to a request; an error is reported in the reply, and its traceback in the log."""
        try:
            return (
                self.make(**header)
                if "scorer" in header
                else {"scores": self.score(header["prompts"], blobs)}
            )
        except BaseException as error:  # a target's sys.exit() too
            traceback.print_exc()
            last = traceback.format_exception_only(type(error), error)[-1].strip()
            return {"error": last, "kind": type(error).__name__, "module": getattr(error, "name", None)}

    def make(self, scorer, device):
        self.scorer = build(scorer)
        if not callable(self.scorer):
            made = f"{scorer['_target_']} makes {self.scorer!r}, which is not callable"
            raise TypeError(f"{made}; for a function of (images, prompts) add `_partial_: true`")
        target = getattr(self.scorer, "func", self.scorer)  # what a partial binds
        self.opened = bytes if getattr(target, "takes", "pil") == PNG else _pil_reader()
        if device is not None and hasattr(self.scorer, "to"):
            self.scorer.to(device)
        return {"ready": True}

    def score(self, prompts, blobs):
        with _without_gradients():
            result = self.scorer([self.opened(blob) for blob in blobs], prompts)
        values = result.tolist() if hasattr(result, "tolist") else result
        if not hasattr(values, "__iter__") or isinstance(values, (str, bytes)):
            raise TypeError(f"the scorer returned {values!r}; it must return one number per image")
        return [_number(value) for value in values]


def _number(value):
    if isinstance(value, (str, bytes, list, tuple)):
        raise TypeError(f"the scorer returned {value!r} for an image; it must return one number per image")
    return float(value)


def _pil_reader():
    from PIL import Image

    def opened(blob):
        image = Image.open(io.BytesIO(blob))
        image.load()
        return image

    return opened


def _without_gradients():
    torch = sys.modules.get("torch")
    return torch.no_grad() if torch else contextlib.nullcontext()


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
