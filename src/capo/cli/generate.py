"""Run generate.py: fill pools stage by stage, import images, export pairs, or report on candidates."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from capo.backbones.parts import TEXT
from capo.cli.build import (
    Components,
    base_of,
    build_components,
    built,
    check_imported,
    sampler_settings,
    training_data,
)
from capo.cli.engines import PARTS as STAGE_PARTS
from capo.cli.engines import RAY, check_engine, engaged, engine_of
from capo.cli.idle import refuse_training_keys
from capo.cli.messages import plain_errors
from capo.cli.pool_state import show_status, verify
from capo.cli.process import prepare_process
from capo.cli.readiness import check_loggers, check_ready, check_weights
from capo.cli.report import check_scored, report_pool
from capo.cli.schema import Generating, check_group_choices, check_values
from capo.data.generation import COMMANDS, STAGES, fill_pool
from capo.data.importing.filling import import_pool
from capo.data.importing.source import Source
from capo.data.importing.survey import described
from capo.data.pair_export import check_target, export_pairs
from capo.data.pool.import_table import read_import_table
from capo.errors import InputError
from capo.runtime.launch import launch
from capo.runtime.processes import check_devices
from capo.runtime.terminal import Terminal, typed

console = Terminal()
IMPORTING = re.compile(r"[+~]*(stage|import(\..*)?|pool\.imported|pool\.labels|objective|pair_export\..*)=")
ALONE = ("import", "export", "report", "status", "verify")  # stages that one process does
# stage on the command line -> stages of a pool that it completes
FILLING = {"all": STAGES, **{command: (stage,) for stage, command in COMMANDS.items()}}
# stage on the command line -> parts of the base that it computes with besides the VAE; others: all
PARTS = {COMMANDS[stage]: parts for stage, parts in STAGE_PARTS.items()} | {
    "import": (TEXT,),
    "export": (),
    "report": (),
    "status": (),
}


def import_source(cfg: DictConfig) -> Source:
    """Source of the images of `stage=import`; InputError if it is not configured or lacks a column."""
    check_weights(cfg)
    if not cfg.get("import"):
        raise InputError(
            "stage=import: choose what to import: import=pickapic, import=rankings or import=folder, "
            "and import.files=PLACE"
        )
    if OmegaConf.is_missing(cfg["import"], "files"):
        raise InputError(
            "import.files is not given: set it to the table, folder or list of tables to import, e.g. "
            "import.files=FOLDER"
        )
    return built(cfg, "import")


def import_images(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Make a pool from existing images and human choices, and print the command that trains on it.

    `overrides` are those of the command line.
    """
    check_engine(cfg)
    source = import_source(cfg)
    prepare_process(cfg.threads)
    pool = import_pool(
        source,
        base_of(cfg, PARTS["import"]),
        sampler_settings(cfg),
        Path(cfg.pool.root),
        cfg.model.name,
        prompts_per_shard=cfg.pool.prompts_per_shard,
        engine=engine_of(cfg),
    )
    table = read_import_table(pool.folder)
    labels = "objective=dpo" if table.ranks is not None else "pool.labels=rewards"
    others = shlex.join(override for override in overrides if not IMPORTING.match(override))
    console.print(described(table.report))
    command = f"python train.py {typed('pool.imported', pool.folder)} {labels} {others}"
    console.print(command.rstrip(), soft_wrap=True)


def export(cfg: DictConfig, components: Components) -> None:
    """Write the pairs that training with this configuration would draw from to a file for other trainers."""
    data = training_data(cfg, components, stages=("scores",))
    candidates = data.select(built(cfg, "pairs"), cfg.calibration, cfg.seed, cfg.noise.shared)
    settings = {
        "data": data.described,
        "model": cfg.model.name,
        "pairs": cfg.pairs._target_,
        "calibration": cfg.calibration,
        "seed": cfg.seed,
    }
    own = cfg.pair_export
    count = export_pairs(
        candidates,
        components.backbone,
        own.file,
        per_prompt=own.per_prompt,
        image_format=own.images,
        row_group=own.row_group,
        batch=cfg.sampling.decode or cfg.sampling.batch,
        settings=settings,
    )
    console.print(f"{count} pairs in {own.file}", soft_wrap=True)


