"""Run evaluate.py: evaluate a run's policy or an exported policy against its base, or compare runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from capo.backbones.model_card import ModelCard, write_card, write_win_rates
from capo.cli.benchmark import run_benchmark
from capo.cli.build import Components, build_components, is_negative, tuned_generator, use_base
from capo.cli.engines import engaged, engine_of
from capo.cli.frontiers import compare_methods
from capo.cli.idle import refuse_both, refuse_training_keys
from capo.cli.messages import plain_errors
from capo.cli.places import check_results
from capo.cli.process import check_common_folder, prepare_process
from capo.cli.readiness import check_ready
from capo.cli.run_changes import check_tuned, given_keys
from capo.cli.run_config import complete, run_config
from capo.cli.run_labels import run_labels, seed_groups
from capo.cli.schema import Evaluating, check_group_choices, check_values
from capo.cli.values import plain
from capo.data.generation import ImageGenerator
from capo.data.images import GeneratedImages
from capo.errors import InputError
from capo.evaluation.compare import compare_runs, run_folders
from capo.evaluation.diversity import SAMPLE
from capo.evaluation.evaluate import evaluate
from capo.evaluation.seeds import read_rates, seeds_table
from capo.evaluation.tables import Row, RunTable
from capo.runtime.files import led_to, lies_in, own_places, put_back
from capo.runtime.launch import launch
from capo.runtime.run_folder import (
    CONFIG,
    EVALUATION,
    METRICS,
    OUTCOME,
    POLICY,
    POOLS,
    RATES,
    check_policy,
    read_outcome,
)
from capo.runtime.schema import shown
from capo.runtime.terminal import Terminal, typed
from capo.training.strength import read_strength

console = Terminal()


def draw_for_evaluation(components: Components, tuned: ImageGenerator, folder: Path) -> None:
    """Generate and score missing images of the evaluation in `folder`, while the first process evaluates."""
    base, test = components.generator, components.pool_specs["test"]
    judges = [*components.evaluation_rewards, *components.oracle]
    GeneratedImages.fill(test, base, judges, progress=False)
    GeneratedImages.fill(components.pool_specs["zero"], base, components.evaluation_rewards, progress=False)
    GeneratedImages.fill(replace(test, root=folder / POOLS), tuned, judges, progress=False)


def check_root(cfg: DictConfig, folder: Path) -> None:
    """Raise InputError where the base's pools would stand among those of an evaluation in `folder`."""
    if (folder / POOLS).resolve() == Path(cfg.pool.root).resolve():
        raise InputError(
            f"pool.root={cfg.pool.root}: the images of the policy go there, and other pools would be removed "
            "from it; give another root, or another hydra.run.dir"
        )


def evaluate_policy(
    cfg: DictConfig, components: Components, policy: Path, folder: Path, run: Path | None = None
) -> dict | None:
    """Evaluate an exported policy against the base into `folder`; see `capo.evaluation.evaluate.evaluate`.

    All processes generate images, each those that no other has generated; the first one evaluates, and the
    others return None. With the directory of its `run`, the report also shows the training curves and the
    curve of strengths. Raises InputError if the policy is not the one that the run exported.
    """
    check_root(cfg, folder)
    put_back(policy)
    components = engaged(cfg, components)
    negative = is_negative(cfg)
    tuned = tuned_generator(components.generator, policy, engine_of(cfg, policy), negative, run)
    if not launch().first:
        draw_for_evaluation(components, tuned, folder)
        return None
    return evaluate(
        folder,
        components.pool_specs["test"],
        tuned,
        components.evaluation_rewards,
        zero=components.pool_specs["zero"],
        oracle=components.oracle,
        title=f"{cfg.model.name}: {'base with a negative model' if negative else 'tuned'} against base",
        config=OmegaConf.to_yaml(cfg, resolve=True),
        curves=run and run / METRICS,
        strength=run and read_strength(run),
        encoder=components.encoder,
        sample=cfg.evaluation.get("diversity_prompts", SAMPLE),  # runs of earlier versions have no such key
        weights=policy,
        engine=components.generator.engine,
    )


def evaluate_own(cfg: DictConfig, components: Components, folder: Path) -> dict | None:
    """Evaluate the policy of the run in `folder`, and write the win-rates to its model card."""
    policy = folder / POLICY
    found = evaluate_policy(cfg, components, policy, folder / EVALUATION, run=folder)
    if found is not None:
        if (card := card_of(folder)) is None:  # a sweep's soup, whose README is not made from a card
            write_win_rates(policy, found["win_rate"])
            return found
        write_card(components.backbone, policy, replace(card, win_rates=found["win_rate"]))
    return found


def card_of(folder: Path) -> ModelCard | None:
    """Read the facts for the policy's README; None of a soup. InputError if they cannot be read."""
    outcome = read_outcome(folder)
    try:
        return None if "soup" in outcome else ModelCard(**outcome["card"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / OUTCOME} has no card of the policy ({error}); restore it, or evaluate the policy "
            f"itself: evaluate.py {typed('policy', folder / POLICY)}"
        ) from error


