"""Tables of runs: labels, marks of the best, and the three files."""

import csv
import json
import re

import numpy as np
import pytest
from omegaconf import OmegaConf

from capo.cli.evaluate import compare
from capo.cli.run_labels import run_labels
from capo.errors import InputError
from capo.evaluation.tables import RunTable, best_rows

REWARDS = ("looks", "align_ment")


def write_run(folder, level, beta=1, noise=0.02, soup=None, prompts=40):
    """An evaluated run whose win-rates for `looks` lie about `level`; the other reward is the same in all."""
    (folder / "evaluation").mkdir(parents=True)
    values = {
        "seed": 0,
        "objective": {"_target_": "capo.objectives.capo", "beta": beta},
        "pairs": {"_target_": "capo.pairs.frs"},
        "noise": {"weighting": "sigmoid", "bias": -1},
        "rewards": {"looks": {}, "align_ment": {}},
        "model": {"name": "tiny", "lora": None},
    }
    OmegaConf.save(OmegaConf.create(values), folder / "config.yaml")
    if soup:
        (folder / "outcome.json").write_text(json.dumps({"soup": soup}))
    drawn = np.random.default_rng(beta).normal(size=prompts)
    looks = level + noise * (drawn - drawn.mean())
    with (folder / "evaluation" / "win_rates.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt_id", "prompt", "category", *(f"win_rate/{name}" for name in REWARDS)])
        table.writerows([f"p{index}", "a, b", "", rate, 0.5] for index, rate in enumerate(looks))
    rate = {"mean": level, "low": level - 0.05, "high": level + 0.05}
    results = {
        "win_rate": {"looks": rate, "align_ment": {**rate, "mean": 0.5}},
        "score": {name: {"policy": 5.25, "base": 5.0} for name in REWARDS},
        "policy": "ab" * 32,
        "base": "cd" * 32,
    }
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


def test_a_value_is_the_best_only_if_a_test_separates_it_from_every_other(tmp_path):
    runs = [
        write_run(tmp_path / "0", 0.6, 1),
        write_run(tmp_path / "1", 0.5, 2),
        write_run(tmp_path / "2", 0.55, 3),
    ]
    assert best_rows(runs, 0) == {"looks": 0}  # the other reward is the same in all
    near = write_run(tmp_path / "3", 0.599, 4, noise=0.1)
    assert best_rows([*runs, near], 0) == {}
    assert best_rows([runs[0], runs[0]], 0) == {} and best_rows(runs[:1], 0) == {}
    fewer = write_run(tmp_path / "4", 0.3, 5, prompts=20)
    assert best_rows([*runs, fewer], 0) == {}  # other prompts
    (runs[1] / "evaluation" / "win_rates.csv").unlink()
    assert best_rows(runs, 0) == {}


def test_labels_are_objective_pairs_and_what_differs(tmp_path):
    runs = [
        write_run(tmp_path / "0", 0.6, 1),
        write_run(tmp_path / "1", 0.5, 2),
        write_run(tmp_path / "soup-0", 0.5, 3, soup=["0", "1"]),
        tmp_path / "merged",
    ]
    assert run_labels(runs) == [
        {"objective": "capo", "pairs": "frs", "beta": "1"},
        {"objective": "capo", "pairs": "frs", "beta": "2"},
        {"objective": "soup of 0, 1", "pairs": "", "beta": ""},
        {"objective": "merged", "pairs": "", "beta": ""},
    ]


@pytest.fixture
def written(tmp_path, capsys):
    runs = [write_run(tmp_path / "0", 0.6, 1), write_run(tmp_path / "1", 0.5, 2)]
    compare_with_pools(runs, tmp_path / "out")
    return tmp_path / "out"


def compare_with_pools(runs, folder):
    from capo.evaluation import compare as comparing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "head_to_head", lambda *_: {})  # it reads the images' scores
        compare(runs, ["runs=<b>"], folder)


def test_the_files_hold_values_marks_command_and_fingerprints(written):
    with (written / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["win_rate/looks"] == "0.6" and first["best/looks"] == "1" and second["best/looks"] == "0"
    assert first["score/looks"] == "5.25" and first["policy"] == "ab" * 32 and first["beta"] == "1"
    page = (written / "table.html").read_text()
    assert page.count("<strong>60.0</strong>") == 1 and "55.0–65.0" in page and "abababab" in page
    assert "runs=&lt;b&gt;" in page and "<b>" not in page and "://" not in page
    latex = (written / "table.tex").read_text()
    assert latex.count(r"\textbf{60.0}") == 1 and r"\multicolumn{2}{c}{align\_ment}" in latex
    assert "% python evaluate.py runs=<b>" in latex and r"\cmidrule(lr){4-5}\cmidrule(lr){6-7}" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows[1:]} == {6}


