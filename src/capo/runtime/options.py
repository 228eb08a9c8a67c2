"""Numbers among the options of programs that Hydra does not start: argparse names the option of a bad one."""

import argparse
import math
import re
from collections.abc import Callable

LONGEST = 20  # digits of a whole number


def whole_number(smallest: int = 1, largest: int | None = None) -> Callable[[str], int]:
    """Type of an option: a whole number from `smallest` to `largest` (None: any), else argparse's message."""
    words = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"

    def read(text: str) -> int:
        found = int(text) if re.fullmatch(rf"\s*-?\d{{1,{LONGEST - 1}}}\s*", text) else None
        if found is None or found < smallest or (largest is not None and found > largest):
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number {words}")
        return found

    return read


def number(*, zero: bool = True, below: float = math.inf) -> Callable[[str], float]:
    """Type of an option: a finite number above 0, or, with `zero`, 0, and `below` another one."""
    words = ("of at least 0" if zero else "above 0") + (f" and below {below:g}" if below < math.inf else "")

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not 0 <= found < below or (found == 0 and not zero):
            raise argparse.ArgumentTypeError(f"{text!r} must be a finite number {words}")
        return found

    return read
