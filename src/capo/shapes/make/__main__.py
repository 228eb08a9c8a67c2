"""Train all learned parts of the shapes world; every stage resumes, and a finished one is skipped.

The stages, in order:

    python -m capo.shapes.make scenes --work DIR
    python -m capo.shapes.make autoencoder --work DIR
    python -m capo.shapes.make base --work DIR  (or torchrun --nproc-per-node 2 -m capo.shapes.make base ...)
    python -m capo.shapes.make rewards --work DIR
    python -m capo.shapes.make flow_autoencoder --work DIR
    python -m capo.shapes.make mmdit --work DIR
    python -m capo.shapes.make card --work DIR --model shapes_mmdit
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from capo.cli.build import build_components
from capo.cli.compose import REPOSITORY, composed
from capo.cli.messages import refused
from capo.errors import InputError
from capo.runtime.options import whole_number
from capo.shapes.make import autoencoder, base, card, flow_autoencoder, lineups, mmdit, rewards, scenery
from capo.shapes.make.fitting import process
from capo.shapes.make.rewards import HELD_OUT

SCENES = 40_000
LINEUPS = 10_000
WEIGHTS = Path(__file__).parents[1] / "weights"


def stage_scenes(options: argparse.Namespace) -> None:
    """Draw the captioned scenes that the base models are trained on."""
    scenery.make_scenes(options.work, SCENES, options.seed, workers=len(os.sched_getaffinity(0)))


def stage_autoencoder(options: argparse.Namespace) -> None:
    """Train the autoencoder of `shapes_unet` on the scenes and encode all of them."""
    autoencoder.train(options.work, options.steps or 8100, seed=options.seed)
    autoencoder.encode_all(options.work)


def stage_base(options: argparse.Namespace) -> None:
    """Train denoiser and text encoders of `shapes_unet` on the encoded scenes and save the pipeline."""
    pipe = base.train(options.work, options.steps or 16_000, seed=options.seed, start=options.start)
    if process()[0] == 0:
        base.ship(pipe, WEIGHTS / "unet")


def stage_flow_autoencoder(options: argparse.Namespace) -> None:
    """Train the autoencoder of `shapes_mmdit`, initialized from that of `shapes_unet`."""
    flow_autoencoder.train(options.work, options.steps or 7500, seed=options.seed)


def stage_mmdit(options: argparse.Namespace) -> None:
    """Train `shapes_mmdit`, the rectified-flow model, on the same scenes and save the pipeline."""
    pipe = mmdit.train(
        options.work, WEIGHTS / "unet", options.steps or 9000, seed=options.seed, start=options.start
    )
    if process()[0] == 0:
        base.ship(pipe, WEIGHTS / "mmdit")


def stage_rewards(options: argparse.Namespace) -> None:
    """Train the three rewards on line-ups, half of whose pictures were autoencoded, and save them."""
    vae = autoencoder.load(options.work)
    tables = lineups.make_lineups(
        options.work, options.lineups, options.seed, vae, len(os.sched_getaffinity(0))
    )
    steps = options.steps or 3600
    names, given = ("alignment", "looks", "preference"), (options.work, tables)
    begin = {name: options.start and options.start / f"{name}.safetensors" for name in names}
    looks = rewards.train_looks(*given, 2 * steps // 3, options.seed, start=begin["looks"])
    alignment = rewards.train_alignment(*given, steps, options.seed, start=begin["alignment"])
    preference = rewards.train_preference(
        *given, steps // 4, options.seed, alignment, start=begin["preference"]
    )
    for name, module in (("alignment", alignment), ("looks", looks), ("preference", preference)):
        rewards.ship(module, WEIGHTS / "rewards" / f"{name}.safetensors")
    print(rewards.figures(tables, alignment, looks, preference))


def stage_card(options: argparse.Namespace) -> None:
    """Measure a shipped base model and write the results into docs/shapes.md, between its two markers."""
    places = [f"run_dir={options.work}", f"pool.root={options.work / 'pools'}"]
    cfg = composed("train", [f"model={options.model}", *places])
    components = build_components(cfg)
    page, first, last = (
        REPOSITORY / "docs" / "shapes.md",
        f"<!-- card of {options.model} -->",
        f"<!-- end of {options.model} -->",
    )
    before, _, rest = page.read_text().partition(first)
    _, found_last, after = rest.partition(last)
    if not found_last:
        raise SystemExit(f"{page} has no place for the card: add the lines {first} and {last}")
    found = card.measure_base(
        components.pool_specs["test"], components.generator, components.evaluation_rewards, components.oracle
    )
    tunable = card.tunability(found, components.backbone, cfg.model.draw, cfg.model.bias)
    told = card.markdown(found, components.backbone, tunable)
    page.write_text(f"{before}{first}\n\n{told}\n\n{last}{after}")
    print(told)


STAGES = {
    name.removeprefix("stage_"): stage for name, stage in list(globals().items()) if name.startswith("stage_")
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m capo.shapes.make", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes, logs and checkpoints")
    parser.add_argument("--steps", type=whole_number(), help="training steps, where the stage trains")
    parser.add_argument(
        "--lineups", type=whole_number(HELD_OUT + 1), default=LINEUPS, help="rewards only: number of line-ups"
    )
    start = "initial weights. base, mmdit: a checkpoint or a pipeline's folder; rewards: folder of weights"
    parser.add_argument("--start", type=Path, help=start)
    parser.add_argument("--model", default="shapes_unet", help="card only: base model")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--threads", type=whole_number(), default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo")
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        STAGES[options.stage](options)
    except FileNotFoundError as error:
        missing = Path(str(error.filename))
        if not missing.is_relative_to(options.work):
            raise
        earlier = list(STAGES)[: list(STAGES).index(options.stage)]
        return refused(InputError(f"{missing} is not there; stages before make it: {', '.join(earlier)}"))
    except Exception as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
