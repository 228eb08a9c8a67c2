"""Rates measured by `check=true`, kept under the pool root for plans of the same device and settings."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from capo.errors import InputError
from capo.runtime.files import refuse_links, write_json
from capo.runtime.fingerprints import content_fingerprint

FOLDER = "rates"  # under the pool root
SCHEMA = 1
LARGEST = 1_000_000  # bytes of a file; none that is written here comes near
LEAST = 1.0  # seconds over which a rate is measured


@dataclass(frozen=True)
class Measurement:
    """What a rate is of: kind of work, name of the device, and the settings on which it depends, as JSON."""

    kind: str
    device: str
    settings: Mapping[str, Any]

    def entries(self) -> dict[str, Any]:
        """The measurement as JSON values, equal to what a file gives back."""
        return json.loads(json.dumps({"kind": self.kind, "device": self.device, "settings": self.settings}))

    def path(self, root: Path) -> Path:
        """File of the rate under the pool root `root`."""
        return root / FOLDER / f"{self.kind}-{content_fingerprint(self.entries())[:8]}.json"


def check_folder(root: Path) -> None:
    """Raise InputError if the folder of rates under the pool root `root` leads out of it, or is no folder."""
    refuse_links(root, [root / FOLDER], own="; pool.root itself may be a link")
    if os.path.lexists(root / FOLDER) and not (root / FOLDER).is_dir():
        raise InputError(
            f"{root / FOLDER} is no folder, but measured rates should stand there: move it away, or use "
            "another pool.root"
        )


def write_rate(root: Path, measurement: Measurement, per_second: float) -> Path:
    """Write a measured rate, in units a second, in place of an earlier one; InputError if that fails."""
    check_folder(root)
    path = measurement.path(root)
    content = {"schema": SCHEMA, **measurement.entries(), "per_second": per_second}
    remedy = "set pool.root to a folder that can be written"
    write_json(path, content, remedy=remedy)
    return path


def read_rate(root: Path, measurement: Measurement) -> tuple[float | None, str | None]:
    """Read a measured rate.

    Returns:
        Units a second, or None if there is no file or it is not used; and why it is not used, or None.
    """
    path = measurement.path(root)
    if not path.is_file():
        return None, None
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large for a rate")
        content = json.loads(path.read_text(encoding="utf-8"))
        return _checked(content, measurement), None
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # of JSON and UTF-8: ValueErrors
        return None, f"{path} is not used ({error}): check=true writes it anew"


def _checked(content: object, measurement: Measurement) -> float:
    if not isinstance(content, dict):
        raise ValueError("it holds no entries")
    rate: Any = content.get("per_second")
    if type(rate) not in (int, float) or not math.isfinite(rate) or rate <= 0:
        raise ValueError("per_second must be a finite number above 0")
    expected = {"schema": SCHEMA, **measurement.entries()}
    if wrong := [name for name, value in expected.items() if content.get(name) != value]:
        raise ValueError(f"its {', '.join(wrong)} are not those of this plan")
    return float(rate)


def measured_rate(work: Callable[[], int], device: torch.device) -> float:
    """Call `work`, which returns the units that it did, once for warm-up and then for a second at least.

    Returns:
        Units a second, with all work on the device done.
    """
    work()
    begun, done = _now(device), 0
    while not done or _now(device) - begun < LEAST:
        done += work()
    return done / (_now(device) - begun)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
