"""The calibration report of `generate.py stage=report` and of the start of training, on tiny models."""

import json

import pytest
from PIL import Image

from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.errors import InputError


def report_in(folder):
    return json.loads((folder / "calibration.json").read_text())


def test_the_stage_asks_for_what_it_needs(tiny_run):
    def report():
        generate_script.run(tiny_run("unused", "stage=report", "pool.seed=31", config="generate"))

    with pytest.raises(InputError, match=r"there is no pool .* stage=all first"):
        report()
    assert not list((tiny_run.folder / "pools").glob("tiny-*-31-train"))  # asking makes nothing
    for stage, lacking, needed in (("text", "latents", "latents"), ("latents", "scores", "score")):
        generate_script.run(tiny_run("unused", f"stage={stage}", "pool.seed=31", config="generate"))
        with pytest.raises(InputError, match=f"1 shards lack their {lacking}.* stage={needed} first"):
            report()


def test_the_stage_and_the_start_of_training_write_the_same_report(tiny_run, drawn_once, monkeypatch, capsys):
    def stop(*args, **options):
        raise InputError("no step is taken")

    monkeypatch.setattr("capo.cli.tune.fit", stop)
    with pytest.raises(InputError, match="no step is taken"):
        train_script.run(tiny_run("begun", "evaluate=false"))
    (pool,) = (tiny_run.folder / "pools").glob("tiny-*-0-train")
    before = {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()}
    capsys.readouterr()
    drawn_once.clear()
    generate_script.run(tiny_run("unused", "stage=report", config="generate"))
    assert f"calibration report: {pool}/report/calibration.html" in capsys.readouterr().out
    found = report_in(pool / "report")
    assert (found["prompts"], found["candidates"], list(found["rewards"])) == (4, 4, ["g", "r"])
    for name in ("calibration.json", "calibration.png", "calibration.html"):
        assert (tiny_run.folder / "begun" / "calibration" / name).read_bytes() == (
            pool / "report" / name
        ).read_bytes()
    assert before == {
        path: path.read_bytes() for path in pool.rglob("*") if path.is_file() and path.parent.name != "report"
    }


def test_an_imported_pool_is_reported(tiny_run, tmp_path):
    images = []
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 90, 200 - 40 * number)).save(tmp_path / f"{number}.png")
        images.append(f"{number}.png")
    rows = [
        {"prompt": "a red hat", "image_path": images[:2], "rank": [1, 2]},
        {"prompt": "a blue hat", "image_path": images[2:], "rank": [2, 1]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    generate_script.run(
        tiny_run(
            "unused",
            "stage=import",
            "import=rankings",
            f"import.files={tmp_path / 'test.json'}",
            config="generate",
        )
    )
    (pool,) = (tiny_run.folder / "pools").glob("tiny-*-imported")
    for labels, names in (("human", ["human"]), ("rewards", ["g", "r"])):
        generate_script.run(
            tiny_run(
                "unused", "stage=report", f"pool.imported={pool}", f"pool.labels={labels}", config="generate"
            )
        )
        found = report_in(pool / "report")
        assert (list(found["rewards"]), found["prompts"], found["candidates"]) == (names, 2, 2)
        assert (found["rewards"][names[0]]["raw"] is None) == (labels == "human")
