"""Schemas of the files of an evaluation, as far as they are read again, and their reader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from capo.errors import InputError
from capo.runtime.limits import IMAGES
from capo.runtime.names import MUST, is_name
from capo.runtime.run_folder import (
    CONFIG,
    EVALUATION,
    OUTCOME,
    POLICY,
    RATES,
    REPORT,
    RESULTS,
    SETTINGS,
    read_outcome,
)
from capo.runtime.schema import Said, Section, key
from capo.runtime.stored import Record, read_record
from capo.runtime.terminal import typed


def _single(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("one of them stands there twice")
    return names


def _named(name: str) -> str:
    if not is_name(name):
        raise ValueError(MUST)
    return name


Share = Annotated[float, Field(ge=0, le=1)]


class Interval(Record):
    """A win-rate in 0-1 with its 95 % interval."""

    mean: Share = key("mean over the prompts")
    low: Share = key("lower end of the interval")
    high: Share = key("upper end of the interval")


class Distance(Record):
    """A mean distance of images."""

    mean: float = key("mean over the prompts")


class Drift(Record):
    """Distances of the policy from the base."""

    latents: Distance = key("of images with the same seed")


class Scores(Record):
    """Mean raw scores."""

    policy: float = key("of the policy's images")


class Moves(Record):
    """A measure of the oracle."""

    policy: float = key("of the policy's images")
    base: float = key("of the base's images")


class Results(Record):
    """What is read of results.json."""

    win_rate: dict[str, Interval] = key("win-rates by reward")
    zero: dict[str, Interval] = key("win-rates of the base against itself by reward", {})
    score: dict[str, Scores] = key("scores by reward")
    oracle: dict[str, Moves] = key("measures by name", {})
    hypervolume: Interval | None = key("volume that the win-rates span", None)
    diversity: Moves | None = key("mean distance of two images of a prompt", None)
    drift: Drift | None = key("distances from the base", None)
    policy: str = key("fingerprint of the policy")
    base: str = key("fingerprint of the base")


class Settings(Record):
    """What is read of settings.json."""

    prompts: Annotated[
        list[str], Field(min_length=1), AfterValidator(_single), Said("a list of ids, each of them once")
    ] = key("ids of the prompts")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = key("seed of the images")
    images_per_prompt: Annotated[int, Field(ge=1, le=IMAGES)] = key("images per prompt")
    rewards: dict[str, Annotated[str, AfterValidator(_named), Said(MUST.removeprefix("must be "))]] = key(
        "keys of scores by reward"
    )
    policy_generator: str = key("fingerprint of what drew the policy's images")


def read_results(folder: Path) -> dict[str, Any]:
    """Read `evaluation/results.json` of a run.

    Raises InputError if it is not there or damaged, or of another policy than the run's.
    """
    if (found := current_results(folder)) is None:
        raise InputError(
            f"runs: {folder / EVALUATION / RESULTS} is of another policy than {folder / OUTCOME}, which was "
            f"written after it; run evaluate.py {typed('run', folder)}"
        )
    return found


def is_evaluated(folder: Path) -> bool:
    """Whether the evaluation of the run in `folder` is whole, and of its policy."""
    place = folder / EVALUATION
    try:
        read_results(folder)
        read_settings(folder)  # written last
    except InputError:
        return False
    return all((place / name).is_file() for name in (RATES, REPORT))


def current_results(folder: Path) -> dict[str, Any] | None:
    """Read the results of the run in `folder`; None if they are of another policy than its outcome names.

    That happens where training went on, or the policy was exported anew, without an evaluation.
    """
    found = _read(folder, RESULTS, Results)
    own = read_outcome(folder).get("policy") if (folder / OUTCOME).is_file() else None
    # of a negative model the results name the base, which is sampled
    return found if own in (None, found["policy"]) or found["policy"] == found["base"] else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `evaluation/settings.json` of a run; InputError if it is not there or damaged."""
    return _read(folder, SETTINGS, Settings)


def _read(folder: Path, name: str, schema: type[Section]) -> dict[str, Any]:
    path, again = folder / EVALUATION / name, f"run evaluate.py {typed('run', folder)}"
    try:
        return read_record(path, schema, f"remove it and {again}")
    except FileNotFoundError as error:
        raise InputError(
            f"runs: {folder} has not been evaluated ({path} does not exist); {_remedy(folder)}"
        ) from error


def _remedy(folder: Path) -> str:
    """What makes a directory without results one that has them."""
    if (folder / OUTCOME).is_file():
        return f"run evaluate.py {typed('run', folder)}"
    if (folder / CONFIG).is_file():
        return "finish its training first: it has no outcome.json"
    if (folder / POLICY).is_dir():  # of a soup, say
        own = f"{typed('policy', folder / POLICY)} {typed('hydra.run.dir', folder / EVALUATION)}"
        return f"run evaluate.py {own}, with the values of its merge"
    if (folder.parent / CONFIG).is_file():
        return f"give the run's own directory, {folder.parent}"
    return "give the directory of a finished run, which train.py printed"
