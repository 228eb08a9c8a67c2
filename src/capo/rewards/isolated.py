"""Run a reward's scorer in another Python environment: the side of `capo.rewards.worker` in this process."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from capo.errors import InputError
from capo.rewards import worker

ATTEMPTS = 2  # a worker that dies is restarted once and gets the same batch
PATIENCE = 120  # seconds for an interpreter to start
NOT_INHERITED = (  # this interpreter's home, and the launcher's variables: the worker has no rank
    "PYTHONHOME",
    "__PYVENV_LAUNCHER__",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class WorkerOutOfMemory(InputError, torch.OutOfMemoryError):
    """The device ran out of memory in a worker; catch it as torch's own error to retry a smaller batch."""


class _Died(Exception):
    """The worker has ended, with this exit code."""


class _Silent(Exception):
    """The worker has not answered in time and was killed."""


class IsolatedScorer:
    """A scorer `(images, prompts) -> (B,)` that runs in a process of another interpreter.

    The process starts with `to` or with the first images, and ends with this object or with this process. Any
    number of threads may call the scorer. Its output and tracebacks are in `log_file`. A process that dies is
    restarted once and gets the same batch again.

    Args:
        name: name of the reward, for messages and the log.
        python: path or command of the interpreter.
        scorer: config of the scorer with a `_target_`.
        timeout: seconds that the process has for an answer, including loading weights.
        logs: folder of the log; None: a temporary one.

    Raises:
        InputError: there is no such interpreter; when scoring: the process dies again, does not answer in
            time or gives an invalid answer, or the scorer raises.
        WorkerOutOfMemory: the process's device runs out of memory.
    """

    def __init__(
        self,
        name: str,
        python: str,
        scorer: Mapping[str, Any],
        timeout: float = 300,
        logs: Path | None = None,
    ):
        self.name, self.python, self.timeout = name, find_python(name, python), timeout
        self.scorer, self.log_file = dict(scorer), (logs or _temporary_folder()) / f"{name}.log"
        self._device: str | None = None
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def to(self, device: str | torch.device) -> None:
        """Start the worker; its scorer is moved to `device` if it has a `to`."""
        with self._lock:
            if str(device) != self._device:
                self._device = str(device)
                self._end()
            self._persist(self._running)

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Return raw scores (B,), float64."""
        files = [_png(image) for image in images]
        with self._lock:
            answer = self._persist(
                lambda: self._running().ask({"prompts": list(prompts)}, files, self.timeout)
            )
        scores = self._checked(answer).get("scores")
        if (
            not isinstance(scores, list)
            or len(scores) != len(files)
            or not all(isinstance(score, float) for score in scores)
        ):
            count = f"{len(scores)} numbers" if isinstance(scores, list) else repr(scores)
            raise self._fault(
                f"returned {count} for {len(files)} images; it must return one number per image",
                "its output is in",
            )
        return torch.tensor(scores, dtype=torch.float64)

    def leave(self) -> None:
        """End the worker if it holds memory of a device; a worker on the CPU stays."""
        if self._device not in (None, "cpu"):
            self.close()

    def close(self) -> None:
        """End the worker; the next images start another one."""
        with self._lock:
            self._end()

    def _running(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker([self.python, worker.__file__, "serve", str(os.getpid())], self.log_file)
            self._checked(self._worker.ask({"scorer": self.scorer, "device": self._device}, [], self.timeout))
        return self._worker

    def _persist(self, ask: Callable[[], Answer]) -> Answer:
        """Return ask(), retried once if the worker dies.

        Any other failure ends the worker, because its next answer might belong to an earlier request.
        """
        attempt = 0
        try:
            while True:
                attempt += 1
                try:
                    return ask()
                except _Died as death:
                    self._end()
                    if attempt == ATTEMPTS:
                        raise self._fault(
                            f"died {ATTEMPTS} times in a row (exit code {death})", "the reason should be in"
                        ) from None
                    log.warning(
                        "reward '%s': its worker died (exit code %s) and is started again; its log is %s",
                        self.name,
                        death,
                        self.log_file,
                    )
        except _Silent:
            self._end()
            raise self._fault(
                f"gave no answer in {self.timeout:g} s and was ended; if it only needs longer, set "
                f"++rewards.{self.name}.timeout=SECONDS",
                "its output is in",
            ) from None
        except ValueError as error:
            self._end()
            if isinstance(error, InputError):
                raise
            raise self._fault(f"sent an invalid message ({error})", "its output is in") from error
        except BaseException:  # Ctrl-C while it works
            self._end()
            raise

    def _checked(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `answer`, or raise the error that it reports."""
        if "error" not in answer:
            return answer
        if answer.get("kind") == "OutOfMemoryError":
            raise WorkerOutOfMemory(str(self._fault(f"ran out of memory ({answer['error']})", "see")))
        if answer.get("kind") == "ModuleNotFoundError" and answer.get("module"):
            raise InputError(
                _not_there(self.name, self.python, [answer["module"]])
                + f"; the traceback is in {self.log_file}"
            )
        raise self._fault(f"failed: {answer['error']}", "the traceback is in")

    def _fault(self, what: str, pointer: str) -> InputError:
        scorer = f"its scorer {self.scorer.get('_target_')} in {self.python}"
        return InputError(f"reward '{self.name}': {scorer} {what}; {pointer} {self.log_file}")

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """A process that runs the worker's script until `end` is called or this object is garbage-collected."""

    def __init__(self, command: Sequence[str], log_file: Path):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        born: Future[subprocess.Popen] = Future()
        # Linux ends the worker with the thread that started it, so its own thread starts it.
        threading.Thread(target=_keep, args=(command, log_file, born), daemon=True).start()
        self.process = born.result()
        self.end = weakref.finalize(self, _kill, self.process, os.getpid())

    def ask(self, header: Mapping[str, Any], blobs: Sequence[bytes], timeout: float) -> Mapping[str, Any]:
        """Send a request and return the answer.

        Raises _Died if the worker ends, _Silent after `timeout` seconds, and ValueError for an invalid
        message.
        """
        late = threading.Event()

        def expire() -> None:
            late.set()
            _kill(self.process, os.getpid())  # ends the read below

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            worker.send(self.process.stdin, header, blobs)
            return worker.receive(self.process.stdout)[0]
        except (EOFError, OSError):
            if late.is_set():
                raise _Silent from None
            _kill(self.process, os.getpid())  # in case only its pipe was closed
            raise _Died(self.process.wait()) from None
        finally:
            timer.cancel()


