"""Keys on the command line that another value leaves without effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from capo.errors import InputError

# a key, or the beginning of several; whether it has an effect; with which value it has one
COUNTS: Sequence[tuple[str, Callable[[DictConfig], object], str]] = (
    ("noise.inversion.", lambda cfg: cfg.noise.source == "inverted", "noise.source=inverted"),
    ("noise.reduction=inside", lambda cfg: cfg.noise.times_per_pair > 1, "noise.times_per_pair=2 or more"),
    ("noise.bias=", lambda cfg: cfg.noise.weighting != "constant", "noise.weighting=sigmoid"),
    ("anchor.slack=", lambda cfg: cfg.anchor.weight or not cfg.anchor.slack, "anchor.weight=WEIGHT above 0"),
    ("pool.labels=human", lambda cfg: cfg.pool.imported, "pool.imported=FOLDER"),
    ("evaluation.diversity_prompts=", lambda cfg: cfg.evaluation.diversity, "evaluation.diversity=auto"),
)


def check_idle(cfg: DictConfig, given: Sequence[str]) -> None:
    """Raise InputError for a key among those `given` on the command line that would be ignored.

    Of a file the same keys may be meant for other choices, and of a sweep for other jobs.
    """
    for override in given:
        for key, counts, other in COUNTS:
            if override.lstrip("+").startswith(key) and not counts(cfg):
                raise InputError(f"{override} counts with {other} alone; give that too, or leave it out")
