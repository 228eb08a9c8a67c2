"""Links in output directories, through which a command would write elsewhere."""

import pytest
from omegaconf import OmegaConf

from capo.cli.callbacks import OwnPlaces
from fixtures import ROOT


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "config.yaml").write_text("precious")
    return folder


def command(tmp_path, **keys):
    own = {"output_subdir": ".hydra", "job": {"name": "train"}}
    places = {"run": {"dir": f"{tmp_path}/run"}, "sweep": {"dir": f"{tmp_path}/sweep"}}
    return OmegaConf.create({"hydra": own | places} | keys)


def refused(call, config, capsys):
    with pytest.raises(SystemExit) as ended:  # Hydra takes any other exception of a callback for a warning
        call(config)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("link", "target"), [
    (".hydra", ""), (".hydra/config.yaml", "config.yaml"), ("train.log", "config.yaml"),
    ("workers", ""), ("workers/looks.log", "config.yaml"), ("check", ""), ("check/sample.png", "config.yaml"),
])  # fmt: skip
def test_what_any_command_writes_stays_in_the_directory(tmp_path, outside, capsys, link, target):
    callback, config = OwnPlaces(), command(tmp_path)
    for place, call in (("run", callback.on_run_start), ("sweep/0", callback.on_multirun_start)):
        (tmp_path / place / link).parent.mkdir(parents=True)
        call(config)
        (tmp_path / place / link).symlink_to(outside / target)
        told = refused(call, config, capsys)
        assert f"{place}/{link} is a link to {outside / target}".rstrip("/") in told and "remove it" in told


def test_a_job_of_a_sweep_stays_in_its_directory(tmp_path, outside, capsys):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "0").symlink_to(outside)
    assert "sweep/0 is a link to" in refused(OwnPlaces().on_multirun_start, command(tmp_path), capsys)


def test_a_run_is_checked_before_hydra_writes_into_its_folders(tmp_path, outside, capsys):
    run = tmp_path / "own"
    run.mkdir()
    (run / "evaluation").symlink_to(outside)
    start = OwnPlaces().on_run_start
    told = refused(start, command(tmp_path, run=str(run), trust=[]), capsys)
    assert f"evaluation is a link to {outside}" in told and f"add 'trust=[{outside}]'" in told
    start(command(tmp_path, run=str(run), trust=[str(outside)]))


def test_every_script_has_the_check():
    for name in ("train", "evaluate", "generate", "merge", "study"):
        conf = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
        assert name == "train" or "train" in conf.defaults
    callbacks = OmegaConf.load(ROOT / "conf" / "train.yaml").hydra.callbacks
    assert callbacks.places._target_ == "capo.cli.callbacks.OwnPlaces"
