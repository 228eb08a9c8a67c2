"""Finish a training run: choose the strength of its best policy, export it, and write the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from capo.backbones.export import export_policy, policy_fingerprint
from capo.backbones.model_card import ModelCard
from capo.cli.build import Components
from capo.cli.parts import module_of, validation_of
from capo.cli.run_config import note_export
from capo.cli.values import plain
from capo.errors import InputError
from capo.evaluation.held_out import alarms
from capo.module import PreferenceModule
from capo.runtime.launch import launch
from capo.runtime.processes import run_on_first_process
from capo.runtime.run_folder import (
    CHECKPOINTS,
    METRICS,
    MONITOR,
    POLICY,
    VALIDATION,
    read_outcome,
    write_outcome,
)
from capo.training.checkpoints import load_best
from capo.training.strength import choose_strength
from capo.training.validation import Place, WinRateValidation


def best_strength(
    cfg: DictConfig,
    module: PreferenceModule,
    validation: WinRateValidation,
    checkpoint: Path,
    folder: Path,
    console: Console,
) -> tuple[float, dict[str, Any]]:
    """Give the module the policy of the best checkpoint, at the best of the strengths that are configured.

    Returns:
        The policy's win-rate on the validation prompts, and facts for the model card.
    """
    trained, choice, facts = load_best(module, checkpoint), validation.choice, {}
    if strengths := plain(cfg.validation).get("strengths"):
        here = launch()
        place = Place(module.backbone.device, here.rank, here.world_size)
        curve, choice = choose_strength(module, validation, trained, strengths, place)
        run_on_first_process(lambda: curve.write(folder))
        tell([*curve.lines(), *choice.sentences()], console)
        facts["strength"] = f"{curve.chosen:g}, chosen among {', '.join(f'{a:g}' for a in curve.points)}"
    if choice.best is None:
        raise ValueError("no checkpoint was validated")
    facts["validation"] = f"{choice.best.rate} against the base, {choice.monitor} of the rewards"
    if warnings := choice.warnings():
        facts["warning"] = " ".join(warnings)
    return choice.best.rate.mean, facts


def tell(sentences: Sequence[str], console: Console) -> None:
    """Print sentences, one per line, as they are."""
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, highlight=False)


def finish(
    cfg: DictConfig,
    components: Components,
    folder: Path,
    module: PreferenceModule,
    win_rate: float,
    facts: dict[str, Any],
) -> None:
    """Export the policy to `folder`/policy, and write outcome.json, which marks the run as finished."""
    source = components.generator.settings.unconditional
    card = ModelCard(str(facts["objective"]), str(facts.pop("data")), None, facts, source)
    policy = export_policy(
        components.backbone,
        module.policy,
        folder / POLICY,
        card,
        full=cfg.export == "full",
        dtype=cfg.get("export_dtype", "float32"),  # runs of earlier versions have no such key
        checkpoint=cfg.export == "single_file",
    )
    outcome = {
        MONITOR: win_rate,
        "policy": policy_fingerprint(components.backbone, policy),
        "card": dataclasses.asdict(card),
    }
    write_outcome(folder, outcome | ({"alarms": alarms(folder / METRICS)} if components.held_out else {}))


def export_again(cfg: DictConfig, components: Components, folder: Path, console: Console) -> None:
    """Validate the best checkpoint of a finished run at the strengths of `cfg`, and export the best again.

    Raises InputError if the run has no checkpoint any more.
    """
    found = sorted((folder / CHECKPOINTS).glob("[0-9]*.ckpt"))
    if not found:
        raise InputError(
            f"validation.strengths needs the run's best checkpoint, but {folder / CHECKPOINTS} holds none; "
            "leave validation.strengths out to evaluate the policy as it was exported"
        )
    before = ModelCard(**read_outcome(folder)["card"])
    module = module_of(cfg, components.backbone)
    validation = validation_of(cfg, components, module, folder / VALIDATION, console)
    win_rate, told = best_strength(cfg, module, validation, found[-1], folder, console)
    facts = {**before.settings, **told, "data": before.data, "objective": before.objective}
    finish(cfg, components, folder, module, win_rate, facts)
    note_export(folder, cfg)
