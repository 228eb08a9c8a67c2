"""Evaluate a policy against its base on unseen prompts: images, scores, results.json and report.html."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from capo.backbones import Backbone
from capo.backbones.weight_drift import WeightDrift, weight_drift
from capo.data.engines import Engine
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import Scores, Side
from capo.data.pool import holds_pool
from capo.errors import DamagedFile, InputError
from capo.evaluation.diversity import (
    SAMPLE,
    Distances,
    Pictures,
    feature_distances,
    latent_distances,
    sampled_rows,
)
from capo.evaluation.reports.gallery import chosen_prompts, exhibits, ranking
from capo.evaluation.reports.page import Report, print_results, render_report
from capo.evaluation.results import DIGITS, results
from capo.evaluation.seeds import COLUMN, DRIFT, rates_in
from capo.evaluation.sides import Comparison
from capo.evaluation.stored import Results, Settings
from capo.rewards import Reward
from capo.rewards.lengths import cut_prompts
from capo.runtime.files import write_json, write_table, write_whole
from capo.runtime.run_folder import POOLS, RATES, REPORT, RESULTS, SETTINGS
from capo.runtime.stored import read_record
from capo.runtime.threads import map_batches
from capo.win_rates import win_rate

log = logging.getLogger(__name__)

AGAIN = "the evaluation is made again"


def evaluate(
    folder: str | Path,
    spec: PoolSpec,
    policy: ImageGenerator,
    rewards: Sequence[Reward],
    *,
    zero: PoolSpec | None = None,
    oracle: Sequence[Reward] = (),
    title: str | None = None,
    shown: int = 12,
    config: str | None = None,
    curves: str | Path | None = None,
    strength: Mapping | None = None,
    encoder: Reward | None = None,
    sample: int = SAMPLE,
    weights: str | Path | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> dict:
    """Generate and score images of policy and base, then write their comparison to `folder`.

    results.json holds the figures, win_rates.csv the win-rates by prompt, report.html the page.

    Args:
        folder: output folder; the policy's images go to its sub-folder `pool`. Results of the same settings
            that are already there are returned unchanged, results of other settings are replaced.
        spec: pool of the base's images; the policy uses the same prompts and seeds. `spec.seed` also seeds
            the bootstrap.
        policy: generator of the policy's images, on the base's backbone; `engine` fills the base's pools.
        rewards: rewards for which win-rates are computed.
        zero: pool of the base's images with other seeds, for the first prompts of `spec`; None: no zero line.
        oracle: measures that are exact, or on which nothing was tuned; reported beside the rewards.
        title: heading of the report; None: the model's name.
        shown: number of prompts in each order of the report's gallery.
        config: text of the run's config.yaml for the report, or None.
        curves: the run's metrics.csv for the report, or None; the file may be missing.
        strength: content of the run's strength.json for the report, or None.
        encoder: the reward whose image encoder measures diversity and drift beside the latents, one that has
            features (`encoder_of`); None: latents alone.
        sample: number of prompts whose images the encoder sees, evenly spaced over the set.
        weights: folder of the policy, for the drift of its weights (a warning if it has none), or None.
        progress: whether to show progress bars.

    Returns:
        The content of results.json (`results`), with "cut" (`cut_prompts`) if a reward cuts prompts.

    Raises:
        InputError: a pool cannot be filled, or the prompts of `zero` are not the first ones of `spec`.
    """
    folder = Path(folder)
    comparison = Comparison(spec, policy, rewards, zero, oracle, encoder, sample, engine)
    settings = comparison.settings() | {"shown": shown}
    found = stored_results(folder, settings)
    if found is not None:
        log.info("%s already holds the results of these settings", folder)
    else:
        report = partial(Report, title or spec.model, config=config, curves=curves, strength=strength)
        found = _compared(folder, comparison, settings, report, weights, progress)
    print_results(found)
    return found


def _compared(
    folder: Path,
    comparison: Comparison,
    settings: dict[str, Any],
    report: Callable[..., Report],
    weights: str | Path | None,
    progress: bool,
) -> dict:
    """Draw and score what is missing, write the comparison to `folder`, and return its results.

    `report` builds the page's content from results, settings, rewards and exhibits.
    """
    tuned, base, zero_scores = comparison.sides(folder / POOLS, progress)
    latents, encoder, rewards = latent_distances(tuned, base), comparison.encoder, comparison.rewards
    chosen = chosen_prompts(ranking(tuned.scores, base.scores), settings["shown"])
    rows = sampled_rows(len(comparison.spec.prompts), comparison.sample) if encoder else []
    pictures = _decoded(tuned, base, sorted({*rows, *(row for order in chosen.values() for row in order)}))
    backbone = comparison.policy.backbone
    found = _results_of(
        tuned,
        base,
        zero_scores,
        settings,
        rewards,
        latents=latents,
        features=_in_features(encoder, pictures, rows, backbone.device),
        weights=None if weights is None else _weight_drift(backbone, Path(weights)),
    )
    page = render_report(report(found, settings, rewards, exhibits(tuned, base, chosen, pictures)))
    _write(folder, settings, found, page, _rate_rows(tuned, base, latents))
    _remove_other_pools(folder / POOLS, tuned.drawn.pool.folder)
    return found


def _results_of(
    tuned: Side,
    base: Side,
    zero_scores: Scores,
    settings: Mapping[str, Any],
    rewards: Sequence[Reward],
    **distances: Any,
) -> dict:
    """Results of both sides; `distances` are the last arguments of `results`."""
    prompts = tuned.drawn.spec.prompts
    found = results(
        tuned.scores,
        base.scores,
        zero_scores=zero_scores,
        fingerprints={side: str(settings[side]) for side in ("policy", "base")},
        seed=tuned.drawn.spec.seed,
        policy_measures=tuned.measures,
        base_measures=base.measures,
        categories=[prompt.category for prompt in prompts],
        **distances,
    )
    cut = cut_prompts(rewards, [prompt.text for prompt in prompts])
    return found | {"cut": cut} if cut else found


def _decoded(tuned: Side, base: Side, rows: Sequence[int]) -> Pictures:
    """Decode the images of some prompts once: row -> images of policy and base."""
    settings, device = tuned.drawn.generator.settings, tuned.drawn.generator.backbone.device

    def both(row: int) -> tuple[Sequence[Image], Sequence[Image]]:
        return tuned.drawn.images(row), base.drawn.images(row)

    return dict(zip(rows, map_batches(both, rows, settings.parallel, device), strict=True)).__getitem__


def _in_features(
    encoder: Reward | None, pictures: Pictures, rows: Sequence[int], device: torch.device
) -> tuple[str, Distances] | None:
    """Name of the encoder, and distances of its vectors; it is on the device for the time of it."""
    if encoder is None:
        return None
    encoder.setup(device)
    try:
        return encoder.name, feature_distances(encoder, pictures, rows)
    finally:
        encoder.offload()


def _weight_drift(backbone: Backbone, policy: Path) -> WeightDrift | None:
    """Drift of the weights; None, with a warning, if they do not compare with the base's."""
    base = backbone.folder / backbone.denoiser_component
    try:
        return weight_drift(base, backbone.variant, backbone.dtype, policy)
    except InputError as error:
        log.warning("the drift of the policy's weights is not measured: %s", error)
        return None


