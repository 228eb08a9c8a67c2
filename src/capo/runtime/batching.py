"""Find the batch size that fits a device's memory, by halving it when the memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from capo.errors import InputError

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class FittingBatch:
    """Process images in batches, halving a batch when the device runs out of memory, down to a single image.

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
            except torch.OutOfMemoryError as error:
                reason = str(error)
            else:
                start = stop
                self._fitted()
                continue
            # Outside the handler: its traceback keeps alive the tensors that the batch allocated.
            self._halve(stop - start, reason)
        return results

    def at_most(self, batch: int) -> int:
        """Largest batch that is processed at once where `batch` is asked for."""
        return min(batch, self.largest or batch)

    def _halve(self, size: int, reason: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size <= 1:
            raise InputError(
                f"{self.what}: a single image does not fit into {device_memory()}: {self.remedy} ({reason})"
            )
        self._refused, self.largest = size, size // 2

    def _fitted(self) -> None:
        if self._refused:
            log.warning(
                "%s: %d images at once do not fit into %s; from now on it gets %d",
                self.what,
                self._refused,
                device_memory(),
                self.largest,
            )
            self._refused = 0


def device_memory() -> str:
    """Describe the current GPU's memory, total and free, for messages."""
    if not torch.cuda.is_available():
        return "the device's memory"
    free, total = torch.cuda.mem_get_info()
    return f"the memory of {torch.cuda.get_device_name()} ({total / 1e9:.1f} GB, {free / 1e9:.1f} GB free)"
