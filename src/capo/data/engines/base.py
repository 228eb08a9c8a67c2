"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from capo.data.stages import Stage


class Engine(Protocol):
    """What does the work of a pool's stages, in whichever processes."""

    def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
        """Make all that the stages of one pool lack, given in their order.

        Raises InputError where an input is at fault, and Unfinished if some of the work failed.
        """
        ...
