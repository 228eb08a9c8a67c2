"""Run a reward's scorer in another Python environment: the side of `capo.rewards.worker` in this process."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
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
from capo.rewards.environments import find_python, inherited_environment, not_importable
from capo.rewards.guard import NoScores, numbers
from capo.rewards.logs import log_file
from capo.runtime.files import appending
from capo.runtime.memory import means_memory

ATTEMPTS = 2  # a worker that is killed is restarted once and gets the same batch
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class WorkerOutOfMemory(InputError, torch.OutOfMemoryError):
    """The device ran out of memory in a worker; catch it as torch's own error to retry a smaller batch."""


class _Died(Exception):
    """The worker has ended, with this exit code; a negative one is the signal that killed it."""

    def __init__(self, code: int):
        super().__init__(str(code))
        self.code = code


class _Silent(Exception):
    """The worker has not answered in time and was killed."""


class IsolatedScorer:
    """A scorer `(images, prompts) -> (B,)` that runs in a process of another interpreter.

    The process starts with `to` or with the first images, and ends with this object or with this process. Any
    number of threads may call the scorer. Its output and tracebacks are in `log_file`. A process that dies is
    restarted once and gets the same batch again, unless it ended by itself.

    Args:
        name: name of the reward, for messages and the log.
        python: path or command of the interpreter.
        scorer: config of the scorer with a `_target_`.
        timeout: seconds that the process has for an answer, including loading weights.
        logs: folder of the log; None: a temporary one.

    Raises:
        InputError: there is no such interpreter; when scoring: the process ends by itself or dies again, does
            not answer in time or gives an invalid answer, or the scorer raises.
        WorkerOutOfMemory: the process's device runs out of memory.
    """

    configurable = False  # no configuration may name it as its scorer: `capo.rewards.lookup.is_scorer`

    def __init__(
        self,
        name: str,
        python: str,
        scorer: Mapping[str, Any],
        timeout: float = 300,
        logs: Path | None = None,
    ):
        self.name, self.python, self.timeout = name, find_python(name, python), timeout
        self.scorer, self.log_file = dict(scorer), log_file(name, logs)
        self._device: str | None = None
        self._takes: str | None = None  # what the scorer gets of an image; known once a worker has started
        self._worker: _Worker | None = None
        self._given_up = False
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
        if self._takes is None:
            with self._lock:
                self._persist(self._running)
        header, blobs = _message(images, prompts, self._takes)  # outside the lock: while others are scored
        with self._lock:
            answer = self._persist(lambda: self._running().ask(header, blobs, self.timeout))
        try:  # again, since whatever runs there may have answered in the worker's place
            scores = numbers(self._checked(answer).get("scores"), len(images))
        except NoScores as error:
            raise self._fault(str(error), "its output is in") from error
        return torch.tensor(scores, dtype=torch.float64)

    def leave(self) -> None:
        """End the worker if it holds memory of a device; a worker on the CPU stays."""
        if self._device not in (None, "cpu"):
            self.close()

    def close(self) -> None:
        """End the worker; the next images start another one."""
        with self._lock:
            self._end()

    def give_up(self) -> None:
        """End the worker at once, also while another thread waits for its answer: that request then fails."""
        self._given_up = True
        if (running := self._worker) is not None:
            running.end()

    def _running(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker([self.python, worker.__file__, "serve", str(os.getpid())], self.log_file)
            request = {"scorer": self.scorer, "device": self._device}
            self._takes = self._checked(self._worker.ask(request, [], self.timeout)).get("takes")
            if self._takes not in (worker.PNG, worker.RGB):
                raise ValueError(f"it takes {self._takes!r}")
        return self._worker

    def _persist(self, ask: Callable[[], Answer]) -> Answer:
        """Return ask(), retried once if the worker is killed; one that ended by itself would do so again.

        Any other failure ends the worker, because its next answer might belong to an earlier request.
        """
        attempt, self._given_up = 0, False
        try:
            while True:
                attempt += 1
                try:
                    return ask()
                except _Died as death:
                    self._end()
                    if self._given_up:
                        raise self._fault("was ended with the work it was for", "see") from None
                    if death.code >= 0:
                        what = f"ended its process (exit code {death})"
                        raise self._fault(what, "the reason should be in") from None
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
        if means_memory(str(answer.get("kind")), str(answer["error"])):
            raise WorkerOutOfMemory(str(self._fault(f"ran out of memory ({answer['error']})", "see")))
        if answer.get("kind") == "ModuleNotFoundError" and answer.get("module"):
            raise InputError(
                not_importable(self.name, self.python, [answer["module"]])
                + f"; the traceback is in {self.log_file}"
            )
        if answer.get("kind") == NoScores.__name__:
            raise self._fault(answer["error"].partition(": ")[2], "its output is in")
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
            return worker.receive(self.process.stdout, most=0)[0]
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
        with appending(log_file) as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=inherited_environment(),
                start_new_session=True,  # Ctrl-C in the terminal reaches this process alone
            )
    except OSError as error:
        born.set_exception(error)
        return
    born.set_result(process)
    process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:  # not in a forked copy of this process
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _message(
    images: Sequence[Image], prompts: Sequence[str], takes: str | None
) -> tuple[dict[str, Any], list[bytes]]:
    """Header and bytes of a request for scores: RGB pixels, or PNG files for a scorer that takes these."""
    pictures = [image.convert("RGB") for image in images]
    if takes == worker.PNG:
        return {"prompts": list(prompts)}, [_png(picture) for picture in pictures]
    shapes = [list(picture.size) for picture in pictures]
    return {"prompts": list(prompts), "shapes": shapes}, [picture.tobytes() for picture in pictures]


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # the pipe is faster than compression
    return file.getvalue()
