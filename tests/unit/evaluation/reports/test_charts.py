import math
import xml.etree.ElementTree as ET

import pytest

from capo.evaluation.reports.charts import (
    Chart,
    Curve,
    half_width,
    interval_bar,
    line_chart,
    read_curves,
    thinned,
    ticks,
)


def attributes(svg, kind):
    return next(element.attrib for element in ET.fromstring(svg) if element.attrib["class"] == kind)


def test_half_width_is_the_next_step_that_holds_every_interval():
    assert half_width([(0.45, 0.58), (0.49, 0.51)], 0.5) == pytest.approx(0.1)
    assert half_width([(0.45, 0.61)], 0.5) == pytest.approx(0.2)  # 0.11 from the center
    assert half_width([(0.4, 0.6)], 0.5) == pytest.approx(0.1)  # rounding asks for no further step
    assert half_width([(0.02, 0.98)], 0.5, most=0.5) == 0.5
    assert half_width([], 0.5) == pytest.approx(0.1)


def test_interval_bar_places_its_parts_on_the_axis():
    # axis 0.3 to 0.7: 0.55 lies at 62.5 %, 0.6 at 75 %, 0.65 at 87.5 %;
    # the band from 0.45 at 37.5 % is 25 % wide
    bar = interval_bar(0.55, 0.6, 0.65, 0.5, 0.2, band=(0.45, 0.55))
    assert attributes(bar, "span") | {"y": "", "height": ""} == {
        "class": "span",
        "x": "62.50%",
        "width": "25.00%",
        "y": "",
        "height": "",
    }
    assert attributes(bar, "dot")["cx"] == "75.00%"
    assert (attributes(bar, "band")["x"], attributes(bar, "band")["width"]) == ("37.50%", "25.00%")
    assert ET.fromstring(bar).attrib["class"] == "interval up"
    assert ET.fromstring(interval_bar(0.4, 0.45, 0.49, 0.5, 0.1)).attrib["class"] == "interval down"
    assert ET.fromstring(interval_bar(0.4, 0.45, 0.51, 0.5, 0.1)).attrib["class"] == "interval level"


def test_interval_bar_stays_on_its_axis():
    bar = interval_bar(-3.0, 0.0, 5.0, 0.0, 1.0)
    assert (attributes(bar, "span")["x"], attributes(bar, "span")["width"]) == ("0.00%", "100.00%")


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]  # 3/4 of 0.25 apart is rounded up to 0.2
    assert ticks(0.43, 0.71) == [0.5, 0.6, 0.7]  # 3/4 of 0.07: up to 0.1
    assert ticks(-0.0011, 0.0011) == [-0.001, -0.0005, 0, 0.0005, 0.001]
    assert ticks(3.0, 3.0) == [3.0]
    for low, high in [(0, 800), (1e-7, 3e-6), (-5.5, 123.4), (4, 99), (0.51, 0.98)]:
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high


def test_long_curves_become_means_of_equal_runs():
    points = [(float(step), float(step % 2)) for step in range(1, 11)]
    assert thinned(points, most=4) == [(2.0, 2 / 3), (5.0, 1 / 3), (8.0, 2 / 3), (10.0, 0.0)]  # runs of three
    assert thinned(points, most=10) == points
    assert thinned([], most=4) == []


CSV = """epoch,step,train/loss,val/win_rate,val/win_rate/looks,train/drift_winner,train/drift_loser,time/s,n
0,10,0.5,,,-1e-3,2e-3,1.0,slow
0,20,nan,0.5,0.6,,,2.0,
0,30,0.25,0.625,0.7,-2e-3,3e-3,3.0,
0,,9,9,9,9,9,9,
"""


def test_curves_of_a_metrics_file(tmp_path):
    (tmp_path / "metrics.csv").write_text(CSV)
    charts = read_curves(tmp_path / "metrics.csv")
    # no clock, no words
    assert [chart.title for chart in charts] == ["val/win_rate", "train/loss", "train/drift"]
    rates, loss, drift = charts
    assert [(curve.label, curve.points) for curve in rates.curves] == [
        ("win_rate", [(20, 0.5), (30, 0.625)]),
        ("looks", [(20, 0.6), (30, 0.7)]),
    ]
    # the NaN and the row without a step are passed over
    assert loss.curves[0].points == [(10, 0.5), (30, 0.25)]
    assert [curve.label for curve in drift.curves] == ["drift_winner", "drift_loser"]
    assert (rates.reference, loss.reference) == (0.5, None)


