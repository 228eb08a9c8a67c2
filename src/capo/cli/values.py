"""Check the values of a configuration against one table of keys, before anything is loaded or written."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo.backbones import Family
from capo.backbones.precision import AUTOCAST, DTYPES
from capo.calibration import LINKS, METHODS
from capo.cli.rules import (
    FILES,
    FOLDER,
    FOLDERS,
    NAMES,
    PATH_NAME,
    SEED,
    SWITCH,
    TEXT,
    Rule,
    number,
    one_of,
    optional,
    shown,
    whole,
)
from capo.cli.targets import REWARDS, TARGET, find, misplaced, place_of
from capo.data.dataset import ENCODE, POOL, TIMES
from capo.data.pool.import_table import LABELS
from capo.errors import InputError, ParameterError, closest
from capo.noise import FLOW_DRAWS, SOURCES, VP_DRAWS
from capo.objectives.averaging import REDUCTIONS
from capo.runtime.launch import STRATEGIES
from capo.runtime.optimizers import ADAMW, ADAMW_8BIT
from capo.runtime.threads import BATCHES, OPERATIONS
from capo.soup import METHODS as SOUPS
from capo.training.choice import MONITORS

LOCAL, RAY = "local", "ray"  # kinds of engine
MISSING = "???"  # mandatory value that is not given; reported by the code that needs it
DRAWS = list(dict.fromkeys([*VP_DRAWS, *FLOW_DRAWS]))
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")


def _are_devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or all(part.strip().isdigit() for part in value.split(","))
    if isinstance(value, list):
        return bool(value) and all(type(part) is int and part >= 0 for part in value)
    return type(value) is int and (value >= 1 or value == -1)


TABLE: dict[str, Rule] = {
    "seed": SEED,
    "threads": optional(whole(1)),
    "calibration": one_of(list(METHODS)),
    # whether null is allowed is decided by the objective
    "objective.beta": replace(number(above=0), holds=optional(number(above=0)).holds),
    "pool.root": TEXT,
    "pool.seed": SEED,
    "pool.candidates": whole(2),
    "pool.prompts_per_shard": whole(1),
    "pool.imported": optional(TEXT),
    "pool.labels": one_of(LABELS),
    "sampling.steps": whole(1),
    "sampling.guidance": number(),
    "sampling.batch": whole(1),
    "sampling.decode": optional(whole(1)),
    "sampling.precision": one_of(list(AUTOCAST)),
    "sampling.unconditional": TEXT,  # words and folders: `check_unconditional` in readiness
    "sampling.parallel": one_of((OPERATIONS, BATCHES)),
    "sampling.channels_last": SWITCH,
    "sampling.compile": SWITCH,
    "engine.kind": one_of((LOCAL, RAY)),
    "engine.address": TEXT,
    "engine.attempts": whole(1),
    "engine.start_limit": number(above=0),
    **{
        f"engine.{stage}.{key}": rule
        for stage in ("text", "latents", "scores")
        for key, rule in {"devices": number(above=0), "workers": optional(whole(1))}.items()
    },
    "data.workers": optional(whole(0)),
    "data.text": one_of((POOL, ENCODE)),
    "selection.group": whole(2),
    "noise.source": one_of(SOURCES),
    "noise.inversion.steps": whole(1),
    "noise.inversion.renoise": whole(0),
    "noise.inversion.eta": number(least=0),
    "noise.shared": SWITCH,
    "noise.weighting": one_of(("sigmoid", "constant")),
    "noise.bias": number(),
    "noise.draw": one_of(DRAWS),
    "noise.times": one_of(TIMES),
    "noise.times_per_pair": whole(1),
    "noise.reduction": one_of(REDUCTIONS),
    "anchor.weight": number(least=0),
    "anchor.slack": number(least=0),
    "model.draw": one_of(DRAWS),
    "validation.every": whole(1),
    "validation.images": whole(2),
    "validation.monitor": one_of(MONITORS),
    "validation.strengths": Rule(
        "a list of numbers above 0 and at most 1, or null",
        lambda value: (
            value is None
            or (isinstance(value, list) and all(type(a) in (int, float) and 0 < a <= 1 for a in value))
        ),
    ),
    "validation.pictures": whole(1),
    "validation.held_out": Rule(
        "rewards by name: validation.held_out=[looks] on the command line, "
        "rewards@validation.held_out: [looks] in the defaults list of a file",
        lambda value: value is None or isinstance(value, Mapping),
    ),
    "evaluation.seed": SEED,
    "evaluation.images": whole(2),
    "evaluation.zero_prompts": whole(1),
    "evaluation.diversity": optional(TEXT),
    "evaluation.diversity_prompts": whole(1),
    "trainer.max_steps": whole(1),
    "trainer.batch": whole(1),
    "trainer.micro_batch": optional(whole(1)),
    "trainer.lr": number(above=0),
    "trainer.warm_up": whole(0),
    "trainer.gradient_clip": optional(number(above=0)),
    "trainer.ema": optional(
        Rule("a number above 0 and below 1", lambda value: type(value) is float and 0 < value < 1)
    ),
    "trainer.checkpoint_every": optional(whole(1)),
    "trainer.max_bad_steps": whole(1),
    "trainer.pinned": Rule(
        "from 0 to less than 1", lambda value: type(value) in (int, float) and 0 <= value < 1
    ),
    "trainer.signal_every": optional(whole(0)),
    # none in which weights are stored in half precision: it would lose updates of 1e-5
    "trainer.precision": one_of(list(AUTOCAST)),
    "trainer.accelerator": one_of(ACCELERATORS),
    "trainer.devices": Rule("a number of devices (-1: all), a list of their numbers, or auto", _are_devices),
    "trainer.strategy": one_of(STRATEGIES),
    "trainer.num_nodes": whole(1),
    "trainer.optimizer": one_of((ADAMW, ADAMW_8BIT)),
    "trainer.gradient_checkpointing": SWITCH,
    "trainer.compile": SWITCH,
    "trainer.compile_tolerance": number(above=0),
    "trainer.channels_last": SWITCH,
    "trainer.log_every": whole(1),
    "model.name": PATH_NAME,
    "model.adapter_lr": number(above=0),
    "model.backbone.dtype": one_of(list(DTYPES)),
    "model.lora.rank": whole(1),
    "model.lora.alpha": number(above=0),
    "model.lora.seed": SEED,
    **{
        f"{place}.*.{key}": rule
        for place in REWARDS
        for key, rule in {
            "link": one_of(list(LINKS)),
            "scale": number(above=0),
            "weights": optional(TEXT),
            "version": whole(1),
            "needs_prompt": SWITCH,
            "python": optional(TEXT),
            "timeout": number(above=0),
            "memory": optional(number(above=0)),
        }.items()
    },
    "plan": SWITCH,
    "check": SWITCH,
    "planning.flops": optional(number(above=0)),
    "planning.scoring": Rule(
        "images a second by reward: 'planning.scoring={pickscore: 50}', or null",
        lambda value: value is None or isinstance(value, Mapping),
    ),
    "planning.scoring.*": number(above=0),
    "planning.utilization": Rule(
        "a number above 0 and at most 1", lambda value: type(value) in (int, float) and 0 < value <= 1
    ),
    "model.published": optional(TEXT),
    "evaluate": SWITCH,
    "export": one_of(("adapter", "full", "single_file")),
    "export_dtype": one_of(list(DTYPES)),
    "push_to_hub": optional(TEXT),
    "import.better": one_of(("lower", "higher")),
    "import.candidates": optional(whole(2)),
    "import.limit": optional(whole(1)),
    "repair": SWITCH,
    "pair_export.file": TEXT,
    "pair_export.per_prompt": optional(whole(1)),
    "pair_export.images": one_of(("jpeg", "png")),
    "pair_export.row_group": whole(1),
    "method": one_of(SOUPS),
    "policies": FOLDERS,
    "weights": Rule(
        "a list of finite numbers, one for each policy, or null",
        lambda value: value is None or (isinstance(value, list) and all(map(number().holds, value))),
    ),
    "run": optional(FOLDER),
    "runs": optional(FOLDERS),
    "policy": optional(FOLDER),
    "base": optional(FOLDER),
    "results": optional(FILES),
    "benchmark.seed": SEED,
    "benchmark.base": SWITCH,
    "benchmark.rewards": Rule(
        "evaluation.rewards, evaluation.oracle, or rewards by name (rewards@benchmark.rewards=NAME)",
        lambda value: value in ("evaluation.rewards", "evaluation.oracle") or isinstance(value, Mapping),
    ),
    "trust": NAMES,
    "study.against": optional(FOLDER),
    "study.prompts": whole(1),
    "study.seed": SEED,
    "study.checks": whole(0),
    "study.ties": SWITCH,
    "study.names": Rule(
        "two names, those of the policy and of what it is compared with, or null",
        lambda value: value is None or (NAMES.holds(value) and len(value) == 2),
    ),
    "study.host": TEXT,
    "study.port": whole(0, 65535),
}
# groups and keys with one `_target_`, whose arguments are checked against its signature
CALLED = ("objective", "pairs", "prompts", "import", "model.backbone", "benchmark.set")


def check_values(cfg: DictConfig) -> None:
    """Raise InputError with one line for each invalid value: key, value, and what it must be.

    Missing values (`???`) and keys that the configuration does not have are ignored.
    """
    values = resolved(cfg)
    faults: dict[str, str] = {}
    for pattern, rule in TABLE.items():
        for key, value in _found(values, pattern.split(".")):
            if value != MISSING and (fault := rule.fault(key, value)):
                faults[key] = fault
    faults |= dict(misplaced(values)) | dict(_name_faults(values))
    for group in CALLED:
        for _, node in _found(values, group.split(".")):
            for key, fault in _call_faults(group, node) if node is not None else ():
                faults.setdefault(key, fault)
    if faults:
        lines = list(faults.values())
        raise InputError(
            lines[0] if len(lines) == 1 else "\n  ".join(["these values cannot be used:", *lines])
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve the configuration to plain values; OmegaConf's error for a `${...}` that cannot be resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))  # a mapping gives nothing else


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Resolve the configuration to plain values; InputError for a `${...}` that cannot be resolved."""
    try:
        return plain(cfg)
    except OmegaConfBaseException as error:
        reason, key = str(error).splitlines()[0], error.full_key or "the configuration"
        raise InputError(f"{key} cannot be resolved ({reason}); give {key}=VALUE itself") from error


