"""Evaluate a policy against its base on unseen prompts: images, scores, results.json and report.html."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages, Scores, Side
from capo.errors import DamagedFile, InputError
from capo.evaluation.reports.gallery import exhibits
from capo.evaluation.reports.page import Report, print_results, render_report
from capo.evaluation.results import DIGITS, results
from capo.evaluation.seeds import COLUMN
from capo.metrics import win_rate
from capo.rewards import Reward
from capo.rewards.lengths import cut_prompts
from capo.runtime.files import write_table, write_whole
from capo.runtime.reading import read_json
from capo.runtime.run_folder import POOLS, RATES, REPORT, RESULTS, SETTINGS

log = logging.getLogger(__name__)

SCHEMA = 2  # of settings.json; results written with another schema are computed again
AGAIN = "the evaluation is made again"


@dataclass(frozen=True)
class _Comparison:
    """Policy and base of one evaluation: their images, the rewards, the zero line and the oracle."""

    spec: PoolSpec
    policy: ImageGenerator
    rewards: Sequence[Reward]
    zero: PoolSpec | None
    oracle: Sequence[Reward]

    @property
    def base(self) -> ImageGenerator:
        return ImageGenerator.base(self.policy.backbone, self.policy.settings)

    def settings(self) -> dict:
        """Everything that the results depend on, as JSON values (settings.json)."""
        spec, zero, fingerprints = self.spec, self.zero, self.policy.backbone.fingerprints
        identity = json.dumps([(prompt.id, prompt.category) for prompt in spec.prompts])
        guide = self.policy.unconditional
        seen = {"seed": spec.seed, "images_per_prompt": spec.candidates}
        unlike = zero and {
            "seed": zero.seed,
            "images_per_prompt": zero.candidates,
            "prompts": len(zero.prompts),
        }
        return {
            "schema": SCHEMA,
            "model": spec.model,
            "policy": self.policy.denoiser_fingerprint,
            "base": fingerprints["denoiser"],
            "policy_generator": self.policy.fingerprint,
            "base_generator": self.base.fingerprint,
            "latent_space": fingerprints["latent_space"],
            "text_encoders": fingerprints["text_encoders"],
            "steps": self.policy.settings.steps,
            "guidance": self.policy.settings.guidance,
            **({"unconditional": guide.fingerprint} if guide else {}),
            "rewards": {reward.name: reward.key for reward in self.rewards},
            "oracle": {measure.name: measure.key for measure in self.oracle},
            **seen,
            "zero": unlike,
            "categories": hashlib.sha256(identity.encode()).hexdigest(),
            "prompts": [prompt.id for prompt in spec.prompts],
        }

    def sides(self, images: Path, progress: bool) -> tuple[Side, Side, dict[str, Tensor]]:
        """Policy, base, and the zero line's scores; missing images and scores are generated first."""
        judges = [*self.rewards, *self.oracle]
        base = GeneratedImages.fill(self.spec, self.base, judges, progress)
        other = self.zero and GeneratedImages.fill(self.zero, self.base, self.rewards, progress)
        tuned = GeneratedImages.fill(replace(self.spec, root=images), self.policy, judges, progress)
        return (
            tuned.side(self.rewards, self.oracle),
            base.side(self.rewards, self.oracle),
            other.scores(self.rewards) if other else {},
        )


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
    progress: bool = True,
) -> dict:
    """Generate and score images of policy and base, then write their comparison to `folder`.

    results.json holds the figures, win_rates.csv the win-rates by prompt, report.html the page.

    Args:
        folder: output folder; the policy's images go to its sub-folder `pool`. Results of the same settings
            that are already there are returned unchanged, results of other settings are replaced.
        spec: pool of the base's images; the policy uses the same prompts and seeds. `spec.seed` also seeds
            the bootstrap.
        policy: generator of the policy's images, on the base's backbone.
        rewards: rewards for which win-rates are computed.
        zero: pool of the base's images with other seeds, for the first prompts of `spec`; None: no zero line.
        oracle: measures that are exact, or on which nothing was tuned; reported beside the rewards.
        title: heading of the report; None: the model's name.
        shown: number of prompts in each order of the report's gallery.
        config: text of the run's config.yaml for the report, or None.
        curves: the run's metrics.csv for the report, or None; the file may be missing.
        strength: content of the run's strength.json for the report, or None.
        progress: whether to show progress bars.

    Returns:
        The content of results.json, see `results`; with "cut" (`cut_prompts`) if prompts are too long for a
        reward.

    Raises:
        InputError: a pool cannot be filled, or the prompts of `zero` are not the first ones of `spec`.
    """
    if zero is not None and list(zero.prompts) != list(spec.prompts[: len(zero.prompts)]):
        raise InputError("the zero line's prompts must be the first test prompts (evaluation.zero_prompts)")
    folder, comparison = Path(folder), _Comparison(spec, policy, rewards, zero, oracle)
    settings = comparison.settings() | {"shown": shown}
    found = stored_results(folder, settings)
    if found is not None:
        log.info("%s already holds the results of these settings", folder)
    else:
        tuned, base, zero_scores = comparison.sides(folder / POOLS, progress)
        found = _results_of(tuned, base, zero_scores, settings)
        if cut := cut_prompts(rewards, [prompt.text for prompt in spec.prompts]):
            found["cut"] = cut
        report = Report(
            title or spec.model,
            found,
            settings,
            rewards,
            exhibits(tuned, base, shown),
            config,
            curves,
            strength,
        )
        _write(folder, settings, found, render_report(report), _rate_rows(tuned, base))
        _remove_other_pools(folder / POOLS, tuned.drawn.pool.folder)
    print_results(found)
    return found


