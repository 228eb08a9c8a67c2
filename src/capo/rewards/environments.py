"""Python environments of isolated rewards: find the interpreter, and check what it can import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from capo.errors import InputError
from capo.rewards import worker

PATIENCE = 120  # seconds for an interpreter to start
MOST = 1 << 20  # bytes of its answer, which lists some names of modules
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
        raise InputError(not_importable(name, path, lacking))


def _lacking(name: str, python: str, modules: Sequence[str]) -> list[str]:
    command = [python, worker.__file__, "missing", *modules]
    try:
        code, told, said = _answer(command)
        if code:
            raise ValueError(([*said.strip().splitlines()][-1:] or [f"it ended with exit code {code}"])[0])
        return json.loads(told)
    except (OSError, ValueError) as error:
        raise InputError(
            f"reward '{name}': python={python} cannot run a worker ({error}); it must be a Python of "
            "version 3.7 or newer that starts"
        ) from error


def _answer(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a program; ValueError for one that does not end, or prints too much."""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env=inherited_environment(), stdin=subprocess.DEVNULL, stdout=told, stderr=said
        )
        until = time.monotonic() + PATIENCE
        try:
            while process.poll() is None:
                if sum(os.fstat(file.fileno()).st_size for file in (told, said)) > MOST:
                    raise ValueError(f"it printed more than {MOST} bytes")
                if time.monotonic() > until:
                    raise ValueError(f"it did not answer in {PATIENCE} s")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        for file in (told, said):
            file.seek(0)
        texts = [file.read(MOST).decode(errors="replace") for file in (told, said)]
    return process.returncode, texts[0], texts[1]


def not_importable(name: str, python: str, modules: Sequence[str]) -> str:
    """Message that the interpreter `python` cannot import `modules`, with the remedy."""
    return (
        f"reward '{name}' needs {', '.join(modules)}, which {python} cannot import: {python} -m pip install "
        f"{' '.join(modules)} (or the package that brings it); the folder of a module of your own goes into "
        "PYTHONPATH"
    )


def not_installed(name: str, modules: Sequence[str], extra: str | None, isolated: bool) -> str:
    """Message that this environment lacks `modules` of the reward `name`, with the remedy.

    `extra` is the pip extra of this package that installs them, if there is one; `isolated`, whether the
    scorer runs in a process of its own, for which another environment can be named.
    """
    remedy = (
        f"pip install 'capo[{extra}]'"
        if extra
        else f"pip install {' '.join(modules)} (or the package that brings it), or, for a module of your "
        "own, put its folder into PYTHONPATH"
    )
    if isolated:
        remedy += (
            ", or give the interpreter of an environment that has it: "
            f"++rewards.{name}.python=/path/to/env/bin/python"
        )
    return f"reward '{name}' needs {', '.join(modules)}, which is not installed: {remedy}"


def inherited_environment() -> dict[str, str]:
    """Environment variables for a worker: those of this process, except NOT_INHERITED."""
    kept = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    return kept | {"PYTHONUNBUFFERED": "1"}  # so that prints are in the log even if it dies