def evaluate_run(cfg: DictConfig, overrides: list[str]) -> dict | None:
    """Evaluate the policy of the run `cfg.run` into its own directory; return the results.

    The run's own configuration is used, with `overrides` of the command line on top. With
    `validation.strengths` among them, the policy's strength is chosen again first.
    """
    folder = Path(str(cfg.run))
    chosen_anew = "validation.strengths" in given_keys(overrides) and bool(cfg.validation.strengths)
    own = run_config(folder, cfg, overrides, chosen_anew)
    if not chosen_anew:
        check_policy(folder)
    with complete(folder):
        check_ready(own, watching=False)
        prepare_process(own.threads)
        components = build_components(own, watching=False)
    card_of(folder)  # is read again when the images are drawn, which may take hours
    if chosen_anew:
        choose_again(own, components, folder)
    return evaluate_own(own, components, folder)


def choose_again(cfg: DictConfig, components: Components, folder: Path) -> None:
    """Choose the strength of a run's policy again, and export it; InputError with several processes."""
    if launch().world_size > 1:
        raise InputError(
            "validation.strengths: strengths are compared by one process: run it without the launcher"
        )
    from capo.cli.finish import export_again  # with Lightning, which an evaluation does without

    export_again(cfg, components, folder, console)


def evaluate_folder(cfg: DictConfig, folder: Path) -> dict | None:
    """Evaluate the exported policy `cfg.policy` into `folder` with the composed configuration."""
    use_base(cfg)
    check_results(folder)
    check_ready(cfg, watching=False)
    prepare_process(cfg.threads)
    return evaluate_policy(cfg, build_components(cfg, watching=False), Path(str(cfg.policy)), folder)


def compare(runs: Sequence[Path], overrides: Sequence[str], folder: Path) -> dict:
    """Compare runs on the console, and write a table of them to `folder` as HTML, CSV and LaTeX."""
    # before anything is printed, since a file of any run may be damaged
    for run in runs:
        if (run / EVALUATION / RATES).exists():  # a run of an earlier version has none
            read_rates(run)
    groups, labeled = seed_groups(runs), list(zip(runs, run_labels(runs), strict=True))
    found = compare_runs(runs, console)
    if groups:
        console.print(seeds_table(groups))
    results = found["results"]
    compared = compare_methods(dict(labeled))
    for table in compared.tables() if compared else ():
        console.print(table)
    rows = [Row(run, labels, results[str(run)]) for run, labels in labeled]
    files = RunTable.of(rows, 0, " ".join(["python evaluate.py", *overrides]), compared).write(folder)
    told = f"the table as a page, as CSV and for LaTeX: {', '.join(map(str, files))}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return found


def check_alone(overrides: Sequence[str]) -> None:
    """Raise InputError for a value beside `runs`, whose results are compared as they are."""
    given = zip(overrides, given_keys(overrides), strict=True)
    if unread := " ".join(text for text, key in given if key not in ("runs", "threads", "trust")):
        raise InputError(
            f"{unread} beside runs: they are compared by the results that they have; leave it out, or "
            f"evaluate each of them with it first: evaluate.py run=DIR {unread}"
        )


def check_inner(run: Path, folder: Path) -> None:
    """Raise InputError for another output directory than the run's own, in which its results would not be."""
    if (run / CONFIG).is_file() and not lies_in(led_to(folder), own_places(run)):
        raise InputError(
            f"{typed('hydra.run.dir', folder)} beside {typed('run', run)}: a run is evaluated into its own "
            f"directory: leave it out, or evaluate its policy alone: {typed('policy', run / POLICY)}"
        )


def run(cfg: DictConfig, overrides: list[str], folder: Path) -> dict | None:
    """Compare `runs`, or evaluate a `run` or a `policy`, by a `benchmark` where one is configured.

    Raises InputError unless one of them is.
    """
    check_values(cfg, Evaluating)
    refuse_training_keys(cfg, overrides)
    if not cfg.evaluate and "evaluate" in given_keys(overrides):
        raise InputError("evaluate=false: evaluate.py does nothing but evaluate; leave it out")
    refuse_both(cfg)
    console.quiet = not launch().first
    if cfg.runs is not None:
        named = plain(cfg)["runs"]
        listed = list(map(str, named)) if isinstance(named, list) else str(named)
        check_alone(overrides)
        return compare(run_folders(listed), overrides, folder)
    if cfg.policy is not None:
        check_tuned(overrides, typed("policy", cfg.policy), "it is evaluated as it is; leave that out")
    if cfg.get("benchmark") is not None:
        return run_benchmark(cfg, overrides, folder)
    if cfg.results is not None:
        raise InputError(f"results={shown(cfg.results)}: name the benchmark that they are of: benchmark=NAME")
    if cfg.run is not None:
        return evaluate_run(cfg, overrides)
    if cfg.policy is not None:
        return evaluate_folder(cfg, folder)
    raise InputError("nothing to evaluate: give run=DIR, runs=[DIR,DIR], policy=FOLDER or benchmark=NAME")


def main(cfg: DictConfig) -> None:
    """Evaluate or compare what the configuration names; user errors end the process with a message."""
    hydra_config = HydraConfig.get()
    with plain_errors(None if cfg.get("run") is None else "the same command"):
        check_group_choices(cfg, hydra_config)
        if launch().world_size > 1 and cfg.get("run") is None:
            check_common_folder(launch().world_size, hydra_config.overrides.hydra)
        folder = Path(hydra_config.runtime.output_dir)
        placed = "hydra.run.dir" in given_keys(hydra_config.overrides.hydra)
        if placed and cfg.get("run") is not None and cfg.get("benchmark") is None:
            check_inner(Path(str(cfg.run)), folder)
        run(cfg, list(hydra_config.overrides.task), folder)
