"""Find the batch size that fits the memory, by halving it when the memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from capo.errors import InputError
from capo.runtime.memory import memory_of, ran_out

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class FittingBatch:
    """Process images in batches, halving a batch when memory runs out, down to a single image.

    The reduced size is the limit for all later calls on this object, and it is logged once. Use it only for
    work whose result depends on the batch size by rounding at most.

    Args:
        what: name of the work, as messages show it.
        remedy: advice for the error message if a single image does not fit.
    """

    def __init__(self, what: str, remedy: str):
        self.what, self.remedy = what, remedy
        self.largest: int | None = None  # None: memory has not run out yet
        self._refused = 0  # smallest batch that ran out of memory; 0 once a smaller one has fit
        self._memory = ""  # which ran out, in words

    def __call__(
        self, function: Callable[[slice], Result], count: int, most: int | None = None
    ) -> list[Result]:
        """Return [function(part), ...] for slices of at most `most` that cover range(count), in order.

        With `count` 0 the function is called once, with an empty slice. Raises InputError if a single image
        does not fit.
        """
        results: list[Result] = []
        start = 0
        while start < count or not results:
            stop = min(start + min(self.largest or count, most or count), count)
            try:
                results.append(function(slice(start, stop)))
            except (RuntimeError, MemoryError, OSError) as error:  # torch's own error is a RuntimeError
                if not ran_out(error):
                    raise
                reason, memory = str(error), memory_of(error)
            else:
                start = stop
                self._fitted()
                continue
            # Outside the handler: its traceback keeps alive the tensors that the batch allocated.
            self._halve(stop - start, memory, reason)
        return results

    def at_most(self, batch: int) -> int:
        """Largest batch that is processed at once where `batch` is asked for."""
        return min(batch, self.largest or batch)

    def _halve(self, size: int, memory: str, reason: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size <= 1:
            raise InputError(
                f"{self.what}: a single image does not fit into {memory}: {self.remedy} ({reason})"
            )
        self._refused, self._memory, self.largest = size, memory, size // 2

    def _fitted(self) -> None:
        if self._refused:
            log.warning(
                "%s: %d images at once do not fit into %s; from now on it gets %d",
                self.what,
                self._refused,
                self._memory,
                self.largest,
            )
            self._refused = 0
