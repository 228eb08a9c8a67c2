"""Figures, warnings and files of the calibration report, against hand-worked numbers."""

import io
import json
import math
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr

from capo.calibration import METHODS, calibrate
from capo.data.labels import HUMAN
from capo.data.selection import select
from capo.errors import InputError
from capo.evaluation.reports import calibration_report as figures
from capo.evaluation.reports.calibration_advice import override, warnings_of
from capo.evaluation.reports.calibration_page import picture, print_report, render_page, sizes, write_report
from capo.pairs import best_worst, frs, random_pair, reward_sum
from capo.rewards import Reward

LOGIT = math.log(0.7 / 0.3)  # 0.8473: a pair that far apart has win-rate 0.7


def report_of(scores, rewards, strategy=frs, method="win_rate"):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    names = [r.name for r in rewards]
    calibrated = calibrate(scores, [r.link for r in rewards], [r.scale for r in rewards], method, names)
    texts = [f"prompt {row}" for row in range(len(scores))]
    return figures.calibration_report(
        scores, calibrated, select(strategy, scores, calibrated), rewards, texts, method, strategy
    )


def column(*prompts):
    """Scores of one reward, a row a prompt: (P, N, 1)."""
    return torch.tensor(prompts, dtype=torch.float32)[..., None]


def reward(name="a", **known):
    return Reward(name, print, **known)


def random_scores(prompts, candidates, rewards, seed=0):
    return torch.randn(prompts, candidates, rewards, generator=torch.Generator().manual_seed(seed))


# --- one reward ---


def test_figures_of_one_reward_worked_by_hand():
    # gaps of prompt 0: 1, 3, 2; of prompt 1: 4, 4, 0; in order 0, 1, 2, 3, 4, 4: median 2.5
    found = report_of(column([0, 1, 3], [5, 1, 5]), [reward(scale=0.5, range=[1, 4])], best_worst).rewards[
        "a"
    ]
    assert found.median_gap == 2.5
    assert found.pair_win_rate == pytest.approx(1 / (1 + math.exp(-1.25)))
    assert found.suggested_scale == pytest.approx(LOGIT / 2.5)
    assert found.seen == (0, 5) and found.declared == (1, 4)
    assert found.outside == pytest.approx(3 / 6)  # 0 and twice 5
    # variances 14/9 (of 0, 1, 3 around 4/3) and 32/9 (of 5, 1, 5 around 11/3): mean 23/9
    assert found.deviation == pytest.approx(math.sqrt(23 / 9))


def test_histograms_count_every_candidate_in_its_bin():
    found = figures.histogram(np.array([0.0, 0.1, 0.1, 0.6, 1.0]), bins=4)
    assert (found.low, found.high, found.counts) == (0.0, 1.0, [3, 0, 1, 1])
    assert figures.histogram(np.array([0.5, 0.5, 0.4]), 0.0, 1.0, bins=5).counts == [0, 0, 3, 0, 0]
    assert figures.histogram(np.full(3, 7.0), bins=3) == figures.Histogram(6.5, 7.5, [0, 3, 0])
    noise = figures.histogram(
        np.array([20.0, 20.000002, 20.0], np.float32), bins=50
    )  # nearer than 50 float32 edges
    assert noise.counts[0] == 2 and noise.counts[-1] == 1 and sum(noise.counts) == 3
    of_reward = report_of(random_scores(20, 4, 1), [reward()], best_worst).rewards["a"]
    assert sum(of_reward.raw.counts) == sum(of_reward.calibrated.counts) == 80
    assert (of_reward.calibrated.low, of_reward.calibrated.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("link", "candidates"), [("identity", 3), ("identity", 4), ("log", 3), ("identity", 2)]
)
def test_the_suggested_scale_gives_the_median_pair_its_win_rate(link, candidates):
    scores = 0.25 + 0.01 * random_scores(51, candidates, 1)  # a raw cosine
    before = report_of(scores, [reward(link=link)], best_worst).rewards["a"]
    assert before.pair_win_rate < 0.6
    scale = float(override("a", before.suggested_scale).removeprefix("rewards.a.scale="))
    assert scale == pytest.approx(before.suggested_scale, rel=5e-3)
    # independently: every pair's win-rate at that scale, by the definition of the link
    values = scores[..., 0].double().log() if link == "log" else scores[..., 0].double()
    rates = [
        1 / (1 + math.exp(-scale * abs(a - b)))
        for row in values.tolist()
        for i, a in enumerate(row)
        for b in row[:i]
    ]
    assert np.median(rates) == pytest.approx(0.7, abs=2e-3)
    after = report_of(scores, [reward(link=link, scale=before.suggested_scale)], best_worst).rewards["a"]
    assert after.pair_win_rate == pytest.approx(0.7, abs=1e-6) and after.flat < 0.1


