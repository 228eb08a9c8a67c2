"""Records of W&B in the jobs of a sweep from elsewhere: read as what they are, or named."""

import json
import os
import re

import pytest
from omegaconf import OmegaConf

from capo.cli import dashboard
from capo.cli.dashboard import tracked_sweep
from capo.cli.sweep import Job
from capo.errors import InputError
from fixtures import ROOT

LOGGER = {"_target_": "capo.training.loggers.wandb_logger", "project": "p", "group": "g"}
RECORD = {"id": "a", "config": {"run": {"logger": {"wandb": LOGGER}}}, "summary": {}}


def tracked(folder, record, metrics=b"step,train/h\n"):
    (folder / "wandb.json").write_text(record if isinstance(record, str) else json.dumps(record))
    (folder / "metrics.csv").write_bytes(metrics)
    return tracked_sweep(folder, [Job(folder, {}, "finished")])


def test_a_run_is_told_from_a_sweep(tmp_path):
    with pytest.raises(InputError, match=r"is not the directory of a sweep, .*; give one that -m has made"):
        tracked_sweep(tmp_path, [])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match=rf"; give {tmp_path.parent}, if that is its sweep"):
        tracked_sweep(tmp_path, [])


def test_a_record_says_where_its_run_went(tmp_path):
    found = tracked(tmp_path, RECORD)
    assert (found.project, found.group, found.curves) == ("p", "g", ["train/h"])


@pytest.fixture
def send(tmp_path, monkeypatch, capsys):
    """Runs the command with a key on a sweep with this logger; its exit code, errors, and where it sent."""
    sent = []
    monkeypatch.setattr(dashboard, "wandb_mode", lambda: "online")
    monkeypatch.setattr(dashboard, "apply", lambda spec, entity: sent.append((entity, spec["project"])) or [])
    monkeypatch.setattr(dashboard, "sweep_rows", lambda jobs: (["job"], [{"job": 0}]))
    monkeypatch.setattr(dashboard, "read_jobs", lambda folder: [Job(folder, {}, "finished")])

    def run(logger, *options):
        config = {"run": {"logger": {"wandb": LOGGER | logger}}}
        (tmp_path / "wandb.json").write_text(json.dumps(RECORD | {"config": config}))
        code = dashboard.main([str(tmp_path), *options])
        return code, capsys.readouterr().err, sent

    return run


@pytest.mark.parametrize(("logger", "options", "place"), [
    ({"project": "capo"}, [], (None, "capo")),
    ({"project": "capo"}, ["--entity", "team"], ("team", "capo")),
    ({"project": "p", "entity": "e"}, ["--entity", "e", "--project", "p"], ("e", "p")),
    ({"project": "capo", "entity": "e"}, ["--entity", "mine"], ("mine", "capo")),
])  # fmt: skip
def test_a_report_goes_where_the_command_line_says(send, logger, options, place):
    assert send(logger, *options) == (0, "", [place])


@pytest.mark.parametrize(("logger", "options", "message"), [
    ({"project": "p"}, [], "name own/p of W&B, to which .*: if that is where it should go, add --project p$"),
    ({"project": "capo", "entity": "e"}, [], "name e/capo of W&B, .* add --entity e$"),
    ({"project": "p", "entity": "e"}, [], "add --entity e --project p$"),
    ({"project": "p"}, ["--project", "q"], "--project q: the jobs .* went to own/p .*--project p$"),
])  # fmt: skip
def test_records_do_not_decide_where_a_report_is_sent(send, logger, options, message):
    code, told, sent = send(logger, *options)
    assert code == 2 and re.search(message, told.strip()) and sent == []


def test_the_project_that_needs_no_word_is_the_one_that_runs_have_by_default():
    shipped = OmegaConf.load(ROOT / "conf" / "logger" / "wandb.yaml")
    assert shipped.wandb.project == dashboard.PROJECT


@pytest.mark.parametrize("content", ["notes", "{}", "[1]"])
def test_a_file_that_is_no_specification_is_not_replaced(send, tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    code, told, sent = send({"project": "capo"}, "--to", str(tmp_path / "mine.json"))
    assert code == 2 and "mine.json cannot be read" in told and "is not replaced: move it away" in told
    assert (tmp_path / "mine.json").read_text() == content and sent == []
    assert send({"project": "capo"}, "--to", str(tmp_path / "fresh.json"))[0] == 0
    assert send({"project": "capo"}, "--to", str(tmp_path / "fresh.json"))[0] == 0  # its own is


@pytest.mark.parametrize(("record", "metrics"), [
    ("[" * 10**5, b""),
    ("[1]", b""),
    (RECORD | {"id": 3}, b""),
    (RECORD | {"config": {"run": {"logger": {"w": LOGGER | {"entity": ["x"]}}}}}, b""),
    (RECORD, b"\xff\xfe\n"),
])  # fmt: skip
def test_damaged_records_and_curves_are_named(tmp_path, record, metrics):
    with pytest.raises(InputError, match=r"(wandb.json|metrics.csv) cannot be read .*; restore it, or move"):
        tracked(tmp_path, record, metrics)


@pytest.mark.parametrize("run", ["x", {"logger": [1]}, {"logger": "x"}])
def test_a_record_without_a_logger_has_no_group(tmp_path, run):
    with pytest.raises(InputError, match="its jobs went to own/None, group None of W&B"):
        tracked(tmp_path, RECORD | {"config": {"run": run}})


def test_curves_in_a_pipe_are_not_waited_for(tmp_path):
    (tmp_path / "wandb.json").write_text(json.dumps(RECORD))
    os.mkfifo(tmp_path / "metrics.csv")
    assert tracked_sweep(tmp_path, [Job(tmp_path, {}, "finished")]).curves == []