def test_win_rates_come_first_and_scores_of_rewards_stand_apart(tmp_path):
    names = [
        "drift/loser/u0.0",
        "drift/loser/u0.2",
        "train/loss",
        "val/score/looks",
        "val/score/novelty",
        "val/win_rate",
    ]
    (tmp_path / "metrics.csv").write_text(f"step,{','.join(names)}\n1,{','.join('1' for _ in names)}\n")
    charts = read_curves(tmp_path / "metrics.csv")
    titles = ["val/win_rate", "val/score/looks", "val/score/novelty", "train/loss", "drift/loser"]
    assert [chart.title for chart in charts] == titles
    assert [curve.label for curve in charts[-1].curves] == ["u0.0", "u0.2"]


def test_curves_beyond_the_colors_are_counted(tmp_path):
    names = [f"drift/winner/u{number}" for number in range(13)]
    (tmp_path / "metrics.csv").write_text(f"step,{','.join(names)}\n1,{','.join('1' for _ in names)}\n")
    (chart,) = read_curves(tmp_path / "metrics.csv")
    assert (len(chart.curves), chart.left_out) == (10, 3)
    assert "and 3 more in metrics.csv" in line_chart(chart)


@pytest.mark.parametrize("text", [None, "", "step,train/loss\n"])
def test_no_file_or_no_rows_give_no_charts(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == []


def parts(markup):
    return ET.fromstring(f"<div>{markup}</div>")


def test_a_line_chart_puts_points_where_their_values_belong():
    # x from 46 to 350 for steps 0 to 100; y: values 0 to 1 with 6 % room, 176 (-0.06) up to 10 (1.06)
    chart = parts(line_chart(Chart("loss", [Curve("loss", [(0, 0.0), (100, 1.0)])])))
    points = [
        tuple(map(float, point.split(","))) for point in chart.find(".//polyline").attrib["points"].split()
    ]
    assert points == [
        (46.0, pytest.approx(176 - 166 * 0.06 / 1.12, abs=0.06)),
        (350.0, pytest.approx(10 + 166 * 0.06 / 1.12, abs=0.06)),
    ]
    assert [text.text for text in chart.iter("text")] == ["0", "0.5", "1", "0", "20", "40", "60", "80", "100"]
    assert chart.find("ul") is None  # one curve needs no legend


def test_a_reference_is_drawn_even_where_no_curve_reaches_it():
    chart = parts(line_chart(Chart("val/win_rate", [Curve("looks", [(0, 0.7), (10, 0.8)])], reference=0.5)))
    (line,) = [element for element in chart.iter("line") if element.attrib["class"] == "center"]
    # 0.5 of 0.482 to 0.818
    assert float(line.attrib["y1"]) == pytest.approx(176 - 166 * 0.018 / 0.336, abs=0.06)
    assert line.attrib["y1"] == line.attrib["y2"]


@pytest.mark.parametrize("points", [[(5, 1.0)], [(5, 2.0), (6, 2.0)], [(5, 0.0), (5, 0.0)]])
def test_constants_and_single_points_are_drawn(points):
    chart = parts(line_chart(Chart("flat", [Curve("flat", points)])))
    marks = [*chart.iter("polyline"), *chart.iter("circle")]
    numbers = [
        float(number)
        for mark in marks
        for key in ("points", "cx", "cy")
        for number in mark.attrib.get(key, "").replace(",", " ").split()
    ]
    assert len(marks) == 1 and numbers and all(map(math.isfinite, numbers))


def test_names_from_a_file_are_escaped():
    chart = Chart("<b>", [Curve("<i>", [(0, 0.0)]), Curve("&", [(0, 1.0)])])
    markup = line_chart(chart)
    assert "<b>" not in markup and "<i>" not in markup
    assert [entry.text for entry in parts(markup).iter("li")] == ["<i>", "&"]
