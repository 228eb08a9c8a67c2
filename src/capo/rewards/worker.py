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

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
import types
from typing import Any

MAGIC = b"CAPO"
START = struct.Struct(">4sI")  # magic, size of the header in bytes
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
# These import nothing of this package, which would load torch beside their tensorflow.
STANDALONE = ("capo.rewards.vila",)
LONGEST_HEADER = 1 << 26  # bytes
# What is sent of an image: a file's bytes to a target whose attribute `takes` is PNG; to others, which get
# PIL images, the bytes of its RGB pixels, since packing them would take longer than the pipe.
PNG, RGB = "png", "rgb"


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
        except ImportError:
            return False

    return [name for name in modules if not found(name)]


def build(node, find=None) -> Any:
    """Return `node` with each `{_target_: module.name, ...}` in it replaced by its call, innermost first.

    `_args_` are positional arguments; `_partial_: true` binds the arguments without calling. `find` looks a
    target up by its name; by default it must be a scorer (`scorer`).
    """
    if isinstance(node, list):
        return [build(inner, find) for inner in node]
    if not isinstance(node, dict):
        return node
    given = {
        key: build(value, find)
        for key, value in node.items()
        if key not in ("_target_", "_partial_", "_convert_", "_recursive_")
    }
    if "_target_" not in node:
        return given
    target, positional = (find or scorer)(node["_target_"]), given.pop("_args_", [])
    return (
        functools.partial(target, *positional, **given)
        if node.get("_partial_")
        else target(*positional, **given)
    )


def scorer(path) -> Any:
    """Return the target of a scorer: `locate(path)`, which must be a scorer where it is of this package.

    Raises ImportError otherwise.
    """
    found = locate(path)
    if path.startswith("capo.") and not is_scorer(found, path.rpartition(".")[0]):
        raise ImportError(
            f"{path} is no scorer: what this package may call here is a class or function that its module "
            "defines and that is called with (images, prompts)"
        )
    return found


def is_scorer(found, module):
    """Whether `found` is a class or function of `module` itself that is called with (images, prompts).

    A class with `configurable = False` is none, since it would start programs that a configuration names.
    """
    if getattr(found, "__module__", None) != module or inspect.isabstract(found):
        return False
    call = found.__call__ if inspect.isclass(found) else found
    if not inspect.isfunction(call) or not getattr(found, "configurable", True):
        return False
    names = list(inspect.signature(call).parameters)
    return names[1 if inspect.isclass(found) else 0 :][:2] == ["images", "prompts"]


def locate(path) -> Any:
    """Return the object at the dotted path `module.name`, importing the longest part that is a module.

    Raises ImportError for a path through what that module has imported, such as `module.os.system`.
    """
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
        for name in names:
            found = getattr(found, name)
            if isinstance(found, types.ModuleType) or name.startswith("__"):
                raise ImportError(
                    f"{path} leads through {name} of {module}; give the name of a class or function and the "
                    "module that defines it"
                )
        return found


def load(module):
    """Import `module`.

    A module in STANDALONE, and any module of capo where capo is not installed, is loaded from its file,
    without the package around it.
    """
    if module in sys.modules:
        return sys.modules[module]
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
        self.takes = RGB

    def answer(self, header, blobs):
        """Return the reply to a request; an error is reported in the reply, and its traceback in the log."""
        try:
            return self.make(**header) if "scorer" in header else {"scores": self.score(blobs, **header)}
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
        self.takes = PNG if getattr(target, "takes", RGB) == PNG else RGB
        if self.takes == RGB:
            import PIL.Image  # noqa: F401  # where it is missing, before any image
        if device is not None and hasattr(self.scorer, "to"):
            self.scorer.to(device)
        return {"ready": True, "takes": self.takes}

    def score(self, blobs, prompts, shapes=None):
        if self.takes == RGB and (not isinstance(shapes, list) or len(shapes) != len(blobs)):
            raise ValueError(f"{len(blobs)} images with the shapes {shapes!r}")
        if len(blobs) != len(prompts):
            raise ValueError(f"{len(blobs)} images for {len(prompts)} prompts")
        images = blobs if self.takes == PNG else list(map(_picture, blobs, shapes or []))
        with _without_gradients():
            result = self.scorer(images, prompts)
        values = result.tolist() if hasattr(result, "tolist") else result
        if not hasattr(values, "__iter__") or isinstance(values, (str, bytes)):
            raise TypeError(f"the scorer returned {values!r}; it must return one number per image")
        return [_number(value) for value in values]


def _number(value):
    if isinstance(value, (str, bytes, list, tuple)):
        raise TypeError(f"the scorer returned {value!r} for an image; it must return one number per image")
    return float(value)


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
