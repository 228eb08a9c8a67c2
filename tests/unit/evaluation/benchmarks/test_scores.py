"""Figures of benchmarks by hand, what official scorers wrote, and the tables."""

import csv
import json
import os

import pytest
import torch

from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.benchmarks import Benchmark, dpg, genai, geneval, t2i_compbench
from capo.evaluation.benchmarks.layout import numbered
from capo.evaluation.benchmarks.scores import Row, summary
from capo.evaluation.benchmarks.table import BenchmarkTable
from capo.evaluation.categories import groups_of
from capo.evaluation.statistics import balanced_interval


def of_categories(categories, **more) -> Benchmark:
    prompts = [make_prompt(f"prompt {number}", name) for number, name in enumerate(categories)]
    return Benchmark("made_up", prompts, 2, numbered(len(prompts), 2), groups=groups_of(categories), **more)


def test_a_mean_over_groups_is_not_that_over_prompts():
    values = {"m": torch.tensor([1.0, 0.0, 1.0, 0.0])}  # a: 2/3, b: 0
    for overall, mean in (("groups", 1 / 3), ("prompts", 1 / 2)):
        found = summary(of_categories("aaab", overall=overall), [Row("one", values)], 0)["measures"]["m"]
        assert found["overall"]["rows"]["one"]["mean"] == round(mean, 6)
        assert found["a"]["rows"]["one"]["mean"] == round(2 / 3, 6) and found["a"]["prompts"] == 3
    assert list(summary(of_categories("aaab", overall=None), [Row("one", values)], 0)["measures"]["m"]) == [
        "a",
        "b",
    ]
    balanced = summary(of_categories("aaab", overall="groups"), [Row("one", values)], 0)["measures"]["m"]
    assert [balanced["overall"]["rows"]["one"][side] for side in ("low", "high")] == [0.0, 0.5]
    # of group a three values are drawn, b has one: sums of three of {1, 0, 1} / 6; 1/27 are all 0
    low, high = balanced_interval([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0])], 0)
    assert (low, high) == (0.0, 0.5)
    for groups, resamples in (([], 10), ([torch.ones(1)], 0), ([torch.ones(0)], 10)):
        with pytest.raises(ValueError, match=r"this needs|an interval needs"):
            balanced_interval(groups, 0, resamples)


def test_a_model_against_itself_has_no_difference():
    benchmark = of_categories("aabb" * 4)
    scores = {"looks": torch.rand(16, 2, generator=torch.Generator().manual_seed(0))}
    rows = [Row.of_scores(name, benchmark, scores) for name in ("policy", "base")]
    for entry in summary(benchmark, rows, 0)["measures"]["looks"].values():
        same = {"mean": 0, "low": 0, "high": 0, "p": 1.0, "holm": 1.0, "prompts_needed": None}
        assert entry["differences"]["policy"] == same
        assert entry["win_rates"]["policy"]["mean"] == 0.5 and entry["best"] is None


def test_a_measure_of_some_groups_has_figures_of_those_alone():
    """Two measures of a: their tests are corrected for one group each, whatever the other groups are."""
    benchmark = of_categories(["a"] * 20 + ["b"] * 20, measured={"m": ("a", "c"), "n": ("c",)})
    level = torch.rand(40, generator=torch.Generator().manual_seed(1)).double()
    rows = [Row(name, {"m": level + more, "all": level + more}) for name, more in (("one", 0.1), ("two", 0))]
    found = summary(benchmark, rows, 0)["measures"]
    assert list(found["m"]) == ["a"] and list(found["all"]) == ["overall", "a", "b"]
    tested = found["m"]["a"]["differences"]["one"]
    assert tested["p"] == tested["holm"] == found["all"]["a"]["differences"]["one"]["p"]
    assert found["all"]["a"]["differences"]["one"]["holm"] == 2 * tested["p"]
    assert found["all"]["overall"]["differences"]["one"]["holm"] == tested["p"]  # m has no overall figure
    assert found["m"]["a"]["best"] == found["all"]["overall"]["best"] == "one"
    with pytest.raises(InputError, match=r"n is a figure of c alone, and what is drawn is overall, a, b;"):
        benchmark.parts_of("n")


