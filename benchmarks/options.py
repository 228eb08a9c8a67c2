"""Numbers on the command line of the benchmarks."""

import argparse
from collections.abc import Callable, Mapping


def whole_number(smallest: int = 1) -> Callable[[str], int]:
    """Type of an option: a whole number of at least `smallest`, else argparse's message with the option."""

    def read(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() and len(text) < 20 else smallest - 1
        if number < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {smallest}")
        return number

    return read


def add_numbers(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """Add an option for each name, of at least 1 (`candidates`: 2, as a win-rate compares two)."""
    for name, default in defaults.items():
        smallest = 2 if name == "candidates" else 1
        parser.add_argument(
            f"--{name}", type=whole_number(smallest), default=default, help=f"default {default}"
        )
