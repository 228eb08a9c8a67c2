import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from capo.errors import DamagedFile
from capo.evaluation.reports.formats import number, verdict
from capo.evaluation.reports.gallery import Change, Exhibit
from capo.evaluation.reports.page import Report, print_results, remarks, render_report
from capo.rewards import Reward
from capo.runtime.files import write_table

RESULTS = {
    "win_rate": {
        "looks": {
            "mean": 0.634,
            "low": 0.601,
            "high": 0.668,
            "p": 0.0002,
            "holm": 0.0004,
            "prompts_needed": 40,
        },
        "alignment": {
            "mean": 0.48,
            "low": 0.44,
            "high": 0.52,
            "p": 0.31,
            "holm": 0.31,
            "prompts_needed": 1900,
        },
    },
    "win_rate_by_category": {
        "single": {
            "looks": {"mean": 0.71, "low": 0.66, "high": 0.76, "p": 0.001, "holm": 0.002},
            "alignment": {"mean": 0.37, "low": 0.33, "high": 0.41, "p": 0.003, "holm": 0.006},
        },
        "two": {
            "looks": {"mean": 0.52, "low": 0.45, "high": 0.59, "p": 0.4, "holm": 0.4},
            "alignment": {"mean": 0.58, "low": 0.49, "high": 0.67, "p": 0.2, "holm": 0.2},
        },
    },
    "zero": {
        "looks": {"mean": 0.51, "low": 0.47, "high": 0.55},
        "alignment": {"mean": 0.49, "low": 0.45, "high": 0.53},
    },
    "score": {"looks": {"policy": 6.25, "base": 5.5}, "alignment": {"policy": 0.7, "base": 0.71}},
    "oracle": {"looks": {"policy": 5.1, "base": 5.3, "low": -0.31, "high": -0.09, "p": 0.004, "holm": 0.004}},
    "oracle_by_category": {
        "single": {"looks": {"policy": 5.0, "base": 5.1, "low": -0.3, "high": 0.1, "p": 0.4, "holm": 0.4}},
        "two": {"looks": {"policy": 5.2, "base": 5.5, "low": -0.5, "high": -0.1, "p": 0.04, "holm": 0.08}},
    },
    "diversity": {"policy": 0.96, "base": 1.0, "low": -0.1, "high": 0.02, "p": 0.2},
    "drift": {
        "latents": {"mean": 0.5, "low": 0.4, "high": 0.6},
        "weights": {"all": 0.0123, "blocks": {"conv_in": 0.0, "mid_block": 0.02, "conv_out": 0.01}},
    },
    "features": {
        "reward": "looks",
        "prompts": 24,
        "diversity": {"policy": 0.03, "base": 0.04, "low": -0.018, "high": 0.004, "p": 0.1},
        "drift": {"mean": 0.01, "low": 0.008, "high": 0.012},
    },
    "prompts": 256,
    "images_per_prompt": 4,
    "policy": "ab" * 32,
    "base": "cd" * 32,
}
SETTINGS = {
    key: f"{key}-print"
    for key in ("policy", "base", "policy_generator", "base_generator", "latent_space", "text_encoders")
} | {"steps": 10, "guidance": 3.0, "seed": 0, "zero": {"prompts": 64}}
REWARDS = [
    Reward("looks", print, weights="/home/me/looks.safetensors", license="Apache-2.0"),
    Reward("alignment", print, link="log", weights="org/name", revision="v2"),
]
VOID = {"meta", "img", "input", "br", "line", "rect", "circle", "polyline"}


def exhibit(prompt="a red circle", **places):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    changes = [Change("looks", 5.0, 6.5, 0.75), Change("oracle: looks", 5.2, 5.1)]
    return Exhibit(prompt, "single", 0.25, changes, images, images[::-1], places)


def page(**changes):
    values = {
        "title": "a run",
        "results": RESULTS,
        "settings": SETTINGS,
        "rewards": REWARDS,
        "exhibits": [exhibit("a red circle", gain=0, plain=1), exhibit("two blue stars", loss=0)],
    }
    return render_report(Report(**values | changes))