def test_pairs_beyond_the_most_are_taken_at_even_distances(monkeypatch):
    scores = torch.arange(12.0)[:, None] * torch.tensor([0.0, 1.0])  # gaps 0, 1, ... 11
    assert figures.median_gap(scores, "identity") == 5.5
    monkeypatch.setattr(figures, "MOST_PAIRS", 4)  # every third prompt: gaps 0, 3, 6, 9
    assert figures.median_gap(scores, "identity") == 4.5


# --- several rewards ---


def test_rank_correlation_worked_by_hand():
    # prompt 0: ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / (3 * 8) = 0.5; prompt 1: reversed, -1; mean -0.25
    first, second = column([1, 2, 3], [1, 2, 3]), column([10, 30, 20], [9, 5, 1])
    constant = column([4, 4, 4], [4, 4, 4])
    matrix = figures.rank_correlation(torch.cat([first, second, constant], -1))
    assert [row[:2] for row in matrix[:2]] == [pytest.approx([1, -0.25]), pytest.approx([-0.25, 1])]
    assert matrix[2] == [None] * 3 and matrix[0][2] is None


def test_rank_correlation_with_ties_is_scipys_spearman_over_the_prompts_that_have_one():
    scores = (2 * random_scores(40, 5, 3)).round()  # many ties
    scores[7, :, 1] = 3.0
    matrix = figures.rank_correlation(scores)
    for first in range(3):
        for second in range(3):
            rows = [row for row in scores.numpy() if np.ptp(row[:, first]) > 0 and np.ptp(row[:, second]) > 0]
            expected = np.mean([spearmanr(row[:, first], row[:, second]).statistic for row in rows])
            assert matrix[first][second] == pytest.approx(expected)


def test_sizes_pairs_and_skipped_prompts_worked_by_hand():
    # prompt 0: candidate 2 dominates 1, which dominates 0: X+ = {2}, X- = {0}, one pair
    # prompt 1: a trade-off of all three: no candidate dominates, nothing to draw
    # prompt 2: 1 and 2 each dominate 0, neither the other: X+ = {1, 2}, X- = {0}, two pairs
    scores = torch.tensor(
        [[[0, 0], [1, 1], [2, 2]], [[0, 2], [1, 1], [2, 0]], [[0, 0], [2, 1], [1, 2]]], dtype=torch.float32
    )
    found = report_of(scores, [reward("a"), reward("b")])
    assert found.selection == figures.PairFigures(
        "frs", [1, 1, 1, 0], [1, 2, 0, 0], (1, 1.5, 2), 1.5, 1, ["prompt 1"], "frontier"
    )
    # undominated: 1 + 3 + 2 of 9
    assert found.frontier == figures.FrontierShares(
        *(pytest.approx(share / 9) for share in (6, 3, 2)), pytest.approx(1 / 3)
    )
    assert sizes([1, 1, 1, 0]) == {
        "mean": 1,
        "lowest": 0,
        "10 %": 0,
        "median": 1,
        "90 %": 2,
        "highest": 2,
        "empty": pytest.approx(1 / 3),
    }


def test_strategies_by_their_names():
    assert figures.strategy_name(partial(frs, lower="all_dominated")) == "frs(lower=all_dominated)"
    assert figures.strategy_name(partial(frs, lower="frontier", depth=None)) == "frs(lower=frontier)"
    strategies = frs, partial(frs, lower="all_dominated"), reward_sum
    lowers = [
        report_of(random_scores(4, 3, 2), [reward("a"), reward("b")], strategy).selection.lower
        for strategy in strategies
    ]
    assert lowers == ["frontier", "all_dominated", None]


