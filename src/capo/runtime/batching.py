"""Batches that fit the memory of a device, found by trying."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from capo.errors import InputError

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class FittingBatch:
    """Hands images over in batches that fit: one for which the device's memory runs out is halved, down to a single image.

    What fitted is the largest batch from then on, for as long as this object lives, and is logged once. For work whose result
    does not depend on how it is cut. `what` does the work, and `remedy` is what helps where a single image is too much.
    """

    def __init__(self, what: str, remedy: str):
        self.what, self.remedy = what, remedy
        self.largest: int | None = None  # None: memory has not run out yet
        self._refused = 0  # the smallest batch for which it has, until a smaller one has fitted

    def __call__(
        self, function: Callable[[slice], Result], count: int, most: int | None = None
    ) -> list[Result]:
        """[function(part), ...] for slices of up to `most` that cover range(count), in order; at least one, if an empty one.

        Raises InputError where a single image does not fit.
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
            # outside of the handler, whose traceback holds what the batch had allocated
            self._halve(stop - start, reason)
        return results

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
                "%s: %d images at once do not fit into %s; from here on it gets %d",
                self.what,
                self._refused,
                device_memory(),
                self.largest,
            )
            self._refused = 0


def device_memory() -> str:
    """The memory of the current GPU in words: its size, and what is free of it."""
    if not torch.cuda.is_available():
        return "the device's memory"
    free, total = torch.cuda.mem_get_info()
    return f"the memory of {torch.cuda.get_device_name()} ({total / 1e9:.1f} GB, {free / 1e9:.1f} GB free)"
