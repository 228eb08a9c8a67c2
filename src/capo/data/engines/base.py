"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from capo.data.stages import Stage
from capo.errors import InputError


class Engine(Protocol):
    """What does the work of a pool's stages, in whichever processes."""

    def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
        """Make all that the stages of one pool lack, given in their order.

        Raises InputError where an input is at fault, and Unfinished if some of the work failed.
        """
        ...


def lost(shard: str, pool: Path, unseen: str) -> InputError:
    """Error for a shard that is not in its pool after it was written; `unseen` says what else may be so."""
    return InputError(
        f"{shard} in {pool} was written but is missing: {unseen}, or something removes them, such as a "
        "scorer; check both, or use another pool.root"
    )
