"""Evaluate a policy against its base on unseen prompts: images, scores, results.json and report.html."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages, Scores, Side
from capo.errors import InputError
from capo.evaluation.reports.gallery import exhibits
from capo.evaluation.reports.page import Report, print_results, render_report
from capo.evaluation.statistics import bootstrap_interval, holm, prompts_needed, sign_flip_p
from capo.metrics import win_rate
from capo.rewards import Reward
from capo.rewards.lengths import cut_prompts
from capo.runtime.files import write_table, write_whole
from capo.runtime.run_folder import POOLS, RATES, REPORT, RESULTS, SETTINGS

log = logging.getLogger(__name__)

SCHEMA = 2  # of settings.json; results written with another schema are computed again
DIGITS = 6


def results(
    policy_scores: Scores,
    base_scores: Scores,
    *,
    zero_scores: Scores,
    diversity: Mapping[str, float],
    fingerprints: Mapping[str, str],
    seed: int,
    policy_measures: Scores = MappingProxyType({}),
    base_measures: Scores = MappingProxyType({}),
    categories: Sequence[str] = (),
) -> dict:
    """Compute the content of results.json: win-rates in 0-1 with 95 % intervals over prompts (CaPO, B.2).

    Each win-rate and measure also has the p-value `p` of a paired test (`sign_flip_p`), `holm` for the tests
    that stand beside it, and win-rates have `prompts_needed`.

    It holds no paths and no times, so equal inputs give equal results.

    Args:
        policy_scores: reward -> (P, K) raw scores of the policy's images.
        base_scores: reward -> (P, K) raw scores of the base's images, for the same prompts and seeds.
        zero_scores: reward -> (Z, K) raw scores of the base's images with other seeds, for the first Z
            prompts; empty if there is no zero line.
        diversity: "policy" and "base" -> `latent_diversity`, averaged over prompts.
        fingerprints: "policy" and "base" -> fingerprint of the denoiser.
        seed: seed of the bootstrap.
        policy_measures: oracle measure -> (P, K) for the policy's images; empty if there is no oracle.
        base_measures: oracle measure -> (P, K) for the base's images; empty if there is no oracle.
        categories: category of each of the P prompts; a prompt of category "" counts only in the overall
            values.
    """
    prompts, images = next(iter(policy_scores.values())).shape
    rates = {name: win_rate(policy_scores[name], base) for name, base in base_scores.items()}
    zero = {name: win_rate(scores, base_scores[name][: len(scores)]) for name, scores in zero_scores.items()}
    measured = _measured(policy_measures, base_measures, categories, seed) if policy_measures else {}
    beyond = {name: rate.double() - 0.5 for name, rate in rates.items()}
    tests = _tests(beyond, seed)
    return {
        "win_rate": {
            name: _with_interval(rate, seed) | tests[name] | {"prompts_needed": prompts_needed(beyond[name])}
            for name, rate in rates.items()
        },
        "zero": {name: _with_interval(rate, seed) for name, rate in zero.items()},
        "score": {
            name: {"policy": _mean(policy_scores[name]), "base": _mean(base)}
            for name, base in base_scores.items()
        },
        **measured,
        "diversity": {side: round(float(diversity[side]), DIGITS) for side in ("policy", "base")},
        "prompts": prompts,
        "images_per_prompt": images,
        "policy": fingerprints["policy"],
        "base": fingerprints["base"],
    }


def _mean(values: Tensor) -> float:
    return round(values.double().mean().item(), DIGITS)


def _tests(differences: Mapping[str, Tensor], seed: int) -> dict[str, dict[str, float]]:
    """P-values of paired differences by name, (P,) each, and Holm's for all of them together."""
    plain = {name: sign_flip_p(values, seed) for name, values in differences.items()}
    adjusted = holm(plain)
    return {name: {"p": round(p, DIGITS), "holm": round(adjusted[name], DIGITS)} for name, p in plain.items()}


def _with_interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(per_prompt, seed)
    return {"mean": _mean(per_prompt), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _measured(policy: Scores, base: Scores, categories: Sequence[str], seed: int) -> dict[str, dict]:
    """Entries "oracle" and "oracle_by_category" of the results, categories in order of first appearance.

    Holm's p-values count the measures of all prompts together, and the categories of one measure.
    """
    everything = list(range(len(next(iter(policy.values())))))
    rows = {
        name: [row for row in everything if categories[row] == name]
        for name in dict.fromkeys(categories)
        if name
    }
    differences = {name: policy[name].double().mean(1) - base[name].double().mean(1) for name in policy}
    tests = _tests(differences, seed)
    by_category = {
        name: _tests({category: values[found] for category, found in rows.items()}, seed)
        for name, values in differences.items()
    }

    def change(found: list[int]) -> dict[str, dict[str, float]]:
        return {name: _change(policy[name][found], base[name][found], seed) for name in policy}

    return {
        "oracle": {name: entry | tests[name] for name, entry in change(everything).items()},
        "oracle_by_category": {
            category: {name: entry | by_category[name][category] for name, entry in change(found).items()}
            for category, found in rows.items()
        },
    }


def _change(policy: Tensor, base: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(policy.double().mean(1) - base.double().mean(1), seed)
    return {
        "policy": _mean(policy),
        "base": _mean(base),
        "low": round(low, DIGITS),
        "high": round(high, DIGITS),
    }


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
    """Read the results in `folder` if they are complete and belong to `settings`, else return None."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if found == settings and (folder / REPORT).is_file():
            return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return None


def _rate_rows(tuned: Side, base: Side) -> list[dict[str, object]]:
    """Rows of win_rates.csv: a prompt's id, text and category, and its win-rate for each reward."""
    rates = {name: win_rate(tuned.scores[name], scores).tolist() for name, scores in base.scores.items()}
    rows: list[dict[str, object]] = []
    for row, prompt in enumerate(tuned.drawn.spec.prompts):
        labels = {"prompt_id": prompt.id, "prompt": prompt.text, "category": prompt.category}
        rows.append({**labels, **{name: round(values[row], DIGITS) for name, values in rates.items()}})
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
