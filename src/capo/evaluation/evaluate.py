"""Policy against base on prompts that nothing before has seen: images, scores, results.json, report.html."""

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
from capo.evaluation.statistics import bootstrap_interval
from capo.metrics import win_rate
from capo.rewards import Reward
from capo.runtime.files import write_whole
from capo.runtime.run_folder import POOLS, REPORT, RESULTS, SETTINGS

log = logging.getLogger(__name__)

SCHEMA = 1  # of settings.json; a result of another schema is made again
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
    """What results.json holds: rates in 0-1, 95 % intervals over prompts, no place and no time (CaPO, B.2).

    Args:
        policy_scores, base_scores: reward -> (P, K) raw scores, same prompts and seeds.
        zero_scores: reward -> (Z, K) scores of the base's images with other seeds, for the first Z prompts;
            empty where there is no zero line.
        diversity: "policy" and "base" (`latent_diversity`, averaged over prompts).
        fingerprints: "policy" and "base", of their denoisers.
        seed: of the bootstrap.
        policy_measures, base_measures: oracle measure -> (P, K); empty where there is no oracle.
        categories: (P,) of the prompts; a prompt of category "" counts in the whole only.
    """
    prompts, images = next(iter(policy_scores.values())).shape
    rates = {name: win_rate(policy_scores[name], base) for name, base in base_scores.items()}
    zero = {name: win_rate(scores, base_scores[name][: len(scores)]) for name, scores in zero_scores.items()}
    measured = _measured(policy_measures, base_measures, categories, seed) if policy_measures else {}
    return {
        "win_rate": {name: _with_interval(rate, seed) for name, rate in rates.items()},
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


def _with_interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(per_prompt, seed)
    return {"mean": _mean(per_prompt), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _measured(policy: Scores, base: Scores, categories: Sequence[str], seed: int) -> dict[str, dict]:
    """ "oracle" and "oracle_by_category"; categories in the order in which the prompts bring them."""

    def change(rows: list[int]) -> dict[str, dict[str, float]]:
        return {name: _change(policy[name][rows], base[name][rows], seed) for name in policy}

    everything = range(len(next(iter(policy.values()))))
    rows = {
        name: [row for row in everything if categories[row] == name]
        for name in dict.fromkeys(categories)
        if name
    }
    return {
        "oracle": change(list(everything)),
        "oracle_by_category": {name: change(found) for name, found in rows.items()},
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
    """What `evaluate` was asked to compare."""

    spec: PoolSpec
    policy: ImageGenerator
    rewards: Sequence[Reward]
    zero: PoolSpec | None
    oracle: Sequence[Reward]

    @property
    def base(self) -> ImageGenerator:
        return ImageGenerator.base(self.policy.backbone, self.policy.settings)

    def settings(self) -> dict:
        """What decides the results, as JSON values."""
        spec, zero, fingerprints = self.spec, self.zero, self.policy.backbone.fingerprints
        identity = json.dumps([(prompt.id, prompt.category) for prompt in spec.prompts])
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
            "rewards": {reward.name: reward.key for reward in self.rewards},
            "oracle": {measure.name: measure.key for measure in self.oracle},
            **seen,
            "zero": unlike,
            "categories": hashlib.sha256(identity.encode()).hexdigest(),
            "prompts": [prompt.id for prompt in spec.prompts],
        }

    def sides(self, images: Path, progress: bool) -> tuple[Side, Side, dict[str, Tensor]]:
        """Policy, base, and the scores of the zero line; what is missing of their images is made first."""
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
    progress: bool = True,
) -> dict:
    """Images of policy and base, same prompts and seeds -> `results`, results.json, report.html in `folder`.

    Args:
        folder: the policy's images go to its `pool`. A result of the same settings that lies there is
            returned as it stands, one of other settings is replaced.
        spec: the base's images; their seeds are the policy's too, and `spec.seed` is the bootstrap's.
        policy: what draws the policy's images, on the base's backbone.
        zero: the base's images with other seeds, for the first prompts of `spec`; None: no zero line.
        oracle: measures that are exact, or that nothing was tuned on; reported beside the rewards.
        title, shown, config, curves: of the report: its heading, how many prompts an order of the gallery
            shows, the text of the run's config.yaml, and its metrics.csv (which need not be there).

    Raises InputError for whatever keeps a pool from being filled, and a zero spec of other prompts.
    """
    if zero is not None and list(zero.prompts) != list(spec.prompts[: len(zero.prompts)]):
        raise InputError("the zero line's prompts must be the first test prompts (evaluation.zero_prompts)")
    folder, comparison = Path(folder), _Comparison(spec, policy, rewards, zero, oracle)
    settings = comparison.settings() | {"shown": shown}
    found = stored_results(folder, settings)
    if found is not None:
        log.info("%s holds the results of these settings already", folder)
    else:
        tuned, base, zero_scores = comparison.sides(folder / POOLS, progress)
        found = _results_of(tuned, base, zero_scores, settings)
        report = Report(
            title or spec.model, found, settings, rewards, exhibits(tuned, base, shown), config, curves
        )
        _write(folder, settings, found, render_report(report))
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
    """The results in `folder` if they are whole and were made with `settings`, else None."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if found == settings and (folder / REPORT).is_file():
            return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return None


def _write(folder: Path, settings: dict, found: dict, page: str) -> None:
    # written last: it says that the others are there, and whose they are
    (folder / SETTINGS).unlink(missing_ok=True)
    write_whole(folder / RESULTS, json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_whole(folder / REPORT, page)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _remove_other_pools(root: Path, kept: Path) -> None:
    """Removes the images of policies that were evaluated here before."""
    for folder in root.iterdir():
        if folder.name != kept.name and (folder / "manifest.json").is_file():
            shutil.rmtree(folder)
