"""Call a user's scorer: what it must return, and what it may not leave behind in its process.

`capo.rewards.worker` does so in another Python environment: this needs only the standard library of Python
3.7 or newer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import traceback

MUST = "it must return one real number per image: a list, an array or a tensor of shape (B,)"
VECTORS = "its method `features` must return a finite vector per image: an array or a tensor of shape (B, D)"
# characters that a message shows of what a scorer returned, and of what it raised
LONGEST_VALUE, LONGEST_ERROR = 200, 1000


class NoScores(TypeError):
    """A scorer returned something other than one real number, or one finite vector, per image."""


def scores(scorer, images, prompts):
    """Return the scores of B images as B floats, which need not be finite.

    Whatever the scorer changed in this process is as before, and the images are. Raises what the scorer
    raises, and NoScores for results of another form.
    """
    with undisturbed(), without_gradients():
        return numbers(_called(scorer, copied(images), list(prompts)), len(images))


def vectors(scorer, images):
    """Return the vectors that a scorer's method `features` gives of B images: float32 (B, D) on the CPU.

    As for `scores`, but in a process with torch, and the vectors are finite.
    """
    torch = sys.modules["torch"]
    with undisturbed(), without_gradients():
        found = _called(lambda copies, _: scorer.features(copies), copied(images), [])
    try:
        table = torch.as_tensor(found)
        if table.is_complex():
            raise TypeError("complex")
        table = table.to("cpu", torch.float32, copy=True)
    except Exception as error:  # no real numbers, of unequal lengths, or without data
        value = _short(" ".join(repr(found).split()))
        raise NoScores(f"returned {value} for {len(images)} images; {VECTORS}") from error
    if table.ndim != 2 or len(table) != len(images) or not table.shape[1]:
        raise NoScores(f"returned shape {tuple(table.shape)} for {len(images)} images; {VECTORS}")
    if not table.isfinite().all():
        image, place = (~table.isfinite()).nonzero()[0].tolist()
        value = f"{table[image, place].item()} at place {place} of the vector"
        raise NoScores(f"returned {value} for image {image} of the batch; {VECTORS}")
    return table


def copied(images):
    """Return images that a scorer may draw on: other rewards, and later calls, see the same ones."""
    return [image.copy() if hasattr(image, "copy") else image for image in images]  # bytes have no copy


def _called(scorer, images, prompts):
    try:
        return scorer(images, prompts)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # GeneratorExit, or a class of its own: no order to end this process
        raise RuntimeError(told(error)) from error


def numbers(result, count):
    """Return what a scorer returned for `count` images as that many floats; NoScores for anything else."""
    shape, values = getattr(result, "shape", None), result
    if hasattr(result, "tolist"):
        if tuple(shape or ()) != (count,):
            raise NoScores(f"returned shape {tuple(shape or ())} for {count} images; {MUST}")
        try:
            values = result.tolist()
        except Exception as error:  # a tensor without data, as those on torch's device `meta`
            what = f"{_short(repr(result))}, which holds no numbers ({told(error)})"
            raise NoScores(f"returned {what}; {MUST}") from error
    if not hasattr(values, "__iter__") or isinstance(values, (str, bytes, dict, set, frozenset)):
        raise NoScores(f"returned {_short(repr(values))} for {count} images; {MUST}")
    values = list(values)
    if len(values) != count:
        raise NoScores(f"returned {len(values)} values for {count} images; {MUST}")
    return [_number(value, place) for place, value in enumerate(values)]


def _number(value, place):
    text = isinstance(value, (str, bytes))  # float() would read it
    if not text and "complex" not in str(getattr(value, "dtype", "")):
        with contextlib.suppress(Exception):  # whatever the value's own class raises
            return float(value)
    raise NoScores(f"returned {_short(repr(value))} for image {place} of the batch; {MUST}")


def told(error):
    """Name an exception and the first line of its message, as the last line of a traceback does.

    Of a file that is no Python, with the file and the line.
    """
    if isinstance(error, SyntaxError) and error.filename:
        text = f"{type(error).__name__}: {error.msg} in {error.filename}, line {error.lineno}"
        return _short(text, LONGEST_ERROR)
    lines = traceback.format_exception_only(type(error), error)[-1].strip().splitlines()
    return _short(lines[0], LONGEST_ERROR)


def _short(text, most=LONGEST_VALUE):
    return text if len(text) <= most else text[: most - 3] + "..."


def without_gradients():
    """Context manager in which torch, if the process has it, records no gradients."""
    torch = sys.modules.get("torch")
    return torch.no_grad() if torch else contextlib.nullcontext()


@contextlib.contextmanager
def undisturbed():
    """Put back, after the block, what a scorer may have changed in its process.

    These are the working directory, the environment's variables, the handlers of SIGINT and SIGTERM (which
    the main thread alone can set), the streams and file descriptors 0 to 2, the states of the random
    generators of Python, numpy and torch, torch's default dtype, default device, gradient mode and number of
    threads, and the permissions of new files. Scorers may work in threads side by side: what all threads
    share is put back once none works.
    `os._exit` of the block is an error: it would end the process without a word, whatever it was at. A
    process that the block has forked ends with the block, since nothing after it is its own.
    """
    torch, number = sys.modules.get("torch"), os.getpid()
    own = _Thread(torch) if torch else None
    with _lock:
        _working.append(_working[0] if _working else _Process(torch))
        _threads.append(threading.get_ident())
    try:
        yield
    finally:
        if os.getpid() != number:
            _end(1)
        if own:
            own.put_back()
        with _lock:
            _threads.remove(threading.get_ident())
            process = _working.pop()
            if not _working:
                process.put_back()


class _Thread:
    """What each thread has of its own."""

    def __init__(self, torch):
        self.torch = torch
        self.device = self._default()
        self.gradients, self.threads = torch.is_grad_enabled(), torch.get_num_threads()

    def _default(self):
        # torch before 2.3 cannot say it
        return self.torch.get_default_device() if hasattr(self.torch, "get_default_device") else None

    def put_back(self):
        """Undo what scorers have changed since the block was entered."""
        if self.device is not None and self._default() != self.device:
            self.torch.set_default_device(None if self.device.type == "cpu" else self.device)
        if self.torch.is_grad_enabled() != self.gradients:
            self.torch.set_grad_enabled(self.gradients)
        if self.torch.get_num_threads() != self.threads:
            self.torch.set_num_threads(self.threads)


class _Process:
    """What all threads share."""

    def __init__(self, torch):
        self.torch, self.numpy = torch, sys.modules.get("numpy")
        self.number, self.exit = os.getpid(), os._exit
        os._exit = self.refuse_exit
        self.folder, self.variables = _folder(), dict(os.environ)
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.streams = sys.stdin, sys.stdout, sys.stderr
        self.copies = {number: _copied(number) for number in range(3)}
        self.random = random.getstate()
        if self.numpy:
            self.array_random = self.numpy.random.get_state()
        if torch:
            self.dtype, self.tensor_random = torch.get_default_dtype(), torch.get_rng_state()
            self.gpu_random = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def refuse_exit(self, code):
        """Stand in for `os._exit`, which threads without a scorer, and forked processes, may call."""
        if os.getpid() == self.number and threading.get_ident() in _threads:
            raise RuntimeError(f"it called os._exit({code}), which would end this process")
        self.exit(code)

    def put_back(self):
        """Undo what a scorer may have changed in this process."""
        os._exit = self.exit
        os.umask(_umask)
        _put_back_variables(self.variables)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:  # None: not Python's
                    signal.signal(number, handler)
        for number, copy in self.copies.items():
            if copy is not None:
                _put_back(number, copy)
        names = ("stdin", "stdout", "stderr")
        for number, (name, stream) in enumerate(zip(names, self.streams)):  # noqa: B905  # of Python 3.10
            setattr(sys, name, _open(stream, number))
        random.setstate(self.random)
        if self.numpy:
            self.numpy.random.set_state(self.array_random)
        if self.torch:
            self.torch.set_default_dtype(self.dtype)
            self.torch.set_rng_state(self.tensor_random)
            if self.gpu_random:
                self.torch.cuda.set_rng_state_all(self.gpu_random)
        if self.folder is not None and _folder() != self.folder:
            os.chdir(self.folder)  # last, since it may have been removed


_end = os._exit
_umask = os.umask(0o077)  # there is no way to read it alone: once, when nothing else is at work
os.umask(_umask)
_lock = threading.Lock()
_working = []  # for each scorer that works, the state of the process before the first of them
_threads = []  # and its thread


def _folder():
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None


def _copied(number):
    try:
        return os.dup(number)
    except OSError:  # it is closed
        return None


def _put_back_variables(variables):
    for name in [name for name in os.environ if name not in variables]:
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _put_back(number, copy):
    try:
        same = os.path.sameopenfile(number, copy)
    except OSError:  # the scorer closed it
        same = False
    if not same:
        os.dup2(copy, number)
    os.close(copy)


def _open(stream, number):
    """Return the stream, or, if the scorer closed it, another one for its file descriptor."""
    if stream is None or not getattr(stream, "closed", False):
        return stream
    return open(number, "w" if number else "r", errors="backslashreplace", closefd=False)