def test_a_difference_that_may_be_chance_says_how_many_prompts_it_needs(tmp_path):
    benchmark = of_categories(["a"] * 4)
    rows = [Row("one", {"m": torch.tensor([0.5, 0.1, 0.4, 0.0])}), Row("two", {"m": torch.full((4,), 0.2)})]
    found = summary(benchmark, rows, 0)
    # differences 0.3, -0.1, 0.2, -0.2: mean 0.05, s^2 = 0.17 / 3; (2.8016 / 0.05)^2 0.05667 = 177.9
    assert found["measures"]["m"]["a"]["differences"]["one"]["prompts_needed"] == 178
    table = BenchmarkTable(found, "", {}, {})
    assert table.html().count("about 178 prompts would show it") == 2  # overall and a
    assert "178" in table.write(tmp_path)[1].read_text()
    rows[0] = Row("one", {"m": torch.full((4,), 0.3)})
    assert "would show it" not in BenchmarkTable(summary(benchmark, rows, 0), "", {}, {}).html()


def test_the_best_row_is_one_that_tests_separate():
    benchmark = of_categories(["a"] * 20 + ["b"] * 20)
    level = torch.rand(40, generator=torch.Generator().manual_seed(1)).double()
    better = level + torch.cat([torch.full((20,), 0.2), torch.tensor([0.02, -0.01] * 10)])
    rows = [Row("first", {"m": better}), Row("second", {"m": level}), Row("third", {"m": level - 0.3})]
    found = summary(benchmark, rows, 0)["measures"]["m"]
    assert [found[part]["best"] for part in ("overall", "a", "b")] == ["first", "first", None]
    apart = found["a"]["differences"]
    assert apart["first"]["mean"] == 0.5 and apart["second"]["mean"] == 0.3  # from the third, the last
    assert apart["first"]["p"] == 0.0002 and apart["first"]["holm"] == 0.0004  # two groups


def test_official_factors_and_spread():
    benchmark = of_categories("aaaabb", factors={"m": 100.0}, chunk=2)
    row = Row.of_scores(
        "one", benchmark, {"m": torch.tensor([[1.0, 3], [2, 2], [4, 4], [6, 6], [1, 1], [3, 3]])}
    )
    found = summary(benchmark, [row], 0)["measures"]["m"]
    assert found["a"]["rows"]["one"]["mean"] == 350.0  # 2, 2, 4, 6
    assert found["a"]["rows"]["one"]["spread"] == 150.0  # of 2 and 5 over two chunks
    assert found["b"]["rows"]["one"]["spread"] == 0.0 and "spread" not in found["overall"]["rows"]["one"]


