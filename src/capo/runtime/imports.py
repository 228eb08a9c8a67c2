"""Import heavy libraries without the garbage collector, which otherwise takes a third of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Keep the garbage collector off during the block, and exempt from it what then exists.

    The objects that diffusers and transformers make at import stay. The collector would look at them again
    and again during the imports, and in every full collection of the run after that.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
