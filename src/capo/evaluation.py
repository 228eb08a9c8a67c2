"""Policy against base on prompts that nothing before has seen: images, scores, and results.json (FORMULAS 8)."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from capo.atomic import write_whole
from capo.errors import InputError
from capo.gallery import Change, Exhibit, chosen_prompts, gains, ranking
from capo.generation import ImageGenerator, PoolPlan, fill_pool, pool_images
from capo.metrics import bootstrap_interval, win_rate
from capo.pool import Pool, PoolReader
from capo.prompts import Prompt
from capo.report import Report, print_results, render_report
from capo.rewards import Reward

log = logging.getLogger(__name__)

SCHEMA = 1  # of settings.json; a result of another schema is made again
DIGITS = 6
RESULTS, SETTINGS, REPORT, POOLS = "results.json", "settings.json", "report.html", "pool"
Oracle = Callable[[Sequence[Image], Sequence[str]], Mapping[str, Tensor]]  # images, prompts -> measure -> (B,)
Scores = Mapping[str, Tensor]  # reward or measure -> (P, K)


# --- from numbers to results: pure ---

def results(policy_scores: Scores, base_scores: Scores, *, zero_scores: Scores, diversity: Mapping[str, float],
            fingerprints: Mapping[str, str], seed: int, policy_measures: Scores | None = None,
            base_measures: Scores | None = None, categories: Sequence[str] = ()) -> dict:
    """What results.json holds: rates in 0-1, 95 % intervals over prompts, nothing that depends on place or time.

    Args:
        policy_scores, base_scores: reward -> (P, K) raw scores, same prompts and seeds.
        zero_scores: reward -> (Z, K) scores of the base's images with other seeds, for the first Z prompts;
            empty where there is no zero line.
        diversity: "policy" and "base" (`latent_diversity`, averaged over prompts).
        fingerprints: "policy" and "base", of their denoisers.
        seed: of the bootstrap.
        policy_measures, base_measures: oracle measure -> (P, K); None where there is no oracle.
        categories: (P,) of the prompts; a prompt of category "" counts in the whole only.
    """
    prompts, images = next(iter(policy_scores.values())).shape
    rates = {name: win_rate(policy_scores[name], base) for name, base in base_scores.items()}
    zero = {name: win_rate(scores, base_scores[name][:len(scores)]) for name, scores in zero_scores.items()}
    measured = {} if policy_measures is None else _measured(policy_measures, base_measures, categories, seed)
    return {
        "win_rate": {name: _with_interval(rate, seed) for name, rate in rates.items()},
        "zero": {name: _with_interval(rate, seed) for name, rate in zero.items()},
        "score": {name: {"policy": _mean(policy_scores[name]), "base": _mean(base)} for name, base in base_scores.items()},
        **measured,
        "diversity": {side: round(float(diversity[side]), DIGITS) for side in ("policy", "base")},
        "prompts": prompts,
        "images_per_prompt": images,
        "zero_prompts": max(map(len, zero_scores.values()), default=0),
        "policy": fingerprints["policy"],
        "base": fingerprints["base"],
    }


def _mean(values: Tensor) -> float:
    return round(values.double().mean().item(), DIGITS)


def _with_interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(per_prompt, seed)
    return {"mean": _mean(per_prompt), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _measured(policy: Scores, base: Scores, categories: Sequence[str], seed: int) -> dict[str, dict]:
    """"oracle" and "oracle_by_category"; categories in the order in which the prompts bring them."""
    def change(rows: list[int]) -> dict[str, dict[str, float]]:
        return {name: _change(policy[name][rows], base[name][rows], seed) for name in policy}

    everything = range(len(next(iter(policy.values()))))
    rows = {name: [row for row in everything if categories[row] == name] for name in dict.fromkeys(categories) if name}
    return {"oracle": change(list(everything)), "oracle_by_category": {name: change(found) for name, found in rows.items()}}


def _change(policy: Tensor, base: Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(policy.double().mean(1) - base.double().mean(1), seed)
    return {"policy": _mean(policy), "base": _mean(base), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def latent_diversity(latents: Tensor) -> float:
    """Mean distance between two latents (K, C, H, W) of one prompt, over all pairs.

    The distance is the root mean square difference, so that it does not grow with the size of the latents: sqrt(2) for
    two independent latents of unit variance, 0 for copies.
    """
    flat = latents.flatten(1).double()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


# --- a set of images on disk ---

@dataclass(frozen=True)
class Drawn:
    """The images of a plan, in their pool: scored, and complete."""

    plan: PoolPlan
    generator: ImageGenerator
    pool: Pool

    @classmethod
    def fill(cls, plan: PoolPlan, generator: ImageGenerator, rewards: Sequence[Reward], progress: bool) -> "Drawn":
        """Makes what is missing of them."""
        return cls(plan, generator, fill_pool(plan, generator, rewards, progress=progress))

    @property
    def positions(self) -> list[int]:
        return self.pool.positions(self.plan.prompts)

    def scores(self, rewards: Sequence[Reward]) -> dict[str, Tensor]:
        """reward -> (P, K) raw scores."""
        scores = self.pool.scores([reward.key for reward in rewards], self.plan.candidates, self.positions)
        return {reward.name: scores[..., number] for number, reward in enumerate(rewards)}

    def diversity(self) -> float:
        """`latent_diversity`, mean over the prompts."""
        reader, candidates = PoolReader(self.pool), range(self.plan.candidates)
        return sum(latent_diversity(reader.latents(place, candidates)) for place in self.positions) / len(self.plan.prompts)

    def images(self, prompt: int) -> list[Image]:
        """The K images of the plan's prompt number `prompt`."""
        latents = PoolReader(self.pool).latents(self.positions[prompt], range(self.plan.candidates))
        return self.generator.backbone.decode(latents)

    def measures(self, oracle: Oracle, label: str, progress: bool) -> dict[str, Tensor]:
        """measure -> (P, K), from the images that the rewards have scored."""
        found: dict[int, list[dict[str, Tensor]]] = {place: [] for place in self.positions}
        texts = {place: prompt.text for prompt, place in self.pool.prompts}
        with tqdm(total=len(found) * self.plan.candidates, desc=f"oracle of {label}", unit="image", disable=not progress,
                  dynamic_ncols=True) as bar:
            for shard in self.pool.shards(self.plan.candidates, self.positions):
                rows = pool_images(self.pool, self.generator.backbone, shard, self.generator.settings.batch)
                for place, images in zip(shard.positions, rows, strict=True):
                    if place in found:
                        found[place].append(dict(oracle(images, [texts[place]] * len(images))))
                        bar.update(len(images))
        return {name: torch.stack([torch.cat([block[name] for block in found[place]])[:self.plan.candidates]
                                   for place in self.positions]).float() for name in next(iter(found.values()))[0]}