def _results_of(tuned: Side, base: Side, zero_scores: Scores, settings: Mapping) -> dict:
    return results(
        tuned.scores,
        base.scores,
        zero_scores=zero_scores,
        diversity={"policy": tuned.drawn.diversity(), "base": base.drawn.diversity()},
        fingerprints=settings,
        seed=settings["seed"],
        policy_measures=tuned.measures,
        base_measures=base.measures,
        categories=[prompt.category for prompt in tuned.drawn.spec.prompts],
    )


def stored_results(folder: Path, settings: Mapping[str, object]) -> dict | None:
    """Read the results in `folder` if they are complete and belong to `settings`, else return None.

    A damaged file counts as none, which the log tells: the evaluation makes it again.
    """
    try:
        if read_json(folder / SETTINGS, AGAIN) == settings and (folder / REPORT).is_file():
            return read_json(folder / RESULTS, AGAIN)
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        log.warning("%s", error)
    return None


def _rate_rows(tuned: Side, base: Side) -> list[dict[str, object]]:
    """Rows of win_rates.csv: a prompt's id, text and category, and its win-rate for each reward."""
    rates = {name: win_rate(tuned.scores[name], scores).tolist() for name, scores in base.scores.items()}
    rows: list[dict[str, object]] = []
    for row, prompt in enumerate(tuned.drawn.spec.prompts):
        labels = {"prompt_id": prompt.id, "prompt": prompt.text, "category": prompt.category}
        rows.append(
            {**labels, **{f"{COLUMN}{name}": round(values[row], DIGITS) for name, values in rates.items()}}
        )
    return rows


def _write(
    folder: Path, settings: dict, found: dict, page: str, rates: Sequence[Mapping[str, object]]
) -> None:
    # settings.json is written last: it marks the other files as complete and says what they belong to
    (folder / SETTINGS).unlink(missing_ok=True)
    write_whole(folder / RESULTS, json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_table(folder / RATES, list(rates[0]), rates)
    write_whole(folder / REPORT, page)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _remove_other_pools(root: Path, kept: Path) -> None:
    """Remove the images of policies that were evaluated in this folder before."""
    for folder in root.iterdir():
        if folder.name != kept.name and (folder / "manifest.json").is_file():
            shutil.rmtree(folder)
