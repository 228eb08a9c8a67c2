"""A study of a run: images of its evaluation, what opens it again, and what is refused."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from capo.cli import study_files
from capo.evaluation.study.store import FIRST, SECOND, Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished and evaluated run of the tiny pipeline."""
    from capo.cli import train

    cfg = tiny_run("studied")
    train.run(cfg)
    return tiny_run.folder / "studied"


@pytest.fixture
def made(typed, monkeypatch):
    """Calls `python -m capo.cli.study *arguments`, and returns the study that it would serve."""

    def call(*arguments: str) -> Study:
        found = []
        monkeypatch.setattr(study_files, "serve", lambda study, host, port: found.append(study))
        typed("capo.cli.study", "study.prompts=2", "study.checks=1", *arguments)
        [study] = found
        study.close()
        return study

    return call


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)), int)


def test_a_runs_study_shows_the_images_of_its_evaluation(run, made, tmp_path, monkeypatch):
    from capo.cli import study_images
    from capo.data.stages import LatentStage

    shown, drawn = [], []
    make = study_images.make_study
    monkeypatch.setattr(
        study_images,
        "make_study",
        lambda folder, *sides, **more: shown.extend(sides) or make(folder, *sides, **more),
    )
    monkeypatch.setattr(LatentStage, "run", lambda *arguments: drawn.append(arguments))
    study = made(f"run={run}")
    assert study.folder == run / "study" and study.facts.names == ("tuned", "tiny") and not drawn
    plain = [pair for pair in study.pairs.values() if not pair.check]
    assert {pair.prompt for pair in plain} == {"cat", "dog"} and len(study.pairs) == 3
    policy, base = shown
    assert (
        policy.pool.folder.parent == run / "evaluation" / "pool" and base.pool.folder.parent.name == "pools"
    )
    for row, pair in enumerate(plain):
        for side, images in ((FIRST, policy), (SECOND, base)):
            expected = np.asarray(images.images(row)[0].convert("RGB"), int)
            assert (pixels(study.image(pair.name, side)) == expected).all()
        assert (pixels(study.image(pair.name, FIRST)) != pixels(study.image(pair.name, SECOND))).any()
    [check] = [pair for pair in study.pairs.values() if pair.check]
    own = next(pair for pair in plain if pair.prompt_id == check.prompt_id)
    assert (pixels(study.image(check.name, FIRST)) == pixels(study.image(own.name, SECOND))).all()


def test_a_study_goes_on_with_its_values_and_refuses_others(run, made, capsys):
    first = made(f"run={run}")
    changed = (first.folder / "study.sqlite").stat().st_mtime_ns
    assert made(f"run={run}").pairs == first.pairs
    assert (first.folder / "study.sqlite").stat().st_mtime_ns == changed
    for override, said in (
        ("study.ties=false", "ties: True -> False"),
        ("study.seed=1", "pairs: 3 -> 3, other prompts or checks"),
        ("study.names=[a,b]", "names: ('tuned', 'tiny') -> ('a', 'b')"),
    ):
        with pytest.raises(SystemExit):
            made(f"run={run}", override)
        assert said in capsys.readouterr().err


def test_a_policy_that_is_not_the_runs_is_not_shown_as_its(run, made, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    outcome = json.loads((other / "outcome.json").read_text())
    (other / "outcome.json").write_text(json.dumps({**outcome, "policy": "0" * 64}))
    with pytest.raises(SystemExit):
        made(f"run={other}")
    assert "is not the policy of its outcome.json (00000000)" in capsys.readouterr().err


def test_policies_without_a_run_are_compared_with_a_base_or_with_each_other(run, made, tiny_folder, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(run / "policy", policy)
    ours = made(f"run={run}")
    study = made(f"policy={policy}", f"base={tiny_folder}", f"hydra.run.dir={tmp_path / 'a'}")
    assert study.facts.names == ("tuned", "tiny") and study.pairs == ours.pairs
    for name in study.pairs:
        for side in (FIRST, SECOND):
            assert (pixels(study.image(name, side)) == pixels(ours.image(name, side))).all()
    twice = [f"policy={policy}", f"study.against={policy}", "study.names=[one,other]"]
    same = made(*twice, f"hydra.run.dir={tmp_path / 'b'}")
    assert same.facts.names == ("one", "other") and same.facts.first == same.facts.second
    for pair in same.pairs.values():
        alike = (pixels(same.image(pair.name, FIRST)) == pixels(same.image(pair.name, SECOND))).all()
        assert alike != pair.check


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "nothing to compare: give run=DIR or policy=FOLDER"),
        (["run=a", "policy=b"], "run=a and policy=b: each names what is to be evaluated"),
        (["policy=x", "study.prompts=3"], "study.prompts=3: there are 2 test prompts"),
        (["policy=x", "study.checks=3"], "study.checks=3: a check is made of a pair"),
        (["policy=x", "study.port=70000"], "study.port=70000: must be a whole number from 0 to 65535"),
        (["policy=x", "study.names=[a]"], "study.names=['a']: must be two names"),
        (["policy=x", "study.names=[a,a]"], "study.names: both sides are called a, which tables cannot"),
        (["policy=x", "study.against=x"], "study.names: both sides are called x, which tables cannot"),
        (["policy=x", "plan=true"], "plan=true belongs to train.py"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(
    made, tmp_path, capsys, monkeypatch, arguments, said
):
    from capo.cli import study_images

    monkeypatch.setattr(study_images, "build_components", lambda *a, **k: sys.exit("loaded"))
    with pytest.raises(SystemExit):
        made(*arguments, f"hydra.run.dir={tmp_path}")
    assert said in capsys.readouterr().err
