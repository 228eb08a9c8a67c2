"""Processor time of processes other than this one, from Linux's /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # a second


def _process(folder: Path) -> tuple[int, int, str, float] | None:
    """(process, parent, program, seconds of all threads) of an entry of /proc, if it lives."""
    try:
        first, _, rest = (folder / "stat").read_text().rpartition(")")
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    fields = rest.split()  # state, parent, ...; user and system time are the 14th and 15th field of all
    program = Path(os.fsdecode(words[0])).name or first.partition("(")[2]
    return int(folder.name), int(fields[1]), program, (int(fields[11]) + int(fields[12])) / TICKS


def descendants(ancestor: int) -> dict[int, tuple[str, float]]:
    """Process -> (program, processor seconds so far) of all living descendants of a process."""
    found = [_process(folder) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    living = {process[0]: process for process in found if process}

    def descends(number: int) -> bool:
        while number in living:
            number = living[number][1]
            if number == ancestor:
                return True
        return False

    return {number: (entry[2], entry[3]) for number, entry in living.items() if descends(number)}


def settle(pause: float = 2.0, tries: int = 30) -> None:
    """Wait until the descendants of this process have started: they take a tenth of a core, or time is up."""
    for _ in range(tries):
        before = descendants(os.getpid())
        time.sleep(pause)
        if sum(spent(before, descendants(os.getpid())).values()) < pause / 10:
            return


def spent(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> dict[str, float]:
    """Program -> seconds between two calls of `descendants`; what ended meanwhile is left out."""
    seconds: dict[str, float] = {}
    for number, (program, now) in after.items():
        seconds[program] = seconds.get(program, 0.0) + now - before.get(number, ("", 0.0))[1]
    return seconds