def _keep(command: Sequence[str], log_file: Path, born: Future[subprocess.Popen]) -> None:
    """Start a worker, wait for its end, and then kill the processes that it started."""
    try:
        with log_file.open("ab") as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal reaches this process alone
            )
    except OSError as error:
        born.set_exception(error)
        return
    born.set_result(process)
    process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    return kept | {"PYTHONUNBUFFERED": "1"}  # so that prints are in the log even if it dies


def _kill(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:  # not in a forked copy of this process
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)  # the pipe is faster than compression
    return file.getvalue()


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="capo-workers-"))


def find_python(name: str, python: str) -> str:
    """Return the absolute path of the interpreter `python`, a path or command; raise InputError if none."""
    # Links are not followed: a virtual environment is identified by its interpreter's own path.
    if found := shutil.which(Path(python).expanduser()):
        return os.path.abspath(found)
    raise InputError(
        f"reward '{name}': there is no interpreter at python={python}; give the path of its environment's "
        "python, or python=null for this one"
    )


def check_environment(name: str, python: str, modules: Sequence[str]) -> None:
    """Raise InputError if `python` cannot run a worker or does not find one of `modules`; imports none."""
    path = find_python(name, python)
    if lacking := _lacking(name, path, modules):
        raise InputError(_not_there(name, path, lacking))


def _lacking(name: str, python: str, modules: Sequence[str]) -> list[str]:
    command = [python, worker.__file__, "missing", *modules]
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()[-1:] or [str(error)]
        raise InputError(
            f"reward '{name}': python={python} cannot run a worker ({said[0]}); it must be a Python of "
            "version 3.7 or newer that starts"
        ) from error


def _not_there(name: str, python: str, modules: Sequence[str]) -> str:
    return (
        f"reward '{name}' needs {', '.join(modules)}, which {python} cannot import: {python} -m pip install "
        f"{' '.join(modules)} (or the package that brings it); the folder of a module of your own goes into "
        "PYTHONPATH"
    )
