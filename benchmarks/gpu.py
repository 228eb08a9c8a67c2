"""Everything that needs a GPU, in one command of about nine minutes, in order of importance.

    python -m benchmarks.gpu --results FOLDER [--minutes 9]
    python -m benchmarks.gpu --results FOLDER --size tiny --device cpu

Each part is a program of its own with a time limit. It writes its figures to FOLDER/<part>.json as they are
measured. The same command starts all parts again, and each measures what is missing in its file. A part that
fails or runs out of time does not end the others; FOLDER/gpu.json records how each ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from capo.runtime.files import write_whole
from capo.runtime.options import number

ROOT = Path(__file__).parents[1]
GRACE = 20.0  # seconds beyond its own limit after which a part is ended
SUMMARY = "gpu.json"


@dataclass(frozen=True)
class Part:
    """A module of this package with its arguments and time limit.

    `sized`: it has the options --size and --minutes.
    """

    name: str
    script: str
    minutes: float
    arguments: Sequence[str] = ()
    sized: bool = True


PARTS = (
    Part("checks", "gpu_checks", 1.0, sized=False),
    Part("train_sdxl", "train_step", 3.0, ("--model", "sdxl")),
    Part("sample_sdxl", "sampling", 1.0, ("--model", "sdxl")),
    Part("generate_sdxl", "generation", 1.5, ("--model", "sdxl")),
    Part("sample_sd3", "sampling", 1.0, ("--model", "sd3")),
    Part("train_sd3", "train_step", 2.0, ("--model", "sd3")),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: exit code, None where it was ended for its time; seconds that it took."""

    code: int | None
    seconds: float


def command(part: Part, results: Path, size: str, device: str, minutes: float) -> list[str]:
    """The part's command line."""
    line = [
        sys.executable,
        "-m",
        f"benchmarks.{part.script}",
        "--results",
        str(results / f"{part.name}.json"),
        "--device",
        device,
    ]
    if part.sized:
        line += ["--size", size, "--minutes", f"{minutes:.2f}"]
    return [*line, *part.arguments]


def run(part: Part, results: Path, size: str, device: str, minutes: float) -> Outcome:
    """Run a part for `minutes` at most; what it prints goes to FOLDER/<part>.log."""
    began = time.monotonic()
    with (results / f"{part.name}.log").open("ab") as log:
        try:
            line = command(part, results, size, device, minutes)
            code = subprocess.run(
                line, stdout=log, stderr=log, timeout=60 * minutes + GRACE, check=False, cwd=ROOT
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    return Outcome(code, round(time.monotonic() - began, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts one after the other until the time is spent."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of figures and logs")
    parser.add_argument("--minutes", type=number(), default=9.0, help="in all; default 9")
    parser.add_argument("--size", default="full", choices=("full", "tiny"), help="default full")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--only", default="", help="parts whose name has this text")
    args = parser.parse_args(arguments)
    results = args.results.absolute()
    results.mkdir(parents=True, exist_ok=True)
    path, began = results / SUMMARY, time.monotonic()
    outcomes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in PARTS:
        left = args.minutes - (time.monotonic() - began) / 60
        if args.only not in part.name:
            continue
        if left <= 0:
            print(f"{part.name} and what follows: not reached; the same command resumes with them")
            return
        outcomes[part.name] = asdict(run(part, results, args.size, args.device, min(part.minutes, left)))
        write_whole(
            path, json.dumps(outcomes, indent=1) + "\n", remedy="choose another folder with --results"
        )
        print(f"{part.name}: {outcomes[part.name]}", flush=True)


if __name__ == "__main__":
    main()
