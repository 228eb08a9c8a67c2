"""What votes say: win-rates, intervals, checks, agreement, and the paper's table."""

import csv
import json
import math
import re

import numpy as np
import pytest

from capo.cli import study_files
from capo.errors import InputError
from capo.evaluation.statistics import bootstrap_interval, crossed_interval
from capo.evaluation.study.analysis import agreement, study_results
from capo.evaluation.study.store import FIRST, SECOND, TIE, Vote
from capo.evaluation.study.tables import shares, with_holm, write_studies
from fixtures.studies import HOSTILE, make_fake_study, vote_as

pytest.importorskip("krippendorff", reason="agreement between raters needs the extra study")


def test_rates_of_three_pairs_by_hand(tmp_path):
    with make_fake_study(tmp_path / "study", prompts=4, checks=1) as study:
        a, b, c, _, check = study.pairs
        study.vote(
            Vote("ann", a, FIRST, FIRST, 2.0),
            Vote("ann", b, FIRST, SECOND, 4.0),
            Vote("ann", c, TIE, FIRST, 9.0),
            Vote("ann", check, FIRST, FIRST, 1.0),
            Vote("ben", a, SECOND, SECOND),
            Vote("ben", b, FIRST, FIRST),
        )
        found = study_results(study, failures=0)
    # by prompt: a (1 + 0) / 2, b (1 + 1) / 2, c 1/2; their mean is 2/3
    assert [row["win_rate"] for row in found["prompts"]] == [0.5, 1.0, 0.5]
    assert [row["votes"] for row in found["prompts"]] == [2, 2, 1] and found["prompts"][0][
        "prompt"
    ] == HOSTILE
    rate = found["win_rate"]
    assert rate["mean"] == pytest.approx(2 / 3, abs=1e-6) and rate["low"] == 0.5 and rate["high"] == 1.0
    # one tie of 5 votes; of the other 4, the left image was chosen by ann for a, ben for a and b
    assert (found["votes"], found["pairs"], found["of_pairs"]) == (5, 3, 4)
    assert (found["ties"], found["left"]) == (0.2, 0.75)
    ann, ben = found["raters"]
    assert (ann["rater"], ann["votes"], ann["checks"], ann["failed"], ann["counts"]) == ("ann", 3, 1, 0, True)
    assert ann["mean"] == pytest.approx(2.5 / 3, abs=1e-6) and ann["median_seconds"] == 4.0
    assert (ben["votes"], ben["mean"], ben["checks"], ben["median_seconds"]) == (2, 0.5, 0, None)
    # observed disagreement: a 1 of 2 pairs, so 1/2; values on a and b: three firsts, one second, so a pair
    # drawn of the four differs in 2 * 3 * 1 / (4 * 3) = 1/2 of cases: alpha = 1 - 1 = 0
    assert found["alpha"] == pytest.approx(0, abs=1e-9)


def test_votes_of_raters_who_fail_checks_do_not_count(tmp_path):
    with make_fake_study(tmp_path / "study", prompts=10, checks=3) as study:
        vote_as(study, "good", 1.0, failed=1)
        vote_as(study, "careless", 0.0, failed=2)
        assert study_results(study, failures=2)["win_rate"]["mean"] == 0.5
        found = study_results(study, failures=1)
        assert found["win_rate"]["mean"] == 1.0 and found["votes"] == 10 and found["alpha"] is None
        rows = {row["rater"]: row for row in found["raters"]}
        assert rows["careless"]["counts"] is False and rows["careless"]["failed"] == 2
        assert rows["careless"]["mean"] == 0.0 and rows["good"]["counts"] is True
        tie = next(pair.name for pair in study.pairs.values() if pair.check)
        study.vote(Vote("good", tie, TIE, FIRST))  # the failure that there was, or one more
        assert {row["rater"]: row["failed"] for row in study_results(study, 3)["raters"]}["good"] >= 1
        with pytest.raises(InputError, match=r"no vote counts \(26 votes, 2 of 2 raters failed more than 0"):
            study_results(study, failures=0)


def test_a_study_without_votes_has_no_results(tmp_path):
    with make_fake_study(tmp_path / "study") as study, pytest.raises(InputError, match="collect votes first"):
        study_results(study, failures=1)


def test_agreement_is_that_of_a_published_example():
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), example C: nominal, alpha = 0.743
    n = math.nan
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ]
    assert agreement(np.array(rows)) == pytest.approx(0.743, abs=5e-4)
    assert agreement(np.array([[1.0, n], [n, 0.0]])) is None  # no pair has two votes
    assert agreement(np.array([[1.0, 1.0], [1.0, 1.0]])) is None  # one value: 0 of 0


