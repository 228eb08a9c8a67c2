"""Import heavy libraries without the garbage collector, which otherwise takes a third of the time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Keep the garbage collector off during the block, and exempt from it what then exists.

    The objects that diffusers and transformers make at import stay. The collector would look at them again
    and again during the imports, and in every full collection of the run after that. Nothing is exempt if the
    block imports nothing new, as in the second job of a sweep: garbage of the first would stay with it.
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_on:
            gc.enable()
