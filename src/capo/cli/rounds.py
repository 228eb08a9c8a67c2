"""Rounds of a training run: each but the first has candidates that the policy in training draws anew."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from capo.backbones.export import export_policy, holds_policy, policy_fingerprint
from capo.backbones.model_card import ModelCard
from capo.cli.build import Components, training_data, tuned_generator
from capo.cli.engines import engaged, engine_of
from capo.data.candidates import Candidates, TrainingData
from capo.data.generation import PoolSpec
from capo.data.labels import described
from capo.data.rounds import Round, refreshes
from capo.errors import DamagedFile, InputError
from capo.module import PreferenceModule
from capo.runtime.files import put_back, write_table
from capo.runtime.processes import run_on_first_process
from capo.runtime.run_folder import CHECKPOINTS, LAST, ONLINE, POLICY, ROUNDS
from capo.training.checkpoints import load_best
from capo.training.rounds import Row

RESTORE = "restore it, or train again in another hydra.run.dir"  # a policy that has drawn
FINGERPRINT = 16  # hex digits of a fingerprint in rounds.csv


def round_data(
    cfg: DictConfig,
    components: Components,
    module: PreferenceModule,
    part: Round,
    step: int,
    folder: Path,
    facts: Mapping[str, Any],
) -> TrainingData:
    """Complete the candidates of a round: the base's, or those of the policy at its beginning.

    All processes draw, each what no other has drawn. The policy is exported first, with the averaged weights
    if the run averages them, so that an interrupted round is completed with the same weights. The pool has
    the policy's fingerprint in its name and stands in the run directory, since no other run draws it. Its
    seed is `pool.seed` plus the number of the round.

    Args:
        cfg: the configuration.
        components: the base, prompts and rewards.
        module: takes the weights of the last checkpoint where the policy has to be exported, and is then not
            to be trained.
        part: the round.
        step: optimizer steps that the run has behind it.
        folder: the run directory.
        facts: what the run optimizes, for the policy's README.

    Raises:
        InputError: training is past the beginning of the round, and its policy is no longer there; or what
            `fill_pool` raises.
    """
    drawing = engaged(cfg, components)
    if not part.number:
        return training_data(cfg, drawing)
    place, backbone = folder / ONLINE / part.name, components.backbone
    policy = place / POLICY
    put_back(policy)
    if step == part.first:
        card = _card(part, facts, components)

        def export() -> None:
            load_best(module, folder / CHECKPOINTS / LAST)
            if not cfg.online.keep:
                forget_rounds(folder, part)
            export_policy(backbone, module.policy, policy, card)

        run_on_first_process(export)
    elif not holds_policy(policy, backbone.denoiser_component):
        raise InputError(
            f"{policy} is not there: it has drawn the candidates of steps {part.first + 1} to {part.last}, "
            f"which training is in at step {step}; {RESTORE}"
        )
    spec = _spec(cfg, components.pool_specs["train"], part, place)
    try:
        drawer = tuned_generator(drawing.generator, policy, engine_of(cfg, policy))
    except DamagedFile as error:  # what is left of the run cannot export it again
        raise DamagedFile(error.path, error.reason, RESTORE) from error
    return TrainingData.sampled(
        spec, drawer, components.rewards, drawn_by=f"the policy after {part.first} steps"
    )


def _spec(cfg: DictConfig, train: PoolSpec, part: Round, place: Path) -> PoolSpec:
    """Spec of the pool of a round, in the folder `place`; `train` is that of the first one."""
    prompts = part.prompts(train.prompts, cfg.online.prompts)
    return replace(train, root=place, seed=train.seed + part.number, prompts=prompts)


def _card(part: Round, facts: Mapping[str, Any], components: Components) -> ModelCard:
    """Card of the policy that draws the candidates of a round."""
    return ModelCard(
        str(facts["objective"]),
        f"candidates of rounds before step {part.first}",
        None,
        {name: value for name, value in facts.items() if name != "objective"},
        components.generator.settings.unconditional,
    )


def forget_rounds(folder: Path, part: Round) -> None:
    """Remove policies and pools of all rounds but `part` from the run directory."""
    for place in sorted((folder / ONLINE).glob("step*")):
        if place.name != part.name:
            shutil.rmtree(place)


def round_facts(
    part: Round, data: TrainingData, candidates: Candidates, components: Components, folder: Path
) -> Row:
    """What is known of a round before it is trained, for rounds.csv."""
    found = candidates.selection.statistics()
    backbone = components.backbone
    drawer = (
        policy_fingerprint(backbone, folder / ONLINE / part.name / POLICY)
        if part.number
        else backbone.fingerprints["denoiser"]
    )
    return {
        "drawn by": drawer[:FINGERPRINT],
        "pool": data.pool.folder.name,
        "prompts": found.prompts,
        "prompts with a pair": found.usable,
        "pairs per prompt": float(found.pairs),
    }


def trained_on(cfg: DictConfig, data: TrainingData, checkpoint: Path) -> str:
    """What the policy of a checkpoint was trained on, in one line; `data` is that of the last round."""
    if cfg.online.every is None:
        return data.described
    again = refreshes(cfg.online.every, int(checkpoint.stem))  # which is named by its step
    policy = f" and, drawn anew {again} time{'s' if again > 1 else ''}, of the policy" if again else ""
    return f"candidates of the base{policy}, {described(data.labels)}"


def write_rounds(folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows of the rounds to `folder`/rounds.csv."""
    write_table(folder / ROUNDS, list(dict.fromkeys(name for row in rows for name in row)), rows)