def test_an_interval_over_raters_too_is_wider_where_raters_differ():
    random = np.random.default_rng(0)
    alike = (random.random((5, 200)) < 0.6).astype(float)
    unlike = (random.random((5, 200)) < np.array([[0.2], [0.4], [0.6], [0.8], [1.0]])).astype(float)
    import torch

    def widths(values):
        over_prompts = bootstrap_interval(torch.from_numpy(values.mean(0)), 0)
        crossed = crossed_interval(values, 0, resamples=2000)
        assert crossed[0] < values.mean() < crossed[1]
        return over_prompts[1] - over_prompts[0], crossed[1] - crossed[0]

    narrow, wide = widths(unlike)
    # raters' rates have a standard deviation of 0.283: of a mean of five 0.127, so about 0.5 in all
    assert narrow < 0.08 and 0.4 < wide < 0.6
    narrow, wide = widths(alike)
    assert wide < 2.5 * narrow
    narrow, wide = widths(alike[:1])  # of one rater only prompts can differ
    assert wide == pytest.approx(narrow, rel=0.1)
    assert crossed_interval(np.array([[1.0], [1.0]]), 0) == (1.0, 1.0)
    with pytest.raises(ValueError, match="one or more for each prompt"):
        crossed_interval(np.array([[1.0, math.nan]]), 0)


def test_one_command_writes_the_papers_table(tmp_path, capsys):
    names = [("CaPO+SDXL", "SDXL"), ("CaPO & co_1", "Diffusion-DPO")]
    for number, pair in enumerate(names):
        with make_fake_study(tmp_path / f"{number}", prompts=40, seed=number, names=pair) as study:
            for rater in range(3):
                vote_as(study, f"rater {rater}", 0.9 if number == 0 else 0.5, seed=rater)
            vote_as(study, "<i>careless</i>", 0.0, failed=2)
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert study_files.main(["results", *folders, "--to", str(tmp_path / "tables")]) == 0
    printed = capsys.readouterr().out
    assert "CaPO+SDXL" in printed and "careless" in printed
    found = [json.loads((tmp_path / f"{number}" / "results.json").read_text()) for number in range(2)]
    with (tmp_path / "tables" / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, study, pair in zip(rows, found, names, strict=True):
        assert (row["first"], row["second"]) == pair and row["raters"] == "3" and row["left_out"] == "1"
        assert float(row["mean"]) == study["win_rate"]["mean"]
    # Holm of two: the smaller p doubled
    assert float(rows[0]["holm"]) == pytest.approx(2 * float(rows[0]["p"])) and float(rows[0]["p"]) < 0.001
    latex = (tmp_path / "tables" / "study.tex").read_text()
    first, second, gain = shares(found[0])
    assert r"CaPO+SDXL & SDXL & Improvement & CaPO \& co\_1 & Diffusion-DPO & Improvement \\" in latex
    assert " & ".join([first, second, gain]).replace("%", r"\%") in latex
    assert first == f"{100 * found[0]['win_rate']['mean']:.1f}%"
    assert shares({"win_rate": {"mean": 0.54625}}) == ("54.6%", "45.4%", "+9.2%")  # of the rounded ones
    assert shares({"win_rate": {"mean": 0.5}}) == ("50.0%", "50.0%", "+0.0%")
    page = (tmp_path / "tables" / "study.html").read_text()
    assert "&lt;i&gt;careless" in page and "<i>careless" not in page
    assert not re.search(r'(src|href)="http', page)
    with (tmp_path / "0" / "prompts.csv").open() as file:
        assert next(csv.DictReader(file))["prompt"] == HOSTILE
    with (tmp_path / "0" / "raters.csv").open() as file:
        assert [row["counts"] for row in csv.DictReader(file)] == ["False", "True", "True", "True"]


def test_results_of_equal_votes_are_equal_bytes(tmp_path):
    pages = []
    for place in ("a", "b"):
        with make_fake_study(tmp_path / place) as study:
            vote_as(study, "ann", 0.7)
            found = with_holm([study_results(study, 1)])
        pages.append([path.read_bytes() for path in write_studies(tmp_path / place / "to", found, "command")])
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    "command, said",
    [
        (["results", "{}/none"], "holds no study"),
        (["results", "{0}", "{0}/."], "is named twice, so it would count as two studies"),
        (["results", "{}", "--to", "{}/study.sqlite"], "study.sqlite: it is no folder; give one"),
        (
            ["export", "{}", "--images-at", "https://x", "--to", "{}/study.sqlite"],
            "it is no folder; give one",
        ),
        (["export", "{}", "--images-at", "http://x"], "load images from https:// alone"),
        (["import", "{}", "{}/none.csv"], "none.csv cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, capsys, command, said):
    make_fake_study(tmp_path / "study").close()
    assert study_files.main([word.format(tmp_path / "study") for word in command]) == 2
    assert said in capsys.readouterr().err


def test_agreement_names_the_extra_that_it_needs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "krippendorff", None)
    with pytest.raises(InputError, match=r"needs the package krippendorff: pip install -e '.\[study\]'"):
        agreement(np.array([[1.0, 0.0], [1.0, 1.0]]))