def geneval_results(path, correct, prompts=("a cat", "a dog")) -> str:
    """results.jsonl as the scorer writes it, in the order of os.listdir."""
    rows = [
        {
            "filename": f"images/policy/{row:05d}/samples/{image:05d}.png",
            "tag": "colors",
            "prompt": prompts[row],
            "correct": value,
            "reason": "",
            "metadata": "{}",
            "details": "{}",
        }
        for (row, image), value in correct.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return path


def test_results_of_geneval(tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"tag": "colors", "prompt": "a cat"}\n{"tag": "position", "prompt": "a dog"}\n')
    benchmark = geneval(str(listed), images=2)
    path = tmp_path / "results.jsonl"
    correct = {(0, 0): True, (0, 1): False, (1, 0): True, (1, 1): True}
    values = benchmark.read_official(geneval_results(path, correct))
    assert values["geneval"].tolist() == [0.5, 1.0]
    for wrong, says in (
        ({**correct, (1, 1): None}, "line 1: no result of evaluate_images.py"),
        (
            {key: value for key, value in correct.items() if key != (1, 1)},
            "1 of 2 prompts do not have figures of 2",
        ),
    ):
        with pytest.raises(InputError, match=says):
            benchmark.read_official(geneval_results(path, wrong))
    path.write_text(geneval_results(path, correct).read_text() * 2)
    with pytest.raises(InputError, match="line 5: image 1 of prompt 1 has a figure already; remove one"):
        benchmark.read_official(path)
    with pytest.raises(InputError, match="folder 00001 has the prompt 'a bird', the list has 'a dog'"):
        benchmark.read_official(geneval_results(path, correct, ("a cat", "a bird")))
    with pytest.raises(InputError, match=r"results=.*nowhere: cannot be read"):
        benchmark.read_official(tmp_path / "nowhere")
    with pytest.raises(InputError, match="benchmark made_up has no official scorer; leave results out"):
        of_categories("a").read_official(path)


def test_results_of_dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("0", "coco_7"):
        (folder / f"{name}.txt").write_text(f"a cat {name}")
    benchmark, path = dpg(str(folder)), tmp_path / "policy.txt"
    lines = [
        "/a, b/images/coco_7.png, 0.5, 1.0, 0.0, 0.5, 0.5",
        "/a, b/images/0.png, 1.0, 1.0, 1.0, 0.2, 0.8",
        "Model: policy",
        "L1 category scores:",
        "\tentity: 91.5",
        "DPG-Bench score: 65.0",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert benchmark.read_official(path)["dpg"].tolist() == pytest.approx([0.8, 0.5])
    for line, says in (
        ("/images/x.png, 1.0, 1.0, 1.0, 1.0, 1.0", "it has a picture 'x', but no text file"),
        ("/images/0.png, 1.0, a, 1.0, 1.0, 1.0", "of '0' it has no figures"),
        ("/images/0.png, 1.0, nan, 1.0, 1.0, 1.0", "'0': the figure nan is not from -1 to 1"),
        ("/images/0.png, 1.0, 700, 1.0, 1.0, 1.0", "'0': the figure 700 is not from -1 to 1"),
        (f"{lines[1]}\n{lines[1]}", "'0': image 0 of prompt 0 has a figure already; remove one of both"),
    ):
        path.write_text("\n".join([lines[0], line]))
        with pytest.raises(InputError, match=says):
            benchmark.read_official(path)


def test_results_of_t2i_compbench(tmp_path):
    (tmp_path / "color_val.txt").write_text("a cat\na dog\n")
    (tmp_path / "spatial_val.txt").write_text("a cat on a mat\n")
    benchmark = t2i_compbench(str(tmp_path), ["color", "spatial"], images=2)
    color, spatial = (
        tmp_path / "color" / "annotation_blip",
        tmp_path / "spatial/labels/annotation_obj_detection_2d",
    )
    for folder in (color, spatial):
        folder.mkdir(parents=True)
    answers = [{"question_id": number, "answer": f"{0.25 * number:.4f}"} for number in (3, 1, 0, 2)]
    (color / "vqa_result.json").write_text(json.dumps(answers))
    with pytest.raises(InputError, match=r"results=.*spatial/.*2d/vqa_result.json: cannot be read"):
        benchmark.read_official(tmp_path)
    (spatial / "vqa_result.json").write_text(
        '[{"question_id": 0, "answer": 1}, {"question_id": 1, "answer": 0.5}]'
    )
    values = benchmark.read_official(tmp_path)
    assert values["t2i_compbench"].tolist() == [0.125, 0.625, 0.75]
    figures = summary(benchmark, [Row("one", values)], 0)["measures"]["t2i_compbench"]
    assert list(figures) == ["color", "spatial"]  # no mean of different scorers
    for text, says in (
        (
            '[{"question_id": 0, "answer": 1}, {"question_id": 0, "answer": 1}]',
            "entry 1: image 0 of prompt 0 has a figure already; remove one of both",
        ),
        ('[{"question_id": 0}]', "entry 0 has no question_id with an answer"),
        ("[3]", "entry 0 has no question_id with an answer"),
        ("5", "it holds 5, not a list"),
        ("null", "it holds null, not a list"),
        ('[{"question_id": 1e999, "answer": 1}]', "entry 0: question_id is inf, not a finite number"),
        ('[{"question_id": 0.5, "answer": 1}]', r"entry 0: question_id is 0.5, not a whole number from 0 on"),
        (
            '[{"question_id": 0, "answer": ' + "9" * 400 + "}]",
            "entry 0: answer is 9+[.]*, not a finite number",
        ),
        ('[{"question_id": 0, "answer": true}]', "entry 0: answer is true, not a finite number"),
    ):
        (spatial / "vqa_result.json").write_text(text)
        with pytest.raises(InputError, match=f"vqa_result.json: {says}"):
            benchmark.read_official(tmp_path)


def test_results_of_genai(tmp_path):
    (tmp_path / "genai_image.json").write_text('{"00000": {"prompt": "a"}, "00001": {"prompt": "b"}}')
    (tmp_path / "genai_skills.json").write_text('{"counting": [1]}')
    benchmark, path = genai(str(tmp_path)), tmp_path / "clip-flant5-xxl_1600_prompts.pt"
    torch.save(torch.tensor([[0.5], [0.25]]), path)
    assert benchmark.read_official(path)["genai"].tolist() == [0.5, 0.25]
    for wrong, says in (
        (torch.ones(3, 1), r"holds \(3, 1\) torch.float32, not finite scores of 2"),
        (torch.ones(2, 0), r"holds \(2, 0\) torch.float32, not finite scores of 2"),
        (torch.ones(2, 1) * 1j, r"holds \(2, 1\) torch.complex64, not finite scores of 2"),
        (torch.ones(2, 1).to_sparse(), "not finite scores of 2"),
        (torch.ones(2, 1, device="meta"), "not finite scores of 2"),
        (torch.ones(2, 1).to(torch.float8_e4m3fn), "float8_e4m3fn, not finite scores of 2"),
        (torch.tensor([[0.5], [float("nan")]]), "not finite scores of 2"),
        ({"a": 1}, "holds dict"),
    ):
        torch.save(wrong, path)
        with pytest.raises(InputError, match=says):
            benchmark.read_official(path)
    for content in (b"nothing", b"hello world", b"\x80\x02h\xff."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="holds more or less than tensors; give the scorer's"):
            benchmark.read_official(path)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    with pytest.raises(InputError, match=r"cannot be read \(it is no ordinary file\); give the scorer's .pt"):
        benchmark.read_official(path)


@pytest.mark.parametrize(("images", "skills", "says"), [
    ('{"\u00b2": {"prompt": "a"}}', "{}", "genai_image.json: '\u00b2' is no number of a prompt"),
    ('{"' + "9" * 5000 + '": {"prompt": "a"}}', "{}", "is no number of a prompt"),
    ('{"1": {"prompt": "a"}, "01": {"prompt": "b"}}', "{}", "two entries are of prompt 01"),
    ('{"1": {"prompt": "a"}}', '{"basic": [1e999]}', "basic: an entry is inf, not a finite number"),
    ('{"1": {"prompt": "a"}}', '{"basic": 1}', "basic: it holds 1, not a list"),
    ('{"1": {"prompt": "a"}}', '{"basic": ["1", "2"]}', "a skill has the prompt 2, which genai_image"),
])  # fmt: skip
def test_lists_of_genai_that_cannot_be_used_are_named(tmp_path, images, skills, says):
    (tmp_path / "genai_image.json").write_text(images)
    (tmp_path / "genai_skills.json").write_text(skills)
    with pytest.raises(InputError, match=says):
        genai(str(tmp_path))


def test_the_tables_say_the_same(tmp_path):
    benchmark = of_categories(["a"] * 20 + ["b_%"] * 20)
    scores = {"m": torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).double()}
    rows = [
        Row.of_scores("policy", benchmark, {"m": scores["m"] + 1}),
        Row.of_scores("base", benchmark, scores),
    ]
    found = summary(benchmark, rows, 0)
    settings = {name: {"denoiser": name * 3, "seed": 7} for name in ("policy", "base")}
    table = BenchmarkTable(found, "python evaluate.py\nbenchmark=made_up", settings, {"m": "not comparable"})
    page, cells, latex = (path.read_text() for path in table.write(tmp_path))
    mean = found["measures"]["m"]["overall"]["rows"]["policy"]["mean"]
    lines = list(csv.DictReader(cells.splitlines()))
    assert lines[0]["row"] == "policy" and float(lines[0]["mean"]) == mean and lines[1]["holm"] == ""
    assert float(lines[0]["difference/mean"]) == 1.0 and float(lines[0]["win_rate/mean"]) == 1.0
    assert rf"policy & \textbf{{{mean:.3f}}} &" in latex and r"b\_\%" in latex
    assert "% python evaluate.py benchmark=made_up\n" in latex
    assert f"<strong>{mean:.3f}</strong>" in page and "not comparable" in page and "policypolicypol" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert len(table.console()) == 1
    alone = BenchmarkTable(summary(benchmark, rows[:1], 0), "", {}, {})
    assert "difference" not in alone.html() and "policy" in alone.html()
    nothing = BenchmarkTable(summary(benchmark, [Row("base", {})], 0), "", settings, {})
    assert "Nothing was scored here" in nothing.html() and nothing.console() == []
    assert nothing.write(tmp_path)[1].read_text() == "\n"
