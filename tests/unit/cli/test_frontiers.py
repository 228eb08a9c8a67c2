"""Runs as frontiers: methods, strengths and seeds, the page, and the files."""

import csv

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from capo.cli.frontiers import compare_methods
from capo.evaluation.frontiers import DRIFT_AT
from capo.evaluation.reports.sweep_page import render_page

PROMPTS = 50


def write_run(folder, objective, beta, seed=0, looks=0.6, alignment=0.55, drift=0.3, prompts=PROMPTS):
    (folder / "evaluation").mkdir(parents=True)
    values = {"seed": seed, "objective": {"_target_": objective, "beta": beta}}
    OmegaConf.save(OmegaConf.create(values), folder / "config.yaml")
    noise = 0.05 * np.random.default_rng(seed).normal(size=(prompts, 2))
    noise -= noise.mean(0)
    with (folder / "evaluation" / "win_rates.csv").open("w", newline="") as file:
        table = csv.writer(file)
        columns = ["win_rate/looks", "win_rate/alignment", *([] if drift is None else ["drift"])]
        table.writerow(["prompt_id", "prompt", "category", *columns])
        for index, (one, two) in enumerate(noise.tolist()):
            figures = [looks + one, alignment + two, *([] if drift is None else [drift])]
            table.writerow([f"p{index}", "a", "", *figures])
    labels = {"objective": objective, "objective.beta": str(beta or ""), "seed": str(seed)}
    return folder, labels


def sweep(folder, **options):
    """Two methods of two strengths; the second strength of the first has two seeds."""
    return dict(
        [
            write_run(folder / "0", "dpo", 100, looks=0.8, alignment=0.52, drift=0.4),
            write_run(folder / "1", "dpo", 1000, looks=0.6, alignment=0.56, drift=0.2),
            write_run(folder / "2", "dpo", 1000, seed=1, looks=0.6, alignment=0.60, drift=0.2),
            write_run(folder / "3", "capo", 30, looks=0.9, alignment=0.55, drift=0.5),
            write_run(folder / "4", "capo", 10, looks=0.7, alignment=0.65, drift=0.3, **options),
        ]
    )


def test_runs_are_arranged_by_method_strength_and_seed(tmp_path):
    compared = compare_methods(sweep(tmp_path))
    assert compared.axis == "objective.beta" and compared.rewards == ["looks", "alignment"]
    # the methods in the order of the runs, though capo has the smallest strength
    assert [frontier.name for frontier in compared.frontiers] == ["objective=dpo", "objective=capo"]
    assert [[point.label for point in frontier.points] for frontier in compared.frontiers] == [
        ["100", "1000"],
        ["10", "30"],
    ]
    seeds = compared.frontiers[0].points[1]
    assert seeds.measured["alignment"].shape == (2, PROMPTS) and seeds.mean("alignment") == pytest.approx(
        0.58
    )
    # dpo: 0.3 x 0.02 and 0.1 x 0.08, of which 0.1 x 0.02 is common; capo: 0.4 x 0.05, 0.2 x 0.15, 0.2 x 0.05
    assert [volume.mean for volume, _ in compared.volumes] == pytest.approx(
        [0.012 / 0.25, 0.04 / 0.25], abs=1e-6
    )
    assert compared.columns(tmp_path / "2")["frontier/hypervolume"] == pytest.approx(0.048)
    assert compared.columns(tmp_path / "5") == {}
    # at equal drift 0.35: dpo between 0.58 and 0.52, capo between 0.65 and 0.55, a quarter of the way
    at = {(match.at, match.reward): match for match in compared.matches}
    assert at[DRIFT_AT, "alignment"].values == pytest.approx((0.535, 0.625))
    assert at["looks", "alignment"].level == pytest.approx(0.75) and len(at) == 3


def test_what_cannot_be_read_or_compared_is_left_out_and_said(tmp_path):
    runs = sweep(tmp_path, prompts=20)
    (tmp_path / "0" / "evaluation" / "win_rates.csv").unlink()
    compared = compare_methods(runs)
    assert [len(frontier.points) for frontier in compared.frontiers] == [1, 1]
    assert "0 is left out: it has no win-rates by prompt" in compared.notes[0]
    (tmp_path / "0" / "evaluation" / "win_rates.csv").write_text("prompt_id,win_rate/looks\np,1.5\n")
    assert "win_rates.csv cannot be read (win_rate/looks goes from 1.5" in compare_methods(runs).notes[0]
    assert "4 is left out: it was evaluated on other prompts" in compared.notes[1] and compared.matches == []
    assert (
        compare_methods({run: labels for run, labels in runs.items() if run.name in "12"}) is None
    )  # one setting
    assert compare_methods({}) is None


def test_without_a_number_that_varies_each_setting_is_a_method(tmp_path):
    runs = dict(
        [write_run(tmp_path / str(number), name, None) for number, name in enumerate(("sft", "dpo", "ipo"))]
    )
    compared = compare_methods(runs)
    assert compared.axis is None and [frontier.name for frontier in compared.frontiers] == [
        "objective=sft",
        "objective=dpo",
        "objective=ipo",
    ]
    assert compared.matches == [] and len(compared.volumes) == 3
    # runs that no label tells apart are not taken for seeds
    alike = dict([write_run(tmp_path / str(number), "dpo", number) for number in (5, 6)])
    compared = compare_methods({run: labels | {"objective.beta": "?"} for run, labels in alike.items()})
    assert [frontier.name for frontier in compared.frontiers] == ["runs=5", "runs=6"]


def test_a_method_without_a_strength_is_a_point_beside_the_others(tmp_path):
    runs = sweep(tmp_path) | dict([write_run(tmp_path / "5", "sft", None, looks=0.65, drift=None)])
    compared = compare_methods(runs)
    assert [frontier.name for frontier in compared.frontiers][-1] == "objective=sft"
    assert {match.at for match in compared.matches} == {"looks"}  # this run has no drift
    assert compared.matches[-1].level == pytest.approx(0.65)


def test_files_and_page(tmp_path):
    compared = compare_methods(sweep(tmp_path))
    assert [path.name for path in compared.write(tmp_path)] == ["frontier.png", "matched.csv"]
    with Image.open(tmp_path / "frontier.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10
    with (tmp_path / "matched.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["at"], row["reward"]) for row in rows] == [
        ("drift of latents", "looks"),
        ("drift of latents", "alignment"),
        ("looks", "alignment"),
    ]
    assert float(rows[1]["difference"]) == pytest.approx(0.09)
    apart = compare_methods(
        dict(
            [
                write_run(tmp_path / "a", "dpo", 1, looks=0.6, drift=0.1),
                write_run(tmp_path / "b", "dpo", 2, looks=0.61, drift=0.2),
                write_run(tmp_path / "c", "ipo", 1, looks=0.7, drift=0.3),
            ]
        )
    )
    assert all(match.level is None for match in apart.matches)
    job = {"job": "0", "status": "finished", "error": "", "val/win_rate": 0.6}
    page = render_page("s", [job], [], None, apart)
    assert page.count("the ranges do not overlap") == 3 and "50 % in each, the reference point" in page
    shown = render_page("s", [job], [], None, compared)
    assert '<td class="above"><span class="rate">+9.0</span>' in shown and "://" not in shown
    assert "<h2>Frontiers</h2>" not in render_page("s", [job], [], None)
