"""Figures of a run, under the names that tables of sweeps and summaries of experiment trackers share."""

from __future__ import annotations

from pathlib import Path

from capo.evaluation.stored import current_results
from capo.runtime.run_folder import EVALUATION, OUTCOME, RESULTS, read_outcome

SHARES = ("mean", "low", "high")
HYPERVOLUME = "test/hypervolume"


def found_figures(folder: Path) -> dict[str, float]:
    """Figures of a run under the column names of `sweep.csv`; those that it lacks are left out.

    The columns are `val/win_rate`, `test/win_rate/<reward>` and `test/hypervolume` with `/low` and `/high`,
    `zero/<reward>`, `oracle/<measure>` and `test/diversity` of the policy with `/base`, and `test/drift`.
    """
    figures: dict[str, float] = {}
    if (folder / OUTCOME).is_file():
        figures |= {name: value for name, value in read_outcome(folder).items() if name.startswith("val/")}
    evaluated = (folder / EVALUATION / RESULTS).is_file()
    if evaluated and (results := current_results(folder)) is not None:
        for name, rate in results["win_rate"].items():
            column = f"test/win_rate/{name}"
            figures |= {column if share == "mean" else f"{column}/{share}": rate[share] for share in SHARES}
        figures |= {f"zero/{name}": rate["mean"] for name, rate in results.get("zero", {}).items()}
        for name, measure in results.get("oracle", {}).items():
            figures |= {f"oracle/{name}": measure["policy"], f"oracle/{name}/base": measure["base"]}
        if volume := results.get("hypervolume"):
            figures |= {HYPERVOLUME: volume["mean"]} | {
                f"{HYPERVOLUME}/{end}": volume[end] for end in SHARES[1:]
            }
        drift, diversity = results.get("drift"), results.get("diversity")
        if drift and diversity:  # which earlier versions did not measure
            figures |= {"test/diversity": diversity["policy"], "test/diversity/base": diversity["base"]}
            figures["test/drift"] = drift["latents"]["mean"]
    return figures
