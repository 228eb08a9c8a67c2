"""Keys that would be ignored: beside another value, by another script, or beside another question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from capo.cli.run_changes import given_keys
from capo.cli.values import plain
from capo.errors import InputError
from capo.runtime.schema import shown

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


def refuse_training_keys(cfg: DictConfig, given: Sequence[str]) -> None:
    """Raise InputError for plan=true, check=true and a `given` push_to_hub, which only train.py supports."""
    if cfg.get("push_to_hub") and "push_to_hub" in given_keys(given):  # a file may be meant for train.py
        raise InputError(
            f"push_to_hub={cfg.push_to_hub} belongs to train.py: give it there with the run's values and its "
            f"hydra.run.dir, or upload a folder by `hf upload {cfg.push_to_hub} FOLDER`"
        )
    if found := [key for key in ("plan", "check") if cfg.get(key)]:
        raise InputError(
            f"{found[0]}=true belongs to train.py: give it there with the same values; pools and evaluations "
            "are included"
        )


def refuse_both(cfg: DictConfig) -> None:
    """Raise InputError for two keys that each name what is evaluated, and for a base that is not used."""
    keys = ("runs", "run", "policy", "base", "benchmark")
    given = {key: shown(plain(cfg)[key]).replace("'", "") for key in keys if cfg.get(key) is not None}
    asked = [f"{key}={given[key]}" for key in ("runs", "run", "policy") if key in given]
    if "runs" in given and "benchmark" in given:
        asked.append("benchmark=NAME")
    if len(asked) > 1:
        raise InputError(
            f"{asked[0]} and {asked[1]}: each names what is to be evaluated, and one of them would be "
            "ignored: leave one out"
        )
    if "base" in given and ("runs" in given or ("run" in given and "benchmark" not in given)):
        raise InputError(
            f"{asked[0]} and base={given['base']}: a run is compared with the base that its own config.yaml "
            "names; leave base out"
        )
