"""Win-rates of a configuration over training seeds, with the errors due to seeds and to prompts.

    python train.py -m seed=0,1,2,3,4
    python -m benchmarks.seeds multirun/DATE/TIME

For each reward, the script prints the mean m over n seeds, the standard deviation s between them, the
standard error SE over prompts (bootstrap of the prompts' win-rates, averaged over seeds), and the lower bound
m - 2 sqrt(s^2 / n + SE^2).
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from capo.data.pool import Pool
from capo.evaluation.compare import policy_scores, run_folders
from capo.metrics import win_rate


def base_scores(folder: Path, settings: dict) -> dict[str, torch.Tensor]:
    """Scores of the base's images that a run was compared with: reward -> (P, K)."""
    root = Path(OmegaConf.load(folder / "config.yaml").pool.root)
    for path in root.glob("*/manifest.json"):
        pool = Pool.open(path.parent)
        if (pool.manifest.generator, pool.manifest.seed) == (settings["base_generator"], settings["seed"]):
            places = {prompt.id: place for prompt, place in pool.prompts}
            if places.keys() >= set(settings["prompts"]):
                positions = [places[prompt] for prompt in settings["prompts"]]
                scores = pool.scores(
                    list(settings["rewards"].values()), settings["images_per_prompt"], positions
                )
                return {name: scores[..., number] for number, name in enumerate(settings["rewards"])}
    raise SystemExit(f"the base's images that {folder} was compared with are not in {root}")


def standard_error(per_prompt: torch.Tensor, resamples: int = 10_000) -> float:
    """Standard deviation of the mean of `per_prompt` (P,) over bootstrap resamples of the prompts."""
    values, draw = per_prompt.double().numpy(), np.random.default_rng(0)
    return float(
        np.std([values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
    )


def main() -> None:
    """Print the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories, or a multirun directory")
    folders = run_folders(parser.parse_args().runs)
    rates: dict[str, list[torch.Tensor]] = {}
    for folder in folders:
        settings = json.loads((folder / "evaluation" / "settings.json").read_text())
        base = base_scores(folder, settings)
        for name, scores in policy_scores(folder, settings).items():
            rates.setdefault(name, []).append(win_rate(scores, base[name]))
    print(f"{len(folders)} runs, {len(next(iter(rates.values()))[0])} prompts")
    for name, per_run in rates.items():
        means = [rate.double().mean().item() for rate in per_run]
        mean, spread = statistics.mean(means), statistics.stdev(means)
        error = standard_error(torch.stack(per_run).mean(0))
        low = mean - 2 * math.sqrt(spread**2 / len(means) + error**2)
        told = " ".join(f"{value:.3f}" for value in means)
        print(f"{name:<12} mean {mean:.3f}  s {spread:.3f}  SE {error:.3f}  lower bound {low:.3f}  ({told})")


if __name__ == "__main__":
    main()