# --- the whole evaluation ---

def evaluate(folder: str | Path, plan: PoolPlan, policy: ImageGenerator, rewards: Sequence[Reward], *,
             zero: PoolPlan | None = None, oracle: Oracle | None = None, title: str | None = None, shown: int = 12,
             config: str | None = None, curves: str | Path | None = None, progress: bool = True) -> dict:
    """Images of policy and base for the same prompts and seeds -> `results`, results.json, report.html in `folder`.

    Args:
        folder: DIR/evaluation; the policy's images go to its `pool`. A result of the same settings is returned as it
            stands, one of other settings is replaced.
        plan: the base's images; their seeds are the policy's too, and `plan.seed` is the bootstrap's.
        policy: what draws the policy's images, on the base's backbone.
        zero: the base's images with other seeds, for the first prompts of `plan`; None: no zero line.
        title, shown, config, curves: of the report: its heading, how many prompts an order of the gallery shows, the
            text of the run's config.yaml, and its metrics.csv (which need not be there).

    Raises InputError for whatever keeps a pool from being filled, and a zero plan of other prompts.
    """
    folder = Path(folder)
    if zero is not None and list(zero.prompts) != list(plan.prompts[:len(zero.prompts)]):
        raise InputError("the zero line's prompts must be the first of the evaluation's (evaluation.zero_prompts)")
    settings = evaluation_settings(plan, policy, rewards, zero, oracle, shown)
    if (stored := stored_results(folder, settings)) is not None:
        log.info("%s holds the results of these settings already", folder)
    else:
        stored = _evaluate(folder, plan, policy, rewards, zero, oracle, settings, progress,
                           {"title": title or plan.model, "config": config, "curves": curves})
    print_results(stored)
    return stored


