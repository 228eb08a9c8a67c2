"""The entry scripts in processes of their own that need not import torch again.

A helper process imports everything once and forks for each command line; the child runs the script's file as `__main__`.
Signals, exit codes and what stands on stderr are then those of `python SCRIPT ...`, a second after the call.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Process:
    """A forked child: its number, and where its output goes."""

    helper: Helper
    pid: int
    folder: Path

    def wait(self) -> int:
        """Exit code, as a shell gives it."""
        return self.helper.ask({"wait": self.pid})

    def interrupt_when(self, happened: Callable[[], bool], seconds: float = 120) -> int:
        """Ctrl-C as soon as `happened`; returns the exit code."""
        deadline = time.monotonic() + seconds
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGINT)
        return self.wait()

    @property
    def error(self) -> str:
        """What it wrote to stderr, progress bars left out."""
        lines = (self.folder / "stderr").read_text().replace("\r", "\n").replace("\x1b[A", "\n").splitlines()
        return "\n".join(line for line in lines if "it/s" not in line and "/s]" not in line and "?, ?" not in line and line.strip())


class Helper:
    """The process that forks."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        paths = os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests")))
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(self, request: dict) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, script: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Process:
        """`python SCRIPT ARGUMENTS` in `cwd`."""
        self.count += 1
        output = self.folder / str(self.count)
        output.mkdir()
        request = {"script": str(ROOT / script), "arguments": list(map(str, arguments)), "output": str(output),
                   "cwd": str(cwd or output), "environment": environment}  # fmt: skip
        return Process(self, self.ask(request), output)

    def run(self, script: str, *arguments: object, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
        """Exit code and stderr of a whole process."""
        process = self.start(script, *arguments, cwd=cwd, **environment)
        return process.wait(), process.error

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _serve() -> None:
    import evaluate  # noqa: F401
    import generate  # noqa: F401
    import train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            _become(request)


def _become(request: dict) -> None:
    import runpy

    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["output"]) / name, os.O_WRONLY | os.O_CREAT), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, whatever started the helper
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["arguments"]]
    code = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
