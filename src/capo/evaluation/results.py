"""The figures of an evaluation (results.json): win-rates, oracle and zero line, with intervals and tests."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from capo.data.images import Scores
from capo.evaluation.statistics import bootstrap_interval, paired_tests, prompts_needed
from capo.metrics import win_rate

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
    """Round the p-values of `paired_tests`."""
    tests = paired_tests(differences, seed)
    return {name: {key: round(p, DIGITS) for key, p in test.items()} for name, test in tests.items()}


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
