"""Layout of a pool: paths of its files and ranges of blocks, as functions without disk access."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK = 8  # largest number of candidates in a shard
TEXT, LATENTS, SCORES, REFERENCE, REPORT = "text", "latents", "scores", "reference", "report"
VERIFIED, LOCKS = ".verified", ".locks"


@dataclass(frozen=True)
class Shard:
    """A row of prompts and a block of its candidates: the unit of work, of writing and of resuming."""

    row: int
    block: int
    positions: range  # of the prompts in the pool
    candidates: range

    @property
    def name(self) -> str:
        """Numbers of row and block, such as `00003-01`, as in the names of files."""
        return f"{self.row:05d}-{self.block:02d}"

    @property
    def images(self) -> int:
        """Number of images that it holds."""
        return len(self.positions) * len(self.candidates)


def pool_name(model: str, generator: str, seed: int, split: str) -> str:
    """Name of a pool's folder; it contains the first 8 digits of the fingerprint `generator`."""
    return f"{model}-{generator[:8]}-{seed}-{split}"


def text_path(folder: Path, row: int) -> Path:
    """File with the text conditioning of a row of prompts."""
    return folder / TEXT / f"{row:05d}.safetensors"


def latents_path(folder: Path, row: int, block: int) -> Path:
    """File with the latents of a row of prompts and a block of candidates."""
    return folder / LATENTS / f"{row:05d}-{block:02d}.safetensors"


def scores_path(folder: Path, key: str, row: int, block: int) -> Path:
    """File with the scores of a row of prompts and a block of candidates; `key` is the label source's."""
    return folder / SCORES / key / f"{row:05d}-{block:02d}.parquet"


def reference_errors_path(folder: Path, fingerprint: str) -> Path:
    """File with errors of the reference under the settings that have this fingerprint."""
    return folder / REFERENCE / f"{fingerprint[:16]}.bin"


def row_of(path: Path) -> int:
    """Row that a file of a pool belongs to."""
    return int(path.name.split(".")[0].split("-")[0])


def write_range(numbers: range) -> str:
    """Format a range for a file's header: `range(0, 8)` as `0-8`."""
    return f"{numbers.start}-{numbers.stop}"


def read_range(text: str) -> range:
    """Parse a range from a file's header: `0-8` as `range(0, 8)`. ValueError for anything else."""
    start, stop = text.split("-")
    if write_range(numbers := range(int(start), int(stop))) != text or not numbers:
        raise ValueError(f"{text!r} is no range of numbers")
    return numbers


def plan_blocks(existing: Mapping[int, range], candidates: int) -> list[range]:
    """Candidate ranges of blocks 0, 1, ... that together hold at least the first `candidates`.

    Blocks in `existing` (number -> range), those on disk that can be read, keep their range. A lost block
    ends where the next existing one begins; a new block takes up to 8 candidates.
    """
    blocks: list[range] = []
    while (start := blocks[-1].stop if blocks else 0) < candidates:
        number = len(blocks)
        here = existing.get(number)
        if not here or here.start != start:
            here = range(start, _stop(existing, number, start, candidates))
        blocks.append(here)
    return blocks


def _stop(existing: Mapping[int, range], number: int, start: int, candidates: int) -> int:
    later = min((n for n in existing if n > number), default=None)
    if later is not None:
        lost = later - number - 1  # blocks in between, with at least one candidate each
        if (stop := min(start + BLOCK, existing[later].start - lost)) > start:
            return stop
    return min(start + BLOCK, candidates)