def evaluation_settings(plan: PoolPlan, policy: ImageGenerator, rewards: Sequence[Reward], zero: PoolPlan | None,
                        oracle: Oracle | None, shown: int) -> dict:
    """What decides the results and the report, as JSON values: settings.json."""
    fingerprints, sampling = policy.backbone.fingerprints, policy.settings
    measured = None if oracle is None else f"{oracle.__module__}.{getattr(oracle, '__qualname__', type(oracle).__qualname__)}"
    return {
        "schema": SCHEMA, "model": plan.model, "policy": policy.denoiser_fingerprint, "base": fingerprints["denoiser"],
        "policy_generator": policy.fingerprint,
        "base_generator": ImageGenerator.base(policy.backbone, sampling).fingerprint,
        "latent_space": fingerprints["latent_space"], "text_encoders": fingerprints["text_encoders"],
        "steps": sampling.steps, "guidance": sampling.guidance,
        "rewards": {reward.name: reward.key for reward in rewards}, "oracle": measured,
        "seed": plan.seed, "images_per_prompt": plan.candidates, "shown": shown,
        "zero": None if zero is None else {"seed": zero.seed, "prompts": len(zero.prompts), "images_per_prompt": zero.candidates},
        "categories": hashlib.sha256("\n".join(prompt.category for prompt in plan.prompts).encode()).hexdigest(),
        "prompts": [prompt.id for prompt in plan.prompts],
    }


def stored_results(folder: Path, settings: Mapping[str, object]) -> dict | None:
    """The results in `folder` if they are whole and were made with `settings`, else None."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if found == settings and (folder / REPORT).is_file():
            return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return None


def _evaluate(folder: Path, plan: PoolPlan, policy: ImageGenerator, rewards: Sequence[Reward], zero: PoolPlan | None,
              oracle: Oracle | None, settings: dict, progress: bool, about: dict) -> dict:
    base_generator = ImageGenerator.base(policy.backbone, policy.settings)
    base = Drawn.fill(plan, base_generator, rewards, progress)
    other = None if zero is None else Drawn.fill(zero, base_generator, rewards, progress)
    tuned = Drawn.fill(replace(plan, root=folder / POOLS), policy, rewards, progress)
    scores = {"policy": tuned.scores(rewards), "base": base.scores(rewards)}
    measures = None
    if oracle is not None:
        measures = {"policy": tuned.measures(oracle, "policy", progress), "base": base.measures(oracle, "base", progress)}
    found = results(
        scores["policy"], scores["base"], zero_scores=other.scores(rewards) if other else {}, seed=plan.seed,
        diversity={"policy": tuned.diversity(), "base": base.diversity()},
        fingerprints={"policy": settings["policy"], "base": settings["base"]},
        policy_measures=measures and measures["policy"], base_measures=measures and measures["base"],
        categories=[prompt.category for prompt in plan.prompts])
    page = render_report(Report(results=found, settings=settings, rewards=rewards, **about,
                                exhibits=_exhibits(tuned, base, scores, measures, settings["shown"])))
    _write(folder, settings, found, page)
    _remove_other_pools(folder / POOLS, tuned.pool.folder)
    return found


def _write(folder: Path, settings: dict, found: dict, page: str) -> None:
    (folder / SETTINGS).unlink(missing_ok=True)  # written last: it says that the others are there, and whose they are
    write_whole(folder / RESULTS, json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_whole(folder / REPORT, page)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _remove_other_pools(root: Path, kept: Path) -> None:
    """Removes the images of policies that were evaluated here before."""
    for folder in root.iterdir():
        if folder.name != kept.name and (folder / "manifest.json").is_file():
            shutil.rmtree(folder)


def _exhibits(tuned: Drawn, base: Drawn, scores: Mapping[str, Scores], measures: Mapping[str, Scores] | None,
              shown: int) -> list[Exhibit]:
    chosen = chosen_prompts(ranking(scores["policy"], scores["base"]), shown)
    rates = {name: win_rate(scores["policy"][name], scores["base"][name]) for name in scores["base"]}
    margins = gains(scores["policy"], scores["base"])

    def exhibit(row: int) -> Exhibit:
        prompt: Prompt = tuned.plan.prompts[row]
        changes = [Change(name, _mean(scores["base"][name][row]), _mean(scores["policy"][name][row]), rates[name][row].item())
                   for name in rates]
        changes += [Change(f"oracle: {name}", _mean(measures["base"][name][row]), _mean(measures["policy"][name][row]))
                    for name in (measures["base"] if measures else ())]
        places = {order: rows.index(row) for order, rows in chosen.items() if row in rows}
        return Exhibit(prompt.text, prompt.category, margins[row].item(), changes, base.images(row), tuned.images(row), places)

    return [exhibit(row) for row in sorted({row for rows in chosen.values() for row in rows})]