def expected_maxima(candidates, rewards):
    """Expected number of non-dominated points among N of L independent coordinates.

    A(N, L) = sum_{k <= N} A(k, L - 1) / k.
    """
    if rewards == 1:
        return 1.0
    return sum(expected_maxima(k, rewards - 1) / k for k in range(1, candidates + 1))


@pytest.mark.parametrize(("candidates", "rewards"), [(2, 2), (8, 3), (16, 3)])
def test_independent_rewards_are_simulated_near_the_exact_share(candidates, rewards):
    found = figures.independent_frontier(candidates, rewards)
    assert found.undominated == pytest.approx(expected_maxima(candidates, rewards) / candidates, abs=0.015)
    # of two candidates neither dominates with probability 1 - 2 / 2^L; then one wins and one loses, or none
    if candidates == 2:
        assert found.empty == pytest.approx(0.5, abs=0.03)
        assert found.winners == found.losers == pytest.approx((1 - found.empty) / 2)


def test_eight_independent_rewards_leave_half_of_the_prompts_without_a_pair():
    assert figures.independent_frontier(16, 8).empty == pytest.approx(0.51, abs=0.03)  # at N = 16


# --- warnings ---


def test_a_flat_reward_is_told_its_scale():
    scores = torch.cat([0.25 + 0.01 * random_scores(30, 6, 1), random_scores(30, 6, 1, seed=1)], -1)
    found = report_of(scores, [reward("clip", range=[15, 35]), reward("other")])
    flat, outside = warnings_of(found)
    assert flat.startswith("reward 'clip': the win-rates of 100% of the prompts are flat")
    assert f"{override('clip', found.rewards['clip'].suggested_scale)} gives" in flat and "(now 0.50" in flat
    assert "100% of its scores lie outside 15 to 35" in outside


def test_a_saturated_reward_is_told_its_scale():
    (told,) = warnings_of(report_of(random_scores(30, 6, 1), [reward(scale=500.0)], best_worst))
    assert (
        "100% of the prompts are saturated" in told and "rewards.a.scale=" in told and "(now 1.000)" in told
    )


def test_no_scale_helps_a_constant_reward():
    found = report_of(
        torch.cat([torch.full((5, 4, 1), 3.0), random_scores(5, 4, 1)], -1), [reward("same"), reward("other")]
    )
    same = found.rewards["same"]
    assert (same.median_gap, same.pair_win_rate, same.suggested_scale, same.spread, same.deviation) == (
        0,
        0.5,
        None,
        0,
        0,
    )
    (told,) = warnings_of(found)
    assert "flat" in told and "No scale helps" in told and "scale`" not in told and ".scale=" not in told


def test_a_pool_without_a_single_pair_is_reported():
    found = report_of(torch.zeros(7, 3, 1), [reward()], best_worst)
    assert (found.selection.pairs, found.selection.skipped, len(found.selection.examples)) == (
        (0, 0.0, 0),
        7,
        5,
    )
    assert "7 of 7 prompts (100%) have no pair with dR > 0" in warnings_of(found)[-1]


def test_a_degenerate_frontier_is_told_with_what_can_be_done():
    scores, rewards = random_scores(300, 8, 6), [reward(name) for name in "abcdef"]
    told = warnings_of(report_of(scores, rewards))[-1]
    assert "the frontier of 6 rewards has degenerated" in told and "Use fewer rewards" in told
    assert "pairs=sum" in told and "pairs.lower=all_dominated" in told and "pairs.depth=4" in told
    deep = warnings_of(report_of(scores, rewards, partial(frs, depth=4)))[-1]
    assert "has degenerated" in deep and "pairs.depth" not in deep  # no prompt is skipped any more
    assert (
        "all_dominated"
        not in warnings_of(report_of(scores, rewards, partial(frs, lower="all_dominated")))[-1]
    )
    assert not any(
        "frontier" in sentence for sentence in warnings_of(report_of(scores, rewards, reward_sum))
    )  # does not use it
    agreeing = scores[..., :1].expand(-1, -1, 6) + 0.1 * scores  # six rewards of nearly one mind
    assert warnings_of(report_of(agreeing, rewards)) == []