def _found(values: object, path: Sequence[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of everything at `path`, where `*` matches every name."""
    if not path:
        yield above[1:], values
    elif isinstance(values, Mapping):
        for name in values if path[0] == "*" else [path[0]]:
            if name in values:
                yield from _found(values[name], path[1:], f"{above}.{name}")


def _name_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for rewards whose name cannot be that of a folder."""
    for place in REWARDS:
        for key, _ in _found(values, [*place.split("."), "*"]):
            name = key.removeprefix(f"{place}.")
            if fault := PATH_NAME.fault(place, name):
                yield key, fault


def _call_faults(group: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for arguments that the group's target does not have, or of another type."""
    target, place = node.get(TARGET), place_of(tuple(group.split(".")))
    assert place, group  # CALLED names places
    arguments = {name: value for name, value in node.items() if not name.startswith("_")}
    try:
        function = find(place, target)
        signature = inspect.signature(function)
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception as error:  # importing a user's module can raise anything
        yield (
            f"{group}._target_",
            f"{group}._target_={target}: cannot be used ({error}); give module.function",
        )
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    faults = {}
    for name, value in arguments.items():
        key = f"{group}.{name}"
        if name not in signature.parameters and not takes_any:
            near = closest(name, list(signature.parameters))
            faults[key] = f"{key}={shown(value)}: {target} takes no such argument" + (
                f"; did you mean {group}.{near[0]}?" if near else ""
            )
        elif value != MISSING and (rule := _hinted(hints.get(name))) and (fault := rule.fault(key, value)):
            faults[key] = fault
    yield from faults.items()
    if not faults and inspect.isclass(function) and issubclass(function, Family):
        try:
            function.check_options(**arguments)
        except ParameterError as error:
            yield f"{group}.{error.parameter}", _said_of(group, error)


@contextmanager
def under(group: str) -> Iterator[None]:
    """What is refused of a parameter is said of its key under `group`: of `objective.beta` for `beta`."""
    try:
        yield
    except ParameterError as error:
        raise InputError(_said_of(group, error)) from error


def _said_of(group: str, error: ParameterError) -> str:
    return f"{group}.{error.parameter}={shown(error.value)}: {error.must}"


def _hinted(hint: object) -> Rule | None:
    """Rule that follows from a type annotation; None if it does not restrict plain values."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = set(get_args(hint))
        if kinds <= {str, Path}:
            return TEXT
        rule = _hinted((kinds - {type(None)}).pop()) if len(kinds - {type(None)}) == 1 else None
        return optional(rule) if rule and type(None) in kinds else rule
    return {int: whole(), float: number(), bool: SWITCH, str: TEXT}.get(hint)
