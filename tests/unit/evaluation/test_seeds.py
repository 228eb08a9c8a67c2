"""Runs over seeds: from the files of evaluations to the table."""

import io
import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from capo.cli import run_config
from capo.cli.run_labels import seed_groups
from capo.errors import DamagedFile, InputError
from capo.evaluation.seeds import over_seeds, read_by_prompt, read_rates, seeds_table
from fixtures.configuration import composed

HEAD = "prompt_id,prompt,category,win_rate/looks\n"


def write_run(folder, seed, rates=(0.5, 0.75), beta=1, lora=None):
    (folder / "evaluation").mkdir(parents=True)
    values = {"seed": seed, "run_dir": str(folder), "objective": {"beta": beta}, "model": {"lora": lora}}
    run_config._write(folder, OmegaConf.create(values))
    rows = "".join(f'p{index},"a, b",single,{rate}\n' for index, rate in enumerate(rates))
    (folder / "evaluation" / "win_rates.csv").write_text(HEAD + rows)
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_row(tmp_path):
    runs = [
        write_run(tmp_path / "0", 0),
        write_run(tmp_path / "1", 1, (0.7, 0.75)),
        write_run(tmp_path / "2", 0, beta=2),
        write_run(tmp_path / "3", 0, lora={"rank": 2, "seed": 0}),
        write_run(tmp_path / "4", 1, lora={"rank": 2, "seed": 1}),
    ]
    groups = seed_groups(runs)
    assert {name: [run.name for run in group] for name, group in groups.items()} == {
        "0, 1": ["0", "1"],
        "3, 4": ["3", "4"],
    }
    prompts, rates = read_rates(runs[1])
    assert prompts == ["p0", "p1"] and rates["looks"].tolist() == [0.7, 0.75]
    assert over_seeds(groups["0, 1"])["looks"].means == pytest.approx((0.625, 0.725))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(seeds_table(groups))
    text = console.export_text()
    assert "0, 1" in text and "67.5 (" in text and "looks" in text


def test_a_copy_of_a_run_is_no_other_seed(tmp_path):
    runs = [write_run(tmp_path / name, seed) for name, seed in (("0", 0), ("copy", 0), ("1", 1))]
    assert list(seed_groups(runs)) == ["0, 1"]
    assert seed_groups(runs[:2]) == {}


def test_the_interval_of_a_share_stays_between_0_and_100(tmp_path):
    runs = [write_run(tmp_path / "0", 0, (1.0, 0.9)), write_run(tmp_path / "1", 1, (0.1, 0.0))]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(seeds_table({"both": runs}))
    assert "50.0 (0.0–100.0)" in console.export_text()


