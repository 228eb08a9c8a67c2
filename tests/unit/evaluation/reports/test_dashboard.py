"""The specification of a sweep's W&B workspace: its panels, and the keys that they may name."""

import json

import pytest

from capo.evaluation.reports.dashboard import Tracked, TrackedRun, markdown_table, specification

CURVES = frozenset(
    {
        *(f"val/win_rate{part}" for part in ("", "/r", "/g")),
        *("train/loss", "train/h", "train/drift_winner", "train/drift_loser", "train/gradient_norm"),
        *("train/gradient_signal", "drift/winner/u0.2", "time/pairs_per_second"),
    }
)
SUMMARY = {
    "val/win_rate": 0.6,
    "test/win_rate/r": 0.7,
    "test/win_rate/r/low": 0.6,
    "test/win_rate/g": 0.5,
    "oracle/r": 0.4,
    "oracle/r/base": 0.3,
    "zero/r": 0.5,
}


def sweep(settings, keys=(), summary=SUMMARY, curves=CURVES, pictures=True):
    own = {"objective": "capo", "beta": 10, "bias": None, "pairs": "frs", "rewards": "g+r", "seed": 0}
    runs = [
        TrackedRun(f"id{number}", {**own, **values}, summary, curves, pictures)
        for number, values in enumerate(settings)
    ]
    return Tracked("ablation", "capo", "ablation", runs, None, keys)


def panels_of(spec):
    """View -> section -> panels."""
    return {
        view["name"].removeprefix("ablation: "): {
            section["name"]: section["panels"] for section in view["sections"]
        }
        for view in spec["views"]
    }


def test_a_swept_number_is_the_axis_of_every_rewards_win_rate():
    spec = specification(
        sweep([{"beta": 10}, {"beta": 30, "seed": 1}, {"beta": 100}], ("objective.beta",)), ""
    )
    results = panels_of(spec)["results"]
    assert [
        (panel["kind"], panel["x"], panel["y"], panel["log_x"]) for panel in results["Win-rate by reward"]
    ] == [
        ("scatter", {"config": "beta"}, {"summary": name}, True)
        for name in ("test/win_rate/r", "test/win_rate/g", "val/win_rate")
    ]
    [frontier] = results["Reward against reward"]
    assert (frontier["x"], frontier["y"]) == ({"summary": "test/win_rate/r"}, {"summary": "test/win_rate/g"})
    [hacking] = results["Rewards against exact measures"]
    assert (hacking["x"], hacking["y"]) == ({"summary": "oracle/r"}, {"summary": "test/win_rate/r"})
    [parallel] = results["All settings"]
    # bias is null in all runs, and the seed varies
    assert [column.get("config") for column in parallel["columns"] if "config" in column] == [
        *("objective", "beta", "pairs", "rewards", "seed")
    ]


@pytest.mark.parametrize(
    "settings, keys, axis, log",
    [
        ([{"beta": 10}, {"beta": 20}], ("objective.beta",), "beta", False),  # ends less than five times apart
        ([{"bias": -1}, {"bias": 9}], ("noise.bias",), "bias", False),  # not positive
        ([{"seed": 0}, {"seed": 1}], ("seed",), "seed", False),
        (
            [{"seed": 0, "beta": 1}, {"seed": 1, "beta": 9}, {"seed": 2}],
            ("seed", "objective.beta"),
            "beta",
            True,
        ),
        (
            [{"run": {"trainer": {"batch": 8}}}, {"run": {"trainer": {"batch": 64}}}],
            ("trainer.batch",),
            "run.trainer.batch",
            True,
        ),
    ],
)
def test_the_axis_is_the_setting_that_varies(settings, keys, axis, log):
    panels = panels_of(specification(sweep(settings, keys), ""))["results"]["Win-rate by reward"]
    assert {(panel["x"]["config"], panel["log_x"]) for panel in panels} == {(axis, log)}


def test_words_are_compared_by_bars_and_nothing_without_a_difference():
    spec = specification(sweep([{}, {"objective": "dpo"}], ("objective",)), "")
    panels = panels_of(spec)["results"]["Win-rate by reward"]
    assert [(panel["kind"], panel["figure"], panel["by"]) for panel in panels] == [
        ("bars", name, "objective") for name in ("test/win_rate/r", "test/win_rate/g", "val/win_rate")
    ]
    assert "Win-rate by reward" not in panels_of(specification(sweep([{}]), ""))["results"]


def test_curves_are_those_that_were_logged_in_sections():
    training = panels_of(specification(sweep([{}, {}]), ""))["training"]
    assert {name: [panel["y"] for panel in panels] for name, panels in training.items()} == {
        "Validation": [["val/win_rate"], ["val/win_rate/g"], ["val/win_rate/r"]],
        "Loss and margin": [["train/loss"], ["train/h"]],
        "Drift from the base": [["train/drift_winner"], ["train/drift_loser"]],
        "Drift by time": [["drift/winner/u0.2"]],
        "Gradient": [["train/gradient_norm"], ["train/gradient_signal"]],
    }


def test_what_no_run_holds_has_no_panel():
    spec = specification(
        sweep([{}, {"beta": 30}], summary={"val/win_rate": float("nan")}, curves=(), pictures=False), ""
    )
    assert spec["views"] == [] and spec["report"]["panels"] == []
    images = panels_of(specification(sweep([{}]), ""))["images"]
    assert images["Base above policy, by step"] == [
        {"kind": "images", "title": "validation images", "keys": ["validation"]}
    ]


def test_the_specification_is_json_and_the_same_each_time():
    tracked = sweep([{"beta": 10}, {"beta": 30}], ("objective.beta",))
    text = json.dumps(specification(tracked, "| a |"), allow_nan=False)
    assert text == json.dumps(specification(tracked, "| a |")) and json.loads(text)["runs"] == ["id0", "id1"]


def test_a_cell_of_the_table_stays_a_cell():
    table = markdown_table(["job", "a|b"], [{"job": "0", "a|b": 0.123456}, {"job": "<b>|\n[x]"}])
    assert table.splitlines() == [
        "| job | a\\|b |",
        "| --- | --- |",
        "| 0 | 0.1235 |",
        "| \\<b\\>\\| \\[x\\] |  |",
    ]
