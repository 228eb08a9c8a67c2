"""Numbers on the command line of the benchmarks."""

import argparse
from collections.abc import Mapping

from capo.runtime.options import whole_number


def add_numbers(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """Add an option for each name, of at least 1 (`candidates`: 2, as a win-rate compares two)."""
    for name, default in defaults.items():
        smallest = 2 if name == "candidates" else 1
        parser.add_argument(
            f"--{name}", type=whole_number(smallest), default=default, help=f"default {default}"
        )