def stored_results(folder: Path, settings: Mapping[str, object]) -> dict | None:
    """Read the results in `folder` if they are complete and belong to `settings`, else return None.

    A damaged file counts as none, which the log tells: the evaluation makes it again.
    """
    try:
        found = read_record(folder / SETTINGS, Settings, AGAIN)
        if found == settings and (folder / REPORT).is_file():
            rates_in(folder, AGAIN)
            return read_record(folder / RESULTS, Results, AGAIN)
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        log.warning("%s", error)
    return None


def _rate_rows(tuned: Side, base: Side, latents: Distances) -> list[dict[str, object]]:
    """Rows of win_rates.csv: a prompt's id, text and category, its win-rates, and distances of latents."""
    distances = {"diversity/policy": latents.policy, "diversity/base": latents.base, DRIFT: latents.drift}
    rates = {name: win_rate(tuned.scores[name], scores).tolist() for name, scores in base.scores.items()}
    rows: list[dict[str, object]] = []
    for row, prompt in enumerate(tuned.drawn.spec.prompts):
        labels = {"prompt_id": prompt.id, "prompt": prompt.text, "category": prompt.category}
        figures = {f"{COLUMN}{name}": values[row] for name, values in rates.items()}
        figures |= {name: values[row].item() for name, values in distances.items()}
        rows.append({**labels, **{name: round(value, DIGITS) for name, value in figures.items()}})
    return rows


def _write(
    folder: Path, settings: dict, found: dict, page: str, rates: Sequence[Mapping[str, object]]
) -> None:
    # settings.json is written last: it marks the other files as complete and says what they belong to
    (folder / SETTINGS).unlink(missing_ok=True)
    write_json(folder / RESULTS, found, allow_nan=False)
    write_table(folder / RATES, list(rates[0]), rates)
    write_whole(folder / REPORT, page)
    write_json(folder / SETTINGS, settings)


def _remove_other_pools(root: Path, kept: Path) -> None:
    """Remove the images of policies that were evaluated in this folder before."""
    for folder in root.iterdir():
        if folder.name != kept.name and holds_pool(folder):
            shutil.rmtree(folder)
