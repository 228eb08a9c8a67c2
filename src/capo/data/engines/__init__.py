"""Which processes fill a pool: this one, with those of a launcher, or workers on a Ray cluster."""

from capo.data.engines.base import Engine
from capo.data.engines.local import LocalEngine, run_stage

__all__ = ["Engine", "LocalEngine", "run_stage"]
