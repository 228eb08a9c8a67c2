"""The figures of an evaluation (results.json): win-rates, oracle and zero line, with intervals and tests."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from capo.backbones.weight_drift import WeightDrift
from capo.data.images import Scores
from capo.evaluation.categories import groups_of
from capo.evaluation.diversity import Distances
from capo.evaluation.frontiers import Frontier, Point, hypervolumes
from capo.evaluation.statistics import bootstrap_interval, paired_tests, prompts_needed
from capo.win_rates import win_rate

DIGITS = 6


def results(
    policy_scores: Scores,
    base_scores: Scores,
    *,
    zero_scores: Scores,
    latents: Distances,
    fingerprints: Mapping[str, str],
    seed: int,
    policy_measures: Scores = MappingProxyType({}),
    base_measures: Scores = MappingProxyType({}),
    categories: Sequence[str] = (),
    features: tuple[str, Distances] | None = None,
    weights: WeightDrift | None = None,
) -> dict:
    """Compute the content of results.json: win-rates in 0-1 with 95 % intervals over prompts (CaPO, B.2).

    Each win-rate and measure also has the p-value `p` of a paired test (`sign_flip_p`), `holm` for the tests
    that stand beside it, and win-rates have `prompts_needed`. Equal inputs give equal results.

    Args:
        policy_scores: reward -> (P, K) raw scores of the policy's images.
        base_scores: reward -> (P, K) raw scores of the base's images, for the same prompts and seeds.
        zero_scores: reward -> (Z, K) raw scores of the base's images with other seeds, for the first Z
            prompts; empty if there is no zero line.
        latents: distances of the latents, of all P prompts.
        fingerprints: "policy" and "base" -> fingerprint of the denoiser.
        seed: seed of the bootstrap.
        policy_measures: oracle measure -> (P, K) for the policy's images; empty if there is no oracle.
        base_measures: likewise for the base's images.
        categories: category of each of the P prompts; one of category "" counts in overall values alone.
        features: an encoder's name and the distances of its vectors, of some prompts; None: not measured.
        weights: drift of the weights; None: not measured.
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
        **_rates_by_category(rates, beyond, categories, seed),
        **_hypervolume(rates, seed),
        "zero": {name: _with_interval(rate, seed) for name, rate in zero.items()},
        "score": {
            name: {"policy": _mean(policy_scores[name]), "base": _mean(base)}
            for name, base in base_scores.items()
        },
        **measured,
        "diversity": _diversity(latents, seed),
        "drift": {"latents": _with_interval(latents.drift, seed)} | _in_weights(weights),
        **_in_features(features, seed),
        "prompts": prompts,
        "images_per_prompt": images,
        "policy": fingerprints["policy"],
        "base": fingerprints["base"],
    }


def _rates_by_category(
    rates: Mapping[str, Tensor], beyond: Mapping[str, Tensor], categories: Sequence[str], seed: int
) -> dict[str, dict]:
    """Entry "win_rate_by_category" of the results: category -> reward -> rate, where there are categories.

    Holm's p-values count the categories of one reward.
    """
    places = groups_of(categories)
    tests = {
        name: _tests({category: values[found] for category, found in places.items()}, seed)
        for name, values in beyond.items()
    }
    rows = {
        category: {
            name: _with_interval(rate[found], seed) | tests[name][category] for name, rate in rates.items()
        }
        for category, found in places.items()
    }
    return {"win_rate_by_category": rows} if rows else {}


def _mean(values: Tensor) -> float:
    return round(values.double().mean().item(), DIGITS)


def _tests(differences: Mapping[str, Tensor], seed: int) -> dict[str, dict[str, float]]:
    """Round the p-values of `paired_tests`."""
    tests = paired_tests(differences, seed)
    return {name: {key: round(p, DIGITS) for key, p in test.items()} for name, test in tests.items()}


def _hypervolume(rates: Mapping[str, Tensor], seed: int) -> dict[str, dict]:
    """Entry "hypervolume" of the results, of two rewards or more (`capo.evaluation.frontiers`)."""
    if len(rates) < 2:
        return {}
    point = Point("", {name: rate[None] for name, rate in rates.items()})
    [(volume, _)] = hypervolumes([Frontier("", [point])], list(rates), seed)
    return {"hypervolume": {key: round(value, DIGITS) for key, value in vars(volume).items()}}


def _diversity(distances: Distances, seed: int) -> dict[str, float]:
    """Diversity of both sides, and interval and p-value of the paired change."""
    test = _tests({"": distances.policy - distances.base}, seed)[""]
    return _change(distances.policy[:, None], distances.base[:, None], seed) | {"p": test["p"]}


def _in_features(features: tuple[str, Distances] | None, seed: int) -> dict[str, dict]:
    """Entry "features" of the results, where they were measured."""
    if features is None:
        return {}
    name, distances = features
    return {
        "features": {
            "reward": name,
            "prompts": len(distances.drift),
            "diversity": _diversity(distances, seed),
            "drift": _with_interval(distances.drift, seed),
        }
    }


def _in_weights(weights: WeightDrift | None) -> dict[str, dict]:
    """Entry "weights" of the drift, where it was measured."""
    if weights is None:
        return {}
    blocks = {name: _significant(drift) for name, drift in weights.blocks.items()}
    return {"weights": {"all": _significant(weights.total), "blocks": blocks}}


def _significant(value: float | None) -> float | None:
    """Round to DIGITS significant digits: relative changes of weights may be far below 1."""
    return value and float(f"{value:.{DIGITS}g}")


def _with_interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(per_prompt, seed)
    return {"mean": _mean(per_prompt), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _measured(policy: Scores, base: Scores, categories: Sequence[str], seed: int) -> dict[str, dict]:
    """Entries "oracle" and "oracle_by_category" of the results, categories in order of first appearance.

    Holm's p-values count the measures of all prompts together, and the categories of one measure.
    """
    everything = list(range(len(next(iter(policy.values())))))
    rows = groups_of(categories)
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
