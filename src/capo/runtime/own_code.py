"""Messages about the user's own code: its name, and what it raised."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from capo.errors import InputError
from capo.runtime.memory import ran_out


def called_by(code: Any) -> Any:
    """What a `functools.partial`, or one of a partial, calls; anything else itself."""
    while isinstance(code, functools.partial):
        code = code.func
    return code


def name_of(code: Any) -> str:
    """Dotted name `module.name` of a function or class, of what a partial calls, or of an object's class."""
    code = called_by(code)
    named = code if hasattr(code, "__qualname__") else type(code)
    return f"{named.__module__}.{named.__qualname__}"


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """InputError that begins with `what` for an exception in the block.

    Errors that are told anyway are raised as they are: an InputError, memory that ran out, and what the
    system says of a file.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        ends = isinstance(error, SystemExit) and type(error) is not SystemExit  # Lightning's, on SIGTERM
        if isinstance(error, InputError | OSError) or ends or ran_out(error):
            raise
        told = traceback.format_exception_only(type(error), error)[-1].strip().splitlines()[0]
        raise InputError(
            f"{what} failed ({told}); correct it, or its arguments: HYDRA_FULL_ERROR=1 shows where"
        ) from error