def test_seeds_are_one_row_whatever_folder_their_logger_writes_to(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        OmegaConf.save(composed(f"seed={seed}", f"run_dir={run}"), run / "config.yaml", resolve=True)
    assert list(seed_groups(runs)) == ["0, 1"]


def test_a_soup_is_no_seed_of_its_first_run(tmp_path):
    """A soup's directory holds the configuration of the first run that it was merged from."""
    runs = [write_run(tmp_path / name, seed) for name, seed in (("0", 0), ("1", 1), ("a", 0), ("b", 1))]
    for run, merged in zip(runs[2:], (["0", "2"], ["1", "3"]), strict=True):
        (run / "outcome.json").write_text(json.dumps({"soup": merged, "method": "slerp"}))
    assert list(seed_groups(runs)) == ["0, 1", "a, b"]
    (runs[3] / "outcome.json").write_text(json.dumps({"soup": ["1", "3"], "method": "linear"}))
    assert list(seed_groups(runs)) == ["0, 1"]


def test_runs_without_an_evaluation_form_no_group(tmp_path):
    write_run(tmp_path / "0", 0)
    (write_run(tmp_path / "1", 1) / "evaluation" / "win_rates.csv").unlink()
    assert seed_groups([tmp_path / "0", tmp_path / "1", tmp_path / "2"]) == {}


def test_what_cannot_be_compared_is_named(tmp_path):
    first = write_run(tmp_path / "0", 0)
    with pytest.raises(InputError, match="evaluated on different prompts or rewards"):
        over_seeds([first, write_run(tmp_path / "1", 1, (0.5,))])
    with pytest.raises(InputError, match=r"win_rates\.csv.*run evaluate\.py run="):
        read_rates(tmp_path / "2")
    alone = [write_run(tmp_path / name, 0, (0.5,)) for name in ("3", "4")]
    with pytest.raises(InputError, match="3 was evaluated on one prompt"):
        over_seeds(alone)
    huge = HEAD + f"p0,{'a' * 200_000},,0.5\n"
    unusable = [
        "",
        HEAD,
        HEAD + "p0,a,,1.01\n",
        HEAD + "p0,a,,-0.01\n",
        HEAD + "p0,a,,x\n",
        HEAD + "p0\n",
        HEAD.replace("prompt_id", "id") + "p0,a,,1\n",
        HEAD + "p0,a,,inf\n",
        huge,
    ]
    for index, text in enumerate(unusable):
        (first / "evaluation" / "win_rates.csv").write_text(text)
        with pytest.raises(InputError, match=r"win_rates\.csv cannot be read .*; run evaluate\.py run="):
            read_rates(first)
        assert index >= 0


def test_win_rates_by_prompt_have_the_means_of_the_results(tmp_path):
    """An edited file is noticed: it has no checksum."""
    run = write_run(tmp_path / "0", 0, (0.123456, 0.123458))
    rate, path = {"mean": 0.123456, "low": 0, "high": 1}, run / "evaluation" / "results.json"
    results = {"win_rate": {"looks": rate}, "score": {}, "policy": "p", "base": "b"}
    path.write_text(json.dumps(results))
    assert read_rates(run)[0] == ["p0", "p1"]
    for changed, told in (
        ({"looks": {**rate, "mean": 0.1235}}, r"the mean of win_rate/looks is 0.123457, but 0.123500 in res"),
        ({}, "win_rate/looks is in win_rates.csv, but not in results.json"),
        ({"looks": rate, "other": rate}, "win_rate/other is in results.json, but not in win_rates.csv"),
    ):
        path.write_text(json.dumps({**results, "win_rate": changed}))
        with pytest.raises(DamagedFile) as refused:
            read_rates(run)
        assert str(refused.value).startswith(f"{run}/evaluation/win_rates.csv cannot be read ({told}")
        assert str(refused.value).endswith(f"; run evaluate.py run={run}")


def test_drift_by_prompt_has_the_mean_of_the_results(tmp_path):
    run = write_run(tmp_path / "0", 0)
    file, path = run / "evaluation" / "win_rates.csv", run / "evaluation" / "results.json"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([f"{head},drift", *(f"{row},{0.25 * n}" for n, row in enumerate(rows))]) + "\n")
    rate = {"mean": 0.625, "low": 0, "high": 1}  # of 0.5 and 0.75; the drift is (0 + 0.25) / 2
    results = {"win_rate": {"looks": rate}, "score": {}, "policy": "p", "base": "b"}
    for mean, damaged in ((0.125, False), (0.5, True)):
        path.write_text(json.dumps({**results, "drift": {"latents": {"mean": mean}}}))
        if not damaged:
            assert read_by_prompt(run)[1]["drift"].tolist() == [0, 0.25]
            continue
        with pytest.raises(DamagedFile, match=r"the mean of drift is 0.125000, but 0.500000 in results.json"):
            read_by_prompt(run)


def test_a_reward_may_be_called_as_another_column(tmp_path):
    run = write_run(tmp_path / "0", 0)
    file = run / "evaluation" / "win_rates.csv"
    file.write_text(file.read_text().replace("win_rate/looks", "win_rate/prompt"))
    assert read_rates(run)[1]["prompt"].tolist() == [0.5, 0.75]