def test_a_damaged_outcome_is_told_before_any_table(tmp_path, capsys):
    runs = [write_run(tmp_path / "0", 0.6, 1), write_run(tmp_path / "1", 0.5, 2)]
    (runs[1] / "outcome.json").write_text("{")
    with pytest.raises(InputError, match=r"1/outcome\.json cannot be read \(it is not JSON"):
        compare_with_pools(runs, tmp_path / "out")
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


def test_what_a_run_lacks_is_a_dash(tmp_path):
    from capo.evaluation.tables import Row

    rate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    results = {"win_rate": {"a": rate}, "score": {"a": {"policy": 1.0}}, "policy": "p", "base": "b"}
    other = {"win_rate": {"b": rate}, "score": {"b": {"policy": 1.0}}, "policy": "p", "base": "b"}
    table = RunTable([Row(tmp_path, {}, results), Row(tmp_path, {}, other)])
    assert table.cells(0, "b") == ("-", "", "-", False) and table.cells(1, "b")[0] == "50.0"
    table.write(tmp_path)
    assert ",," in (tmp_path / "table.csv").read_text()


def without(key):
    def change(folder):
        path = folder / "evaluation" / "results.json"
        found = json.loads(path.read_text())
        found.pop(key)
        path.write_text(json.dumps(found))

    return change


def having(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(("damage", "message"), [
    (having("config.yaml", "- 1\n"), r"config.yaml cannot be read \(it holds no keys"),
    (having("config.yaml", "a: ["), r"config.yaml cannot be read"),
    (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml cannot be read"),
    (having("outcome.json", "[]"), r"outcome.json cannot be read \(it holds no names"),
    (having("outcome.json", "{"), "outcome.json cannot be read"),
    (without("policy"), "results.json cannot be read .policy is not given"),
    (without("score"), "results.json cannot be read .score is not given"),
    (having("evaluation/results.json", "[]"), r"results.json cannot be read \(it holds no names"),
    (having("evaluation/results.json", '{"win_rate": {}, "score": {"a": {"policy": "=1"}}}'),
     "score.a.policy==1: must be a finite number"),
    (having("evaluation/results.json", '{"win_rate": {}, "score": {}, "policy": 3, "base": ""}'),
     "policy=3: must be text"),
    (having("evaluation/results.json", "[" * 100_000), "results.json cannot be read"),
    (having("evaluation/win_rates.csv", "prompt_id,win_rate/looks,win_rate/align_ment\np,1,0.5\n"),
     r"win_rates.csv cannot be read \(the mean of win_rate/looks is 1.0+, but 0.6"),
])  # fmt: skip
def test_a_run_whose_files_are_damaged_is_one_message(tmp_path, damage, message):
    runs = [write_run(tmp_path / str(number), 0.6, number) for number in (1, 2)]
    damage(runs[0])
    with pytest.raises(InputError, match=message):
        compare_with_pools(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "seed: 0\n", "model: null\nnoise: text\nrewards: null\nobjective: x\n"])
def test_a_configuration_that_lacks_keys_has_labels_without_them(tmp_path, text):
    runs = [write_run(tmp_path / str(number), 0.6, number) for number in (1, 2)]
    (runs[0] / "config.yaml").write_text(text)
    (runs[0] / "outcome.json").write_text('{"soup": 3}')
    compare_with_pools(runs, tmp_path / "out")
    assert run_labels(runs)[0]["pairs"] == ""


def test_no_name_brings_a_command_into_the_latex(tmp_path):
    from capo.evaluation.tables import Row

    results = {"win_rate": {}, "score": {}, "policy": "p\n\\bye", "base": "b"}
    labels = {"a\nb": "~^\\input{c}%\n$&"}
    text = RunTable([Row(tmp_path / "x\n\\input{y}", labels, results)], {}, "evaluate.py\n\\x\x1b").latex()
    lines = text.splitlines()
    assert lines[0] == "% evaluate.py \\x\\x1b" and "x \\input{y}: policy p \\bye" in lines[2]
    assert lines[3].startswith("\\begin{tabular}") and "a b" in text
    assert r"\textasciitilde{}\textasciicircum{}\textbackslash{}input\{c\}\% \$\&" in text