class Page(HTMLParser):
    """Elements with their attributes; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def read(self):
        return " ".join(" ".join(self.text).split())


def test_page_fetches_nothing(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.25\n")
    text = page(config="model: x\n", curves=tmp_path / "metrics.csv")
    assert "://" not in text and "@import" not in text and "<script" not in text and "url(" not in text
    for tag, attributes in Page(text).elements:
        assert tag not in ("link", "iframe", "object", "embed")
        for key in {"src", "href", "srcset", "data", "poster"} & attributes.keys():
            assert attributes[key].startswith("data:image/")


def test_headline_shows_rates_zero_line_and_scores():
    text = Page(page()).read()
    assert "63.4 % [60.1, 66.8] < 0.001 51.0 % [47.0, 55.0] 5.500 → 6.250" in text
    assert "48.0 % [44.0, 52.0] 0.310 49.0 % [45.0, 53.0] 0.710 → 0.700" in text
    assert "256 prompts, 4 images each" in text and "on the first 64 prompts" in text
    # intervals reach 0.168 from the center: the axis runs from 30 to 70 %
    assert "30 % 50 % 70 %" in text


def test_win_rates_are_shown_by_category():
    text = page()
    rows = re.findall(r"<tr><th scope=.row.>(single|two)</th>(.*?)</tr>", text.split("<h2>Oracle")[0], re.S)
    assert [name for name, _ in rows] == ["single", "two"]
    assert '<span class="above">71.0 %</span> <span class="span">[66.0, 76.0]</span>' in rows[0][1]
    assert '<span class="below">37.0 %</span>' in rows[0][1] and "p 0.006" in rows[0][1]
    assert rows[1][1].count('class="unclear"') == 2
    few = {name: value for name, value in RESULTS.items() if name != "win_rate_by_category"}
    assert "By category" not in page(results=few)


def test_oracle_is_shown_by_category():
    text = Page(page()).read()
    assert "all prompts -0.200 [-0.310, -0.090] 0.004 5.300 → 5.100" in text
    assert "two -0.300 [-0.500, -0.100] 0.080 5.500 → 5.200" in text
    without = {key: value for key, value in RESULTS.items() if not key.startswith("oracle")}
    assert "Measured exactly" not in page(results=without)


def test_gallery_holds_both_sides_and_its_orders():
    parsed = Page(page())
    cards = [attributes for tag, attributes in parsed.elements if tag == "article"]
    assert (
        cards[0]["class"].split() == ["card", "in-gain", "in-plain"]
        and "--gain: 0; --plain: 1;" in cards[0]["style"]
    )
    assert cards[1]["class"].split() == ["card", "in-loss"]
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert [image["alt"] for image in images[:4]] == ["base: a red circle"] * 2 + ["tuned: a red circle"] * 2
    # the other way round
    assert [image["src"] for image in images[:2]] == [image["src"] for image in images[3:1:-1]]
    assert (
        "looks 5.000 → 6.500 +1.500 75 %" in parsed.read()
        and "oracle: looks 5.200 → 5.100 -0.100" in parsed.read()
    )
    radios = [attributes for tag, attributes in parsed.elements if tag == "input"]
    labels = [attributes["for"] for tag, attributes in parsed.elements if tag == "label"]
    assert [radio["id"] for radio in radios] == labels == ["by-gain", "by-loss", "by-plain"]
    assert ["checked" in radio for radio in radios] == [True, False, False]


@pytest.mark.parametrize(
    ("policy", "shown", "verdict"),
    [
        (0.5004, "+0.000", "unclear"),
        (0.4996, "+0.000", "unclear"),
        (0.501, "+0.001", "above"),
        (0.4, "-0.100", "below"),
    ],
)
def test_a_change_that_rounds_to_nothing_has_no_color(policy, shown, verdict):
    card = Exhibit("a", "", 0.0, [Change("looks", 0.5, policy, 0.5)], [], [], {"gain": 0})
    assert f'<td class="{verdict}">{shown}</td>' in page(exhibits=[card])


def test_every_class_of_a_curve_has_a_color():
    text = page()
    for index in range(10):
        assert (
            f".series-{index} {{ --c: var(--s{index}); }}" in text
            and len(re.findall(rf"--s{index}: #", text)) == 2
        )


def test_settings_and_fingerprints_are_shown_and_escaped():
    text = page(
        title="<i>", config="a: <b> & 'c'\n", exhibits=[exhibit('"><script>alert(1)</script>\x1b[31m')]
    )
    assert "<script" not in text and "<i>" not in text
    assert "\x1b" not in text and r"\x1b[31m" in text  # which a terminal that shows the file would obey
    read = Page(text).read()
    assert "a: <b> & 'c'" in read and '"><script>alert(1)</script>' in read
    for key in ("policy", "base", "latent_space", "text_encoders", "policy_generator"):
        assert f"{key}-print" in read
    assert (
        REWARDS[0].key in read
        and "looks.safetensors" in read
        and "/home/me" not in text
        and "org/name (v2)" in read
        and "log, 1.0" in read
    )


def test_page_without_zero_line_gallery_or_config():
    read = Page(page(results=RESULTS | {"zero": {}}, settings=SETTINGS | {"zero": None}, exhibits=[])).read()
    assert (
        "not computed" in read
        and "Gallery" not in read
        and "config.yaml" not in read
        and "pale band" not in read
    )


def test_the_same_report_gives_the_same_text():
    assert page() == page()


def test_remarks_name_reward_hacking_a_zero_line_off_its_place_and_prompts_that_are_cut():
    chance, hacked, off = remarks(RESULTS | {"zero": {"looks": {"mean": 0.4, "low": 0.35, "high": 0.45}}})
    assert chance == (
        "alignment: 48.0 % may be chance (p 0.310); about 1900 prompts would show a difference of that size, "
        "256 were drawn."
    )
    assert hacked.startswith("looks: the reward prefers the policy (63.4 %)")
    assert "from 5.300 to 5.100: reward hacking" in hacked
    assert off.startswith("looks: the zero line's interval (35.0 % to 45.0 %)")
    cut = RESULTS | {"oracle": {}, "cut": {"looks": {"tokens": 77, "prompts": 3}}}
    assert remarks(cut)[1:] == [
        f"looks: it reads 77 tokens of a prompt; at least 3 of {RESULTS['prompts']} prompts are longer, and "
        "nothing after that counts in its scores."
    ]
    risen = {"looks": {"policy": 5.4, "base": 5.3, "low": -0.01, "high": 0.2}}
    assert remarks(RESULTS | {"oracle": risen}) == [chance]
    fallen = {"two": {"looks": {"policy": 5.2, "base": 5.5, "holm": 0.03}}}
    assert (
        "looks of 'two' falls from 5.500 to 5.200 (p 0.030 by Holm"
        in remarks(RESULTS | {"oracle_by_category": fallen})[1]
    )


def test_diversity_and_drift_are_relative_to_the_base():
    text = Page(page()).read()
    # 0.96 / 1 - 1, and distances of the features: 0.03 / 0.04 - 1, -0.018 / 0.04, 0.004 / 0.04, 0.01 / 0.04
    assert "latents -4.0 % [-10.0, +2.0] 0.200 1.000 → 0.960 0.500 (50 %)" in text
    assert "features -25.0 % [-45.0, +10.0] 0.100 0.04 → 0.03 0.01 (25 %)" in text
    assert (
        "0.0123 for all of them, and by block: mid_block 0.02 conv_out 0.01" in text
    )  # conv_in has not moved
    assert 'class="amount" width="50.0%"' in page()  # 0.01 of 0.02
    bare = {key: value for key, value in RESULTS.items() if key != "features"}
    bare["drift"] = {"latents": RESULTS["drift"]["latents"]}
    read = Page(page(results=bare)).read()
    assert "which needs no model" in read and "by block" not in read and "cosine" not in read
    alike = {
        "policy": 0.0,
        "base": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
    }  # all images of a prompt are equal
    assert "+0.0 % [+0.0, +0.0]" in Page(page(results=bare | {"diversity": alike})).read()


@pytest.mark.parametrize(
    ("low", "high", "said"), [(-0.1, -0.002, ["latents"]), (-0.1, 0.0, []), (0.001, 0.1, [])]
)
def test_a_fall_of_diversity_beyond_its_interval_is_a_warning(low, high, said):
    changed = {"policy": 1 + (low + high) / 2, "base": 1.0, "low": low, "high": high, "p": 0.01}
    falls = [sentence for sentence in remarks(RESULTS | {"diversity": changed}) if "diversity" in sentence]
    assert len(falls) == len(said) and all(name in falls[0] for name in said)
    if said:
        assert falls[0].startswith("diversity falls by 5.1 % (0.2 to 10.0 %; latents)")
        both = RESULTS["features"] | {"diversity": changed}
        assert "what 'looks' sees in images, 24 prompts" in remarks(RESULTS | {"features": both})[-1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.51, 0.6, "above"), (0.4, 0.49, "below"), (0.5, 0.6, "unclear"), (0.4, 0.5, "unclear")],
)
def test_verdict(low, high, expected):
    assert verdict({"low": low, "high": high}, 0.5) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (0.27, "0.270"), (22.7341, "22.734"), (0.012345, "0.0123")]
)
def test_scores_keep_three_digits_that_count(value, text):
    assert number(value) == text


def test_console_table_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    print_results(RESULTS, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(
        re.search(r"looks +63\.4 +60\.1–66\.8 +51\.0 \(47\.0–55\.0\) +5\.500 → 6\.250", line)
        for line in lines
    )
    assert any(re.search(r"looks +5\.300 +5\.100 +-0\.200 +-0\.310 to -0\.090", line) for line in lines)
    assert any(re.search(r"two +5\.500 → 5\.200", line) for line in lines)
    assert "reward hacking" in " ".join(lines)


def test_the_curve_of_strengths_is_drawn_from_the_base_on():
    """The base is at strength 0 with 0.5; without a curve there is no section."""
    curve = [
        {"strength": strength, "win_rate": {}, "rewards": {"looks": rate}}
        for strength, rate in ((0.5, 0.7), (1.0, 0.6))
    ]
    assert "<h2>Strength</h2>" not in page()
    text = page(strength={"chosen": 0.5, "curve": curve})
    assert "the policy has strength 0.5." in text
    [points] = re.findall(r'<polyline class="series-0" points="([^"]*)"', text)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2) and ys[0] > ys[2] > ys[1]


def test_rounds_of_a_run_are_a_table(tmp_path):
    """Read from the file beside the curves, as a run writes it; a damaged figure is named."""
    row = {"round": 0, "first step": 1, "last step": 80, "drawn by": "ab", "pool": "p", "prompts": 96}
    row |= {
        "prompts with a pair": 90,
        "pairs per prompt": 3.25,
        "val/win_rate": 0.5625,
        "val/win_rate/looks": 0.6,
    }
    later = row | {"round": 1, "first step": 81, "last step": 120, "val/win_rate": 0.71}
    curves = tmp_path / "metrics.csv"
    assert "<h2>Rounds</h2>" not in page(curves=curves)
    write_table(tmp_path / "rounds.csv", list(row), [row, later])
    text = page(curves=curves)
    cells = re.findall(r"<td>([^<]*)</td>", text.partition("<h2>Rounds</h2>")[2].partition("</table>")[0])
    assert cells == [
        "1-80",
        "90 of 96",
        "3.2",
        "0.562",
        "0.600",
        "81-120",
        "90 of 96",
        "3.2",
        "0.710",
        "0.600",
    ]
    write_table(tmp_path / "rounds.csv", list(row), [row | {"val/win_rate": "high"}])
    with pytest.raises(DamagedFile, match=r"rounds\.csv.*val/win_rate is 'high'"):
        page(curves=curves)
