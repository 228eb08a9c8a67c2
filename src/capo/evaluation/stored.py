"""Schemas of the files of an evaluation, as far as they are read again, and their reader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from capo.errors import InputError
from capo.runtime.limits import IMAGES
from capo.runtime.names import MUST, is_name
from capo.runtime.run_folder import EVALUATION, RESULTS, SETTINGS
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


class Interval(Record):
    """A win-rate in 0-1 with its 95 % interval."""

    mean: float = key("mean over the prompts")
    low: float = key("lower end of the interval")
    high: float = key("upper end of the interval")


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
    """Read `evaluation/results.json` of a run; InputError if it is not there or damaged."""
    return _read(folder, RESULTS, Results)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `evaluation/settings.json` of a run; InputError if it is not there or damaged."""
    return _read(folder, SETTINGS, Settings)


def _read(folder: Path, name: str, schema: type[Section]) -> dict[str, Any]:
    path, again = folder / EVALUATION / name, f"run evaluate.py {typed('run', folder)}"
    try:
        return read_record(path, schema, f"remove it and {again}")
    except FileNotFoundError as error:
        raise InputError(f"runs: {folder} has not been evaluated ({path} does not exist); {again}") from error