def report(cfg: DictConfig, components: Components) -> None:
    """Report on the scores, calibrated rewards and pairs of the candidates (docs/calibration.md)."""
    if not cfg.pool.imported:
        check_scored(components.pool_specs["train"], components.generator, components.rewards)
    report_pool(training_data(cfg, components, stages=()), built(cfg, "pairs"), cfg.calibration, console)


def check_stage(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise InputError for what only another stage than `cfg.stage` reads, and this one would leave out."""
    exporting = [override for override in overrides if override.lstrip("+").startswith("pair_export.")]
    given = {
        "verify": ("repair=true" if cfg.repair else None, "repairs"),
        "import": ("import" if cfg.get("import") else None, "imports"),
        "export": (next(iter(exporting), None), "exports"),
    }
    for stage, (found, does) in given.items():
        if found and cfg.stage != stage:
            key = found.partition("=")[0]
            raise InputError(
                f"{found} with stage={cfg.stage}: stage={stage} alone {does}; give stage={stage}, or leave "
                f"{key} out"
            )


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Run `cfg.stage`: fill the four pools or one stage of them, import images, export pairs, or report.

    `overrides` are those of the command line, which may be for another stage (`check_stage`).
    """
    check_values(cfg, Generating)
    refuse_training_keys(cfg, overrides)
    check_stage(cfg, overrides)
    if cfg.stage in ALONE and launch().world_size > 1:
        raise InputError(f"stage={cfg.stage} is the work of one process: run it without the launcher")
    if cfg.stage == "import":
        return import_images(cfg, overrides)
    console.quiet = not launch().first
    scoring = cfg.stage in ("all", "score") or (cfg.stage == "verify" and cfg.repair)
    check_ready(cfg, scoring=scoring)
    check_imported(cfg)
    if cfg.stage == "export":
        check_target(Path(cfg.pair_export.file), "pair_export.file")
    if cfg.stage in FILLING:
        check_loggers(cfg)
        check_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    prepare_process(cfg.threads)
    build = partial(build_components, cfg, scoring=scoring, parts=parts_of(cfg))
    if cfg.stage == "export":
        return export(cfg, build())
    if cfg.stage == "report":
        return report(cfg, build())
    if cfg.stage == "status":
        return show_status(cfg, build(), console)
    if cfg.stage == "verify":
        return verify(cfg, engaged(cfg, build()), console)
    fill_pools(cfg, build)


def parts_of(cfg: DictConfig) -> tuple[str, ...] | None:
    """Parts of the base that this process computes with besides the VAE; None: all."""
    if cfg.stage == "verify" and not cfg.repair:
        return ()
    if cfg.engine.kind == RAY and cfg.stage not in ALONE:
        return PARTS["text"]  # a driver computes nothing but the size of a text embedding
    return PARTS.get(cfg.stage)


def fill_pools(cfg: DictConfig, build: Callable[[], Components]) -> None:
    """Complete `cfg.stage` of the four pools, with their progress in the loggers."""
    from capo.cli.outlook import followed, outlook_line  # with Lightning, which other stages do without
    from capo.cli.tracking import GENERATE, trackers

    folder, stages = Path(cfg.run_dir), FILLING[cfg.stage]
    with trackers(cfg, None, folder, GENERATE) as loggers:
        # now: loading takes longer than to find that a tracker cannot begin
        components = engaged(cfg, build())
        with followed(cfg, components, folder, loggers, stages, trains=False) as outlook:
            console.print(outlook_line(outlook, cfg.trainer.accelerator), soft_wrap=True)
            for name, spec in components.pool_specs.items():
                if name == "train" and cfg.pool.imported:
                    continue  # an imported pool already has its images
                pool = fill_pool(spec, components.generator, components.judges[name], stages=stages)
                images = f"{len(spec.prompts)} prompts x {spec.candidates} images"
                console.print(f"{name}: {images} in {pool.folder}")


def main(cfg: DictConfig) -> None:
    """Run the configured stage; user errors end the process with a message."""
    with plain_errors("the same command"):
        check_group_choices(cfg, HydraConfig.get())
        run(cfg, HydraConfig.get().overrides.task)
