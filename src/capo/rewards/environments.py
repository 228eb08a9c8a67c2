"""Python environments of isolated rewards: find the interpreter, and check what it can import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from capo.errors import InputError
from capo.rewards import worker

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
        done = subprocess.run(
            command,
            env=inherited_environment(),
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


def not_importable(name: str, python: str, modules: Sequence[str]) -> str:
    """Message that the interpreter `python` cannot import `modules`, with the remedy."""
    return (
        f"reward '{name}' needs {', '.join(modules)}, which {python} cannot import: {python} -m pip install "
        f"{' '.join(modules)} (or the package that brings it); the folder of a module of your own goes into "
        "PYTHONPATH"
    )


def not_installed(name: str, modules: str, extra: str | None, isolated: bool) -> str:
    """Message that this environment lacks `modules` of the reward `name`, with the remedy.

    `extra` is the pip extra of this package that installs them, if there is one; `isolated`, whether the
    scorer runs in a process of its own, for which another environment can be named.
    """
    remedy = f"pip install 'capo[{extra}]'" if extra else f"pip install {modules}"
    if isolated:
        remedy += (
            ", or give the interpreter of an environment that has it: "
            f"++rewards.{name}.python=/path/to/env/bin/python"
        )
    return f"reward '{name}' needs {modules}, which is not installed: {remedy}"


def inherited_environment() -> dict[str, str]:
    """Environment variables for a worker: those of this process, except NOT_INHERITED."""
    kept = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    return kept | {"PYTHONUNBUFFERED": "1"}  # so that prints are in the log even if it dies
