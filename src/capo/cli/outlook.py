"""Hours that are left of a command, told before it works and kept up to date while it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from capo.cli.build import Components
from capo.cli.plan import request_of
from capo.cli.rates import gpu_name
from capo.data.generation import PoolSpec, open_pool, stages_of
from capo.data.rounds import refreshes, rounds_left, validations
from capo.data.watching import Place, PoolWatch, watched
from capo.errors import InputError
from capo.preflight.devices import peak_of
from capo.preflight.hours import costs_of, pool_work, work_of
from capo.preflight.plan import flops_of
from capo.preflight.requests import EVALUATED, OF_ROUNDS, VALIDATED, PoolRequest, Request
from capo.runtime.launch import launch
from capo.runtime.outlook import EVALUATION as EVALUATING
from capo.runtime.outlook import OF_POOLS, TRAINING, VALIDATION, Outlook, Work
from capo.runtime.run_folder import CHECKPOINTS, EVALUATION, LAST, ONLINE, POOLS
from capo.training.loggers import CurvesFile, logged_step, pool_seconds
from capo.training.trackers import Tracker


def _request(cfg: DictConfig, components: Components) -> Request | None:
    """The plan's request; its peak only where it is known, and None for a model without configs."""
    counts: dict[str, int | None] = {split: len(prompts) for split, prompts in components.splits.items()}
    try:
        request = request_of(cfg, counts)
    except InputError:
        return None
    peak = peak_of(cfg.planning.flops, gpu_name(cfg.trainer.accelerator))
    return replace(request, flops=None) if peak.assumed else request


def _missing(spec: PoolSpec, components: Components, name: str) -> dict[str, int] | None:
    """Units that a pool lacks, by stage, as the headers of its files tell; None: all of them."""
    generator = components.generator
    folder = spec.folder(generator.fingerprint)
    if not folder.is_dir():
        return None
    try:
        pool = open_pool(spec, generator)
        stages = stages_of(pool, spec, generator, components.judges[name], verify=False)
        return {stage.name: sum(map(stage.amount, stage.todo())) for stage in stages}
    except InputError:  # which filling the pool raises again
        return None


def outlook_of(
    request: Request, specs: Mapping[str, PoolSpec], components: Components, stages: Sequence[str]
) -> Outlook:
    """Outlook of the `stages` that fill pools and of all else in the request, less what is there already."""
    known = request.rates
    rated = None not in (known.steps, known.decoding, known.pairs)
    counted = {} if request.flops is None or rated else flops_of(request)
    outlook = Outlook.of(
        [work for work in work_of(request) if work.stage in stages or work.stage not in OF_POOLS],
        costs_of(request, counted),
    )
    for name, spec in specs.items():
        if name not in request.pools:
            continue
        missing = _missing(spec, components, name)
        for kind, work in _by_stage(request.pools[name]).items():
            if missing is not None and work.units:
                outlook.done(work.stage, work.kind, max(0, work.units - missing[kind]))
    return outlook


def _by_stage(pool: PoolRequest) -> dict[str, Work]:
    """Work of a pool, by its stages."""
    return dict(zip(OF_POOLS, pool_work(pool), strict=False))


def _places(
    cfg: DictConfig,
    request: Request | None,
    specs: Mapping[str, PoolSpec],
    components: Components,
    folder: Path,
) -> dict[Path, Place]:
    fingerprint = components.generator.fingerprint
    found = {}
    for name, spec in specs.items():
        pool = spec.folder(fingerprint)
        known = request is not None and name in request.pools
        found[pool] = Place(name, _by_stage(request.pools[name]) if request is not None and known else {})
    if request is not None and EVALUATED in request.pools:
        found[folder / EVALUATION / POOLS] = Place("policy", _by_stage(request.pools[EVALUATED]))
    if request is not None and (later := request.pools.get(OF_ROUNDS)):
        one = Place(OF_ROUNDS, _by_stage(replace(later, times=1)))
        parts = rounds_left(0, cfg.online.every, cfg.trainer.max_steps)
        found |= {folder / ONLINE / part.name: one for part in parts if part.number}
    return found


def _trained(cfg: DictConfig, request: Request, outlook: Outlook, folder: Path) -> None:
    """Take from the outlook what a run that is resumed has behind it, as its curves tell."""
    step = logged_step(folder) if (folder / CHECKPOINTS / LAST).is_file() else 0
    outlook.done(TRAINING, TRAINING, step * cfg.trainer.batch)
    steps, every, rounds = cfg.trainer.max_steps, cfg.validation.every, cfg.online.every
    behind = validations(0, steps, every, rounds) - validations(step, steps, every, rounds)
    for work in pool_work(request.pools[VALIDATED]):
        if work.units:
            outlook.done(VALIDATION, work.kind, work.units * behind / request.pools[VALIDATED].times)
    if later := request.pools.get(OF_ROUNDS):
        for work in pool_work(later):
            if work.units:
                outlook.done(
                    work.stage, work.kind, work.units * refreshes(rounds, max(step, 1)) / later.times
                )


@contextmanager
def followed(
    cfg: DictConfig,
    components: Components,
    folder: Path,
    loggers: Sequence[Logger],
    stages: Sequence[str] = OF_POOLS,
    trains: bool = True,
) -> Iterator[Outlook]:
    """Follow the pools that are filled in the block, on the first process; yield what is left of the command.

    Args:
        cfg: the configuration.
        components: what the command works with.
        folder: the run directory.
        loggers: loggers, of which those that take figures of pools get them.
        stages: stages of the pools that are completed before training.
        trains: whether training and evaluation follow; else all pools are filled, and nothing else is done.
    """
    request, outlook = _request(cfg, components) if launch().first else None, Outlook()
    specs = dict(components.pool_specs)
    if cfg.pool.imported:
        del specs["train"]
    if request is None:
        outlook.left[EVALUATING, EVALUATING] = None  # there is more to do than what can be followed
    else:
        if not trains:
            filled = {
                name: replace(pool, times=1, stage="")
                for name, pool in request.pools.items()
                if pool.stored and not pool.in_run
            }
            request = replace(request, pools=filled, training=replace(request.training, steps=0))
        outlook = outlook_of(request, specs, components, stages)
        if trains:
            _trained(cfg, request, outlook, folder)
    sinks = [logger.log_pools for logger in loggers if isinstance(logger, CurvesFile | Tracker)]
    places = _places(cfg, request, specs, components, folder)
    watch = PoolWatch(outlook, places, sinks, pool_seconds(folder)) if launch().first else None
    with watched(watch):
        yield outlook


def outlook_line(outlook: Outlook, accelerator: str) -> str:
    """Hours that are left, by stage and in all, and the devices that are seen and used, in one line."""
    used, name = launch().world_size, gpu_name(accelerator)
    seen = torch.cuda.device_count() * launch().machines
    devices = "the CPU" if name is None else f"{used} of {seen} GPU{'s' if seen > 1 else ''} ({name})"
    found, total = outlook.hours(), outlook.total
    if not found:
        return f"hours: nothing is left to do but to load, on {devices}"
    if not total.hours:
        return f"hours are not known before work has begun, on {devices}: check=true measures rates"
    stages = ", ".join(f"{stage} {hours}" for stage, hours in found.items())
    unrated = f" (no rate is known of {', '.join(total.without)})" if total.without else ""
    return f"hours: {stages}; {total} in all, on {devices}{unrated}"
