"""Trackers that cannot begin are refused before any work; those that fail later cost none."""

import csv
import logging
from functools import wraps
from pathlib import Path
from typing import ClassVar

import pytest
import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image

from capo.cli import generate as generate_script
from capo.cli import readiness
from capo.cli import train as train_script
from capo.cli.tracking import trackers
from capo.errors import InputError
from capo.training.loggers import CurvesFile, wandb_logger
from capo.training.trackers import Tracker
from capo.training.wandb_run import RunIdentity

IDENTITY = RunIdentity({}, {})


class Fails(Logger):
    """Takes `good` calls, and raises at all later ones."""

    calls: ClassVar[list[str]] = []
    name, version = "fails", "0"

    def __init__(self, good: int = 0, word: str = "down"):
        super().__init__()
        self.good, self.word = good, word

    def _call(self, what):
        type(self).calls.append(what)
        if len(type(self).calls) > self.good:
            raise ConnectionError(f"{self.word}\nfor good")

    def log_metrics(self, metrics, step=None):
        self._call("log_metrics")

    def log_hyperparams(self, *args, **kwargs):
        self._call("log_hyperparams")

    def save(self):
        self._call("save")

    def finalize(self, status):
        self._call("finalize")


@pytest.fixture(autouse=True)
def forgotten():
    Fails.calls.clear()


def named(cfg, **loggers):
    OmegaConf.update(cfg, "logger", loggers, merge=False)
    return cfg


def test_the_first_failure_is_told_and_nothing_more_is_sent(caplog):
    tracker = Tracker(Fails(good=1), "logger.own")
    tracker.begin(IDENTITY)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log_metrics({"loss": 1.0}, step)
        tracker.log_pools({"x": 1.0})
        tracker.save()
        tracker.summarize({})
        tracker.finalize("success")
        tracker.close()
    assert Fails.calls == ["log_metrics", "log_metrics"]
    assert [record.message for record in caplog.records] == [
        "logger.own: Fails failed (ConnectionError: down); the run goes on without it"
    ]


def test_a_tracker_that_is_interrupted_is_not_forgiven():
    class Interrupted(Fails):
        def log_metrics(self, metrics, step=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tracker(Interrupted(), "logger.own").log_metrics({}, 1)


@pytest.mark.slow
def test_a_run_goes_on_without_the_tracker_that_fails_in_it(tiny_run, caplog):
    own = {"_target_": f"{__name__}.Fails", "good": 2}
    csv_file = {"_target_": "capo.training.loggers.csv_logger", "folder": "${run_dir}"}
    cfg = named(tiny_run("goes-on", "evaluate=false"), own=own, csv=csv_file)
    with caplog.at_level(logging.WARNING):
        assert 0 <= train_script.run(cfg) <= 1
    with (Path(cfg.run_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows if row["train/loss"]} == {"1", "2"}
    assert [record.message for record in caplog.records if "Fails" in record.message] == [
        "logger.own: Fails failed (ConnectionError: down); the run goes on without it"
    ]
    assert len(Fails.calls) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"entityy": "me"},
     r"logger.wandb.entityy=me: wandb.init takes no such option; did you mean \+logger.wandb.entity\?"),
    ({"tags": 5}, r"logger.wandb.tags=5: must be "),
    ({"group": {"a": 1}}, r"logger.wandb.group={'a': 1}: must be "),
    ({"mode": "online"}, "logger.wandb.mode=online: this package gives it to wandb.init"),
    ({"project": "a/b"},
     r"logger.wandb: WandbRun cannot begin \(UsageError: Invalid project name 'a/b'.*WANDB_MODE=offline"),
])  # fmt: skip
def test_what_wandb_refuses_is_a_message(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match=message):
        Tracker(wandb_logger(tmp_path, **{"project": "capo"} | options), "logger.wandb").begin(IDENTITY)


def test_a_key_that_wandb_refuses_is_a_message(tmp_path, monkeypatch):
    def refusing(**options):
        assert options["mode"] == "online"
        raise wandb.errors.AuthenticationError("WANDB_API_KEY invalid: API key must have 40+ characters")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", wraps(wandb.init)(refusing))
    with pytest.raises(InputError, match=r"cannot begin \(AuthenticationError.*: check WANDB_API_KEY"):
        Tracker(wandb_logger(tmp_path, "capo"), "logger.wandb").begin(IDENTITY)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_record_of_a_wandb_run_names_its_file(tmp_path, monkeypatch, text):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"wandb\.json cannot be read \(.*; remove it"):
        Tracker(wandb_logger(tmp_path, "capo"), "logger.wandb").begin(IDENTITY)


@pytest.mark.parametrize(("made", "message"), [
    ({"_target_": f"{__name__}.Fails", "bad": 1}, r"logger.own: .*Fails failed \(TypeError: .*'bad'"),
    ({"_target_": "pathlib.Path", "_args_": ["x"]}, "logger.own makes PosixPath.'x'., which is no logger"),
    ({"_target_": "capo.training.loggers.tensorboard_logger", "folder": "/dev/null/x"},
     r"logger.own: TensorBoardLogger cannot begin \(.*check logger.own.folder"),
])  # fmt: skip
@pytest.mark.parametrize("script", [train_script, generate_script])
def test_a_logger_that_cannot_begin_is_refused_before_anything_is_drawn(
    tiny_run, monkeypatch, made, message, script
):
    for module in ("capo.cli.tune", "capo.cli.generate"):
        monkeypatch.setattr(f"{module}.build_components", lambda *_, **__: pytest.fail("weights load"))
    config = script.__name__.rpartition(".")[2]
    cfg = named(tiny_run(f"cannot-{config}", "pool.root=/nowhere", config=config), own=made)
    monkeypatch.setattr("capo.cli.train.refuse_early", lambda cfg: None)
    monkeypatch.setattr("capo.cli.generate.check_ready", lambda *_, **__: None)
    with pytest.raises(InputError, match=message):
        script.run(cfg)


def test_a_package_that_is_not_installed_is_named_before_anything_is_loaded(tiny_run, monkeypatch):
    board = {"_target_": "capo.training.loggers.tensorboard_logger", "folder": "x"}
    for config, script in (("train", train_script), ("generate", generate_script)):
        cfg = named(tiny_run("lacks", config=config), tensorboard=board)
        readiness.check_loggers(cfg)
        with monkeypatch.context() as patch:
            patch.setattr(readiness, "find_spec", lambda name: None)
            with pytest.raises(InputError, match=r"logger.tensorboard needs .* 'capo\[tensorboard\]'"):
                script.run(cfg)
    assert not (tiny_run.folder / "lacks").exists()


def test_pictures_and_rows_reach_tensorboard(tmp_path, monkeypatch):
    sent = []
    tracker = Tracker(TensorBoardLogger(tmp_path, name="tensorboard", version=""), "logger.tensorboard")
    tracker.begin(IDENTITY)
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "grid.png")
    monkeypatch.setattr(tracker.logger.experiment, "add_image", lambda *given, **_: sent.append(given))
    tracker.log_picture("validation", tmp_path / "grid.png", 7)
    tracker.log_metrics({"loss": 1.0}, 7)
    tracker.finalize("success")
    [(name, pixels, step)] = sent
    assert (name, pixels.shape, step) == ("validation", (2, 3, 3), 7)
    assert [*(tmp_path / "tensorboard").glob("events*")]


def test_the_curves_of_the_run_itself_are_no_tracker(tiny_run):
    cfg = tiny_run("curves")
    with trackers(cfg, None, Path(cfg.run_dir)) as loggers:
        assert [type(logger) for logger in loggers] == [CurvesFile]