@pytest.mark.parametrize("seed", range(3))
def test_all_dominated_gives_no_pair_to_a_prompt_that_has_none(seed):
    """Which is what the warning says of it."""
    scores, rewards = random_scores(300, 4, 4, seed), [reward(name) for name in "abcd"]
    frontier, wider = (
        report_of(scores, rewards, partial(frs, lower=lower)).selection
        for lower in ("frontier", "all_dominated")
    )
    assert frontier.skipped == wider.skipped > 0 and wider.mean_pairs > frontier.mean_pairs


# --- what is not available ---


def test_a_human_choice_has_no_scores_and_no_warnings():
    found = report_of(column([1, 0], [0, 1], [1, 0]), [HUMAN], frs)
    human = found.rewards["human"]
    assert [
        human.raw,
        human.deviation,
        human.flat,
        human.saturated,
        human.pair_win_rate,
        human.suggested_scale,
    ] == [None] * 6
    assert human.calibrated.counts[0] == human.calibrated.counts[-1] == 3
    assert warnings_of(found) == []
    assert "a human choice: ranks, no scores" in render_page("t", found, {}, [], picture(found))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "win_rate"])
def test_other_calibrations_have_no_flat_prompts(method):
    scores = random_scores(10, 4, 2)
    found = report_of(scores, [reward("a", scale=1e-3), reward("b")], random_pair, method)
    assert (
        found.rewards["a"].flat is None and found.rewards["a"].saturated is None and warnings_of(found) == []
    )
    calibrated = METHODS[method](scores[..., 0])
    assert found.rewards["a"].calibrated.low == pytest.approx(calibrated.min().item())
    assert "link and scale take no part in training" in render_page("t", found, {}, [], b"")


# --- the files ---


class Words(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.found += data.split()


def test_the_files(tmp_path):
    found = report_of(
        torch.cat([torch.full((6, 2, 1), 0.5), random_scores(6, 2, 1)], -1), [reward("same"), reward("b")]
    )
    warnings = write_report(tmp_path / "report", "a <pool>", found, {"calibration": "win_rate"})
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "calibration.html",
        "calibration.json",
        "calibration.png",
    ]
    text = (tmp_path / "report" / "calibration.html").read_text()
    words = Words(text)
    assert warnings and all(sentence in " ".join(words.found) for sentence in warnings)
    assert (
        "://" not in text
        and "<pool>" not in text
        and all(source.startswith("data:image/png") for source in words.sources)
    )
    assert "no scale helps" in text and override("b", found.rewards["b"].suggested_scale) in text
    with Image.open(tmp_path / "report" / "calibration.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 800
    stored = json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert stored["warnings"] == warnings and stored["selection"]["winners"] == found.selection.winners
    assert stored["rewards"]["same"]["suggested_scale"] is None
    assert stored["rewards"]["b"]["raw"]["counts"] == found.rewards["b"].raw.counts
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    write_report(tmp_path / "report", "a <pool>", found, {"calibration": "win_rate"})
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}


def test_a_picture_has_a_row_for_every_reward_and_one_for_the_pairs():
    found = [
        report_of(random_scores(5, 3, count), [reward(str(index)) for index in range(count)], random_pair)
        for count in (1, 3)
    ]
    heights = [Image.open(io.BytesIO(picture(report))).height for report in found]
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)  # four rows and two


def test_a_folder_that_cannot_be_written_is_named_and_stays(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="file/report cannot be written"):
        write_report(
            tmp_path / "file" / "report", "t", report_of(random_scores(3, 2, 1), [reward()], best_worst), {}
        )
    assert (tmp_path / "file").read_text() == "kept"


def test_the_console_has_a_row_a_reward_and_the_warnings():
    found = report_of(0.01 * random_scores(9, 3, 2), [reward("a"), reward("b", scale=100.0)])
    console = Console(width=90, record=True, file=io.StringIO())
    print_report(found, warnings_of(found), console)
    lines = console.export_text().splitlines()
    assert sum(line.split()[:2] in (["a", "1"], ["b", "100"]) for line in lines) == 2
    assert any(line.startswith("X+ / X-: ") for line in lines) and any(
        "reward 'a'" in line and "flat" in line for line in lines
    )
